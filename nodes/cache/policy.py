"""What to do with what was found: the read path's one decision, as a pure function.

D1  An entry whose write-behind is pending is newer than the source: it is served whatever
    its age, and never loaded over.
D2  An entry with an outdated tag, or past its hard lifetime, is not served.
D3  Between soft and hard lifetime an entry is served as stale, and refreshed.
"""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from ...schemas.entry import Entry
from ...schemas.errors import ConfigError

__all__ = ["Decision", "Load", "Policy", "Serve", "ServeStale", "decide", "lifetime_ms"]

_LONGEST_S = 366 * 86_400


class Policy(Struct, frozen=True, kw_only=True):
    """How one cache treats its entries. Times in milliseconds."""

    ttl_ms: int
    stale_ms: int = 0  #: how long after its lifetime an entry may still be served
    negative_ms: int = 0  #: lifetime of a known absence; 0: absences are not cached
    lease_ms: int = 10_000
    jitter: float = 0.0
    on_disconnected: Literal["bypass", "stale", "fail"] = "bypass"


class Serve(Struct, frozen=True):
    """Fresh. ``keep``: the near cache may have it."""

    entry: Entry
    keep: bool = True


class ServeStale(Struct, frozen=True):
    """Old, but allowed: serve it, and have it refreshed."""

    entry: Entry


class Load(Struct, frozen=True):
    """Nothing to serve. ``seen``: the version that will not do; -1: there is no entry."""

    seen: int


Decision = Serve | ServeStale | Load


def decide(entry: Entry | None, *, now_ms: int, tags_hold: bool) -> Decision:
    """What a reader gets who found this entry in the shared tier at this time."""
    if entry is None:
        return Load(-1)
    if entry.pending:
        return Serve(entry, keep=not entry.doomed)
    if entry.doomed or not tags_hold or now_ms >= entry.hard_at_ms:
        return Load(entry.version)
    if now_ms >= entry.soft_at_ms:
        return ServeStale(entry)
    return Serve(entry)


def lifetime_ms(name: str, seconds: float, *, zero: bool = False) -> int:
    """Checked, in milliseconds.

    Raises:
        ConfigError: it is no number, not positive, or over a year.
    """
    low = 0.0 if zero else 0.001
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        problem = "is not a number"
    elif math.isnan(seconds) or not low <= seconds <= _LONGEST_S:
        problem = f"must lie between {low:g} and {_LONGEST_S} seconds"
    else:
        return int(seconds * 1000)
    raise ConfigError(
        setting=name,
        value=repr(seconds),
        origin="the declaration of a cache",
        problem=problem,
        fix="give seconds, such as 60",
    )

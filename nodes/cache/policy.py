"""What to do with what was found: the read path's one decision, as a pure function.

D1  An entry whose write-behind is pending is newer than the source: it is served whatever
    its age, and never loaded over.
D2  An entry with an invalid tag, or past its hard lifetime, is not served.
D3  What is old, or has a stale tag, is served as stale and refreshed, until its hard lifetime
    less what is kept for errors only. From there on it is what is left if the loader fails.
D4  What has lived for the fraction ``refresh_ahead`` of its lifetime is served, and refreshed.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ...schemas.entry import Entry
from ..values.packing import EntryLifetimes
from .tags import Standing

__all__ = [
    "Decision",
    "Load",
    "OnDisconnected",
    "Policy",
    "Serve",
    "ServeStale",
    "ahead_ms",
    "decide",
]

OnDisconnected = Literal["bypass", "stale", "fail"]


class Policy(EntryLifetimes, frozen=True, kw_only=True):
    """How one cache treats its entries. Times in milliseconds; 0: there is none."""

    lease_ms: int = 10_000
    refresh_ahead: float = 0.0  #: fraction of the lifetime after which a read refreshes
    soft_timeout_ms: int = 0  #: for how long a caller waits who could be served stale
    hard_timeout_ms: int = 0  #: for how long any caller waits
    throttle_ms: int = 1_000  #: how long a source is left alone that failed for a key
    staleness_ms: int = 500
    on_disconnected: OnDisconnected = "bypass"


class Serve(Struct, frozen=True):
    """Fresh. ``keep``: the near cache may have it. ``refresh``: it is time for a new one."""

    entry: Entry
    keep: bool = True
    refresh: bool = False


class ServeStale(Struct, frozen=True):
    """Old, but allowed: serve it, and have it refreshed."""

    entry: Entry


class Load(Struct, frozen=True):
    """Nothing to serve.

    ``seen``: the version that will not do; -1: there is no entry. ``fallback``: what may be
    served if the loader fails.
    """

    seen: int
    fallback: Entry | None = None


Decision = Serve | ServeStale | Load


def decide(
    entry: Entry | None, now_ms: int, tags: Standing = "fresh", refresh_ahead: float = 0.0
) -> Decision:
    """What a reader gets who found this entry in the shared tier at this time."""
    if entry is None:
        return Load(-1)
    if entry.pending:
        return Serve(entry, keep=not entry.doomed)
    if entry.doomed or tags == "invalid" or now_ms >= entry.hard_at_ms:
        return Load(entry.version)
    if entry.meta.error_ms and now_ms >= entry.hard_at_ms - entry.meta.error_ms:
        return Load(entry.version, fallback=entry)
    if now_ms >= entry.soft_at_ms or tags == "stale":
        return ServeStale(entry)
    ripe_at_ms = ahead_ms(entry.soft_at_ms, entry.meta.soft_ms, refresh_ahead)
    return Serve(entry, refresh=now_ms >= ripe_at_ms)


def ahead_ms(soft_at_ms: float, lifetime_ms: int, refresh_ahead: float) -> float:
    """When what lives so long, until then, is ripe for being refreshed; its end: never."""
    return soft_at_ms - (1 - refresh_ahead) * lifetime_ms if refresh_ahead else soft_at_ms

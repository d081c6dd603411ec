"""The generic cell rate algorithm (GCRA) with integers: the decision of every limit.

The state of a limit is its theoretical arrival time (TAT): the time at which the bucket is full
again. Debt is the time until then, in units: ``Terms.drain`` units are paid off per microsecond,
and a token costs ``Terms.weight`` units, so that no rate needs a fraction. ``scripts/_gcra.lua``
implements the same; a test compares both on a real server.

G1  In any window of w microseconds at most ``burst + w * rate`` tokens are granted.
G2  A request is refused for exactly ``wait_us``, if there is no other request in between.
G3  A refusal changes no state, unless the clock was set back (G5).
G4  A changed limit keeps its TAT, to at most one microsecond later.
G5  If the clock was set back, the TAT is set back too: the debt at the time of writing is the debt
    now. So a limit is closed for no longer than it was then: at most ``burst / rate``, plus
    forced charges.

Algorithm: ITU-T I.371, the virtual scheduling form.
"""

from __future__ import annotations

from msgspec import Struct

from ...schemas.limits import Terms

__all__ = ["DEBT_MAX", "Tat", "debt_of", "fits", "is_set_back", "put_debt", "wait_us"]

DEBT_MAX = 2**52  #: units; forced charges cannot exceed this debt


class Tat(Struct, frozen=True):
    """A time, ``us + rest/drain`` microseconds, and the time at which it was written."""

    us: int
    rest: int = 0
    drain: int = 1
    written_us: int = 0


def debt_of(tat: Tat | None, now_us: int, terms: Terms) -> int:
    """The debt now, in units."""
    if tat is None:
        return 0
    now_us = max(now_us, tat.written_us)
    us, rest = tat.us, tat.rest
    if rest and tat.drain != terms.drain:
        us, rest = us + 1, 0
    return min((us - now_us) * terms.drain + rest, DEBT_MAX) if us >= now_us else 0


def is_set_back(tat: Tat | None, now_us: int) -> bool:
    """Whether the clock was set back since the TAT was written, so it must be written again."""
    return tat is not None and now_us < tat.written_us


def put_debt(debt: int, now_us: int, terms: Terms) -> Tat | None:
    """The TAT with this debt."""
    if not debt:
        return None
    whole, rest = divmod(debt, terms.drain)
    return Tat(now_us + whole, rest, terms.drain, now_us)


def fits(debt: int, terms: Terms, cost: int = 1) -> int:
    """The number of requests of this cost that can be granted."""
    return max(0, (terms.capacity - debt) // (terms.weight * cost))


def wait_us(debt: int, terms: Terms, cost: int) -> int:
    """Microseconds until a request of this cost can be granted."""
    return max(0, -((terms.capacity - debt - cost * terms.weight) // terms.drain))

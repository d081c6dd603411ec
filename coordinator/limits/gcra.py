"""The generic cell rate algorithm in whole numbers: the rule that limits decide by.

A limit's whole state is its theoretical arrival time (TAT): when the bucket would be full
again. Debt is the time until then, in units of which ``Terms.drain`` are paid off in each
microsecond and a token costs ``Terms.weight``, so that no rate has a fraction.
``scripts/_gcra.lua`` says the same; a test compares the two on a real server.

G1  In any window of w microseconds at most ``burst + w * rate`` tokens are granted.
G2  An ask is refused for exactly as long as ``wait_us`` says, if nobody asks in between.
G3  A refusal changes nothing, unless the clock was set back (G5).
G4  A changed limit keeps its TAT, to a microsecond and at most that much later.
G5  Where the clock was set back, the TAT is set back, too: the debt when it was written is the debt
    now. So a limit is closed for no longer than it was then, ``burst / rate`` at most, plus the
    charges made by force.

Algorithm: ITU-T I.371, the virtual scheduling form.
"""

from __future__ import annotations

from msgspec import Struct

from ...schemas.limits import Terms

__all__ = ["DEBT_MAX", "Tat", "debt_of", "fits", "is_set_back", "put_debt", "wait_us"]

DEBT_MAX = 2**52  #: units; debt made by force goes no further


class Tat(Struct, frozen=True):
    """A point in time: ``us + rest/drain`` microseconds; and when it was written."""

    us: int
    rest: int = 0
    drain: int = 1
    written_us: int = 0


def debt_of(tat: Tat | None, now_us: int, terms: Terms) -> int:
    """Units owed now."""
    if tat is None:
        return 0
    now_us = max(now_us, tat.written_us)
    us, rest = tat.us, tat.rest
    if rest and tat.drain != terms.drain:
        us, rest = us + 1, 0
    return min((us - now_us) * terms.drain + rest, DEBT_MAX) if us >= now_us else 0


def is_set_back(tat: Tat | None, now_us: int) -> bool:
    """Whether the clock was set back since it was written, so that it must be written again."""
    return tat is not None and now_us < tat.written_us


def put_debt(debt: int, now_us: int, terms: Terms) -> Tat | None:
    """The state in which so much is owed."""
    if not debt:
        return None
    whole, rest = divmod(debt, terms.drain)
    return Tat(now_us + whole, rest, terms.drain, now_us)


def fits(debt: int, terms: Terms, cost: int = 1) -> int:
    """How many asks of this cost can be granted."""
    return max(0, (terms.capacity - debt) // (terms.weight * cost))


def wait_us(debt: int, terms: Terms, cost: int) -> int:
    """Until an ask of this cost can be granted."""
    return max(0, -((terms.capacity - debt - cost * terms.weight) // terms.drain))

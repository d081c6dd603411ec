"""The generic cell rate algorithm in whole numbers: the rule that limits decide by.

A limit's whole state is its theoretical arrival time (TAT): when the bucket would be full
again. Debt is the time until then, in units of which ``Terms.drain`` are paid off in each
microsecond and a token costs ``Terms.weight``, so that no rate has a fraction.
``scripts/_gcra.lua`` says the same; a test compares the two on a real server.

G1  In any window of w microseconds at most ``burst + w * rate`` tokens are granted.
G2  An ask is refused for exactly as long as ``wait_us`` says, if nobody asks in between.
G3  A refusal changes nothing, unless the clock was set back (G5).
G4  A changed limit keeps its TAT, to a microsecond and at most that much later; of what was
    granted, no more than the changed limit's burst is owed.
G5  A limit is closed for no longer than ``burst / rate``, and the time that debt by force takes
    beyond that. Where the clock was set back, the TAT is set back, too: to a full burst owed;
    or, if more was owed by force, to what was owed when that was written.

Algorithm: ITU-T I.371, the virtual scheduling form.
"""

from __future__ import annotations

from msgspec import Struct

from ...schemas.limits import Terms

__all__ = ["DEBT_MAX", "Tat", "debt_of", "fits", "is_set_back", "put_debt", "wait_us"]

DEBT_MAX = 2**52  #: units; debt made by force goes no further


class Tat(Struct, frozen=True):
    """A point in time: ``us + rest/drain`` microseconds. ``written_us`` tells when more than a
    burst was owed, and is 0 otherwise; then ``rest`` is 0.
    """

    us: int
    rest: int = 0
    drain: int = 1
    written_us: int = 0


def debt_of(tat: Tat | None, now_us: int, terms: Terms) -> int:
    """Units owed now."""
    if tat is None:
        return 0
    if tat.written_us:
        return _until(tat, max(now_us, tat.written_us), terms)
    return min(_until(tat, now_us, terms), terms.capacity)


def is_set_back(tat: Tat | None, now_us: int, terms: Terms) -> bool:
    """Whether this is no state that could have been written by now: it is to be written anew."""
    if tat is None:
        return False
    if tat.written_us:
        return now_us < tat.written_us
    return _until(tat, now_us, terms) > terms.capacity


def _until(tat: Tat, now_us: int, terms: Terms) -> int:
    us, rest = tat.us, tat.rest
    if rest and tat.drain != terms.drain:
        us, rest = us + 1, 0
    return min((us - now_us) * terms.drain + rest, DEBT_MAX) if us >= now_us else 0


def put_debt(debt: int, now_us: int, terms: Terms) -> Tat | None:
    """The state in which so much is owed; beyond a burst, to a microsecond."""
    if not debt:
        return None
    whole, rest = divmod(debt, terms.drain)
    if debt > terms.capacity:
        return Tat(now_us + whole + bool(rest), written_us=now_us)
    return Tat(now_us + whole, rest, terms.drain)


def fits(debt: int, terms: Terms, cost: int = 1) -> int:
    """How many asks of this cost can be granted."""
    return max(0, (terms.capacity - debt) // (terms.weight * cost))


def wait_us(debt: int, terms: Terms, cost: int) -> int:
    """Until an ask of this cost can be granted."""
    return max(0, -((terms.capacity - debt - cost * terms.weight) // terms.drain))

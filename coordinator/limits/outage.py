"""Decisions of limits while the server is unavailable: the policy of each limit, in this process.

O1  ``open`` grants, ``closed`` refuses, ``local`` grants the fair share of this process: rate and
    burst divided by the last known number of members (``member_count``).
O2  After a failure the server is not asked for ``retry_s``; then one script tries again. In between
    every request is answered at once. A request waits no longer than the script in flight. A state
    that the server cannot parse is decided here, and does not count as a failure of the server.
O3  With several limits, one that is closed, or has used its share, refuses for all.

Local charges are not sent to the server later. A request with a cost above the burst of the share
is refused during the whole outage. A subject that was dropped for space starts with a full share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...schemas.limits import Limit, Terms, terms_of
from ..clock import Clock
from . import gcra
from .store import Costs, Mode, Outcome

__all__ = ["CLOSED_RETRY_MS", "Outage", "decide_alone", "share_of"]

CLOSED_RETRY_MS = 1_000
RETRY_S = 0.25


class Outage:
    """The state of the outage: whether the server may be asked."""

    def __init__(self, clock: Clock, *, retry_s: float = RETRY_S) -> None:
        self._clock = clock
        self._retry_s = retry_s
        self._next_try_at: float | None = None
        self.failures = 0

    def __repr__(self) -> str:
        return f"<Outage {'under way' if self.known else 'none'}, {self.failures} failures>"

    @property
    def known(self) -> bool:
        return self._next_try_at is not None

    def blocks(self) -> bool:
        """Whether to decide locally; False lets this caller try, and the others wait for it."""
        if self._next_try_at is None:
            return False
        if (now := self._clock.monotonic()) < self._next_try_at:
            return True
        self._next_try_at = now + self._retry_s
        return False

    def failed(self) -> None:
        self.failures += 1
        self._next_try_at = self._clock.monotonic() + self._retry_s

    def over(self) -> None:
        self._next_try_at = None


def share_of(limit: Limit, members: int) -> Terms:
    """The share of one process in a limit; its burst is at least one token."""
    terms = terms_of(limit)
    members = max(1, members)
    return Terms(terms.drain, terms.weight * members, max(1, terms.burst // members))


def decide_alone(
    limits: Sequence[Limit],
    states: list[gcra.Tat | None],
    run: tuple[Mode, int, Costs],
    now_us: int,
    members: Callable[[], int],
) -> Outcome:
    """The outcome of a run of equal requests; ``states`` are charged in place."""
    mode, count, costs = run
    local = [at for at, each in enumerate(limits) if each.store_down == "local"]
    shares = {at: share_of(limits[at], members()) for at in local}
    debts = {at: gcra.debt_of(states[at], now_us, shares[at]) for at in local}
    enforced = [at for at in local if not limits[at].shadow]
    closed = [at for at, each in enumerate(limits) if each.store_down == "closed"]
    closed = [at for at in closed if not limits[at].shadow]
    granted = count
    if mode in "tp":
        fit = [gcra.fits(debts[at], shares[at], costs[at]) for at in enforced]
        granted = 0 if closed else min([count, *fit])
    for at in local:
        charged = {"t": granted, "f": granted, "r": -granted}.get(mode, 0) * costs[at]
        owed = debts[at] + charged * shares[at].weight
        debts[at] = min(max(0, owed), gcra.DEBT_MAX)
        if charged:
            states[at] = gcra.put_debt(debts[at], now_us, shares[at])
    if closed:
        return Outcome(granted, closed[0], 0, CLOSED_RETRY_MS * 1_000, CLOSED_RETRY_MS * 1_000)
    if not enforced:
        let_in = next((at for at, each in enumerate(limits) if not each.shadow), 0)
        return Outcome(granted, let_in, limits[let_in].burst, 0, 0)
    waits = {at: gcra.wait_us(debts[at], shares[at], costs[at]) for at in enforced}
    binding = max(enforced, key=lambda at: (waits[at], -gcra.fits(debts[at], shares[at])))
    reset_us = -(-debts[binding] // shares[binding].drain)
    left = gcra.fits(debts[binding], shares[binding])
    return Outcome(granted, binding, left, waits[binding], reset_us)

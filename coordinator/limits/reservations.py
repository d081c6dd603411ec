"""Charge an estimate now and the actual cost later.

R1  A granted reservation has charged its estimate. Settling charges the difference, for any debt,
    or returns it. A reservation is settled once.
R2  A reservation that is not settled costs its estimate: it expires on the server after ``ttl_s``,
    and then settling raises UnknownReservation and changes nothing.
R3  A reservation granted without the server needs no settling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from msgspec import Struct

from ...schemas.errors_limits import InvalidLimit, RateLimited, UnknownReservation
from ...schemas.limits import Verdict
from .limit_set import Cost, LimitSet
from .shared_state import LimiterState
from .store import Costs

__all__ = ["Reservation", "Reservations"]

TTL_S_MIN, TTL_S_MAX = 1.0, 86_400.0
_ACTUAL_MAX = 10**9
_ID = re.compile(r"[0-9a-f]{32}\Z")
_LOCAL = ""


class Reservation(Struct, frozen=True, kw_only=True):
    id: str  #: empty: granted during an outage, nothing to settle
    subject: str
    within: str
    verdict: Verdict


class Reservations:
    """``ids`` returns 32 hexadecimal digits, unique for each call."""

    def __init__(self, state: LimiterState, *, ids: Callable[[], str]) -> None:
        self._state = state
        self._ids = ids

    async def reserve(
        self, limits: LimitSet, subject: str, cost: Cost, *, ttl_s: float, within: str = ""
    ) -> Reservation:
        """Charge an estimate.

        Raises:
            RateLimited: it was refused. InvalidLimit, InvalidKey: an argument is invalid.
            Unavailable: it was granted but could not be recorded.
        """
        costs = limits.checked_costs(cost)
        self._check_ttl(limits, ttl_s)
        queue = limits.queue(subject, within)
        verdict = await limits.charge(queue, costs)
        if not verdict.allowed:
            raise RateLimited(verdict.limit, verdict.retry_after_ms)
        made = Reservation(
            id=_LOCAL if verdict.source == "local" else self._ids(),
            subject=subject,
            within=within,
            verdict=verdict,
        )
        if made.id:
            try:
                await self._write(limits, made, costs, ttl_s)
            except BaseException:
                queue.give_back(1, costs)
                raise
        return made

    async def settle(
        self, limits: LimitSet, subject: str, id: str, actual: Cost, *, within: str = ""
    ) -> None:
        """Charge the actual cost, 0 or more.

        Raises:
            UnknownReservation: it was settled, has expired or never existed; nothing changes.
        """
        costs = _actual_costs(limits, actual)
        if id == _LOCAL:
            return
        if not _ID.match(id):
            raise UnknownReservation(_set_name(limits), id[:40])
        queue = limits.queue(subject, within)
        queue.denial.forget()
        keys = [self._key(limits, subject, id, within), *queue.keys]
        if not await self._state.store.settle(keys, limits.args, queue.word, costs):
            raise UnknownReservation(_set_name(limits), id)
        queue.denial.forget()

    async def _write(self, limits: LimitSet, made: Reservation, costs: Costs, ttl_s: float) -> None:
        key = self._key(limits, made.subject, made.id, made.within)
        text, ttl_ms = " ".join(map(str, costs)), round(ttl_s * 1_000)
        await self._state.store.commands.call("SET", key, text, "PX", ttl_ms)

    def _key(self, limits: LimitSet, subject: str, id: str, within: str) -> str:
        names = self._state.store.names
        return names.limit("rr", _set_name(limits), f"{subject}:{id}", within or subject)

    def _check_ttl(self, limits: LimitSet, ttl_s: float) -> None:
        if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
            fix = f"give seconds from {TTL_S_MIN:g} to {TTL_S_MAX:g}"
            raise InvalidLimit(_set_name(limits), "ttl", repr(ttl_s)[:40], "is out of bounds", fix)


def _actual_costs(limits: LimitSet, actual: Cost) -> Costs:
    given = actual if isinstance(actual, Mapping) else dict.fromkeys(limits.names, actual)
    costs = tuple(given.get(name, -1) for name in limits.names)
    if set(given) != set(limits.names) or not all(
        type(each) is int and 0 <= each <= _ACTUAL_MAX for each in costs
    ):
        fix = f"give a whole number from 0 to {_ACTUAL_MAX} for {', '.join(limits.names)}"
        raise InvalidLimit(_set_name(limits), "actual", repr(actual)[:40], "is no cost", fix)
    return costs


def _set_name(limits: LimitSet) -> str:
    return "+".join(limits.names)

"""Charges an estimate now, and what it really cost later.

R1  A reservation holds its estimate from the moment it is granted. Settled, the difference is
    charged, whatever the debt is then, or given back. It is settled once.
R2  One that is never settled costs its estimate: after ``ttl_s`` the server forgets it, and
    settling it is an UnknownReservation that changes nothing.
R3  What a limit granted without the server has nothing to settle.
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
    id: str  #: empty: the server was away, there is nothing to settle
    subject: str
    within: str
    verdict: Verdict


class Reservations:
    """``ids`` gives 32 hexadecimal digits, never the same twice."""

    def __init__(self, desk: LimiterState, *, ids: Callable[[], str]) -> None:
        self._desk = desk
        self._ids = ids

    async def reserve(
        self, limits: LimitSet, subject: str, cost: Cost, *, ttl_s: float, within: str = ""
    ) -> Reservation:
        """Charge an estimate.

        Raises:
            RateLimited: it was refused. InvalidLimit, InvalidKey: it makes no sense.
            Unavailable: it was granted, and could not be written down.
        """
        costs = limits.checked_costs(cost)
        self._check_ttl(limits, ttl_s)
        lane = limits.lane(subject, within)
        verdict = await limits.charge(lane, costs)
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
                lane.give_back(1, costs)
                raise
        return made

    async def settle(
        self, limits: LimitSet, subject: str, id: str, actual: Cost, *, within: str = ""
    ) -> None:
        """Charge what it was, 0 or more.

        Raises:
            UnknownReservation: it was settled, has expired, or never was; nothing is changed.
        """
        costs = _actual_costs(limits, actual)
        if id == _LOCAL:
            return
        if not _ID.match(id):
            raise UnknownReservation(_set_name(limits), id[:40])
        lane = limits.lane(subject, within)
        lane.denial.forget()
        keys = [self._key(limits, subject, id, within), *lane.keys]
        if not await self._desk.ledger.settle(keys, limits.args, lane.word, costs):
            raise UnknownReservation(_set_name(limits), id)
        lane.denial.forget()

    async def _write(self, limits: LimitSet, made: Reservation, costs: Costs, ttl_s: float) -> None:
        key = self._key(limits, made.subject, made.id, made.within)
        text, ttl_ms = " ".join(map(str, costs)), round(ttl_s * 1_000)
        await self._desk.ledger.commands.call("SET", key, text, "PX", ttl_ms)

    def _key(self, limits: LimitSet, subject: str, id: str, within: str) -> str:
        names = self._desk.ledger.names
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

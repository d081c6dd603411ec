"""Rate limits as a service sees them.

    api = node.limit("api", rate=100, per=1, burst=50)

    verdict = await api.take(user_id)
    if not verdict.allowed: ...

H1  A limit may be declared at any time. What the configuration says of a limit, in a table
    [limits.NAME], goes before what the code says.
H2  ``reload`` takes what the configuration says now; a limit that it no longer names is as
    the code says, or else stays as it was.
H3  Outside a running node every ask is a ForebayError.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager

from ..coordinator.limits.limit_set import Cost, LimitSet
from ..coordinator.limits.limiter import Limiter
from ..coordinator.limits.reservations import Reservation
from ..coordinator.limits.slots import Slot
from ..schemas.errors import ForebayError
from ..schemas.errors_limits import InvalidLimit
from ..schemas.limits import Limit, Verdict, check_limit
from ..schemas.settings import Limiter as LimiterSettings
from ..schemas.settings_limits import default_limit

__all__ = ["Hold", "LimitBook", "RateLimit"]


class RateLimit:
    """One limit, or several that grant together. Made by ``node.limit`` and ``node.limits``.

    A subject is who or what is limited. ``cost`` is a number of tokens, or one for each limit
    by name. ``within`` puts the subject in the shard of another name. Bad input is InvalidKey or
    InvalidLimit; a full queue is Unavailable, a missing server is not: see ``store_down``.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._limiter: Limiter | None = None
        self._set: LimitSet | None = None

    def __repr__(self) -> str:
        return f"<RateLimit {'+'.join(self.names)}{'' if self._set else ', not running'}>"

    def take(
        self, subject: str, cost: Cost = 1, *, partial: bool = False, within: str = ""
    ) -> Awaitable[Verdict]:
        """Charge ``cost``, all or nothing; or with ``partial`` as much of it as there is."""
        return self._running().take(subject, cost, partial=partial, within=within)

    def peek(self, subject: str, cost: Cost = 1, *, within: str = "") -> Awaitable[Verdict]:
        """What ``take`` would say, and nothing is charged."""
        return self._running().peek(subject, cost, within=within)

    def force(self, subject: str, cost: Cost = 1, *, within: str = "") -> Awaitable[Verdict]:
        """Charge it in any case: the debt keeps others out for longer."""
        return self._running().force(subject, cost, within=within)

    def refund(self, subject: str, cost: Cost = 1, *, within: str = "") -> Awaitable[Verdict]:
        """Give back what was charged and not used."""
        return self._running().refund(subject, cost, within=within)

    async def reserve(
        self, subject: str, cost: Cost = 1, *, ttl: float = 60.0, within: str = ""
    ) -> Hold:
        """Charge an estimate; ``settle`` it within ``ttl`` seconds, or it stands.

        Raises:
            RateLimited: it was refused. Unavailable: it could not be written down.
        """
        limits, limiter = self._running(), self._limiter
        assert limiter is not None
        reservations = limiter.reservations
        made = await reservations.reserve(limits, subject, cost, ttl_s=ttl, within=within)
        return Hold(self, made)

    async def settle(self, subject: str, id: str, actual: Cost, *, within: str = "") -> None:
        """Charge what a reservation really cost.

        Raises:
            UnknownReservation: it was settled, has expired, or never was.
        """
        limits, limiter = self._running(), self._limiter
        assert limiter is not None
        await limiter.reservations.settle(limits, subject, id, actual, within=within)

    def slot(
        self, subject: str, *, lease: float = 10.0, within: str = ""
    ) -> AbstractAsyncContextManager[Slot]:
        """``async with limit.slot(subject)``: one of ``concurrency`` at a time.

        Raises:
            RateLimited: all are taken. SlotLost: it could not be renewed, the body is over.
            InvalidLimit: these are several limits; slots are of one.
        """
        limits = self._running().limits
        assert self._limiter is not None
        if len(limits) > 1:
            fix = "take a slot of each limit by itself"
            raise InvalidLimit("+".join(self.names), "slot", "several limits", "are no one", fix)
        (limit,) = limits
        return self._limiter.slots.hold(limit, subject, lease_s=lease, within=within)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """As they are in force."""
        return self._running().limits

    def bind(self, limiter: Limiter) -> None:
        """Raises InvalidLimit if nobody has said what one of the limits is."""
        self._set = limiter.of(*self.names)
        self._limiter = limiter

    def unbind(self) -> None:
        self._set = self._limiter = None

    def _running(self) -> LimitSet:
        if self._set is None:
            raise ForebayError("the node is not running; use it inside `async with node:`")
        if self._limiter is not None:
            self._limiter.check_loop()
        return self._set


class Hold:
    """A reservation that was granted."""

    def __init__(self, limit: RateLimit, reservation: Reservation) -> None:
        self._limit = limit
        self.reservation = reservation

    def __repr__(self) -> str:
        return f"<Hold {self.id or 'without the server'} of {self._limit!r}>"

    @property
    def id(self) -> str:
        return self.reservation.id

    @property
    def verdict(self) -> Verdict:
        return self.reservation.verdict

    async def settle(self, actual: Cost) -> None:
        """See ``RateLimit.settle``."""
        made = self.reservation
        await self._limit.settle(made.subject, made.id, actual, within=made.within)


class LimitBook:
    """The limits of a node, and their handles."""

    def __init__(self) -> None:
        self._in_code: dict[str, Limit] = {}
        self._in_settings: dict[str, Limit] = {}
        self._handles: dict[tuple[str, ...], RateLimit] = {}
        self._limiter: Limiter | None = None

    def declare(self, limit: Limit) -> None:
        """Say in the code what a limit is."""
        checked = check_limit(limit)
        self._in_code[checked.name] = checked
        if self._limiter is not None and checked.name not in self._in_settings:
            self._limiter.define([checked])

    def handle(self, *names: str) -> RateLimit:
        found = self._handles.get(names)
        if found is None:
            found = RateLimit(*names)
            if self._limiter is not None:
                found.bind(self._limiter)
            self._handles[names] = found
        return found

    def bind(self, limiter: Limiter, settings: LimiterSettings) -> None:
        """Raises InvalidLimit: a handle names a limit that nobody has defined."""
        self._define(limiter, settings)
        for handle in self._handles.values():
            handle.bind(limiter)
        self._limiter = limiter

    def unbind(self) -> None:
        self._limiter = None
        for handle in self._handles.values():
            handle.unbind()

    def reload(self, settings: LimiterSettings) -> list[str]:
        """The names of the limits that are other than before."""
        if self._limiter is None:
            raise ForebayError("the node is not running; it reads its limits when it starts")
        return self._define(self._limiter, settings)

    def _define(self, limiter: Limiter, settings: LimiterSettings) -> list[str]:
        default = default_limit(settings)
        named = {each.name: each for each in settings.named}
        changed = limiter.define({default.name: default, **self._in_code, **named}.values())
        self._in_settings = named
        return changed

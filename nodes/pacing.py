"""A pace that the whole cluster keeps: several nodes that warm one cache share its rate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from ..coordinator.limits.limiter import Limiter
from ..schemas.limits import Limit

__all__ = ["Pacing"]

_SUBJECT = "all"


class Pacing:
    """Each pace is a limit of its name; without Valkey each node keeps its share of it."""

    def __init__(
        self, limiter: Limiter, *, sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    ) -> None:
        self._limiter = limiter
        self._sleep = sleep

    async def turn(self, name: str, count: int, *, per_second: float, burst: int) -> None:
        """Return when so many more may begin, at most ``burst`` of them at once."""
        self._limiter.define([Limit(name=name, rate=per_second, burst=burst)])
        limit = self._limiter.of(name)
        while not (verdict := await limit.take(_SUBJECT, count)).allowed:
            await self._sleep(verdict.retry_after_ms / 1000)

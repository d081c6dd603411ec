"""A pace that the whole cluster keeps: several nodes that warm one cache share its rate."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from hashlib import blake2b

import anyio

from ..coordinator.limits.limiter import Limiter
from ..schemas.limits import Limit

__all__ = ["Pacing"]

_SUBJECT = "all"
_PLAIN_MAX = 40


def _limit_name(name: str) -> str:
    """A name that limits may have, for any pace: names of caches may be longer, and wilder."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if plain == name and len(name) <= _PLAIN_MAX:
        return name
    return f"{plain[:_PLAIN_MAX]}.{blake2b(name.encode(), digest_size=8).hexdigest()}"


class Pacing:
    """Each pace is a limit of its name; without Valkey each node keeps its share of it."""

    def __init__(
        self, limiter: Limiter, *, sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    ) -> None:
        self._limiter = limiter
        self._sleep = sleep

    async def turn(self, name: str, count: int, *, per_second: float, burst: int) -> None:
        """Return when so many more may begin, at most ``burst`` of them at once."""
        pace = _limit_name(name)
        self._limiter.define([Limit(name=pace, rate=per_second, burst=burst)])
        limit = self._limiter.of(pace)
        while not (verdict := await limit.take(_SUBJECT, count)).allowed:
            await self._sleep(verdict.retry_after_ms / 1000)

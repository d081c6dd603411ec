"""A rate that the whole cluster shares: several nodes that warm one cache keep to it together."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from hashlib import blake2b

import anyio

from ..coordinator.limits.limiter import Limiter
from ..schemas.limits import Limit

_SUBJECT = "all"
_PLAIN_MAX = 40


def _limit_name(name: str) -> str:
    """A valid limit name for a pace: a cache name may be longer, with other characters."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if plain == name and len(name) <= _PLAIN_MAX:
        return name
    return f"{plain[:_PLAIN_MAX]}.{blake2b(name.encode(), digest_size=8).hexdigest()}"


class Pacing:
    """Each pace is a rate limit; without Valkey each node keeps to its share of the rate."""

    def __init__(
        self, limiter: Limiter, *, sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    ) -> None:
        self._limiter = limiter
        self._sleep = sleep

    async def turn(self, name: str, count: int, *, per_second: float, burst: int) -> None:
        """Wait until ``count`` more operations may begin, at most ``burst`` at once."""
        pace = _limit_name(name)
        self._limiter.define([Limit(name=pace, rate=per_second, burst=burst)])
        limit = self._limiter.of(pace)
        while not (verdict := await limit.take(_SUBJECT, count)).allowed:
            await self._sleep(verdict.retry_after_ms / 1000)

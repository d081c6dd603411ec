"""Counts the keys of a namespace, for ``/stats``.

N1  A count reads ``PAGES_MAX`` pages of SCAN at most. In a larger database the count is an
    estimate: the share of the namespace in what was read, of all keys. SCAN goes through a hash
    table, so what it reads first is a fair sample.
N2  A count is kept for ``KEPT_S``: asking often costs the server nothing.
N3  Without an answer of the server, or without the right to SCAN, there is no count.
"""

from __future__ import annotations

import anyio
from msgspec import Struct

from ..coordinator.clock import Clock
from ..coordinator.valkey.link import Commands
from ..schemas.errors import ForebayError
from ..schemas.keys import Names
from ..schemas.replies import array, integer

__all__ = ["KEPT_S", "PAGES_MAX", "PAGE_KEYS", "KeyCount", "NamespaceKeys"]

PAGES_MAX = 20
PAGE_KEYS = 1_000
KEPT_S = 10.0


class NamespaceKeys(Struct, frozen=True):
    count: int
    is_estimate: bool


class KeyCount:
    def __init__(self, commands: Commands, names: Names, clock: Clock) -> None:
        self._commands = commands
        self._prefixes = tuple(pattern[1:-1].encode() for pattern in names.key_patterns)
        self._clock = clock
        self._kept: NamespaceKeys | None = None
        self._kept_until = float("-inf")
        self._one_at_a_time = anyio.Lock()

    async def look(self) -> NamespaceKeys | None:
        """The keys of the namespace; None: they cannot be counted."""
        async with self._one_at_a_time:
            if self._clock.monotonic() >= self._kept_until:
                try:
                    self._kept = await self._count()
                except ForebayError:
                    self._kept = None
                self._kept_until = self._clock.monotonic() + KEPT_S
            return self._kept

    async def _count(self) -> NamespaceKeys:
        cursor, seen = b"0", set[bytes]()
        for _ in range(PAGES_MAX):
            reply = await self._commands.call("SCAN", cursor, "COUNT", PAGE_KEYS)
            cursor, page = array(reply, "SCAN", length=2)
            seen.update(map(bytes, array(page, "the keys of SCAN")))  # it may give a key twice
            if cursor == b"0":
                break
        ours = sum(key.startswith(self._prefixes) for key in seen)
        if cursor == b"0" or not seen:
            return NamespaceKeys(ours, is_estimate=False)
        every = integer(await self._commands.call("DBSIZE"), "DBSIZE")
        return NamespaceKeys(round(ours / len(seen) * every), is_estimate=True)

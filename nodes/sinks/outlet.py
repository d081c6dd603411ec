"""The one way to a sink in this process, for all who write to it.

O1  The sink gets one batch at a time, whoever sends it.
O2  It is opened before its first batch, once, and closed once; a batch after that opens it anew.
O3  Whoever is cancelled while waiting has written nothing.

An outlet is a sink itself. What its sink raises comes out as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio

from .base import Sink, SinkBatch

__all__ = ["Outlet"]


class Outlet:
    def __init__(self, sink: Sink, *, namespace: str = "") -> None:
        self.name = sink.name
        self._sink = sink
        self._namespace = namespace
        self._turn = anyio.Lock()
        self._open = False

    def __repr__(self) -> str:
        return f"<Outlet to {self.name} {'open' if self._open else 'closed'}>"

    async def open(self, namespace: str = "") -> None:
        """Open the sink, unless it is; the namespace is the outlet's."""
        async with self._turn:
            await self._opened()

    async def write(self, batch: SinkBatch) -> None:
        async with self._turn:
            await self._opened()
            await self._sink.write(batch)

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        async with self._turn:
            await self._opened()
            return await self._sink.progress(shards)

    async def aclose(self) -> None:
        async with self._turn:
            if self._open:
                self._open = False
                await self._sink.aclose()

    async def _opened(self) -> None:
        if not self._open:
            await self._sink.open(self._namespace)
            self._open = True

"""The one way to a sink in this process, for all who write to it.

O1  The sink gets one batch at a time, from all senders; a sink with ``concurrency`` n gets one of
    ``write`` and n - 1 of ``write_beside``. So a batch that waits for a locked row (a
    write-through, or one shard's writes) does not hold up the writes of other shards.
O2  It is opened before its first batch, once, and closed once; a batch after that opens it anew.
O3  Whoever is cancelled while waiting has written nothing.
O4  A sink that is cancelled from inside has failed, with CancelledInside.

An outlet is a sink itself. What its sink raises comes out as it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from ..cancellation import run_apart
from .base import Sink, SinkBatch

__all__ = ["Outlet"]


class Outlet:
    def __init__(self, sink: Sink, *, namespace: str = "") -> None:
        self.name = sink.name
        self._sink = sink
        self._namespace = namespace
        beside = max(0, int(getattr(sink, "concurrency", 1)) - 1)
        self._turn = anyio.Semaphore(1)
        self._beside = anyio.Semaphore(beside) if beside else self._turn
        self._turns = (self._turn, *[self._beside] * beside)
        self._opening = anyio.Lock()
        self._open = False

    def __repr__(self) -> str:
        return f"<Outlet to {self.name} {'open' if self._open else 'closed'}>"

    async def open(self, namespace: str = "") -> None:
        """Open the sink, unless it is; the namespace is the outlet's."""
        async with self._using(self._turn):
            pass

    async def write(self, batch: SinkBatch) -> None:
        async with self._using(self._turn):
            await run_apart(f"the sink {self.name}", self._sink.write, batch)

    async def write_beside(self, batch: SinkBatch) -> None:
        """As ``write``, for a batch that may have to wait for a locked row."""
        async with self._using(self._beside):
            await run_apart(f"the sink {self.name}", self._sink.write, batch)

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        async with self._using(self._turn):
            return await run_apart(f"the sink {self.name}", self._sink.progress, shards)

    async def aclose(self) -> None:
        async with AsyncExitStack() as stack:
            for turn in self._turns:
                await stack.enter_async_context(turn)
            if self._open:
                self._open = False
                await run_apart(f"the sink {self.name}", self._sink.aclose)

    @asynccontextmanager
    async def _using(self, turn: anyio.Semaphore) -> AsyncGenerator[None]:
        async with turn:
            async with self._opening:
                if not self._open:
                    await run_apart(f"the sink {self.name}", self._sink.open, self._namespace)
                    self._open = True
            yield

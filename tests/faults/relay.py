"""Addresses that stay, whoever answers behind them: what a failover looks like to a client
that has one address.

R1  A connection is to one server for as long as it lives: ``lead`` ends those to another, or, as
    a virtual address does, leaves them where they are.
R2  Each client has a name, and may be led elsewhere than the others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

_CHUNK = 65_536
_PATIENCE_S = 10.0


class Relay:
    """``with Relay(port) as relay: url = relay.url("one"); relay.lead(other_port)``"""

    def __init__(self, port: int) -> None:
        self._usual = port
        self._targets: dict[str, int] = {}
        self._ports: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[Any], str] = {}
        self.accepted = 0  #: connections
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def url(self, name: str) -> str:
        """Where the client of this name connects to."""
        if name not in self._ports:
            self._ports[name] = self._do(self._listen(name))
        return f"valkey://127.0.0.1:{self._ports[name]}/0"

    def lead(self, port: int, names: Iterable[str] | None = None, *, cut: bool = True) -> None:
        """Lead these clients, or all, to another server; without ``cut``, new connections only."""
        if names is None:
            self._usual = port
        for name in list(self._targets) if names is None else names:
            self._targets[name] = port
        if cut:
            self._do(self._cut(set(self._targets) if names is None else set(names)))

    def _do(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(_PATIENCE_S)

    async def _listen(self, name: str) -> int:
        self._targets.setdefault(name, self._usual)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.accepted += 1
            self._connections[task] = name
            try:
                await self._serve(name, reader, writer)
            except asyncio.CancelledError:
                pass  # cut; nobody waits for this task
            finally:
                del self._connections[task]
                writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _serve(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self._targets[name])
        except OSError:
            return
        pumps = [asyncio.ensure_future(_pump(*each)) for each in ((reader, ours), (theirs, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            ours.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _cut(self, names: set[str]) -> None:
        cut = [task for task, name in self._connections.items() if name in names]
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        await self._cut(set(self._targets))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()

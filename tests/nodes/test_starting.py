"""A server that does not answer for a while during the start: U5."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

import forebay
from forebay.schemas.errors import ConfigError, StartupError
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.valkey_server import ValkeyServer


class Silence:
    """A proxy to a server that forwards nothing for a while, from the ``at``-th request on."""

    def __init__(self, port: int, *, at: int, seconds: float) -> None:
        self._port = port
        self._at = at
        self._seconds = seconds
        self._open = asyncio.Event()
        self._open.set()
        self.requests = 0
        self.fell = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(
            self._pump(reader, ours, asks=True), self._pump(theirs, writer, asks=False)
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool
    ) -> None:
        try:
            while chunk := await reader.read(65_536):
                if asks:
                    self._asked()
                await self._open.wait()
                writer.write(chunk)
        except OSError:
            pass  # one side has disconnected
        finally:
            writer.transport.abort()

    def _asked(self) -> None:
        self.requests += 1
        if self.requests == self._at:
            self.fell = True
            self._open.clear()
            asyncio.get_running_loop().call_later(self._seconds, self._open.set)


@asynccontextmanager
async def silence(server: ValkeyServer, *, at: int, seconds: float) -> AsyncIterator[Any]:
    between = Silence(server.port, at=at, seconds=seconds)
    listening = await asyncio.start_server(between.serve, "127.0.0.1", 0)
    try:
        yield between, listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


def node_at(port: int, namespace: str, *, startup_timeout_ms: int) -> forebay.Node:
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=4),
            valkey=Valkey(
                url=f"valkey://127.0.0.1:{port}/0",
                connect_timeout_ms=300,
                command_timeout_ms=100,
                startup_timeout_ms=startup_timeout_ms,
            ),
        )
    )

    @node.cached("item:{id}", ttl=60)
    async def item(id: int) -> int:
        return id

    return node


@pytest.mark.parametrize("at", range(1, 32, 2))
async def test_a_server_that_is_silent_for_a_while_is_waited_for(
    valkey_server: ValkeyServer, namespace: str, at: int
) -> None:
    """U5: the server may stop answering at any request; the node starts when it answers again."""
    async with silence(valkey_server, at=at, seconds=0.3) as (between, port):
        node = node_at(port, namespace, startup_timeout_ms=20_000)
        async with node:
            with anyio.fail_after(20):
                while not between.fell:  # the last requests come after the start
                    await anyio.sleep(0.01)
                assert await node.caches[0](7) == 7


@pytest.mark.parametrize("at", [5, 18, 22, 24])
async def test_a_server_that_stays_silent_fails_the_start_in_time(
    valkey_server: ValkeyServer, namespace: str, at: int
) -> None:
    """U5: after valkey.startup_timeout_ms one error names the server."""
    async with silence(valkey_server, at=at, seconds=60) as (between, port):
        node = node_at(port, namespace, startup_timeout_ms=400)
        with anyio.fail_after(20), pytest.raises(StartupError, match=f":{port}"):
            async with node:
                pytest.fail("it started")
        assert between.fell


def test_without_an_event_loop_of_asyncio_there_is_one_config_error() -> None:
    """Without an asyncio loop nothing is started, and no coroutine is left unawaited."""
    node = forebay.Node("shop")
    with pytest.raises(ConfigError, match=r"asyncio\.run\(main\(\)\)") as caught:
        node.start().send(None)
    assert caught.value.setting == "the event loop"
    assert node.state == "not running"


def test_trio_is_named() -> None:
    """Under trio the package can be imported, and a start raises an error."""
    trio = pytest.importorskip("trio")

    async def main() -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            async with forebay.Node("shop"):
                pass
        return caught.value

    assert str(trio.run(main)).startswith("the event loop = trio (from the application): ")
    with pytest.raises(ConfigError, match="none that asyncio knows"):
        forebay.Node("shop").start().send(None)

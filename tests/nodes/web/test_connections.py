"""The connection limit, on the event loop of asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.abc import SocketStream

from forebay.nodes.web.aiohttp_internals import SPARE, GuardedHandler, connections_within
from forebay.nodes.web.protocols import Read
from forebay.schemas.settings import Http

if TYPE_CHECKING:
    from forebay.nodes.web.server import EndpointAddress
    from tests.nodes.web.conftest import FakeNode, Listening

LOOPS = {"asyncio": False, "uvloop": True}
PROBE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
READY = PROBE.replace(b"/livez", b"/readyz")
GOOD = b'{"type":"invalidate","keys":["a"]}'
POST = b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WAITING = POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(GOOD)


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": LOOPS[request.param]}


@asynccontextmanager
async def connected(address: EndpointAddress, count: int) -> AsyncIterator[list[SocketStream]]:
    async with AsyncExitStack() as stack:
        made = [await anyio.connect_tcp(address.host, address.port) for _ in range(count)]
        for stream in made:
            stack.push_async_callback(stream.aclose)
        yield made


async def ask(stream: SocketStream, request: bytes) -> bytes:
    """The first part of the answer; empty if the connection is closed."""
    try:
        await stream.send(request)
        return await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return b""


async def until_closed(stream: SocketStream) -> bytes:
    received = b""
    try:
        while True:
            received += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return received


async def work(streams: list[SocketStream]) -> None:
    """Make each connection busy: the node waits for its body."""
    for stream in streams:
        assert b"100 Continue" in await ask(stream, WAITING)


async def finish(streams: list[SocketStream]) -> None:
    for stream in streams:
        assert b" 202 " in await ask(stream, GOOD)


async def test_the_connection_idle_longest_makes_room(
    listening: Listening, fake_node: FakeNode
) -> None:
    """G2: kept-alive connections lock no client out; the last used one stays longest."""
    async with (
        listening(Http(port=0, connections_max=3)) as address,
        connected(address, 3) as kept,
    ):
        for stream in (*kept, kept[0]):
            assert b" 200 " in await ask(stream, PROBE)
        async with connected(address, 1) as more:
            assert b" 200 " in await ask(more[0], PROBE)
            assert await until_closed(kept[1]) == b""
            for stream in (kept[0], kept[2]):
                assert b" 200 " in await ask(stream, PROBE)
    assert fake_node.instruments.counts["limit_reached", "http_connections"] == 1


async def test_one_at_work_stays_when_idle_ones_make_room(listening: Listening) -> None:
    """G2: only a connection without a request is closed."""
    async with (
        listening(Http(port=0, connections_max=2)) as address,
        connected(address, 2) as kept,
    ):
        await work(kept[:1])
        assert b" 200 " in await ask(kept[1], PROBE)
        async with AsyncExitStack() as stack:
            for _ in range(5):
                (more,) = await stack.enter_async_context(connected(address, 1))
                assert b" 200 " in await ask(more, PROBE)
            await finish(kept[:1])


async def test_probes_are_served_when_all_are_at_work(
    listening: Listening, fake_node: FakeNode
) -> None:
    """G2: a connection beyond the limit serves one probe; any other request gets a 503."""
    async with (
        listening(Http(port=0, connections_max=2)) as address,
        connected(address, 2) as busy,
    ):
        await work(busy)
        for _ in range(2 * SPARE):
            async with connected(address, 2) as more:
                answer = await ask(more[0], READY)
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert b"Connection: close" in answer
                refused = await ask(more[1], POST + b"Content-Length: 9\r\n\r\n" + b"x" * 9)
                assert refused.startswith(b"HTTP/1.1 503 ")
                assert b"Retry-After: 1" in refused
                assert b'"code":"busy"' in refused
        await finish(busy)
        async with connected(address, 1) as later:
            assert b" 202 " in await ask(later[0], WAITING.replace(b"Expect", b"X") + GOOD)
    assert fake_node.published == [GOOD] * 3


async def test_silent_connections_do_not_keep_probes_out(listening: Listening) -> None:
    """G2: spare connections replace each other, and get Retry-After."""
    async with (
        listening(Http(port=0, connections_max=1)) as address,
        connected(address, 1) as busy,
    ):
        await work(busy)
        async with connected(address, 3 * SPARE) as silent, connected(address, 1) as probe:
            assert b" 200 " in await ask(probe[0], PROBE)
            for stream in silent[: 2 * SPARE]:
                assert (await until_closed(stream)).startswith(b"HTTP/1.1 503 ")
        await finish(busy)


async def test_an_answer_of_any_size_has_to_be_read(
    listening: Listening, fake_node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: an unread answer is cut off, also a small one on a kept-alive connection."""
    small = b'"' + b"x" * 50_000 + b'"'
    fake_node.values["a"] = Read(json=small, tier="near", age_ms=0, stale=False, version=1)
    counts, links = fake_node.instruments.counts, []

    def made(self: GuardedHandler, transport: asyncio.BaseTransport) -> None:
        links.append(transport)
        connection_made(self, transport)

    connection_made = GuardedHandler.connection_made
    monkeypatch.setattr(GuardedHandler, "connection_made", made)
    async with listening(Http(port=0, body_timeout_ms=300)) as address, connected(address, 1) as it:
        asked = 0
        with anyio.fail_after(30):
            while not links or not links[0].get_write_buffer_size():
                await it[0].send(PROBE.replace(b"/livez", b"/v1/cache/a"))
                asked += 1
                while counts["http_requests", "/v1/cache/{key}", "2xx"] < asked:
                    await anyio.sleep(0.001)
                await anyio.sleep(0.01)  # the kernel may accept it at once
            assert links[0].get_write_buffer_size() < 64 * 1_024
            while counts["limit_reached", "http_unread_answer"] == 0:
                await anyio.sleep(0.01)


@pytest.mark.parametrize(
    ("asked", "open_files", "served"),
    [
        (1_024, 20_000, 1_024),
        (1_024, 1_024, 760),
        (1_024, 256, 184),
        (1_024, 64, 1),
        (10, 1_024, 10),
        (65_536, resource.RLIM_INFINITY, 65_536),
    ],
)
def test_open_files_bound_connections(asked: int, open_files: int, served: int) -> None:
    """The limit stays below the number of open files, so that a connection can be accepted."""
    assert connections_within(asked, open_files) == served

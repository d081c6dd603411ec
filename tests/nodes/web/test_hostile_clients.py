"""Hostile clients: malformed input, silence, slow sending, too many connections, large bodies."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import TYPE_CHECKING

import aiohttp
import anyio
import pytest
from anyio.abc import SocketStream, TaskGroup
from structlog.testing import capture_logs

from forebay.coordinator.clock import SystemClock
from forebay.nodes.web import server
from forebay.nodes.web.protocols import Read
from forebay.nodes.web.server import serve
from forebay.schemas.settings import Http

if TYPE_CHECKING:
    from forebay.nodes.web.server import EndpointAddress
    from tests.nodes.web.conftest import FakeNode, Listening

GOOD = b'{"type":"invalidate","keys":["a"]}'
PROBE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"

MALFORMED = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    "resp": b"*1\r\n$4\r\nPING\r\n",
    "h2_preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": b"\x00" * 20_000,
    "length_and_chunked": POST
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two_lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "signed_length": POST + b"Content-Length: +5\r\n\r\nabcde",
    "negative_length": POST + b"Content-Length: -1\r\n\r\n",
    "huge_length": POST + b"Content-Length: 100000000000000000000\r\n\r\n",
    "chunk_overflow": CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\nabc",
    "chunk_not_hex": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "many_trailers": CHUNKED + b"0\r\n" + b"A: b\r\n" * 5_000 + b"\r\n",
    "long_header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9_000 + b"\r\n\r\n",
    "many_headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 5_000 + b"\r\n",
    "long_path": b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "folded_header": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "space_before_colon": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    "nul_in_header": b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
}


@asynccontextmanager
async def connected(address: EndpointAddress) -> AsyncIterator[SocketStream]:
    async with await anyio.connect_tcp(address.host, address.port) as stream:
        yield stream


async def until_closed(stream: SocketStream) -> bytes:
    """Read until the other side has closed."""
    received = b""
    try:
        while True:
            received += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return received


async def answered(address: EndpointAddress, request: bytes) -> bytes:
    async with connected(address) as stream:
        await stream.send(request)
        return await until_closed(stream)


async def is_served(address: EndpointAddress) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{address.url}/livez") as response:
        return response.status == 200


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_no_http_gets_400_and_no_traceback(
    endpoint: EndpointAddress, fake_node: FakeNode, name: str
) -> None:
    """G4: malformed input gets one 400 and one debug line without its bytes; others are served."""
    with capture_logs() as logs:
        answer = await answered(endpoint, MALFORMED[name])

    assert answer.startswith(b"HTTP/1.0 400 ")
    assert answer.count(b"400 Bad Request") == 1
    assert b'"code":"malformed"' in answer
    assert b"nosniff" in answer
    assert [(each["event"], each["log_level"]) for each in logs] == [("http.malformed", "debug")]
    assert set(logs[0]) == {"event", "log_level", "remote", "fault"}
    assert fake_node.instruments.counts["http_requests", "malformed", "4xx"] == 1
    assert await is_served(endpoint)


@pytest.mark.parametrize("tail", [b"zz\r\nabc", b"FFFFFFFFFFFFFFFFFF\r\n", b"1\r\nabc"])
async def test_a_body_that_breaks_half_way_gets_400_and_no_traceback(
    endpoint: EndpointAddress, tail: bytes
) -> None:
    """G4 also holds while the handler reads the body."""
    with capture_logs() as logs:
        async with connected(endpoint) as stream:
            await stream.send(CHUNKED.replace(b"Connection", b"Expect: 100-continue\r\nConnection"))
            assert b"100 Continue" in await stream.receive()
            await stream.send(tail)
            answer = await until_closed(stream)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"400 Bad Request") == 1
    assert {each["log_level"] for each in logs} <= {"debug"}
    assert await is_served(endpoint)


async def test_who_hangs_up_half_way_leaves_no_trace(
    endpoint: EndpointAddress, fake_node: FakeNode
) -> None:
    """A client that disconnects in the middle of its body causes no error."""
    with capture_logs() as logs:
        async with connected(endpoint) as stream:
            await stream.send(POST + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n")
            assert b"100 Continue" in await stream.receive()
        assert await is_served(endpoint)

    assert {each["log_level"] for each in logs} <= {"debug"}
    assert fake_node.published == []


@pytest.mark.parametrize("start", [b"", b"G", PROBE[:-2], PROBE + b"GET /li"])
async def test_headers_that_do_not_come_close_the_connection(
    listening: Listening, fake_node: FakeNode, start: bytes
) -> None:
    """G1: a silent connection and one with half of its headers are both closed."""
    http = Http(port=0, header_timeout_ms=200)
    async with listening(http) as address, connected(address) as stream:
        if start.startswith(PROBE):
            await stream.send(PROBE)
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")
        await stream.send(start.removeprefix(PROBE))
        assert await until_closed(stream) == b""
    assert fake_node.instruments.counts["limit_reached", "http_headers"] == 1


async def test_dripping_headers_do_not_gain_time(listening: Listening) -> None:
    """G1: the deadline counts from the first byte."""
    http = Http(port=0, header_timeout_ms=300)
    async with listening(http) as address, connected(address) as stream:

        async def drip() -> None:
            await stream.send(b"GET /livez HTTP/1.1\r\nX: ")
            with suppress(anyio.BrokenResourceError):
                while True:
                    await stream.send(b"a")
                    await anyio.sleep(0.02)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drip)
            assert await until_closed(stream) == b""
            tasks.cancel_scope.cancel()


async def test_good_clients_are_served_beside_200_slow_ones(
    listening: Listening, fake_node: FakeNode
) -> None:
    """Slow connections do not delay other clients, and all of them are closed."""
    closed = 0

    async def be_slow(address: EndpointAddress, number: int) -> None:
        nonlocal closed
        async with connected(address) as stream:
            await stream.send(b"GET /livez HTTP/1.1\r\nX: " if number % 2 else b"\r\n")
            assert await until_closed(stream) == b""
            closed += 1

    async with listening(Http(port=0, header_timeout_ms=1_500)) as address:
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(be_slow, address, number)
            for _ in range(50):
                assert await is_served(address)
        assert closed == 200


async def test_silent_connections_make_room(listening: Listening, fake_node: FakeNode) -> None:
    """G2: at the limit the longest-waiting connection is closed, so a probe is still served."""
    http = Http(port=0, connections_max=5, header_timeout_ms=60_000)
    async with listening(http) as address:
        streams = [await anyio.connect_tcp(address.host, address.port) for _ in range(20)]
        assert await is_served(address)
        assert await until_closed(streams[0]) == b""
        for stream in streams:
            await stream.aclose()
    assert fake_node.instruments.counts["limit_reached", "http_connections"] >= 15


async def test_connections_at_work_are_not_given_up(
    listening: Listening, fake_node: FakeNode
) -> None:
    """G2: when all connections are busy, a new one gets a 503 with Retry-After."""
    http = Http(port=0, connections_max=2, body_timeout_ms=60_000)
    async with (
        listening(http) as address,
        connected(address) as first,
        connected(address) as second,
    ):
        for stream in (first, second):
            await stream.send(POST + b"Content-Length: %d\r\n" % len(GOOD))
            await stream.send(b"Expect: 100-continue\r\n\r\n")
            assert b"100 Continue" in await stream.receive()
        refused = await answered(address, b"")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After" in refused
        for stream in (first, second):
            await stream.send(GOOD)
            assert b" 202 " in await stream.receive()


async def test_a_slow_body_is_408(listening: Listening) -> None:
    """A body has its own deadline, from the end of its headers."""
    async with listening(Http(port=0, body_timeout_ms=200)) as address:
        answer = await answered(address, POST + b"Content-Length: 50\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"body_timeout"' in answer


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Connection: close\r\nContent-Length: 1000000000000000000\r\n\r\n",
        CHUNKED + b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n",
        CHUNKED + b"FFFFFF\r\n" + b"x" * 200_000,
    ],
    ids=["announced", "small_chunks", "one_chunk"],
)
async def test_a_body_over_the_limit_is_413(endpoint: EndpointAddress, sent: bytes) -> None:
    """A body is refused at the limit, chunked or not; the next request is served."""
    async with connected(endpoint) as stream:
        with anyio.move_on_after(5):
            with suppress(anyio.BrokenResourceError):
                await stream.send(sent)
        answer = await until_closed(stream)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert await is_served(endpoint)


@pytest.mark.parametrize(
    "body",
    [
        b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n",
        b"%x;" % len(GOOD) + b"a" * 2_000_000 + b"\r\n" + GOOD + b"\r\n0\r\n\r\n",
    ],
    ids=["one_byte_chunks", "long_extension"],
)
async def test_odd_chunks_are_the_same_body(
    endpoint: EndpointAddress, fake_node: FakeNode, body: bytes
) -> None:
    """A body is the same for any split into packets."""
    answer = await answered(endpoint, CHUNKED + body)

    assert answer.startswith(b"HTTP/1.1 202 ")
    assert fake_node.published == [GOOD]


async def test_bodies_together_have_a_limit(
    listening: Listening, fake_node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2: the bytes of unfinished bodies are bounded, and released when they end."""
    monkeypatch.setattr(server, "ALL_BYTES_MAX", 0)
    http = Http(port=0, body_bytes_max=100_000)
    head = POST + b"Content-Length: 90000\r\n\r\n"
    replies: list[bytes] = []
    async with listening(http) as address:
        async with (
            connected(address) as first,
            connected(address) as second,
            anyio.create_task_group() as tasks,
        ):
            for stream in (first, second):
                await stream.send(head + b" " * 60_000)
                tasks.start_soon(_first_reply, stream, replies, tasks)
        assert replies[0].startswith(b"HTTP/1.1 503 ")
        assert b'"code":"busy"' in replies[0]
        answer = await answered(address, CHUNKED + b"%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 202 ")


async def _first_reply(stream: SocketStream, replies: list[bytes], tasks: TaskGroup) -> None:
    replies.append(await stream.receive())
    tasks.cancel_scope.cancel()


async def test_who_does_not_read_is_cut_off(listening: Listening, fake_node: FakeNode) -> None:
    """G3: an unread answer does not stay in memory."""
    huge = b'"' + b"x" * 30_000_000 + b'"'
    fake_node.values["a"] = Read(json=huge, tier="near", age_ms=0, stale=False, version=1)
    async with listening(Http(port=0, body_timeout_ms=200)) as address:
        with socket.create_connection((address.host, address.port)) as lazy:
            lazy.sendall(PROBE.replace(b"/livez", b"/v1/cache/a"))
            with anyio.fail_after(20):
                while not fake_node.instruments.counts["limit_reached", "http_unread_answer"]:
                    await anyio.sleep(0.05)
            assert await is_served(address)


async def test_a_handler_that_hangs_does_not_hold_up_the_stop(fake_node: FakeNode) -> None:
    """S1: the endpoint stops within its bound, and cuts off running requests."""
    asked = anyio.Event()

    async def hang() -> dict[str, object]:
        asked.set()
        await anyio.sleep_forever()
        return {}

    fake_node.stats = hang  # type: ignore[method-assign]
    clock, random, http = SystemClock(), Random(1), Http(port=0)
    with anyio.fail_after(20):
        async with (
            anyio.create_task_group() as tasks,
            serve(
                fake_node,
                http,
                instruments=fake_node.instruments,
                event_bytes_max=1_000,
                clock=clock,
                random=random,
                stop_ms=600,
            ) as address,
        ):
            tasks.start_soon(answered, address, PROBE.replace(b"/livez", b"/stats"))
            await asked.wait()
    with pytest.raises(OSError, match="connect"):
        await anyio.connect_tcp(address.host, address.port)

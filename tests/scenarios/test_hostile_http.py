"""Hostile HTTP at a node process, with the loop of asyncio and with uvloop.

Each row is refused by its own status, or costs nothing; the process lives and does not grow, and
the next good requests are served.
"""

from __future__ import annotations

import gzip
import os
import re
import resource
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select
from typing import NamedTuple

import pytest

from support.eventually import wait_until
from support.node_process import TESTS, NodeProcess
from support.valkey_server import ValkeyServer

GOOD = b'{"type":"invalidate","keys":["product:1"]}'
HEADER_TIMEOUT_MS = 1_000
BODY_TIMEOUT_MS = 5_000  #: more than the longest body of a row takes on a busy machine
CONNECTIONS_MAX = 64
GROWTH_MAX = 1.2
IDLE = 10_000

CLOSE = b"Host: localhost\r\nConnection: close\r\n"
POST = b"POST /v1/events HTTP/1.1\r\nContent-Type: application/json\r\n" + CLOSE
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /stats HTTP/1.1\r\n" + CLOSE
KEPT = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
BOMB = gzip.compress(bytes(1_000_000)) * 300  # 300 members, 300 MB


class Target(NamedTuple):
    node: NodeProcess
    rss: int  #: before the first row

    def connect(self) -> socket.socket:
        return socket.create_connection((self.node.host, self.node.port), timeout=30)

    def ask(self, request: bytes) -> bytes:
        """All that comes until the other side closes."""
        with self.connect() as link:
            with suppress(OSError):  # it may close before it has read all of this
                link.sendall(request)
            return read_all(link)

    def reached(self, limit: str) -> float:
        text = self.node.get("/metrics").body.decode()
        found = re.search(
            rf'^forebay_limit_reached_total{{.*"{limit}".*}} (\S+)', text, re.MULTILINE
        )
        return float(found[1]) if found else 0.0


def read_all(link: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while part := link.recv(65_536):
            received += part
    return received


def rss_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def target(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    valkey_server: ValkeyServer,
) -> Iterator[Target]:
    """One node for all rows of a loop; uvloop is what `forebay run` takes where it is installed."""
    directory = tmp_path_factory.mktemp(request.param)
    path = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    if request.param == "asyncio":
        (directory / "uvloop.py").write_text("raise ImportError('not for this node')\n")
        path.insert(0, str(directory))
    with NodeProcess(
        directory,
        environ={"PYTHONPATH": os.pathsep.join(filter(None, path)), "SHOP_SINK": ""},
        valkey__url=valkey_server.socket_url,
        node__namespace=f"hostile-{request.param}-{os.getpid()}",
        node__shards=1,
        http__connections_max=CONNECTIONS_MAX,
        http__header_timeout_ms=HEADER_TIMEOUT_MS,
        http__body_timeout_ms=BODY_TIMEOUT_MS,
    ) as node:
        loaded = Path(f"/proc/{node.pid}/maps").read_text()
        assert ("uvloop/loop." in loaded) == (request.param == "uvloop")
        for path_ in ("/metrics", "/openapi.json", "/stats"):
            assert node.get(path_).status == 200
        yield Target(node, rss_of(node.pid))


def posted(length: bytes, body: bytes = b"", *more: bytes) -> bytes:
    fields = b"".join(each + b"\r\n" for each in (b"Content-Length: " + length, *more))
    return POST + fields + b"\r\n" + body


def encoded(encoding: bytes, body: bytes) -> bytes:
    return posted(b"%d" % len(body), body, b"Content-Encoding: " + encoding)


def got(target: bytes, *fields: bytes, host: bytes = b"Host: localhost\r\n") -> bytes:
    lines = b"".join(each + b"\r\n" for each in fields)
    return b"GET " + target + b" HTTP/1.1\r\n" + host + b"Connection: close\r\n" + lines + b"\r\n"


def chunked(body: bytes) -> bytes:
    return CHUNKED + body + b"0\r\n\r\n"


GOOD_IN_CHUNKS = b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD)
LONG_EXTENSION = b"%x;" % len(GOOD) + b"a" * 2_000_000 + b"\r\n" + GOOD + b"\r\n"
AGAIN = gzip.compress(gzip.compress(GOOD))

#: row of the list of hostile inputs -> its forms, each with the status that it gets
ROWS: dict[str, list[tuple[bytes, int]]] = {
    "22_gzip_bomb": [(encoded(b"gzip", BOMB), 415)],
    "23_deflate_bomb": [(encoded(b"deflate", zlib.compress(bytes(10_000_000))), 415)],
    "24_gzip_of_gzip": [(encoded(b"gzip", AGAIN), 415), (encoded(b"gzip, gzip", AGAIN), 415)],
    "25_br_zstd": [(encoded(b"br", GOOD), 415), (encoded(b"zstd", GOOD), 415)],
    "26_5_mb": [(posted(b"5000000", b" " * 5_000_000), 413)],
    "27_length_and_chunked": [
        (posted(b"5", b"0\r\n\r\n", b"Transfer-Encoding: chunked"), 400),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (posted(b"5", b"0\r\n\r\n", b"Transfer-Encoding: chunked").replace(b"1.1", b"1.0"), 400),
        (chunked(b"").replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
        (CHUNKED.replace(b": chunked", b": chunked, identity") + b"0\r\n\r\n", 400),
    ],
    "28_two_lengths": [
        (posted(b"5", b"abcdef", b"Content-Length: 6"), 400),
        (posted(b"5", b"abcde", b"Content-Length: 5"), 400),
        (posted(b"5, 5", b"abcde"), 400),
    ],
    "29_odd_lengths": [(posted(n, b"abcde"), 400) for n in (b"+5", b"-1", b"1" + b"0" * 20)],
    "30_chunk_overflow": [(CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\nabc", 400)],
    "31_one_byte_chunks": [
        (chunked(b"1\r\n \r\n" * 300_000 + GOOD_IN_CHUNKS), 413),  # more than an event may have
        (chunked(b"1\r\n \r\n" * 60_000 + GOOD_IN_CHUNKS), 202),
    ],
    "32_chunk_extension": [(chunked(LONG_EXTENSION), 202)],
    "33_9_kb_header": [(got(b"/stats", b"X: " + b"a" * 9_000), 400)],
    "34_5000_headers": [(got(b"/stats", *[b"X: a"] * 5_000), 400)],
    "35_9_kb_url": [(got(b"/" + b"a" * 9_000), 400)],
    "36_folded": [(got(b"/stats", b"A: b\r\n c"), 400)],
    "37_space_before_colon": [
        (got(b"/stats", b"A : b"), 400),
        (got(b"/stats", host=b"Host : localhost\r\n"), 400),
    ],
    "38_lf_only": [(got(b"/stats").replace(b"\r\n", b"\n"), 400)],
    "39_hosts": [
        (got(b"/stats", host=b""), 400),
        (got(b"/stats", host=b"Host: localhost\r\nHost: evil.com\r\n"), 400),
        (got(b"/stats", host=b"Host: evil.com\r\n"), 421),
    ],
    "40_absolute_form": [
        (got(b"http://evil.com/stats"), 421),
        (got(b"http://localhost/stats", host=b"Host: evil.com\r\n"), 421),
        (got(b"http://localhost/stats"), 200),
    ],
    "41_other_protocols": [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
        (b"*1\r\n$4\r\nPING\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
}


def status_of(answer: bytes) -> int:
    """Of the only answer."""
    found = re.findall(rb"^HTTP/1\.[01] (\d{3}) ", answer, re.MULTILINE)
    assert len(found) == 1, answer[:300]
    return int(found[0])


def slow_header(target: Target) -> None:
    """It is closed, though bytes keep coming."""
    reached = target.reached("http_headers")
    with target.connect() as link:
        link.sendall(GET[:-2])
        wait_until(lambda: _drips(link, b"X: a\r\n"), what="the end of the connection")
    assert target.reached("http_headers") > reached


def slow_body(target: Target) -> None:
    """It is answered with 408, though bytes keep coming."""
    with target.connect() as link:
        link.sendall(posted(b"100"))
        wait_until(lambda: _drips(link, b" ") or select([link], [], [], 0)[0], what="an answer")
        assert status_of(link.recv(65_536)) == 408
    assert target.reached("http_body_time") > 0


def _drips(link: socket.socket, part: bytes) -> bool:
    """Send a part; whether the other side has ended the connection."""
    time.sleep(0.05)
    try:
        link.sendall(part)
    except ConnectionError:
        return True
    return False


def many_idle(target: Target) -> None:
    """Silent ones, and ones that are kept alive: a probe and an event get through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as links:
            for number in range(min(IDLE, hard - 500)):
                link = links.enter_context(target.connect())
                if number % 50 == 0:
                    link.sendall(KEPT)
                    assert b" 200 " in link.recv(4_096)
            assert target.node.get("/livez").status == 200
            assert target.node.post({"type": "invalidate", "keys": ["product:1"]}).status == 202
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert target.reached("http_connections") > IDLE / 2


def unread_answers(target: Target) -> None:
    """It is cut off; what it asked for does not pile up."""
    reached = target.reached("http_unread_answer")
    with target.connect() as link:
        link.setblocking(False)
        with suppress(BlockingIOError):
            for _ in range(50_000):
                link.send(KEPT.replace(b"/livez", b"/openapi.json"))
        wait_until(lambda: target.reached("http_unread_answer") > reached, what="the cut")


SLOW: dict[str, Callable[[Target], None]] = {
    "42_slow_header": slow_header,
    "43_slow_body": slow_body,
    "44_10000_idle": many_idle,
    "45_unread_answers": unread_answers,
}


def unharmed(target: Target) -> None:
    assert target.node.ended() is None
    assert status_of(target.ask(GET + b"\r\n")) == 200
    assert status_of(target.ask(posted(b"%d" % len(GOOD), GOOD))) == 202
    assert rss_of(target.node.pid) < GROWTH_MAX * target.rss
    assert '"level":"error"' not in target.node.said()


@pytest.mark.parametrize("row", ROWS)
def test_a_hostile_request_gets_its_status(target: Target, row: str) -> None:
    """Each form of the row, one after the other, and then a good client."""
    for request, status in ROWS[row]:
        assert status_of(target.ask(request)) == status, request[:200]
    unharmed(target)


@pytest.mark.parametrize("row", SLOW)
def test_a_client_that_holds_connections_costs_nobody_else(target: Target, row: str) -> None:
    """It loses its connections, and a good client is served."""
    SLOW[row](target)
    assert target.node.ended() is None
    unharmed(target)

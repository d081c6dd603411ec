"""The served values of Host: nodes/web/access.py."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from structlog.testing import capture_logs

from forebay.nodes.web.access import ServedNames
from forebay.schemas.settings import Http

if TYPE_CHECKING:
    from forebay.nodes.web.server import EndpointAddress
    from tests.nodes.web.conftest import FakeNode, Listening

GOOD = b'{"type":"invalidate","keys":["a"]}'
OURS = ServedNames(["localhost", "Vm.", "", "cache.internal", "*.svc.x"])


@pytest.mark.parametrize(
    "authority",
    [
        "127.0.0.1",
        "127.0.0.1:8642",
        "203.0.113.9:80",
        "[::1]",
        "[::1]:8642",
        "[::ffff:127.0.0.1]:1",
        "localhost",
        "LOCALHOST:8642",
        "localhost.:8642",
        "vm",
        "cache.internal:443",
        "a.svc.x",
        "b.a.SVC.x:1",
    ],
)
def test_addresses_and_our_names_are_served(authority: str) -> None:
    """N1: a served name matches with any port, in any case, with or without a final dot."""
    assert OURS.serves(authority)


@pytest.mark.parametrize(
    "authority",
    [
        "",
        ":80",
        "evil.com",
        "evil.com:8642",
        "localhost.evil.com",
        "notlocalhost",
        "internal",
        "x.cache.internal",
        "svc.x",
        "evilsvc.x",
        "127.0.0.1.evil.com",
        "2130706433",
        "0x7f.1",
        "127.1",
        "127.0.0.1@evil.com",
        "evil.com#@127.0.0.1",
        "[::1].evil.com",
        "[evil.com]",
        "[::1",
        "127.0.0.1 evil.com",
        "127.0.0.1:80:80",
        "127.0.0.1:٣",
    ],
)
def test_any_other_name_is_not_served(authority: str) -> None:
    """N1: a part of a served address or name is refused."""
    assert not OURS.serves(authority)


async def ask(address: EndpointAddress, head: str, body: bytes = b"") -> bytes:
    request = head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body
    async with await anyio.connect_tcp(address.host, address.port) as stream:
        await stream.send(request)
        received = b""
        try:
            while True:
                received += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return received


def post(host: str) -> str:
    return (
        f"POST /v1/events HTTP/1.1\nHost: {host}\nOrigin: http://{host}\nConnection: close\n"
        f"Content-Type: application/json\nContent-Length: {len(GOOD)}"
    )


async def test_a_page_with_a_name_of_its_own_is_refused(
    endpoint: EndpointAddress, fake_node: FakeNode
) -> None:
    """N1: a rebound DNS name can neither publish nor read, and the answer names the setting."""
    refused = await ask(endpoint, post("evil.com"), GOOD)
    assert refused.startswith(b"HTTP/1.1 421 ")
    assert b'"code":"wrong_host"' in refused
    assert b"http.hosts" in refused
    for path in ("/", "/stats", "/openapi.json", "/v1/cache/a", "/v1/explain/a", "/nothing"):
        head = f"GET {path} HTTP/1.1\nHost: evil.com:{endpoint.port}"
        assert (await ask(endpoint, head)).startswith(b"HTTP/1.1 421 ")
    assert fake_node.published == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]", socket.gethostname()])
async def test_our_own_names_publish(
    endpoint: EndpointAddress, fake_node: FakeNode, host: str
) -> None:
    """N1: the name of this machine and any IP address are served."""
    assert (await ask(endpoint, post(host), GOOD)).startswith(b"HTTP/1.1 202 ")
    assert fake_node.published == [GOOD]


async def test_names_of_the_settings_are_served(listening: Listening) -> None:
    """N1: http.hosts and http.host add names."""
    http = Http(host="localhost", port=0, hosts=("cache.shop", "*.svc.x"))
    async with listening(http) as address:
        for host in ("cache.shop:8642", "shop-0.svc.x"):
            assert (await ask(address, post(host), GOOD)).startswith(b"HTTP/1.1 202 ")
        assert (await ask(address, post("svc.y"), GOOD)).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/healthz", "/metrics"])
async def test_probes_and_metrics_answer_any_name(endpoint: EndpointAddress, path: str) -> None:
    """N2: probes and metrics accept any Host."""
    head = f"GET {path} HTTP/1.1\nHost: evil.com\nConnection: close"
    assert (await ask(endpoint, head)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "head",
    [
        "GET {path} HTTP/1.1\nX: y",
        "GET {path} HTTP/1.1\nHost: localhost\nHost: localhost",
        "GET {path} HTTP/1.1\nHost: localhost\nHost: evil.com",
        "GET {path} HTTP/1.1\nHost: a/b",
        "GET {path} HTTP/1.1\nHost: u@127.0.0.1",
        "GET {path} HTTP/1.1\nHost: 127.0.0.1, evil.com ",
        "GET {path} HTTP/1.0\nHost: localhost\nTransfer-Encoding: chunked",
        "GET {path} HTTP/1.0\nTransfer-Encoding: identity",
    ],
)
@pytest.mark.parametrize("path", ["/stats", "/livez"])
async def test_a_request_that_http_forbids_is_400(
    endpoint: EndpointAddress, path: str, head: str
) -> None:
    """N3: an invalid Host gets a 400 on every route, and the connection is closed."""
    answer = await ask(endpoint, head.format(path=path))
    assert answer.split(b" ")[1] == b"400"
    assert b'"code":"malformed"' in answer


async def test_a_chunked_body_of_http_1_0_is_not_read(
    endpoint: EndpointAddress, fake_node: FakeNode
) -> None:
    """N3: an HTTP/1.0 request with Transfer-Encoding is refused: its end is ambiguous."""
    head = post("localhost").replace("HTTP/1.1", "HTTP/1.0").partition("\nContent-Length")[0]
    chunk = b"%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n"
    answer = await ask(endpoint, head + "\nTransfer-Encoding: chunked", chunk)
    assert answer.startswith(b"HTTP/1.0 400 ")
    assert b"HTTP/1.0 has no Transfer-Encoding" in answer
    assert fake_node.published == []


async def test_http_1_0_without_a_name_is_served(endpoint: EndpointAddress) -> None:
    """N3: an HTTP/1.0 request without a Host is served."""
    assert b" 200 " in await ask(endpoint, "GET /stats HTTP/1.0\nX: y")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://127.0.0.1/stats", b"200"),
        ("http://localhost:1/stats", b"200"),
        ("http://evil.com/stats", b"421"),
        ("http://127.0.0.1@evil.com/stats", b"421"),
        ("http://evil.com?/stats", b"421"),
        ("/stats?://evil.com", b"200"),
    ],
)
async def test_a_target_that_is_a_url_names_this_node(
    endpoint: EndpointAddress, target: str, status: bytes
) -> None:
    """N4: a URL as target must name the node, also with a served Host."""
    head = f"GET {target} HTTP/1.1\nHost: localhost\nConnection: close"
    assert (await ask(endpoint, head)).split(b" ")[1] == status


async def test_an_open_endpoint_warns(listening: Listening, tmp_path: Path) -> None:
    """The node warns at its start if other machines reach it without a token."""
    token = tmp_path / "token"
    token.write_text("a" * 32)
    warned = []
    for http in (
        Http(port=0, host="0.0.0.0", open=True),
        Http(port=0, host="127.0.0.1", open=True),
        Http(port=0, host="0.0.0.0", open=True, token_file=str(token)),
    ):
        with capture_logs() as logs:
            async with listening(http):
                pass
        warned.append([each["event"] for each in logs if each["log_level"] == "warning"])
    assert warned == [["http.open"], [], []]

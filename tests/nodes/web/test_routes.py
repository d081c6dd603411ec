"""Reads, stats, the index, and the common headers of all answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest
from yarl import URL

from forebay.nodes.web.protocols import Read
from forebay.schemas.errors import ConfigError, Disconnected, LoaderError
from forebay.schemas.settings import Http

if TYPE_CHECKING:
    from forebay.nodes.web.server import EndpointAddress
    from tests.nodes.web.conftest import FakeNode, Listening

VALUE = Read(json=b'{"name":"tea"}', tier="near", age_ms=12, stale=True, version=1_700)
ABSENT = Read(json=b"null", tier="shared", age_ms=1, stale=False, version=9, negative=True)


async def test_a_value_comes_with_its_story(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """The body is the value alone; tier, age, staleness and version are headers."""
    fake_node.values["product:1"] = VALUE
    async with client.get("/v1/cache/product:1") as response:
        assert (response.status, await response.json()) == (200, {"name": "tea"})
        told = {k: v for k, v in response.headers.items() if k.startswith("X-Forebay")}

    assert told == {
        "X-Forebay-Tier": "near",
        "X-Forebay-Age-Ms": "12",
        "X-Forebay-Stale": "true",
        "X-Forebay-Version": "1700",
    }


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("unknown:1", 404, "no_cache"),
        ("product:gone", 404, "absent"),
        ("product:broken", 504, "loader_failed"),
        ("product:away", 503, "unavailable"),
        ("a%20b", 400, "invalid_key"),
        ("a%00b", 400, "invalid_key"),
        ("%ff%fe", 400, "invalid_key"),
        ("x" * 513, 400, "invalid_key"),
        ("%2e%2e/%2e%2e/etc/passwd", 404, "no_cache"),
    ],
)
async def test_a_read_that_gives_nothing_says_why(
    client: aiohttp.ClientSession, fake_node: FakeNode, path: str, status: int, code: str
) -> None:
    """Each error has its status and its stable code; none reveals internals."""
    fake_node.values = {
        "product:gone": ABSENT,
        "product:broken": LoaderError("product", "product:broken", "password=hunter2"),
        "product:away": Disconnected("hunter2"),
    }
    async with client.get(URL(f"/v1/cache/{path}", encoded=True)) as response:
        body = await response.text()
        assert response.status == status

    assert f'"code":"{code}"' in body
    assert '"fix":""' not in body
    assert "hunter2" not in body


async def test_a_key_is_percent_decoded_once(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """A key with a percent sign or a slash is reached by encoding it."""
    fake_node.values = {"product:a%3Ab/c": VALUE}
    for path in ("product:a%253Ab/c", "product%3Aa%253Ab%2Fc"):
        url = URL(f"/v1/cache/{path}", encoded=True)
        async with client.get(url) as response:
            assert response.status == 200


async def test_stats_are_the_nodes_own(client: aiohttp.ClientSession, fake_node: FakeNode) -> None:
    """The object names the instance and the namespace, and has the node's fields."""
    async with client.get("/stats") as response:
        body = await response.json()

    assert (body["instance"], body["namespace"]) == ("node-1", "shop")
    assert body["keys"] == {"entries": 3}

    fake_node.failure = Disconnected("gone")
    async with client.get("/stats") as response:
        assert response.status == 503


async def test_the_index_lists_routes_that_work(client: aiohttp.ClientSession) -> None:
    """Each route without a parameter that GET / lists answers."""
    async with client.get("/") as response:
        routes = (await response.json())["routes"]

    plain = [each for each in routes if "{" not in each["path"]]
    for each in plain:
        query = {"key": "product:1"} if each["path"] == "/v1/cache" else {}
        async with client.request(each["method"], each["path"], params=query) as response:
            assert response.status in (200, 415)
    assert len(plain) == 9
    assert all(each["purpose"] for each in routes)


async def test_every_answer_is_guarded_and_counted_by_its_template(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """S2: labels are route templates: a thousand paths make one series."""
    for path in ("/livez", "/v1/cache/a", "/v1/cache/b", "/nothing", "/nothing/else"):
        async with client.get(path) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Server"] == "forebay"
    async with client.get("/v1/events") as response:
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == "method_not_allowed"

    counts = fake_node.instruments.counts
    counted = {key[1:]: n for key, n in counts.items() if key[0] == "http_requests" and n}
    assert counted == {
        ("/livez", "2xx"): 1,
        ("/v1/cache/{key}", "4xx"): 2,
        ("unmatched", "4xx"): 3,
    }


async def test_a_browsers_page_cannot_publish(client: aiohttp.ClientSession) -> None:
    """E4: the preflight is refused, and no answer allows another origin."""
    asked = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    async with client.options("/v1/events", headers=asked) as response:
        assert response.status == 405
        assert not [each for each in response.headers if each.startswith("Access-Control")]


async def test_a_port_in_use_names_the_setting(
    endpoint: EndpointAddress, listening: Listening
) -> None:
    """The error has the setting, its value and the fix."""
    with pytest.raises(ConfigError) as caught:
        async with listening(Http(port=endpoint.port)):
            pytest.fail("it listened on a port in use")

    assert (caught.value.setting, caught.value.value) == ("http.port", str(endpoint.port))
    assert "another process" in caught.value.problem


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_a_host_that_is_not_ours_names_the_setting(listening: Listening, host: str) -> None:
    """An address of another machine is an invalid http.host."""
    with pytest.raises(ConfigError) as caught:
        async with listening(Http(host=host, port=0)):
            pytest.fail("it listened on another machine's address")

    assert (caught.value.setting, caught.value.value) == ("http.host", host)

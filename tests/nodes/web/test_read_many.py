"""GET /v1/cache?key=A&key=B: many keys, each with the status of a single read."""

from __future__ import annotations

from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

import forebay
from forebay.nodes.web.cache import BYTES_MAX, KEYS_MAX
from forebay.nodes.web.protocols import Read
from forebay.schemas.errors import LoaderError, Unavailable
from forebay.schemas.settings import Http

VALUE = Read(json=b'{"name":"tea"}', tier="near", age_ms=12, stale=True, version=1700)
IMPORTED = Read(json=b"7", tier="shared", age_ms=None, stale=False, version=3)
ABSENT = Read(json=b"null", tier="shared", age_ms=1, stale=False, version=9, negative=True)


def target(*keys: str) -> URL:
    query = "&".join(f"key={quote(key, safe=':')}" for key in keys)
    return URL(f"/v1/cache?{query}", encoded=True)


async def test_each_key_has_its_own_answer(client: aiohttp.ClientSession, fake_node) -> None:
    """Answers follow the order of the query, with repeated keys; errors are those of one key."""
    fake_node.values = {
        "product:1": VALUE,
        "product:2": IMPORTED,
        "product:gone": ABSENT,
        "product:broken": LoaderError("product", "product:broken", "password=hunter2"),
        "product:away": Unavailable("it is away"),
    }
    keys = [*fake_node.values, "nobody:1", "product:1"]
    async with client.get(target(*keys)) as response:
        assert response.status == 200
        told = (await response.json())["keys"]
    assert [each["key"] for each in told] == keys
    assert [each["status"] for each in told] == [200, 200, 404, 504, 503, 404, 200]
    assert told[0] == told[6]
    assert told[0] == {
        "key": "product:1",
        "status": 200,
        "value": {"name": "tea"},
        "tier": "near",
        "age_ms": 12,
        "stale": True,
        "version": 1700,
    }
    assert "age_ms" not in told[1]
    assert [each["error"]["code"] for each in told[2:6]] == [
        "absent",
        "loader_failed",
        "unavailable",
        "no_cache",
    ]
    assert "hunter2" not in str(told)
    for key, alone in zip(keys, told, strict=True):
        async with client.get(URL(f"/v1/cache/{key}", encoded=True)) as response:
            assert response.status == alone["status"]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("", "wrong_field"),
        ("keys=a", "wrong_field"),
        ("key", "wrong_field"),
        ("key=", "invalid_key"),
        ("key=a%20b", "invalid_key"),
        ("key=%ff", "invalid_key"),
        ("&".join(f"key=product:{n}" for n in range(KEYS_MAX + 1)), "wrong_field"),
    ],
)
async def test_a_query_that_cannot_be_is_400(
    client: aiohttp.ClientSession, query: str, code: str
) -> None:
    """Missing, too many or invalid keys: the error names the field, and nothing is read."""
    async with client.get(URL(f"/v1/cache?{query}", encoded=True)) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["field"]) == (400, code, "key")


async def test_a_plus_is_a_plus(client: aiohttp.ClientSession, fake_node) -> None:
    """The query is decoded like the path."""
    fake_node.values = {"product:a+b": VALUE}
    async with client.get(URL("/v1/cache?key=product:a+b&key=product%3Aa%2Bb", encoded=True)) as it:
        assert [each["status"] for each in (await it.json())["keys"]] == [200, 200]


async def test_an_answer_is_bounded(client: aiohttp.ClientSession, fake_node) -> None:
    """A value beyond the bound is refused and counted; a smaller one after it is served."""
    big = Read(
        json=b'"' + b"x" * (BYTES_MAX // 2) + b'"', tier="near", age_ms=1, stale=False, version=1
    )
    fake_node.values = {"product:1": big, "product:2": big, "product:3": IMPORTED}
    async with client.get(target(*fake_node.values)) as response:
        told = (await response.json())["keys"]
    assert [each["status"] for each in told] == [200, 413, 200]
    assert told[1]["error"]["fix"] == "request fewer keys at once"
    assert fake_node.instruments.counts["limit_reached", "http_read_bytes"] == 1


async def test_a_node_loads_what_it_lacks_in_one_batch(make_node) -> None:
    """Through a whole node: keys of two caches, the misses of one in one call of its loader."""
    node = make_node(http=Http(port=0))
    calls: list[list[int]] = []

    @node.cached("row:{id}", ttl=60)
    async def row(id: int) -> int | None: ...

    @row.batch
    async def rows(ids: list[int]) -> dict[int, int | None]:
        calls.append(sorted(ids))
        return {each: each * 10 for each in ids if each != 4}

    @node.cached("odd:{id}", ttl=60)
    async def odd(id: int) -> float:
        if id == 1:
            raise OSError("the source is down")
        return float("nan")

    asked = ["row:1", "row:2", "odd:1", "row:4", "odd:2", "row:x", "other:1"]
    async with (
        node,
        node.serving() as url,
        aiohttp.ClientSession(url) as client,
        client.get(target(*asked)) as response,
    ):
        told = (await response.json())["keys"]
    assert [each["status"] for each in told] == [200, 200, 504, 404, 406, 400, 404]
    assert [each.get("value") for each in told[:2]] == [10, 20]
    assert calls == [[1, 2, 4]]
    assert isinstance(node, forebay.Node)

"""Request scope on running nodes: reads and changes of caches inside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import forebay
from conftest import MakeServer
from forebay.nodes.request_scope import outside, request_scope


class Shop:
    """A node with two caches: rows of a source, and a page made of the first row."""

    def __init__(self, node: forebay.Node, source: Any) -> None:
        self.node = node
        self.source = source

        @node.cached("row:{id}", ttl=60, tags=["rows"])
        async def row(id: int) -> str | None:
            return await source.get(id)

        @node.cached("page:{id}", ttl=60)
        async def page(id: int) -> str:
            return f"page of {await row(id)}"

        @node.sink("row:{id}")
        async def nowhere(writes: list[forebay.Write[str]]) -> None:
            """A sink that no worker uses."""

        self.row, self.page = row, page


@pytest.fixture
async def shops(make_node: Any, source: Any) -> AsyncIterator[tuple[Shop, Shop]]:
    """Two nodes of one cluster with one source."""
    here, there = Shop(make_node(), source), Shop(make_node(), source)
    source.values[1] = "old"
    async with here.node, there.node:
        yield here, there


async def test_request_keeps_its_values_while_others_change_them(
    shops: tuple[Shop, Shop], eventually: Any
) -> None:
    """S1: a notice that arrives during a request takes effect for the next request."""
    here, there = shops
    async with request_scope():
        assert await here.row(1) == "old"
        there.source.values[1] = "new"
        with outside():  # another request
            await there.row.invalidate(1)
        await eventually(lambda: not_near(here, "row:1"), what="the notice")

        assert await here.row(1) == "old"
        assert (await here.row.get_with_info(1)).value == "old"
    assert await here.row(1) == "new"


def not_near(shop: Shop, key: str) -> bool:
    return shop.row._cache.path.near.get(key) is None


async def test_own_write_is_read_in_the_same_request(shops: tuple[Shop, Shop]) -> None:
    """S2: a write_behind, and a delete by it, is visible to the request."""
    here, _ = shops
    async with request_scope():
        assert await here.row(1) == "old"
        await here.row.write_behind(1, "mine")
        assert [await here.row(1), await here.row(1)] == ["mine", "mine"]
        await here.row.write_behind(1, None)
        assert await here.row(1) is None


@pytest.mark.parametrize("how", ["of the cache", "by key", "by tag"])
async def test_own_invalidation_takes_effect_in_the_same_request(
    shops: tuple[Shop, Shop], how: str
) -> None:
    """S2: after each kind of invalidation the request reads the key again."""
    here, _ = shops
    invalidate = {
        "of the cache": lambda: here.row.invalidate(1),
        "by key": lambda: here.node.invalidate(["row:1"]),
        "by tag": lambda: here.node.invalidate(tags=["rows"]),
    }[how]
    async with request_scope():
        assert await here.row(1) == "old"
        here.source.values[1] = "new"
        assert await here.row(1) == "old"
        await invalidate()
        assert await here.row(1) == "new"


@pytest.mark.parametrize("how", ["invalidate", "write_behind"])
async def test_own_change_whose_outcome_is_unknown_is_not_hidden(
    make_node: Any, source: Any, make_server: MakeServer, how: str
) -> None:
    """S2: a change that may have been executed drops the kept value."""
    server = make_server()
    shop = Shop(make_node(server), source)
    async with shop.node, request_scope() as seen:
        await shop.row(1)
        assert seen.get(shop.row._cache, "row:1") is not None
        server.kill9()
        with pytest.raises(forebay.Unavailable):
            await (shop.row.invalidate(1) if how == "invalidate" else shop.row.write_behind(1, "x"))
        assert seen.get(shop.row._cache, "row:1") is None


async def test_loader_does_not_see_values_of_the_request(
    shops: tuple[Shop, Shop], eventually: Any
) -> None:
    """S5: a stored page is made of current values."""
    here, there = shops
    async with request_scope():
        assert await here.row(1) == "old"
        there.source.values[1] = "new"
        with outside():
            await there.row.invalidate(1)
        await eventually(lambda: not_near(here, "row:1"), what="the notice")

        assert await here.page(1) == "page of new"
        assert await here.row(1) == "old"
    assert await there.page(1) == "page of new"


async def test_same_key_on_two_nodes_of_a_process_is_two(make_node: Any, source: Any) -> None:
    """S1: a scope separates caches with equal keys."""
    one, two = make_node(), make_node()

    @one.cached("x:{id}", ttl=60)
    async def number(id: int) -> int:
        return id

    @two.cached("x:{id}", ttl=60)
    async def text(id: int) -> str:
        return f"{id}"

    async with one, two, request_scope():
        assert await number(1) == 1
        assert await text(1) == "1"
        assert await number(1) == 1


async def test_concurrent_requests_on_one_node_are_separate(
    shops: tuple[Shop, Shop],
) -> None:
    """S3: a request keeps the value from before a change; a later request gets the new value."""
    here, _ = shops
    changed, began = anyio.Event(), anyio.Event()
    seen: dict[str, list[str | None]] = {}

    async def early() -> None:
        async with request_scope():
            first = await here.row(1)
            began.set()
            await changed.wait()
            seen["early"] = [first, await here.row(1)]

    async def late() -> None:
        await began.wait()
        here.source.values[1] = "new"
        async with request_scope():
            await here.row.invalidate(1)
            changed.set()
            seen["late"] = [await here.row(1), await here.row(1)]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(early)
        tasks.start_soon(late)
    assert seen == {"early": ["old", "old"], "late": ["new", "new"]}

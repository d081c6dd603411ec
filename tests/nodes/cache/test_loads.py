"""Loads on a node: what becomes of what a loader says of its load, and of those who wait."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

import forebay
from forebay.schemas.errors import Disconnected, ServerRefused


class Pages:
    """A source of pages, and what its loader was told of what is stored."""

    def __init__(self) -> None:
        self.values = {1: "first"}
        self.etags: dict[int, str] = {}
        self.known: list[tuple[Any, str]] = []

    def declare(self, node: forebay.Node, **options: Any) -> Any:
        @node.cached("page:{id}", ttl=60, tags=["all"], **options)
        async def page(id: int) -> str:
            load = forebay.loading()
            self.known.append((load.previous, load.etag))
            etag = self.etags.get(id)
            if etag is not None and etag == load.etag:
                unchanged: str = load.not_modified()
                return unchanged
            load.tag("author")
            load.depends_on("base:1")
            load.keep(etag=etag)
            return self.values[id]

        return page


@pytest.fixture
def pages() -> Pages:
    return Pages()


async def test_what_was_not_modified_keeps_its_tags_and_etag(make_node, pages: Pages) -> None:
    """Loading A3: also those that its loader named then, and not now."""
    node = make_node()
    page = pages.declare(node)
    pages.etags[1] = "e1"
    async with node:
        await page(1)  # it makes the tag of what it depends on
        await page(1)
        assert (await page.get_with_info(1)).version > 0
        for invalidate in ({"tags": ["all"]}, {"tags": ["author"]}, {"keys": ["base:1"]}):
            loads = len(pages.known)
            for _ in range(2):
                await node.invalidate(**invalidate)
                assert await page(1) == "first"
                assert await page(1) == "first"
            assert len(pages.known) == loads + 2, invalidate
            assert pages.known[-2:] == [("first", "e1")] * 2


async def test_a_new_value_without_an_etag_has_none(make_node, pages: Pages) -> None:
    """Loading A3: the old one would say that nothing was modified when the old value is back."""
    node = make_node()
    page = pages.declare(node)
    pages.etags[1] = "e1"
    async with node:
        await page(1)
        await page(1)
        pages.values[1] = "second"
        del pages.etags[1]
        await node.invalidate(tags=["all"])
        assert await page(1) == "second"
        pages.etags[1], pages.values[1] = "e1", "first"
        await node.invalidate(tags=["all"])
        assert await page(1) == "first"
        assert pages.known[-1] == ("second", "")


@pytest.mark.parametrize("error", [Disconnected("gone"), ServerRefused("OOM", "full")])
async def test_what_was_loaded_is_given_though_it_cannot_be_stored(
    make_node, pages: Pages, monkeypatch, error: Exception
) -> None:
    """L1: also where the tags that the loader named cannot be asked for any more."""
    node = make_node()
    page = pages.declare(node)

    async def discovered(*args: Any, **options: Any) -> Any:
        raise error

    async with node:
        monkeypatch.setattr(page._cache.path._core.tags, "discovered", discovered)
        hit = await page.get_with_info(1)
        assert (hit.value, hit.version) == ("first", 0)
        monkeypatch.undo()
        with anyio.fail_after(5):
            await page(1)
        assert len(pages.known) == 2, "the lease was given back, and nothing stored"


async def test_a_bulk_read_does_not_wait_for_another_s_load_to_begin_its_own(
    make_node, eventually
) -> None:
    """M2: a load that was under way before is not a part of its call, and holds up nobody."""
    node, gate, calls = make_node(), anyio.Event(), list[list[int]]()

    @node.cached("item:{id}", ttl=60)
    async def item(id: int) -> int:
        raise AssertionError

    @item.batch
    async def items(ids: list[int]) -> dict[int, int]:
        calls.append(ids)
        if 1 in ids:
            await gate.wait()
        return {each: each * each for each in ids}

    async with node:
        single = asyncio.ensure_future(item(1))
        await eventually(lambda: calls, what="the first load")
        many = asyncio.ensure_future(item.many([1, 2, 3]))
        await eventually(lambda: len(calls) == 2, what="the call for the others")
        gate.set()
        assert await many == [1, 4, 9]
        assert await single == 1
    assert calls == [[1], [2, 3]]


async def test_an_absence_that_was_overtaken_takes_nothing_away(
    make_node, source, eventually
) -> None:
    """L7: what was put while the loader ran is newer than what it did not find."""
    node = make_node()

    @node.cached("row:{id}", ttl=60, negative_ttl=0)
    async def row(id: int) -> str | None:
        found: str | None = await source.get(id)
        return found

    async with node:
        await row.put(1, "old")
        await node.invalidate(["row:1"], soft=True)
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(row, 1)
            with anyio.fail_after(20):
                await source.began.wait()
            await row.put(1, "new")
            source.let_go()
        await eventually(lambda: node._instruments.counts["refreshes", "refused"])
        row._cache.path.near.clear()
        assert await row(1) == "new"


async def test_a_value_survives_that_cannot_be_loaded_once_more(make_node, source) -> None:
    """L6: the callers get what there is, though Valkey did not answer in between."""
    node = make_node()

    @node.cached("row:{id}", ttl=60)
    async def row(id: int) -> str:
        forebay.loading().tag("late")
        found: str = await source.get(id)
        return found

    async def away(key: str, token: str) -> None:
        raise Disconnected("just now")

    source.values[1] = "first"
    async with node:
        source.hold()
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                assert await row(1) == "first"

            tasks.start_soon(read)
            with anyio.fail_after(20):
                await source.began.wait()
            await node.invalidate(tags=["late"])
            node._parts.shared.holds = away
            source.let_go()
        assert source.loads == 1

"""A cache whose callers change what they get: each has a copy, and each error names the key."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.schemas.errors import InvalidValue, LoaderError


def declare(node: forebay.Node, source: Any) -> Cached[Any, list[str]]:
    @node.cached("basket:{id}", ttl=600, mutable=True)
    async def basket(id: int) -> list[str]:
        return await source.get(id)

    return basket


async def test_what_a_caller_changes_nobody_sees(make_node, source) -> None:
    """J1: wherever the value is from, and whoever wrote it."""
    node = make_node()
    basket = declare(node, source)
    source.values[1] = ["tea"]
    async with node, forebay.request_scope():
        for _ in range(3):
            (await basket(1)).append("milk")
            (await basket.many([1]))[0].append("milk")
            (await basket.get_with_info(1)).value.append("milk")
        written = ["cup"]
        await basket.put(1, written)
        written.append("milk")
        (await basket(1)).append("milk")
        assert await basket(1) == ["cup"]
    assert source.values[1] == ["tea"]


async def test_what_cannot_be_decoded_is_the_loader_s_fault(make_node, source) -> None:
    """Found before anybody has a copy, so that it is no broken entry for all who read it."""
    node = make_node()
    basket = declare(node, source)
    source.values[1] = [1]
    async with node:
        for read in (basket, basket.get_with_info):
            with pytest.raises(LoaderError, match="basket:1"):
                await read(1)
        assert isinstance((await basket.many_with_info([1]))[0], LoaderError)
        with pytest.raises(InvalidValue, match="basket:1"):
            await basket.put(1, [1])  # type: ignore[list-item]


async def test_what_is_too_large_is_given_and_not_stored(make_node, source) -> None:
    """As in any cache."""
    node = make_node(value_bytes_max=100)
    basket = declare(node, source)
    source.values[1] = ["x" * 500]
    async with node:
        assert [await basket(1), await basket(1)] == [["x" * 500]] * 2
        assert source.loads == 2
        with pytest.raises(InvalidValue, match="oversized"):
            await basket.put(1, ["x" * 500])


@pytest.mark.parametrize("way", ["write_through", "write_behind", "put"])
async def test_what_is_changed_while_it_is_written_is_not_kept(make_node, source, way: str) -> None:
    """J1: the near cache has what was stored, whatever sink or caller do to it meanwhile."""
    node = make_node()
    basket = declare(node, source)
    written = ["tea"]

    @node.sink("basket:{id}")
    async def save(writes: list[forebay.Write[list[str]]]) -> None:
        for write in writes:
            write.value.append("milk")

    async def change() -> None:
        await anyio.lowlevel.checkpoint()
        written.append("milk")

    async with node, anyio.create_task_group() as tasks:
        tasks.start_soon(change)
        await getattr(basket, way)(1, written)
        assert written == ["tea", "milk"]
        near = await basket(1)
        basket._cache.path.near.clear()
        assert (near, await basket(1)) == (["tea"], ["tea"])

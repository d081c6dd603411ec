"""Invalidating a tag softly: what carries it may be served as stale, and is refreshed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import msgspec
import pytest

import forebay
from forebay.nodes.cache.cached import Cached

Row = dict[str, int]


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    options = {"ttl": 600.0, "stale_for": 600.0, "tags": ["rows", "row:{id}"], **options}

    @node.cached("row:{id}", **options)
    async def row(id: int) -> Row | None:
        return await source.get(id)

    return row


@pytest.fixture
async def nodes(make_node, source) -> AsyncIterator[list[forebay.Node]]:
    """Two, which have read row 1."""
    made = [make_node(jitter=0.0, lease_ms=60_000) for _ in range(2)]
    for each in made:
        each.row = declare(each, source)
    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    async with AsyncExitStack() as stack:
        for each in made:
            await stack.enter_async_context(each)
        assert [await each.row(1) for each in made] == [{"n": 1}] * 2
        yield made


async def stale_on(node: Any) -> bool:
    return bool((await node.row.get_with_info(1)).stale)


async def fresh_on(node: Any, value: Row) -> bool:
    hit = await node.row.get_with_info(1)
    return bool(hit.value == value and not hit.stale)


@pytest.mark.parametrize("tag", ["rows", "row:1"])
async def test_what_carries_the_tag_is_served_stale_and_refreshed(
    nodes, source, eventually, tag: str
) -> None:
    """Policy D3: here at once, elsewhere within the promise; the refresh is one."""
    source.values[1] = {"n": 11}
    source.hold()
    await nodes[0].invalidate(tags=[tag], soft=True)
    hit = await nodes[0].row.get_with_info(1)
    assert (hit.value, hit.tier, hit.stale) == ({"n": 1}, "shared", True)
    await eventually(lambda: stale_on(nodes[1]))
    source.let_go()
    for node in nodes:
        await eventually(lambda node=node: fresh_on(node, {"n": 11}))
    assert source.loads == 2


async def test_what_does_not_carry_the_tag_is_left_alone(nodes, source) -> None:
    """It stays near."""
    await nodes[0].row(2)
    await nodes[0].invalidate(tags=["row:1"], soft=True)
    assert (await nodes[0].row.get_with_info(2)).tier == "near"


@pytest.mark.parametrize("soft_first", [True, False])
async def test_a_hard_invalidation_counts_whatever_soft_ones_there_are(
    nodes, source, eventually, soft_first: bool
) -> None:
    """Tags: two versions; the soft bump after a hard one brings nothing back."""
    source.values[1] = {"n": 11}
    source.hold()
    for soft in (soft_first, not soft_first):
        await nodes[0].invalidate(tags=["rows"], soft=soft)
    source.let_go()
    assert await nodes[0].row(1) == {"n": 11}
    await eventually(lambda: fresh_on(nodes[1], {"n": 11}))


async def test_a_node_that_did_not_know_the_tag_reads_both_versions(
    nodes, source, make_node, eventually
) -> None:
    """It comes later, and asks the server: stale is stale there, too, and invalid is invalid."""
    late = make_node(jitter=0.0)
    late.row = declare(late, source)
    source.hold()
    await nodes[0].invalidate(tags=["rows"], soft=True)
    async with late:
        hit = await late.row.get_with_info(1)
        assert (hit.value, hit.stale) == ({"n": 1}, True)
        await nodes[0].invalidate(tags=["rows"])
        source.values[1] = {"n": 11}
        source.let_go()
        await eventually(lambda: fresh_on(late, {"n": 11}))


async def test_a_soft_bump_while_it_is_loaded_leaves_it_stale(nodes, source, eventually) -> None:
    """Loads L1: it is stored, since it may be served, but not taken for fresh by anybody."""
    await nodes[0].row.invalidate(1)
    source.hold()
    asked = source.loads

    async def load() -> None:
        await nodes[0].row(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load)
        await source.began.wait()
        source.values[1] = {"n": 11}
        await nodes[1].invalidate(tags=["rows"], soft=True)
        source.let_go()
    for node in nodes:
        await eventually(lambda node=node: fresh_on(node, {"n": 11}))
    assert source.loads == asked + 2


async def test_an_event_may_be_soft(make_node, nodes, source, eventually) -> None:
    """As published in any language; applied by a worker."""
    worker = make_node(workers=True)
    worker.row = declare(worker, source)
    source.hold()
    event = {"type": "invalidate", "tags": ["rows"], "soft": True}
    async with worker:
        await worker.publish([msgspec.json.encode(event)])
        await eventually(lambda: stale_on(nodes[1]))
        assert (await nodes[1].row.get_with_info(1)).value == {"n": 1}
        source.values[1] = {"n": 11}
        await worker.publish([msgspec.json.encode({**event, "soft": False})])
        source.let_go()
        await eventually(lambda: fresh_on(nodes[1], {"n": 11}))


async def test_what_may_not_be_served_stale_ends_with_its_lifetime(nodes, source, grow_old) -> None:
    """Policy D2: softly invalidated or not."""
    await nodes[0].invalidate(tags=["rows"], soft=True)
    grow_old("row:1", 1_300.0, nodes[0].row)
    source.values[1] = {"n": 11}
    assert await nodes[0].row(1) == {"n": 11}

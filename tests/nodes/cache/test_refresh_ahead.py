"""Refreshing before the end: a read past the fraction has it loaded, and waits for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached

Row = dict[str, int]
RIPE_S = 70.0  #: past the fraction of ``declare``, before its ttl


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    @node.cached("row:{id}", **{"ttl": 100.0, "refresh_ahead": 0.5, **options})
    async def row(id: int) -> Row | None:
        return await source.get(id)

    return row


@pytest.fixture
async def nodes(make_node, source) -> AsyncIterator[list[forebay.Node]]:
    made = [make_node(jitter=0.0, lease_ms=60_000) for _ in range(2)]
    for each in made:
        each.row = declare(each, source)
    source.values[1] = {"n": 1}
    async with AsyncExitStack() as stack:
        for each in made:
            await stack.enter_async_context(each)
        yield made


def published(nodes: list[forebay.Node]) -> int:
    return sum(node._instruments.counts.get(("refresh_requests", "published"), 0) for node in nodes)


async def test_a_ripe_value_is_served_fresh_and_refreshed_once(
    nodes, source, grow_old, eventually
) -> None:
    """Policy D4: from the shared tier, by both nodes, however many read; nobody waits."""
    rows = [node.row for node in nodes]
    await rows[0](1)
    grow_old("row:1", RIPE_S, *rows)
    source.values[1] = {"n": 2}
    source.hold()
    with anyio.fail_after(20):
        hits = await asyncio.gather(*[row.get_with_info(1) for row in rows * 20])
        await source.began.wait()
    assert all((hit.value, hit.stale) == ({"n": 1}, False) for hit in hits)
    source.let_go()
    for row in rows:

        async def new(row: Any = row) -> bool:
            return bool((await row.get_with_info(1)).value == {"n": 2})

        await eventually(new)
    assert source.loads == 2
    assert published(nodes) == 1


async def test_what_is_not_ripe_is_not_refreshed(nodes, source, grow_old) -> None:
    """It has lived for less than the fraction."""
    await nodes[0].row(1)
    grow_old("row:1", 40.0, nodes[0].row)
    assert (await nodes[0].row.get_with_info(1)).tier == "shared"
    assert (await nodes[0].row.get_with_info(1)).tier == "near"
    assert (published(nodes), source.loads) == (0, 1)


async def test_a_refresh_that_fails_costs_nothing(nodes, source, grow_old, eventually) -> None:
    """The value is fresh until its end, and its source is left alone for a while."""
    row = nodes[0].row
    await row(1)
    grow_old("row:1", RIPE_S, row)
    source.error = ConnectionError("down")
    assert not (await row.get_with_info(1)).stale
    await eventually(lambda: source.loads == 2)
    for cached in (row, nodes[1].row):
        hit = await cached.get_with_info(1)
        assert (hit.value, hit.stale) == ({"n": 1}, False)
    assert source.loads == 2


async def test_an_invalidation_counts_while_it_is_refreshed(
    nodes, source, grow_old, eventually
) -> None:
    """Loads L1: what was loaded before it is not stored."""
    row = nodes[0].row
    await row(1)
    grow_old("row:1", RIPE_S, row)
    source.hold()
    await row(1)
    with anyio.fail_after(20):
        await source.began.wait()
    source.values[1] = {"n": 2}
    await nodes[1].row.invalidate(1)
    source.let_go()
    assert await nodes[1].row(1) == {"n": 2}

    async def told() -> bool:
        return bool(await row(1) == {"n": 2})

    await eventually(told)


async def test_a_near_value_is_refreshed_ahead_too(make_node, source, eventually) -> None:
    """Near: read all the time, it is never waited for, and never stale."""
    node = make_node(jitter=0.0)
    row = declare(node, source, ttl=0.6, refresh_ahead=0.2)
    source.values[1] = {"n": 1}
    tiers, versions = set(), set()
    async with node:
        await row(1)
        with anyio.fail_after(20):
            while len(versions) < 4:
                hit = await row.get_with_info(1)
                tiers.add(hit.tier)
                versions.add(hit.version)
                await anyio.sleep(0.005)
    assert tiers == {"near"}

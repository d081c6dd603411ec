"""Each read is one sample of cache_requests_total, whichever way it goes; loads are apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import forebay
from conftest import MakeServer
from forebay.nodes.cache.cached import Cached
from forebay.nodes.request_scope import request_scope
from forebay.schemas.errors import Backpressure, SourceFailing, Unavailable
from forebay.schemas.jobs import RefreshJob
from forebay.schemas.settings import Limits

Reads = Callable[[], Awaitable[object]]
Row = dict[str, int]
NEVER_MS = 600_000


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    options = {"ttl": 600.0, "name": "row", **options}

    @node.cached("row:{id}", **options)
    async def row(id: int) -> Row | None:
        return await source.get(id)

    return row


def samples(node: forebay.Node, name: str) -> dict[tuple[str, ...], int]:
    """What was counted, by the labels that follow the cache."""
    found: dict[tuple[str, ...], int] = {}
    for family in node.registry.collect():
        for each in family.samples:
            if each.name == f"forebay_{name}" and each.labels["cache"] == "row" and each.value:
                labels = tuple(value for label, value in each.labels.items() if label != "cache")
                found[labels] = int(each.value)
    return found


def reads(node: forebay.Node) -> dict[tuple[str, ...], int]:
    return samples(node, "cache_requests_total")


def loads(node: forebay.Node) -> dict[str, int]:
    return {labels[0]: n for labels, n in samples(node, "loads_total").items()}


async def fails(awaited: Awaitable[object], kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        await awaited


@pytest.fixture
async def node(make_node: Any, source: Any) -> AsyncIterator[forebay.Node]:
    made = make_node(lease_ms=60_000)
    made.row = declare(made, source)
    source.values.update({number: {"n": number} for number in range(10)})
    async with made:
        yield made


async def test_thirteen_reads_are_thirteen_samples(node: Any) -> None:
    """Loads, near hits, followers of a load and a bulk read: the hit ratio is what it was."""
    await node.row(1)
    for _ in range(6):
        await node.row(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(node.row, 2)
        tasks.start_soon(node.row, 2)
    await node.row(99)
    await node.row.get_with_info(99)
    await node.row.many([1, 2])

    assert reads(node) == {
        ("near", "hit"): 8,
        ("near", "negative"): 1,
        ("source", "miss"): 4,
    }
    assert loads(node) == {"loaded": 3}


async def test_shared_hits_are_told_from_known_absences(make_node: Any, source: Any) -> None:
    """A second node finds what the first one stored; it loads nothing."""
    one, two = make_node(), make_node()
    row, again = declare(one, source), declare(two, source)
    source.values[1] = {"n": 1}
    async with one, two:
        await row.many([1, 2])
        await again(1)
        await again._cache.read_key("row:2")
        await again.many([1, 2])

        assert reads(one) == {("source", "miss"): 2}
        assert reads(two) == {
            ("shared", "hit"): 1,
            ("shared", "negative"): 1,
            ("near", "hit"): 1,
            ("near", "negative"): 1,
        }
        assert loads(two) == {}


async def test_stale_values_are_counted_by_where_they_are_from(
    make_node: Any, source: Any, grow_old: Any
) -> None:
    """A stale read of the shared tier, and one while the loader fails: no misses."""
    node = make_node(lease_ms=60_000)
    row = declare(node, source, stale_for=60.0, stale_if_error=600.0)
    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    async with node:
        await row.many([1, 2])
        source.error = OSError("away")
        grow_old("row:1", 700.0, row)
        assert (await row.get_with_info(1)).stale
        assert reads(node) == {("source", "miss"): 2, ("shared", "stale"): 1}
        assert loads(node) == {"loaded": 2, "error": 1}

        grow_old("row:2", 620.0, row)
        assert (await row.get_with_info(2)).stale
        assert reads(node) == {("source", "miss"): 2, ("shared", "stale"): 2}


async def test_a_stale_value_for_want_of_patience_is_one_sample_each(
    make_node: Any, source: Any, grow_old: Any
) -> None:
    """Three readers who wait for one load, and get the stale value in time."""
    node = make_node(lease_ms=60_000)
    row = declare(node, source, stale_if_error=600.0, soft_timeout=0.01)
    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        grow_old("row:1", 610.0, row)
        source.hold()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(row, 1)
        source.let_go()
        assert reads(node) == {("source", "miss"): 1, ("shared", "stale"): 3}


async def test_reads_of_a_bulk_read_are_counted_by_key(node: Any, source: Any) -> None:
    """One sample for each key that was asked for, whatever became of it."""
    await node.row.many([1, 2])

    async def get(key: int) -> Row:
        if key == 4:
            raise OSError("of this key")
        return {"n": key}

    source.get = get
    found = await node.row.many_with_info([1, 3, 3, 4])

    assert [type(each).__name__ for each in found] == ["Hit", "Hit", "Hit", "OSError"]
    assert reads(node) == {("source", "miss"): 3, ("near", "hit"): 1, ("source", "error"): 1}
    assert loads(node) == {"loaded": 3, "error": 1}


async def test_what_a_request_read_before_is_a_hit_of_its_scope(node: Any) -> None:
    """Also in a bulk read; what the scope does not have is counted as outside of it."""
    async with request_scope():
        await node.row(1)
        await node.row(1)
        await node.row.get_with_info(1)
        await node.row.many([1, 2])
        await node.row(99)
        await node.row(99)
    await node.row(1)

    assert reads(node) == {
        ("source", "miss"): 3,
        ("request", "hit"): 3,
        ("request", "negative"): 1,
        ("near", "hit"): 1,
    }


async def test_reads_that_fail_are_counted_once(make_node: Any, source: Any) -> None:
    """The loader's error, then refusals while the source is left alone; waiters are readers."""
    node = make_node(lease_ms=60_000, breaker_failures=2, breaker_recovery_ms=NEVER_MS)
    row = declare(node, source)
    source.error = OSError("away")
    async with node:
        await fails(row(1), OSError)
        await fails(row(2), OSError)
        await fails(row(3), SourceFailing)

        assert reads(node) == {("source", "error"): 2, ("source", "refused"): 1}
        assert loads(node) == {"error": 2, "refused": 1}


async def test_reads_that_were_not_let_in_are_refused(make_node: Any, source: Any) -> None:
    """Backpressure is no error of the source."""
    node = make_node(lease_ms=60_000, limits=Limits(loads_max=1))
    row = declare(node, source)
    async with node:
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(row, 1)
            await source.began.wait()
            await fails(row(2), Backpressure)
            source.let_go()

        assert reads(node) == {("source", "miss"): 1, ("source", "refused"): 1}


async def test_a_read_that_is_cancelled_is_counted_so(node: Any, source: Any) -> None:
    """Two readers of one load, one of them gone; and a bulk read that is cut short."""
    source.hold()
    async with anyio.create_task_group() as tasks:
        scopes = [anyio.CancelScope(), anyio.CancelScope()]

        async def read(reads: Reads, scope: anyio.CancelScope) -> None:
            with scope:
                await reads()

        tasks.start_soon(read, lambda: node.row(1), scopes[0])
        tasks.start_soon(read, lambda: node.row.many([1, 2]), scopes[1])
        tasks.start_soon(node.row, 1)
        while source.loads < 2 or node.row._cache.path.flights.waiting < 4:
            await anyio.sleep(0.001)
        for scope in scopes:
            scope.cancel()
        while node.row._cache.path.flights.waiting > 1:
            await anyio.sleep(0.001)
        source.let_go()

    assert reads(node) == {("source", "cancelled"): 3, ("source", "miss"): 1}
    assert loads(node)["loaded"] >= 1


@pytest.mark.parametrize("policy", ["bypass", "stale", "fail"])
async def test_reads_without_a_server_are_counted_by_policy(
    make_node: Any, source: Any, make_server: MakeServer, policy: str
) -> None:
    """Degraded: from the source, from what the near cache had, or an error of the shared tier."""
    server = make_server()
    node = make_node(server, max_staleness_ms=50, on_disconnected=policy)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        before = reads(node)
        server.kill9()
        with anyio.fail_after(20):
            while node._parts.backend.link.connected or row._cache.path.loads.live:
                await anyio.sleep(0.005)
        if policy == "fail":
            await fails(row(1), Unavailable)
        else:
            assert await row(1) == {"n": 1}

        expected = {
            "bypass": ("source", "miss"),
            "stale": ("near", "stale"),
            "fail": ("shared", "error"),
        }[policy]
        assert before == {("source", "miss"): 1}
        more = {labels: n - before.get(labels, 0) for labels, n in reads(node).items()}
        assert {labels: n for labels, n in more.items() if n} == {expected: 1}


async def test_a_refresh_is_a_load_and_no_read(node: Any) -> None:
    """Jobs load without a reader."""
    await node._parts.shared.begin("row:1", "token", lease_ms=60_000, seen=-1)
    assert await node.row._cache.refresh(RefreshJob(cache="row", key="row:1", token="token"))
    assert (reads(node), loads(node)) == ({}, {"loaded": 1})


async def test_reads_are_timed_that_the_near_cache_did_not_answer(node: Any) -> None:
    """A bulk read once; a hit of the near cache never."""
    for _ in range(5):
        await node.row(1)
    await node.row.many([1, 2, 3])

    def count(name: str) -> float | None:
        return node.registry.get_sample_value(f"forebay_{name}_seconds_count", {"cache": "row"})

    assert (count("cache_read"), count("loader")) == (2, 3)

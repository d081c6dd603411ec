"""How long callers wait for a loader, and what becomes of the load that they left."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.schemas.errors import LoaderError

Row = dict[str, int]
SOON_S = 0.03
GRACE_S = 130.0  #: past ttl and stale_for, and within stale_if_error


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    options = {"ttl": 60.0, "stale_for": 60.0, "stale_if_error": 600.0, **options}

    @node.cached("row:{id}", **options)
    async def row(id: int) -> Row | None:
        return await source.get(id)

    return row


@pytest.fixture
async def open_nodes(make_node, source) -> AsyncIterator[Any]:
    """``open_nodes(2, soft_timeout=...)``: that many caches, each on a node of its own."""
    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    async with anyio.create_task_group() as tasks:
        closing = anyio.Event()

        async def live(node: forebay.Node, *, task_status: Any) -> None:
            async with node:
                task_status.started()
                await closing.wait()

        async def start(count: int = 1, **options: Any) -> list[Cached[Any, Row | None]]:
            nodes = [make_node(jitter=0.0, lease_ms=60_000) for _ in range(count)]
            caches = [declare(node, source, **options) for node in nodes]
            for node in nodes:
                await tasks.start(live, node)
            return caches

        yield start
        source.let_go()
        closing.set()


async def test_who_could_be_served_stale_waits_no_longer_than_the_soft_timeout(
    open_nodes, source, grow_old, eventually
) -> None:
    """F6: the load goes on in the background and is stored; the next reader gets it fresh."""
    (row,) = await open_nodes(soft_timeout=SOON_S)
    await row(1)
    grow_old("row:1", GRACE_S, row)
    source.values[1] = {"n": 11}
    source.hold()
    with anyio.fail_after(20):
        hit = await row.get_with_info(1)
    assert (hit.value, hit.tier, hit.stale) == ({"n": 1}, "shared", True)
    assert len(row._cache.path.flights) == 1
    source.let_go()
    await eventually(lambda: not len(row._cache.path.flights))
    hit = await row.get_with_info(1)
    assert (hit.value, hit.tier, hit.stale) == ({"n": 11}, "near", False)
    assert source.loads == 2


async def test_a_loader_that_is_quick_enough_is_waited_for(open_nodes, source, grow_old) -> None:
    """The timeout is a limit, and nobody is served stale without need."""
    (row,) = await open_nodes(soft_timeout=20.0)
    await row(1)
    grow_old("row:1", GRACE_S, row)
    source.values[1] = {"n": 11}
    hit = await row.get_with_info(1)
    assert (hit.value, hit.tier, hit.stale) == ({"n": 11}, "source", False)


async def test_latecomers_need_not_wait_for_a_load_that_is_late(
    open_nodes, source, grow_old
) -> None:
    """F6: the patience counts from when the load began, for whoever comes."""
    (row,) = await open_nodes(soft_timeout=SOON_S)
    await row(1)
    grow_old("row:1", GRACE_S, row)
    source.hold()
    await row(1)
    for _ in range(10):
        assert (await row.get_with_info(1)).stale
        assert row._cache.path.flights.waiting == 0
    assert source.loads == 2, "they joined the same load"


async def test_who_has_nothing_to_be_served_waits(open_nodes, source) -> None:
    """The soft timeout is for those who could be served stale."""
    (row,) = await open_nodes(soft_timeout=SOON_S)
    source.hold()
    got = []

    async def read() -> None:
        got.append(await row.get_with_info(1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await source.began.wait()
        await anyio.sleep(3 * SOON_S)
        assert not got
        source.let_go()
    assert got[0].value == {"n": 1}


async def test_nobody_waits_longer_than_the_hard_timeout(open_nodes, source, eventually) -> None:
    """F6: each gets an error of its own; the load ends all the same, and is stored."""
    row, again = await open_nodes(2, hard_timeout=SOON_S)
    source.hold()
    errors = []

    async def read() -> None:
        with pytest.raises(LoaderError, match="not loaded in") as caught:
            await row(1)
        errors.append(caught.value)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(read)
        await read()  # a latecomer
    assert len({id(error) for error in errors}) == 21
    assert {(error.cache, error.key) for error in errors} == {("row", "row:1")}
    source.let_go()
    await eventually(lambda: not len(row._cache.path.flights))
    assert (await row.get_with_info(1)).tier == "near"
    assert (await again.get_with_info(1)).tier == "shared"
    assert source.loads == 1


async def test_the_hard_timeout_serves_what_there_is(open_nodes, source, grow_old) -> None:
    """An old value is better than an error, where it is allowed."""
    (row,) = await open_nodes(hard_timeout=SOON_S)
    await row(1)
    grow_old("row:1", GRACE_S, row)
    source.hold()
    with anyio.fail_after(20):
        assert (await row.get_with_info(1)).stale


async def test_a_loader_that_fails_in_time_fails_its_callers(open_nodes, source) -> None:
    """Its own error, and not a timeout."""
    (row,) = await open_nodes(hard_timeout=20.0)
    source.error = ConnectionError("down")
    with pytest.raises(ConnectionError, match="down"):
        await row(1)


async def test_a_load_that_fails_after_all_have_left_harms_nothing(
    open_nodes, source, grow_old, eventually, valkey_server
) -> None:
    """Its source is left alone, as after any failure; the old value is served on."""
    (row,) = await open_nodes(soft_timeout=SOON_S)
    await row(1)
    grow_old("row:1", GRACE_S, row)
    source.error = ConnectionError("down")
    source.hold()
    await row(1)
    source.let_go()
    await eventually(lambda: not len(row._cache.path.flights))
    assert valkey_server.execute("GET", row._cache.path.shared.names.lease("row:1")) == b"!"
    assert (await row.get_with_info(1)).stale


async def test_a_caller_who_is_cancelled_before_the_timeout_leaves_the_load(
    open_nodes, source, eventually
) -> None:
    """Flights F1; nobody is left waiting."""
    (row,) = await open_nodes(hard_timeout=20.0)
    source.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(row, 1)
        await source.began.wait()
        tasks.cancel_scope.cancel()
    assert row._cache.path.flights.waiting == 0
    source.let_go()
    await eventually(lambda: not len(row._cache.path.flights))
    assert (await row.get_with_info(1)).tier == "near"
    assert source.loads == 1


async def test_a_node_that_waits_for_anothers_load_keeps_its_own_time(
    open_nodes, source, grow_old
) -> None:
    """The timeouts hold for the lease of another node as for a load here."""
    row, again = await open_nodes(2, soft_timeout=SOON_S)
    await row(1)
    grow_old("row:1", GRACE_S, row, again)
    source.values[1] = {"n": 11}
    source.hold()
    with anyio.fail_after(20):
        for cached in (row, again):
            assert (await cached.get_with_info(1)).value == {"n": 1}
        source.let_go()
        while (await again.get_with_info(1)).stale:
            await anyio.sleep(0.005)
    assert await again(1) == {"n": 11}
    assert source.loads == 2


async def test_after_an_invalidation_no_late_value_is_served(
    open_nodes, source, grow_old, eventually
) -> None:
    """Flights F2: those who come later join no load from before, and get no old value."""
    (row,) = await open_nodes(soft_timeout=SOON_S)
    await row(1)
    grow_old("row:1", GRACE_S, row)
    source.hold()
    assert await row(1) == {"n": 1}
    await row.invalidate(1)
    source.values[1] = {"n": 11}
    first_gate = source._gate
    source.hold()
    source.let_go()
    assert await row(1) == {"n": 11}
    first_gate.set()
    await eventually(lambda: not len(row._cache.path.flights))
    assert await row(1) == {"n": 11}


async def test_a_timeout_is_held_against_the_nodes_own_lease(make_node, source) -> None:
    """Not against the default: whoever raised cache.lease_ms, as the error advises, is served."""
    patient, hasty = make_node(lease_ms=60_000), make_node(lease_ms=1_000)
    for node in (patient, hasty):
        declare(node, source, hard_timeout=20.0)
    async with patient:
        assert patient.is_running
    with pytest.raises(forebay.ConfigError, match=r"hard_timeout = 20.0 .*lease_ms=1000"):
        await hasty.start()
    assert not hasty.is_running

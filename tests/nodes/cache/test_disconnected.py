"""Reads while Valkey is frozen, dead, full, or refuses: what each policy does."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.schemas.errors import ServerRefused, Unavailable
from support.valkey_server import ValkeyServer

Row = dict[str, int]
LOSSES = ["frozen", "killed"]


@pytest.fixture
def server(make_server) -> ValkeyServer:
    """One of the test's own, to be frozen and killed."""
    made: ValkeyServer = make_server()
    return made


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    @node.cached("row:{id}", **{"ttl": 600.0, "tags": ["rows"], **options})
    async def row(id: int) -> Row | None:
        return await source.get(id)

    return row


async def lose(server: ValkeyServer, node: forebay.Node, loss: str) -> None:
    """Take the server away, and let the promise run out."""
    server.sigstop() if loss == "frozen" else server.kill9()
    with anyio.fail_after(20):
        while node._parts.clock.monotonic() < node._parts.follower.live_until:
            await anyio.sleep(0.01)


async def bring_back(server: ValkeyServer, node: forebay.Node, loss: str) -> None:
    """And wait until the node believes what it hears again."""
    server.sigcont() if loss == "frozen" else server.start()
    with anyio.fail_after(20):
        while node._parts.clock.monotonic() >= node._parts.follower.live_until:
            await anyio.sleep(0.01)


@pytest.mark.parametrize("loss", LOSSES)
async def test_bypass_asks_the_source_and_stores_nothing(
    make_node, source, server, loss: str
) -> None:
    """R5: also for what the near cache had; afterwards all is as before."""
    node = make_node(server, max_staleness_ms=200)
    row = declare(node, source)
    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    async with node:
        await row(1)
        await lose(server, node, loss)
        source.values[1] = {"n": 11}
        hits = [await row.get_with_info(1), await row.get_with_info(2)]
        assert [(hit.value, hit.tier, hit.version) for hit in hits] == [
            ({"n": 11}, "source", 0),
            ({"n": 2}, "source", 0),
        ]
        asked = source.loads
        assert await row(2) == {"n": 2}
        assert source.loads == asked + 1
        await bring_back(server, node, loss)
        assert (await row(2), await row(2)) == ({"n": 2}, {"n": 2})
        assert (await row.get_with_info(2)).tier == "near"
        assert await row(1) == ({"n": 1} if loss == "frozen" else {"n": 11})


async def test_the_near_cache_serves_as_long_as_the_promise_holds(
    make_node, source, server
) -> None:
    """And not a moment longer."""
    node = make_node(server, max_staleness_ms=400)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        server.sigstop()
        follower, clock = node._parts.follower, node._parts.clock
        tiers = []
        with anyio.fail_after(20):
            while "source" not in tiers:
                before, promised = clock.monotonic(), follower.live_until
                tier = (await row.get_with_info(1)).tier
                tiers.append(tier)
                assert tier == "near" or before >= promised or clock.monotonic() >= promised
                assert tier == "source" or before < follower.live_until
                await anyio.sleep(0.01)
        assert "near" in tiers
        server.sigcont()


async def test_a_thousand_callers_while_it_is_away_make_one_load(make_node, source, server) -> None:
    """Flights work without a lease, too."""
    node = make_node(server, max_staleness_ms=60_000)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        server.sigstop()
        source.hold()
        async with anyio.create_task_group() as tasks:
            for _ in range(1_000):
                tasks.start_soon(row, 1)
            await source.began.wait()
            source.let_go()
        assert source.loads == 1
        server.sigcont()


@pytest.mark.parametrize("loss", LOSSES)
async def test_stale_serves_what_it_has_and_says_so(make_node, source, server, loss: str) -> None:
    """R5: what the near cache does not have comes from the source."""
    node = make_node(server, max_staleness_ms=200, on_disconnected="stale")
    row = declare(node, source)
    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    async with node:
        before = await row.get_with_info(1)
        await lose(server, node, loss)
        source.values[1] = {"n": 11}
        hit = await row.get_with_info(1)
        assert (hit.value, hit.tier, hit.stale) == ({"n": 1}, "near", True)
        assert hit.version == before.version
        assert (await row.get_with_info(2)).tier == "source"
        assert node._instruments.counts["cache_requests", "row", "near", "stale"] == 1
        await bring_back(server, node, loss)
        assert await row(1) == ({"n": 1} if loss == "frozen" else {"n": 11})


async def test_stale_never_serves_what_is_known_to_be_wrong(make_node, source, server) -> None:
    """R5: invalidated by key or tag, or past its hard lifetime."""
    node = make_node(server, max_staleness_ms=200, on_disconnected="stale", jitter=0.0)
    row = declare(node, source)

    @node.cached("short:{id}", ttl=0.05, stale_for=0.05)
    async def short(id: int) -> int:
        return id

    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        await short(1)
        await node.invalidate(tags=["rows"])
        await lose(server, node, "frozen")
        source.values[1] = {"n": 2}
        assert await row(1) == {"n": 2}
        assert (await short.get_with_info(1)).tier == "source"
        server.sigcont()


@pytest.mark.parametrize("loss", LOSSES)
async def test_fail_raises_and_asks_nobody(make_node, source, server, loss: str) -> None:
    """R5: for those who would rather have no answer than an old one."""
    node = make_node(server, max_staleness_ms=200, on_disconnected="fail")
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        await lose(server, node, loss)
        for number in (1, 2):
            with pytest.raises(Unavailable):
                await row(number)
        assert source.loads == 1
        await bring_back(server, node, loss)
        assert await row(1) == {"n": 1}


async def test_a_server_that_refuses_is_as_good_as_away(make_node, source, server) -> None:
    """R5: out of memory, it grants no lease; the value comes from the source all the same."""
    node, strict = make_node(server), make_node(server, on_disconnected="fail")
    row, strict_row = declare(node, source), declare(strict, source)
    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    async with node, strict:
        await row(1)
        server.execute("CONFIG", "SET", "maxmemory", "1")
        hit = await row.get_with_info(2)
        assert (hit.value, hit.tier, hit.version) == ({"n": 2}, "source", 0)
        assert await row(1) == {"n": 1}
        with pytest.raises(ServerRefused, match="OOM"):
            await strict_row(2)
        server.execute("CONFIG", "SET", "maxmemory", "0")
        await row(2)
        assert (await row.get_with_info(2)).tier == "near"


async def test_a_server_that_lets_nobody_read_is_as_good_as_away(make_node, source, server) -> None:
    """R5: a right that is missing costs the cache, not the answer."""
    node = make_node(server)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        server.execute("ACL", "SETUSER", "default", "-mget")
        assert await row(1) == {"n": 1}
        assert (await row.get_with_info(1)).tier == "source"
        server.execute("ACL", "SETUSER", "default", "+mget")
        await row(1)
        assert (await row.get_with_info(1)).tier == "near"


async def test_a_value_survives_that_the_server_has_no_room_for(make_node, source, server) -> None:
    """L2: the lease was granted, the fill is refused; the value is returned, the lease is back."""
    node = make_node(server)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(row, 1)
            await source.began.wait()
            server.execute("CONFIG", "SET", "maxmemory", "1")
            source.let_go()
        with anyio.fail_after(20):
            while server.execute("EXISTS", node._parts.names.lease("row:1")):
                await anyio.sleep(0.005)
        server.execute("CONFIG", "SET", "maxmemory", "0")
        assert await row(1) == {"n": 1}
        assert source.loads == 2


async def test_changes_made_while_it_was_frozen_are_seen_afterwards(
    make_node, source, server
) -> None:
    """Nothing that was remembered outlives what was not heard."""
    node, other = make_node(server, max_staleness_ms=200), make_node(server, max_staleness_ms=200)
    row, again = declare(node, source), declare(other, source)
    source.values[1] = {"n": 1}
    async with node, other:
        await row(1)
        await again(1)
        await lose(server, node, "killed")
        source.values[1] = {"n": 2}
        server.start()
        with anyio.fail_after(20):
            while await row(1) != {"n": 2} or await again(1) != {"n": 2}:
                await anyio.sleep(0.01)
        assert (await row.get_with_info(1)).value == {"n": 2}


async def test_a_load_from_before_the_loss_is_not_joined_long_after(
    make_node, source, server
) -> None:
    """Flights F2: an invalidation may have been missed since; the promise holds for joining too."""
    node = make_node(server, max_staleness_ms=100)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    got = []

    async def call() -> None:
        got.append((await row(1))["n"])

    async with node:
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await source.began.wait()
            await lose(server, node, "frozen")
            source.values[1] = {"n": 2}
            first_gate = source._gate
            source.hold()
            tasks.start_soon(call)
            await source.began.wait()
            source.let_go()
            while not got:
                await anyio.sleep(0.01)
            first_gate.set()
        assert got == [2, 1]
        server.sigcont()


async def test_a_node_that_stopped_serves_nothing(make_node, source, server) -> None:
    """And says so; started again, it begins with an empty near cache."""
    node = make_node(server)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        await row(1)
    with pytest.raises(forebay.ForebayError, match="the node is not running"):
        await row(1)
    async with node:
        assert (await row.get_with_info(1)).tier == "shared"
        await row(1)
        assert row._cache.near_hits == 2, "counted over all starts"

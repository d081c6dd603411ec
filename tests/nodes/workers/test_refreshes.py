"""Refresh jobs on a real server: H1-H4, on one node and on several."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.workers.refreshes import Refreshes
from forebay.schemas.jobs import RefreshJob, write_job
from forebay.schemas.settings import Limits, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.workers import SHARDS, Workshop, at_work

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]


class Seats:
    """A cached loader that counts, and can be held or made to fail."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.running = self.running_max = 0
        self.gate = anyio.Event()
        self.gate.set()
        self.error: BaseException | None = None

    def declare(self, node: forebay.Node) -> None:
        async def seat(id: str) -> int:
            self.loads[id] += 1
            self.running += 1
            self.running_max = max(self.running, self.running_max)
            try:
                await self.gate.wait()
                if self.error is not None:
                    raise self.error
                return self.loads[id]
            finally:
                self.running -= 1

        node.cached("seat:{id}", ttl=60, stale_for=60)(seat)


async def queue(shop: Workshop, key: str, *, token: str = "t", lease_ms: int = 60_000) -> None:
    """A job as ``refresh_publish`` leaves it; without a lease if ``lease_ms`` is 0."""
    shard = shop.names.shard(key)
    if lease_ms:
        await shop.link.call("SET", shop.names.lease(key), token, "PX", lease_ms)
    raw = write_job(RefreshJob(cache="seat", key=key, token=token))
    await shop.link.call("XADD", shop.names.part(shard, "refreshes"), "*", "j", raw)


def refreshes_of(shop: Workshop, **options: int) -> Refreshes:
    """Another member of the group, beside the node's own."""
    limits: dict[str, Any] = {"lease_ms": 60_000, "running_max": 100}
    return Refreshes(
        shop.link,
        shop.names,
        shop.parts.routes,
        node_id="other",
        instruments=shop.node._instruments,
        **limits | options,
    )


async def left(shop: Workshop) -> int:
    streams = [shop.names.part(shard, "refreshes") for shard in range(SHARDS)]
    return sum(await shop.link.call_many([("XLEN", name) for name in streams]))


async def ring(shop: Workshop) -> None:
    for shard in range(SHARDS):
        shop.parts.refreshes.bell(shard)


async def test_a_job_is_done_acknowledged_and_gone(open_shop: OpenShop) -> None:
    """The value is filled under the lease of the job; nothing stays in stream or group."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        await queue(shop, "seat:1")
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 1)

        async def gone() -> bool:
            return await left(shop) == 0

        await until(gone)
        assert seats.loads == {"1": 1}
        stream = shop.names.part(shop.names.shard("seat:1"), "refreshes")
        assert (await shop.link.call("XPENDING", stream, "refresh"))[0] == 0
        assert await shop.link.call("EXISTS", shop.names.entry("seat:1")) == 1
        assert await shop.link.call("EXISTS", shop.names.lease("seat:1")) == 0


@asynccontextmanager
async def cluster(url: str, namespace: str, seats: Seats, size: int) -> AsyncIterator[list[Any]]:
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=SHARDS),
        valkey=Valkey(url=url),
        workers=Workers(enabled=True),
    )
    async with anyio.create_task_group() as tasks:
        stop, nodes = anyio.Event(), []

        async def run(*, task_status: Any) -> None:
            node = forebay.Node(settings=settings)
            seats.declare(node)
            async with node:
                nodes.append(node)
                task_status.started()
                await stop.wait()

        for _ in range(size):
            await tasks.start(run)
        yield nodes
        stop.set()


async def test_of_several_nodes_exactly_one_does_a_job(valkey_server: Any, namespace: str) -> None:
    """Three nodes share sixty jobs out; each key is loaded once."""
    seats = Seats()
    keys = [f"seat:{n}" for n in range(60)]
    event = json.dumps({"type": "refresh", "keys": keys})
    async with cluster(valkey_server.socket_url, namespace, seats, 3) as nodes:
        valkey_server.execute("XADD", f"forebay:{namespace}:events", "*", "event", event)
        await until(lambda: sum(n._instruments.counts["refreshes", "done"] for n in nodes) == 60)
    assert set(seats.loads.values()) == {1}
    assert len(seats.loads) == 60


async def test_groups_are_made_once_however_many_begin(open_shop: OpenShop) -> None:
    """Whoever comes second finds the group there, which is as good."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        for shard in range(SHARDS):
            await shop.link.call("DEL", shop.names.part(shard, "refreshes"))
        for n in range(8):
            await queue(shop, f"seat:{n}")
        async with at_work(*[refreshes_of(shop) for _ in range(5)]):
            await until(lambda: shop.counts["refreshes", "done"] == 8)
        assert set(seats.loads.values()) == {1}


async def test_work_goes_on_when_groups_were_deleted(open_shop: OpenShop) -> None:
    """A FLUSHALL takes streams and groups away; the next jobs are done all the same."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        await queue(shop, "seat:1")
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 1)
        for shard in range(SHARDS):
            await shop.link.call("DEL", shop.names.part(shard, "refreshes"))
        await queue(shop, "seat:2")
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 2)


async def test_jobs_of_a_node_that_died_are_dropped_after_the_lease(open_shop: OpenShop) -> None:
    """H1: taken and never acknowledged; young ones are left to whoever has them."""
    async with open_shop() as shop:
        stream = shop.names.part(shop.names.shard("seat:1"), "refreshes")
        await queue(shop, "seat:1")
        await shop.link.call("XGROUP", "CREATE", stream, "refresh", "0")
        read = ("XREADGROUP", "GROUP", "refresh", "died", "STREAMS", stream, ">")
        assert await shop.link.call(*read)
        await refreshes_of(shop, lease_ms=60_000).reclaim()
        assert await left(shop) == 1
        other = refreshes_of(shop, lease_ms=1)

        async def dropped() -> bool:
            await other.reclaim()
            return await left(shop) == 0

        await until(dropped)
        assert shop.counts["refreshes", "expired"] == 1
        assert (await shop.link.call("XPENDING", stream, "refresh"))[0] == 0


@pytest.mark.parametrize("lease_ms", [0, 60_000], ids=["no lease", "another's lease"])
async def test_a_job_without_its_lease_is_dropped_without_a_load(
    open_shop: OpenShop, lease_ms: int
) -> None:
    """H1, H3: the value could not be stored, so the source is not asked."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        await queue(shop, "seat:1", lease_ms=lease_ms)
        if lease_ms:
            await shop.link.call("SET", shop.names.lease("seat:1"), "another", "PX", lease_ms)
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "expired"] == 1)
        assert not seats.loads


@pytest.mark.parametrize("error", [LookupError("no such seat"), asyncio.CancelledError()])
async def test_a_loader_that_fails_is_not_tried_again_and_stops_nobody(
    open_shop: OpenShop, error: BaseException
) -> None:
    """H2: also if it lets a cancellation out that nobody asked for."""
    seats = Seats()
    seats.error = error
    async with open_shop(declare=seats.declare) as shop:
        await queue(shop, "seat:1")
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "failed"] == 1)

        async def gone() -> bool:
            return await left(shop) == 0

        await until(gone)
        assert seats.loads == {"1": 1}
        seats.error = None
        await queue(shop, "seat:2")
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 1)


async def test_no_more_run_at_a_time_than_set(valkey_server: Any, namespace: str) -> None:
    """H3: the others wait their turn."""
    seats = Seats()
    seats.gate = anyio.Event()
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=SHARDS),
        valkey=Valkey(url=valkey_server.socket_url),
        workers=Workers(enabled=True),
        limits=Limits(loads_max=3),
    )
    node = forebay.Node(settings=settings)
    seats.declare(node)
    async with node:
        event = json.dumps({"type": "refresh", "keys": [f"seat:{n}" for n in range(30)]})
        await node.publish([event.encode()])
        await until(lambda: seats.running == 3)
        await anyio.wait_all_tasks_blocked()
        assert seats.running == 3
        seats.gate.set()
        await until(lambda: sum(seats.loads.values()) == 30)
        assert seats.running_max == 3


@pytest.mark.parametrize(
    "fields", [["j", b"\xc1"], ["x", "y"], ["j", b""], ["j", b"\x91" * 100_000]]
)
async def test_what_is_no_job_is_dropped_and_the_next_is_done(
    open_shop: OpenShop, fields: list[Any]
) -> None:
    """H4: whatever somebody put into the stream."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        shard = shop.names.shard("seat:1")
        await shop.link.call("XADD", shop.names.part(shard, "refreshes"), "*", *fields)
        await queue(shop, "seat:1")
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 1)
        assert shop.counts["refreshes", "undecodable"] == 1


async def test_a_job_for_an_unknown_cache_is_dropped(open_shop: OpenShop) -> None:
    """H4: another application's, or one of before; it stays in nobody's way."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        raw = write_job(RefreshJob(cache="rows", key="row:1", token="t"))
        await shop.link.call("XADD", shop.names.part(0, "refreshes"), "*", "j", raw)
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "unknown_cache"] == 1)


async def test_a_stream_that_is_something_else_stops_no_other(open_shop: OpenShop) -> None:
    """H4: the jobs of the other shards are done, also those taken in the same breath."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        keys = [shop.key(shard, "seat:") for shard in range(SHARDS)]
        await shop.link.call("DEL", shop.names.part(1, "refreshes"))
        await shop.link.call("SET", shop.names.part(1, "refreshes"), "x")
        for shard in (0, 2, 3):
            await queue(shop, keys[shard])
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 3)
        await shop.link.call("DEL", shop.names.part(1, "refreshes"))
        await queue(shop, keys[1])
        await ring(shop)
        await until(lambda: shop.counts["refreshes", "done"] == 4)


async def test_consumers_do_not_pile_up(open_shop: OpenShop) -> None:
    """The server never forgets a consumer, so however many nodes come and go it is one."""
    seats = Seats()
    async with open_shop(declare=seats.declare) as shop:
        for n in range(3):
            await queue(shop, f"seat:{n}")
            async with at_work(refreshes_of(shop)):
                await until(lambda n=n: shop.counts["refreshes", "done"] == n + 1)
        for shard in range(SHARDS):
            stream = shop.names.part(shard, "refreshes")
            assert len(await shop.link.call("XINFO", "CONSUMERS", stream, "refresh")) <= 1

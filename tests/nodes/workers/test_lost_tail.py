"""A server that comes back without its last accepted writes: a lost tail, a failover."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import forebay
from conftest import MakeServer
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer
from support.workers import Table, Workshop, at_work, write

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]

PERSISTENT = {"appendonly": "yes", "appendfsync": "always"}
TTL_S = 20


@asynccontextmanager
async def service(
    url: str, namespace: str, *tables: Table, **workers: int
) -> AsyncIterator[tuple[forebay.Node, Any]]:
    """A node with workers and one shard; the first table is behind the cache that is given."""
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=1),
            valkey=Valkey(url=url, reconnect_jitter_ms=20),
            workers=Workers(**{"flush_delay_ms": 0} | workers),
        )
    )
    for table in tables:
        node.sink(f"{table.name}:{{id}}", table)

    @node.cached(f"{tables[0].name}:{{id}}", ttl=TTL_S)
    async def price(id: int) -> int | None:
        return tables[0].values().get(f"{tables[0].name}:{id}")

    async with node:
        yield node, price


def log_of(server: ValkeyServer) -> Path:
    (found,) = (server.directory / "appendonlydir").glob("*.incr.aof")
    return found


def lose_tail(server: ValkeyServer, size: int) -> None:
    """Simulate a power loss that takes all writes after the file had this size."""
    server.kill9()
    with log_of(server).open("r+b") as log:
        log.truncate(size)
    server.start()


async def nothing_waits(node: forebay.Node) -> None:
    writes = node._parts.names.part(0, "writes")
    await until(_answered(node, lambda: node._parts.backend.link.call("XLEN", writes), 0))


def _answered(
    node: forebay.Node, ask: Callable[[], Awaitable[Any]], wanted: object
) -> Callable[[], Awaitable[bool]]:
    async def found() -> bool:
        try:
            return bool(await ask() == wanted)
        except forebay.ForebayError:
            return False  # it is not back yet

    return found


async def ends(node: forebay.Node, key: str) -> bool:
    """Whether the entry is gone, or is going to expire."""
    return bool(await node._parts.backend.link.call("PTTL", node._parts.names.entry(key)) != -1)


@pytest.mark.parametrize("sinks", [1, 2])
async def test_a_lost_tail_pins_nothing(
    make_server: MakeServer, namespace: str, sinks: int
) -> None:
    """The worker follows the checkpoint back; rows in the sink are not served as older."""
    server = make_server(config=PERSISTENT)
    table, other = Table("p"), Table("q")
    async with service(server.url, namespace, *(table, other)[:sinks]) as (node, price):
        await price.write_behind(1, 0)
        await nothing_waits(node)  # so that there is a checkpoint
        table.hang_at = len(table.batches) + 1
        await price.write_behind(1, 2)
        await table.hanging.wait()
        size = log_of(server).stat().st_size
        table.go_on.set()
        await nothing_waits(node)
        await price.write_behind(1, 3)
        await nothing_waits(node)
        assert table.values() == {"p:1": 3}
        lose_tail(server, size)
        await nothing_waits(node)
        assert await ends(node, "p:1")
        assert await price(1) == 3
        await price.write_behind(2, 4)
        await nothing_waits(node)
        assert table.values() == {"p:1": 3, "p:2": 4}
        assert await ends(node, "p:2")


async def test_an_epoch_that_the_sink_has_seen_the_end_of_is_left(open_shop: OpenShop) -> None:
    """The server lost that another was the owner in between; the sink knows a later epoch."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        table.epochs[0] = owner.tenures[0].epoch + 1
        ids = await shop.publish(write(shop.key(0), 1))
        async with at_work(shop.ingress(owner), shop.write_behind(owner)):
            await shop.applied(ids[-1])
            await until(lambda: 0 not in owner.tenures)
            await owner.beat()
            await shop.sunk()
        assert table.values() == {shop.key(0): 1}
        assert owner.tenures[0].epoch == table.epochs[0]

"""Ingress and write-behind empty their streams also when the server's memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import valkey

import forebay
from forebay.nodes.workers.applier import allowance
from forebay.schemas.errors import ServerRefused
from forebay.schemas.keys import EVENTS
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.eventually import until, wait_until
from support.node_process import NodeProcess
from support.valkey_server import ValkeyServer
from support.workers import SHARDS, Table, Workshop, at_work, invalidate, workshop, write

LIMIT = 6 * 1_048_576
PADDING = "x" * 1_000  # is not compressed
NEWER = b'{"type": "dev.forebay.cache.write.v2", "key": "flight:1"}'
REFUSED = b'{"type": "explode", "keys": ["a"]}'
STRAY = b'{"type": "write", "key": "nobody:1", "value": 1}'


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    config = {"maxmemory": str(LIMIT), "maxmemory-policy": "noeviction"}
    with ValkeyServer(config=config) as server:
        yield server


def fill(server: ValkeyServer, stream: str, key: str = "flight:{}", value: object = PADDING) -> int:
    """Publish writes as any program does, until the server refuses; how many it took."""
    with valkey.Valkey(unix_socket_path=server.socket_path) as client:
        for number in range(100_000):
            try:
                client.xadd(stream, {"event": write(key.format(number), value)})
            except valkey.OutOfMemoryError:
                return number
    raise AssertionError("the memory is not full")


def beyond_limit(server: ValkeyServer) -> int:
    info = dict(
        line.split(":", 1)
        for line in server.execute("INFO", "memory").decode().split()
        if ":" in line
    )
    return int(info["used_memory"]) - int(info["mem_not_counted_for_evict"]) - LIMIT


async def drained(shop: Workshop) -> None:
    async def is_empty() -> bool:
        return not await shop.link.call("XLEN", shop.names.events)

    await until(is_empty)
    await shop.sunk()


async def test_what_was_published_until_memory_was_full_is_applied(
    server: ValkeyServer, namespace: str
) -> None:
    """Every write reaches the sink once, in a namespace that no node had before."""
    count, table = fill(server, f"forebay:{namespace}:events"), Table()
    async with workshop(server, namespace, sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        async with at_work(shop.ingress(owner), shop.write_behind(owner)):
            await drained(shop)
        assert await shop.dead() == []
    assert len(table.rows) == len(table.stored) == count


async def test_events_of_every_kind_pass_when_memory_is_full(
    server: ValkeyServer, namespace: str
) -> None:
    """Invalidations, refused events, events of newer versions, writes to no sink, and poison."""
    stream, table = f"forebay:{namespace}:events", Table()
    table.poison = {"poison"}
    async with workshop(server, namespace, sinks={"flight:{id}": table}) as shop:
        odd = [invalidate("a"), invalidate("b", tags=["t"]), REFUSED, STRAY, NEWER]
        await shop.publish(*odd, write("flight:poison", "poison"), invalidate("c", soft=True))
        fill(server, stream)
        owner = await shop.ownership()
        async with at_work(shop.ingress(owner), shop.write_behind(owner)):
            await drained(shop)
        assert [each["reason"] for each in await shop.dead()] == [b"unknown_type"]
        held = [await shop.link.call("XLEN", shop.names.part(n, "held")) for n in range(SHARDS)]
        assert sum(held) == 1  # the write that no sink takes
        assert len(await shop.entries(EVENTS, "held")) == 1
        assert len(await shop.dead(shop.names.shard("flight:poison"))) == 1


async def test_what_is_added_beyond_the_limit_is_bounded(
    server: ValkeyServer, namespace: str
) -> None:
    """While the sink hangs, ingress pauses at the allowance; then it continues."""
    count, table = fill(server, f"forebay:{namespace}:events"), Table()
    table.hang_at = 1
    async with workshop(server, namespace, sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        async with at_work(shop.ingress(owner), shop.write_behind(owner)):
            await until(lambda: beyond_limit(server) > allowance(LIMIT) // 2)
            refused = shop.counts["limit_reached", "memory"]
            await until(lambda: shop.counts["limit_reached", "memory"] > refused + 20)
            length = await shop.link.call("XLEN", shop.names.events)
            assert 0 < length <= count
            # Work under way at once, and connections, come on top.
            assert 0 < beyond_limit(server) < allowance(LIMIT) + 2 * 1_048_576
            table.go_on.set()
            await drained(shop)
    assert len(table.rows) == count


async def test_what_is_refused_is_named(server: ValkeyServer, namespace: str) -> None:
    """With the operation, the reason and the remedy; an invalidation is not refused."""
    settings = Settings(
        node=NodeSettings(namespace=namespace), valkey=Valkey(url=server.socket_url)
    )
    node = forebay.Node(settings=settings)

    @node.cached("flight:{id}", ttl=60)
    async def flight(id: int) -> str:
        return "loaded"

    async with node:
        server.execute("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(ServerRefused, match=r"event_publish: OOM .*; raise maxmemory"):
            await node.publish([{"type": "invalidate", "keys": ["flight:1"]}])
        with pytest.raises(ServerRefused, match=r"entry_put: OOM .*; raise maxmemory"):
            await flight.put(1, "value")
        await node.invalidate(["flight:1"])


def test_a_worker_starts_on_a_full_server(server: ValkeyServer, tmp_path: Path) -> None:
    """`forebay run`, where no node of the namespace has ever been."""
    count = fill(
        server, "forebay:shop:events", "product:{}", {"id": 1, "price": 2, "note": PADDING}
    )
    with NodeProcess(tmp_path, valkey__url=server.url) as node:
        wait_until(lambda: not server.execute("XLEN", "forebay:shop:events"))
        wait_until(lambda: (tmp_path / "sunk.jsonl").read_bytes().count(b"\n") == count)
        assert node.get("/livez").status == 200

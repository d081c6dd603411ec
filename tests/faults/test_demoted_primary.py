"""A primary that is demoted behind an address that moves, and connections that stay."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

import forebay
from conftest import MakeServer
from forebay.schemas.settings import CacheDefaults, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer, free_port
from support.workers import Table

from .relay import Relay

STALENESS_MS = 500


class Pair:
    """A primary and its replica behind one address."""

    def __init__(self, make_server: MakeServer) -> None:
        config = {"repl-diskless-sync-delay": "0"}
        self.first, self.second = make_server(config=config), make_server(config=config)
        replicate(self.second, self.first.port)
        self.relay = Relay(self.first.port)

    def fail_over(self, *, move: bool = True, cut: bool = False) -> None:
        """The second is promoted; the first is a replica that has lost its primary."""
        self.second.execute("REPLICAOF", "NO", "ONE")
        self.first.execute("REPLICAOF", "127.0.0.1", free_port())
        if move:
            self.move(cut=cut)

    def move(self, *, cut: bool = False) -> None:
        self.relay.lead(self.second.port, cut=cut)


def replicate(server: ValkeyServer, port: int) -> None:
    """Return when it has all that the other has."""
    server.execute("REPLICAOF", "127.0.0.1", port)
    for _ in range(2_000):
        if b"master_link_status:up" in server.execute("INFO", "replication"):
            return
        time.sleep(0.005)
    raise AssertionError("the replica does not follow")


@pytest.fixture
def pair(make_server: MakeServer) -> Iterator[Pair]:
    made = Pair(make_server)
    with made.relay:
        yield made


@asynccontextmanager
async def service(
    url: str, namespace: str, table: Table, **valkey: Any
) -> AsyncIterator[tuple[forebay.Node, Any]]:
    options = {"reconnect_jitter_ms": 20, "reconnect_max_ms": 100, "breaker_recovery_ms": 100}
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=4),
            valkey=Valkey(url=url, **(options | valkey)),
            cache=CacheDefaults(max_staleness_ms=STALENESS_MS),
            workers=Workers(flush_delay_ms=0),
        )
    )
    node.sink("p:{id}", table)

    @node.cached("p:{id}", ttl=60)
    async def price(id: int) -> int | None:
        return table.values().get(f"p:{id}")

    async with node:
        yield node, price


async def accepted(price: Any, id: int, value: int) -> None:
    """Put until it is accepted: a put refused as READONLY was not carried out."""

    async def put() -> bool:
        try:
            await price.put(id, value)
        except forebay.ForebayError:
            return False
        return True

    await until(put)


def failing(node: forebay.Node) -> dict[str, str]:
    return {each.name: each.detail for each in node.checks() if each.state == "fail"}


async def test_every_connection_follows_an_address_that_moved(pair: Pair, namespace: str) -> None:
    """Writes, notices of others, events and sinks: all go by way of the new primary."""
    table = Table()
    async with (
        service(pair.relay.url("one"), namespace, table) as (node, price),
        service(pair.relay.url("two"), namespace, table) as (_, other),
    ):
        await price.put(1, 1)
        assert await other(1) == 1
        pair.fail_over()
        await accepted(price, 1, 2)
        await until(lambda: not failing(node))
        assert await price(1) == 2
        assert pair.second.execute("GET", node._parts.names.entry("p:1"))
        await accepted(other, 1, 3)
        await until(lambda: reads(price, 1, 3))
        assert node._parts.backend.pubsub.live
        clients = pair.first.execute("CLIENT", "LIST").decode().splitlines()
        assert [line for line in clients if "name=forebay-" in line] == []
        await price.write_behind(2, 4)
        await node.publish([forebay_event("p:3", 5)])
        await until(lambda: table.values() == {"p:2": 4, "p:3": 5})


async def reads(price: Any, id: int, value: int) -> bool:
    return bool(await price(id) == value)


def forebay_event(key: str, value: int) -> Any:
    return {"type": "write", "key": key, "value": value}


async def test_near_hits_are_suspect_while_a_replica_answers(pair: Pair, namespace: str) -> None:
    """A replica that is cut off answers reads, but its answers do not prove currency."""
    async with service(pair.relay.url("one"), namespace, Table()) as (node, price):
        await price.put(1, 1)
        assert await price(1) == 1
        pair.fail_over(move=False)
        await until(lambda: "valkey" in failing(node))
        assert "replica" in failing(node)["valkey"]
        await until(lambda: node._parts.follower.live_until < anyio.current_time())
        await until(lambda: node._parts.backend.link.breaker.state != "closed")
        pair.move()
        await accepted(price, 1, 2)
        await until(lambda: not failing(node))


async def test_a_replica_at_the_address_is_not_dialed_all_the_time(
    pair: Pair, namespace: str
) -> None:
    """Each connection has its backoff, up to ``reconnect_max_ms``."""
    url = pair.relay.url("one")
    async with service(url, namespace, Table(), reconnect_max_ms=1_000) as (node, _):
        pair.fail_over(move=False)
        await until(lambda: "valkey" in failing(node))
        before, began = pair.relay.accepted, anyio.current_time()
        await anyio.sleep(1.0)
        seconds = anyio.current_time() - began
        # Three connections: six tries to get to a second, and two each second from then on.
        assert pair.relay.accepted - before < 3 * (6 + 2 * seconds)


async def test_a_failover_to_a_replica_that_lags_pins_nothing(pair: Pair, namespace: str) -> None:
    """As for a lost tail: rows already in the sink are not served as older, nor stranded."""
    table = Table()
    async with service(pair.relay.url("one"), namespace, table) as (node, price):
        await price.write_behind(1, 0)
        await until(lambda: table.values() == {"p:1": 0})
        table.hang_at = len(table.batches) + 1
        await price.write_behind(1, 2)
        await table.hanging.wait()
        while (
            pair.second.execute("XLEN", writes := node._parts.names.part(shard(node), "writes")) < 1
        ):
            await anyio.sleep(0.005)
        pair.second.execute("REPLICAOF", "NO", "ONE")  # it gets nothing from now on
        table.go_on.set()
        await until(lambda: pair.first.execute("XLEN", writes) == 0)
        await price.write_behind(1, 3)
        await until(lambda: table.values() == {"p:1": 3})
        pair.first.kill9()
        pair.move(cut=True)
        await until(lambda: pair.second.execute("XLEN", writes) == 0)
        assert pair.second.execute("PTTL", node._parts.names.entry("p:1")) != -1
        await until(lambda: reads_or_fails(price, 1, 3))


async def reads_or_fails(price: Any, id: int, value: int) -> bool:
    try:
        return await reads(price, id, value)
    except forebay.ForebayError:
        return False


def shard(node: forebay.Node) -> int:
    return node._parts.names.shard("p:1")

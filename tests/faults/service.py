"""Two whole nodes of one application, and proof that shards work in which nothing is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import msgspec

import forebay
from forebay.schemas.keys import Names
from forebay.schemas.settings import Durable, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer
from support.workers import Table

SHARDS = 4
PLANTED = (0, 1)  #: shards in which records are planted


def lock_of(names: Names, shard: int) -> str:
    return next(f"lock-{n}" for n in range(1_000) if names.shard(f"lock-{n}") == shard)


def subject_of(names: Names, shard: int) -> str:
    return next(f"user-{n}" for n in range(1_000) if names.shard(f"user-{n}") == shard)


class Service:
    """Two nodes of one application, and how late their loop has been."""

    def __init__(self, server: ValkeyServer, namespace: str) -> None:
        self.settings = Settings(
            node=NodeSettings(namespace=namespace, shards=SHARDS),
            valkey=Valkey(url=server.socket_url),
            workers=Workers(enabled=True, beat_ms=100, flush_delay_ms=0),
            durable=Durable(),
        )
        self.table = Table()
        self.source: dict[str, int] = {}
        self.nodes: list[forebay.Node] = []
        self.items: list[Any] = []
        self.late_s = 0.0

    def make(self) -> forebay.Node:
        node = forebay.Node(settings=self.settings)

        @node.cached("item:{id}", ttl=60)
        async def item(id: str) -> int:
            return self.source.get(id, 0)

        node.sink("row:{id}", self.table)
        self.nodes.append(node)
        self.items.append(item)
        return node

    async def watch(self) -> None:
        while True:
            began = anyio.current_time()
            await anyio.sleep(0.01)
            self.late_s = max(self.late_s, anyio.current_time() - began)


async def works(service: Service, number: int, *, events: bool = True) -> None:
    """Reads, invalidations, events, writes and locks of shards in which nothing was planted."""
    node, other = service.nodes[:2]
    names = node._parts.names
    shard = next(n for n in range(SHARDS) if n not in PLANTED)
    key = next(f"item:{n}" for n in range(1_000) if names.shard(f"item:{n}") == shard)
    row = next(f"row:{n}" for n in range(1_000) if names.shard(f"row:{n}") == shard)
    item_id = key.partition(":")[2]
    with anyio.fail_after(20):
        service.source[item_id] = number
        await node.invalidate([key])
        for item in service.items[:2]:

            async def is_new(item: Callable[..., Any] = item) -> bool:
                return bool(await item(item_id) == number)

            await until(is_new)
        event = {"type": "write", "key": row, "value": number}
        if events:
            await other.publish([msgspec.json.encode(event)])
            await until(lambda: service.table.rows.get(row, (0, -1))[1] == number)
        async with node.lock(lock_of(names, shard), timeout=10):
            pass
        assert await other.limit("api", rate=1_000, per=1).take(subject_of(names, shard))

"""Nodes of one namespace in two databases of one server: they share keys and channels of none.

Pub/sub knows no databases, so the number of one that is not 0 is part of every channel's name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import anyio
import pytest

import forebay
from forebay.schemas.errors import SourceFailing
from forebay.schemas.keys import Names
from forebay.schemas.settings import CacheDefaults, NodeSettings, Settings, Valkey
from support.eventually import until
from support.valkey_server import ValkeyServer

SHARDS = 4


class Shop:
    """A node in one database, and the loads of its cache."""

    def __init__(self, url: str, namespace: str) -> None:
        self.node = forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=namespace, shards=SHARDS),
                valkey=Valkey(url=url),
                cache=CacheDefaults(breaker_failures=1),
            )
        )
        self.is_down = False

        @self.node.cached("item:{id}", ttl=60)
        async def item(id: int) -> int:
            if self.is_down:
                raise OSError("the source is down")
            return id

        self.item = item

    @property
    def names(self) -> Names:
        return self.node._parts.names


@pytest.fixture
async def shops(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[list[Shop]]:
    """Two nodes in database 0, two in database 3; the namespace is the same."""
    async with AsyncExitStack() as stack:
        made = []
        for database in (0, 0, 3, 3):
            shop = Shop(f"{valkey_server.socket_url}?db={database}", namespace)
            await stack.enter_async_context(shop.node)
            made.append(shop)
        yield made


async def test_a_failing_source_is_failing_in_its_database_only(shops: list[Shop]) -> None:
    """An invalidation in database 3 reaches the nodes of database 3 only."""
    plain, _, broken, beside = shops
    broken.is_down = beside.is_down = True
    with pytest.raises(OSError, match="source is down"):
        await broken.item(1)

    async def refused() -> bool:
        try:
            await beside.item(2)
        except SourceFailing:
            return True
        except OSError:
            return False
        return False

    await until(refused)
    assert [await plain.item(number) for number in range(20)] == list(range(20))


async def test_members_and_explanations_are_of_the_database(shops: list[Shop]) -> None:
    """Each database has two processes that share its limits, and two nodes that explain."""
    for shop in shops:
        await shop.item(1)
        headcount = shop.node._parts.member_count
        await headcount.look()
        assert headcount.count == 2
        told = await shop.node.explain("item:1")
        assert len(told.nodes.answers) == 2


async def test_refunds_are_told_in_the_database_only(
    shops: list[Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens returned in database 3 change no local tokens in database 0."""
    plain, _, giving, beside = shops
    heard: dict[int, list[bytes]] = {0: [], 3: []}
    for shop in (plain, beside):
        names = shop.names
        own = heard[names.database]

        def listen(channel: bytes, payload: bytes, own: list[bytes] = own) -> None:
            if channel.endswith(b":limits") and payload != b"x-probe":
                own.append(payload)

        shop.node._parts.backend.pubsub.on_message(listen)
    limit = giving.node.limit("api", rate=10, per=1, burst=10)
    assert await limit.take("tenant")
    await limit.refund("tenant")
    await until(lambda: heard[3] != [])
    await _round_trip(plain)
    assert heard[0] == []


async def test_locks_are_handed_over_within_the_database(shops: list[Shop]) -> None:
    """A waiter wakes in its own database; the same name in the other database is another lock."""
    plain, _, first, second = shops
    async with plain.node.lock("rebuild", lease=10), anyio.create_task_group() as tasks:
        holder = await first.node.lock("rebuild", lease=10).acquire()
        waiting = second.node.lock("rebuild", lease=10, timeout=10)
        took_s = 0.0

        async def wait() -> None:
            nonlocal took_s
            began = anyio.current_time()
            async with waiting:
                took_s = anyio.current_time() - began

        tasks.start_soon(wait)
        await until(lambda: second.node._parts.locks.statistics().waiting == 1)
        await holder.release()
    assert took_s < 10
    for shop in (first, plain):
        wake = f"{shop.names.wake}{shop.names.process('x')}"
        assert wake.startswith(f"forebay:{shop.names.namespace}:wake:")
        assert ("db3" in wake) == (shop is first)


async def test_no_channel_is_used_by_two_databases(
    shops: list[Shop], valkey_server: ValkeyServer
) -> None:
    """Every channel of the namespace has subscribers of one database only."""
    pattern = f"forebay:{shops[0].names.namespace}:*"
    channels = {
        bytes(each).decode() for each in valkey_server.execute("PUBSUB", "CHANNELS", pattern)
    }
    of_third = {each for each in channels if ":db3" in each}
    assert {each.replace(":db3", "", 1) for each in of_third if ":wake:" not in each} <= channels
    for channel in channels:
        if ":wake:" not in channel:
            (_, listeners) = valkey_server.execute("PUBSUB", "NUMSUB", channel)
            assert listeners == 2, channel


async def _round_trip(shop: Shop) -> None:
    """Wait until earlier messages have arrived."""
    parts = shop.node._parts
    arrived = anyio.Event()

    def listen(channel: bytes, payload: bytes) -> None:
        if payload == b"x-probe":
            arrived.set()

    parts.backend.pubsub.on_message(listen)
    await parts.backend.link.call("PUBLISH", shop.names.limits, b"x-probe")
    with anyio.fail_after(20):
        await arrived.wait()

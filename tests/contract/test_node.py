"""The whole way through ``forebay.Node``, two nodes of one namespace, on every kind of backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
import pytest
from msgspec import Struct

import forebay
from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.entry import read_entry
from forebay.schemas.errors import InvalidEvent
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until

SHARDS = 8


class Product(Struct, frozen=True):
    id: int
    price: int


class Shop:
    """A node with what a small service declares on it. ``prices`` stands for the database."""

    def __init__(self, name: str, namespace: str, valkey: Valkey, prices: dict[int, int]) -> None:
        self.loads: list[int] = []
        self.stored: list[tuple[str, Product | None]] = []
        self.error: Exception | None = None
        self.gate = anyio.Event()
        self.gate.set()
        self.prices = prices
        self.node = node = forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=namespace, id=name, shards=SHARDS),
                valkey=valkey,
                workers=Workers(ownership_ttl_ms=1_000, beat_ms=100, flush_delay_ms=0),
            )
        )

        @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
        async def product(id: int) -> Product | None:
            self.loads.append(id)
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            return Product(id, prices[id]) if id in prices else None

        @node.sink("product:{id}")
        async def save(writes: list[forebay.Write[Product]]) -> None:
            self.stored += [(write.key, write.value) for write in writes]
            self.prices |= {write.value.id: write.value.price for write in writes if write.value}

        self.product = product

    async def price(self, number: int) -> int:
        found = await self.product(number)
        assert found is not None
        return found.price


MakeShop = Callable[..., Awaitable[Shop]]


@pytest.fixture
async def opened(backend_settings: Valkey, namespace: str) -> AsyncIterator[MakeShop]:
    """``await opened("a")``: a shop whose node runs; all share one database of prices."""
    prices = {1: 10, 2: 20, 3: 30}
    async with AsyncExitStack() as stack:

        async def open_shop(name: str, *, workers: bool = False) -> Shop:
            shop = Shop(name, namespace, backend_settings, prices)
            await shop.node.start(workers=workers)
            stack.push_async_exit(shop.node)
            return shop

        yield open_shop


@pytest.fixture
async def shops(opened: MakeShop) -> tuple[Shop, Shop]:
    return await opened("a", workers=True), await opened("b")


def shards_owned(shop: Shop) -> int:
    crew = shop.node._parts.crew
    return 0 if crew is None else crew.ownership.statistics().owned


async def waiting(shop: Shop) -> int:
    """Write-behind jobs that are not done."""
    parts = shop.node._parts
    lengths = await parts.backend.link.call_many(
        [("XLEN", parts.names.part(shard, "writes")) for shard in range(SHARDS)]
    )
    return sum(lengths)


# Reading


async def test_a_value_is_loaded_once_then_near_then_shared(shops: tuple[Shop, Shop]) -> None:
    """The first read loads; the next is near; the other node has it from the shared tier."""
    a, b = shops
    tiers = [(await shop.product.get_with_info(1)).tier for shop in (a, a, b, b)]
    assert tiers == ["source", "near", "shared", "near"]
    assert (a.loads, b.loads) == ([1], [])
    assert await a.price(1) == await b.price(1) == 10


async def test_many_callers_on_two_nodes_make_one_load(shops: tuple[Shop, Shop]) -> None:
    """Single flight, in the process and in the cluster."""
    a, b = shops
    for shop in shops:
        shop.gate = anyio.Event()
    got: list[int] = []

    async def read(shop: Shop) -> None:
        got.append(await shop.price(1))

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(read, a)
            tasks.start_soon(read, b)

        async def loading() -> bool:
            return bool(a.loads or b.loads)

        await until(loading)
        for shop in shops:
            shop.gate.set()
    assert got == [10] * 100
    assert len(a.loads + b.loads) == 1


async def test_what_is_not_there_is_remembered_too(shops: tuple[Shop, Shop]) -> None:
    """A known absence is an entry like any other, and can be invalidated."""
    a, b = shops
    assert await a.product(9) is None
    assert await b.product(9) is None
    assert (a.loads, b.loads) == ([9], [])
    a.prices[9] = 90
    await b.product.invalidate(9)
    assert await b.price(9) == 90


async def test_an_error_of_the_loader_is_stored_nowhere(shops: tuple[Shop, Shop]) -> None:
    """Each caller gets it; the next call tries again, on this node or another."""
    a, b = shops
    for shop in shops:
        shop.error = ConnectionError("the database is away")
    for shop in (a, a, b):
        with pytest.raises(ConnectionError):
            await shop.product(2)
    for shop in shops:
        shop.error = None
    assert await b.price(2) == await a.price(2) == 20
    assert (a.loads, b.loads) == ([2, 2], [2, 2])


# Invalidating


async def test_an_invalidation_holds_here_at_once_and_elsewhere_soon(
    shops: tuple[Shop, Shop],
) -> None:
    """On the node that asked for it before it returns, on the others by the log."""
    a, b = shops
    for shop in shops:
        assert await shop.price(1) == 10
    a.prices[1] = 11
    await a.product.invalidate(1)
    assert await a.price(1) == 11

    async def seen() -> bool:
        return await b.price(1) == 11

    await until(seen)
    assert (a.loads, b.loads) == ([1, 1], [])


async def test_a_tag_invalidates_all_that_carries_it(shops: tuple[Shop, Shop]) -> None:
    """On every node, whatever hangs on it; what is loaded afterwards holds again."""
    a, b = shops
    for number in (1, 2, 3):
        await a.price(number)
        await b.price(number)
    a.prices.update({1: 11, 2: 21, 3: 31})
    await b.node.invalidate(tags=["catalog"])
    assert [await b.price(number) for number in (1, 2, 3)] == [11, 21, 31]

    async def seen() -> bool:
        return [await a.price(number) for number in (1, 2, 3)] == [11, 21, 31]

    await until(seen)
    assert (a.loads, b.loads) == ([1, 2, 3], [1, 2, 3])
    tiers = {(await shop.product.get_with_info(1)).tier for shop in shops}
    assert tiers == {"near"}


async def test_a_stale_value_is_served_while_it_is_refreshed(shops: tuple[Shop, Shop]) -> None:
    """Nobody waits for the refresh, which one of the nodes does as a job."""
    a, b = shops
    await a.price(1)
    await b.price(1)
    a.prices[1] = 11
    for shop in shops:
        shop.gate = anyio.Event()
    await a.node.invalidate(["product:1"], soft=True)
    stale = await a.product.get_with_info(1)
    assert stale.stale
    assert stale.value == Product(1, 10)
    for shop in shops:
        shop.gate.set()

    async def refreshed() -> bool:
        return await a.price(1) == 11 and await b.price(1) == 11

    await until(refreshed)
    assert len(a.loads + b.loads) == 2


# Writing behind


async def test_a_write_behind_is_seen_at_once_and_stored_soon(shops: tuple[Shop, Shop]) -> None:
    """The entry first, then the sink, then the checkpoint; nothing is left waiting."""
    a, b = shops
    await b.price(1)
    await a.product.write_behind(1, Product(1, 99))
    assert await a.price(1) == 99

    async def seen() -> bool:
        return await b.price(1) == 99

    async def stored() -> bool:
        return bool(a.stored) and not await waiting(a)

    await until(seen)
    await until(stored)
    assert a.stored[-1] == ("product:1", Product(1, 99))
    assert b.stored == []
    parts = a.node._parts
    raw = await parts.backend.link.call("GET", parts.names.entry("product:1"))
    assert read_entry(raw, bytes_max=1_000).pending == 0
    assert (await b.product.get_with_info(1)).tier == "near"


async def test_writes_of_a_key_are_stored_in_their_order(shops: tuple[Shop, Shop]) -> None:
    """Whichever node wrote them; some may be left out for newer ones, never the last."""
    a, b = shops
    for price in range(100, 140):
        await (a, b)[price % 2].product.write_behind(1, Product(1, price))

    async def stored() -> bool:
        return bool(a.stored) and a.stored[-1][1] == Product(1, 139)

    await until(stored)
    prices = [value.price for _, value in a.stored if value is not None]
    assert prices == sorted(set(prices))


async def test_the_workers_share_and_hand_over(opened: MakeShop) -> None:
    """Two workers have a fair share each; who stops leaves its part to the other."""
    a, b = await opened("a", workers=True), await opened("b", workers=True)

    async def shared() -> bool:
        return (shards_owned(a), shards_owned(b)) in ((5, 4), (4, 5))

    await until(shared)
    assert await b.node.drain()

    async def handed_over() -> bool:
        return shards_owned(a) == SHARDS + 1

    await until(handed_over)
    for number in range(20):
        await b.product.write_behind(number, Product(number, number))

    async def stored() -> bool:
        return len({key for key, _ in a.stored}) == 20

    await until(stored)
    assert b.stored == []


# Events


async def test_published_events_are_applied_on_every_node(shops: tuple[Shop, Shop]) -> None:
    """An invalidation, a tag, a write: from any node, in the order published."""
    a, b = shops
    for number in (1, 2, 3):
        await a.price(number)
        await b.price(number)
    a.prices[1], a.prices[2] = 11, 21
    await b.node.publish(
        [
            b'{"type": "invalidate", "keys": ["product:1"]}',
            b'{"type": "invalidate", "tags": ["catalog"]}',
            b'{"type": "write", "key": "product:3", "value": {"id": 3, "price": 33}}',
        ]
    )

    async def applied() -> bool:
        return [[await shop.price(number) for number in (1, 2, 3)] for shop in shops] == [
            [11, 21, 33]
        ] * 2

    await until(applied)

    async def stored() -> bool:
        return a.stored == [("product:3", Product(3, 33))]

    await until(stored)


async def test_events_come_in_by_a_plain_xadd(shops: tuple[Shop, Shop]) -> None:
    """From any language; what cannot be applied is put aside, and holds up nothing."""
    a, b = shops
    await b.price(1)
    a.prices[1] = 11
    link, names = a.node._parts.backend.link, a.node._parts.names
    await link.call("XADD", names.events, "*", "event", "this is no JSON")
    await link.call(
        "XADD", names.events, "*", "event", '{"type": "invalidate", "keys": ["product:1"]}'
    )

    async def applied() -> bool:
        return await b.price(1) == 11

    await until(applied)
    ((_, fields),) = await link.call("XRANGE", names.part(-1, "dead"), "-", "+")
    assert b"this is no JSON" in fields
    assert b"undecodable" in b" ".join(fields)
    assert await link.call("XLEN", names.events) == 0 or await link.call(
        "HGET", names.part(-1, "done"), "events"
    )


async def test_an_event_with_an_id_is_applied_once(shops: tuple[Shop, Shop]) -> None:
    """A publisher that does not know whether it was heard repeats it, with the same id."""
    a, _ = shops
    event = (
        b'{"specversion": "1.0", "id": "e-1", "source": "/test",'
        b' "type": "dev.forebay.cache.write.v1",'
        b' "data": {"key": "product:1", "value": {"id": 1, "price": 77}}}'
    )
    await a.node.publish([event])
    await a.node.publish([event, b'{"type": "write", "key": "product:2", "value": null}'])

    async def stored() -> bool:
        return ("product:2", None) in a.stored and not await waiting(a)

    await until(stored)
    counts = a.node._instruments.counts
    assert counts["events_processed", "write", "applied"] == 2
    assert counts["events_processed", "write", "duplicate"] == 1
    assert [value for key, value in a.stored if key == "product:1"] == [Product(1, 77)]


async def test_a_refresh_event_loads_ahead_of_the_readers(shops: tuple[Shop, Shop]) -> None:
    """They find the new value, loaded once."""
    a, b = shops
    await a.price(1)
    a.prices[1] = 11
    await b.node.publish([b'{"type": "refresh", "keys": ["product:1"]}'])

    async def refreshed() -> bool:
        return await a.price(1) == 11

    await until(refreshed)
    assert len(a.loads + b.loads) == 2


async def test_what_is_no_event_is_not_published(
    shops: tuple[Shop, Shop], backend_settings: Valkey
) -> None:
    """All or none: the good ones beside it are not stored either."""
    a, _ = shops
    with pytest.raises(InvalidEvent):
        await a.node.publish([b'{"type": "invalidate", "keys": ["product:1"]}', b"{}"])
    async with Backend(backend_settings, client_name="test") as backend:
        assert await backend.link.call("XLEN", a.node._parts.names.events) == 0


async def test_a_node_that_joins_later_is_right_from_the_start(
    shops: tuple[Shop, Shop], opened: MakeShop
) -> None:
    """It knows nothing of what was before, and follows from there."""
    a, _ = shops
    for _ in range(20):
        await a.product.invalidate(1)
    await a.price(1)
    c = await opened("c")
    assert (await c.product.get_with_info(1)).tier == "shared"
    a.prices[1] = 11
    await a.product.invalidate(1)

    async def seen() -> bool:
        return await c.price(1) == 11

    await until(seen)
    assert c.node._parts.follower.statistics().resets == 0

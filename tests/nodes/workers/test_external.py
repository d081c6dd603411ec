"""What others do to entries in Valkey itself: V1-V5 of nodes.workers.external, B1-B4 of foreign."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

import forebay
from conftest import MakeServer
from forebay.coordinator.background import background_tasks
from forebay.coordinator.valkey.dialer import Dialed, Dialer
from forebay.nodes.workers.external import ExternalWriters
from forebay.nodes.workers.foreign import RESET, ForeignEntries
from forebay.schemas.entry import EntryMeta, make_tail
from forebay.schemas.keys import EVENTS
from forebay.schemas.notices import Dropped, Notice, read_notice
from forebay.schemas.settings import CacheDefaults, Http, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.links import SPEEDY, dialer_to
from support.valkey_server import ValkeyServer

SHARDS = 4
PATIENCE_S = 20.0  #: for whatever has to come; not what is promised


class Product(msgspec.Struct, frozen=True):
    id: int
    price: int


class Shop:
    """The source, what was asked of it, and what others see in Valkey."""

    def __init__(self, server: ValkeyServer, namespace: str) -> None:
        self.server = server
        self.namespace = namespace
        self.loads: list[int] = []
        self.sunk: list[int] = []
        self.gate = anyio.Event()
        self.gate.set()

    def node(self, *, elect: bool = True, ownership_ttl_ms: int = 10_000) -> forebay.Node:
        """A busy machine takes no election away from it, unless the lease is short."""
        node = forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=self.namespace, shards=SHARDS),
                valkey=Valkey(url=self.server.socket_url, **SPEEDY),
                http=Http(enabled=False),
                workers=Workers(
                    enabled=elect, ownership_ttl_ms=ownership_ttl_ms, beat_ms=100, drain_ms=500
                ),
                cache=CacheDefaults(jitter=0),
            )
        )

        @node.cached("product:{id}", ttl=600, tags=["catalog"])
        async def product(id: int) -> Product:
            self.loads.append(id)
            price, gate = len(self.loads), self.gate
            await gate.wait()
            return Product(id, price)

        @node.cached("brief:{id}", ttl=0.2)
        async def brief(id: int) -> int:
            return id

        @node.sink("product:{id}")
        async def save(writes: list[forebay.Write[Product]]) -> None:
            self.sunk += [write.value.id for write in writes if write.value is not None]

        return node

    def entry(self, node: forebay.Node, key: str) -> str:
        return node._parts.names.entry(key)

    def notices(self, node: forebay.Node) -> list[tuple[bytes, Notice | None]]:
        found = []
        for shard in range(SHARDS):
            name = node._parts.names.part(shard, "log")
            for _, fields in self.server.execute("XRANGE", name, "-", "+"):
                found.append((fields[3], read_notice(fields[3])))
        return found

    def told(self, node: forebay.Node) -> list[str]:
        """Keys that the worker told of: nobody's notices, since nodes sign theirs."""
        return [
            key
            for _, notice in self.notices(node)
            if isinstance(notice, Dropped) and not notice.origin
            for key in notice.keys
        ]

    def resets(self, node: forebay.Node) -> int:
        return sum(raw == RESET for raw, _ in self.notices(node))


class Gate(Dialer):
    """A dialer that can be kept from dialing."""

    opened: anyio.Event

    __slots__ = ("opened",)

    async def dial(self) -> Dialed:
        await self.opened.wait()
        return await super().dial()


def worker_of(node: forebay.Node, dialer: Dialer | None, **options: Any) -> ExternalWriters:
    """The worker, put together as for the crew of a node."""
    parts = node._parts
    foreign = ForeignEntries(
        parts.backend.link,
        parts.names,
        parts.scripts,
        parts.follower,
        clock=parts.clock,
        server_clock=parts.server_clock,
    )
    return ExternalWriters(
        dialer,
        parts.settings.valkey,
        parts.names,
        foreign,
        clock=parts.clock,
        rng=random.Random(1),
        instruments=parts.instruments,
        **options,
    )


def attach(node: forebay.Node, worker: ExternalWriters) -> None:
    """Have it hear of notices and of tenures."""
    assert node._parts.crew is not None
    apply, ownership = node._parts.follower._apply, node._parts.crew.ownership

    def applied(shard: int, version: int, notice: Notice) -> None:
        apply(shard, version, notice)
        worker.noticed(version, notice)

    node._parts.follower._apply = applied
    ownership.add(worker)
    if EVENTS in ownership.tenures:
        worker.gained(ownership.tenures[EVENTS])


@asynccontextmanager
async def following(
    node: forebay.Node, dialer: Dialer | None = None, **options: Any
) -> AsyncIterator[ExternalWriters]:
    """The worker, at work when this is entered if the node is elected."""
    worker = worker_of(node, dialer or dialer_to(node.settings.valkey.url), **options)
    attach(node, worker)
    async with background_tasks() as tasks:
        await tasks.start(worker.run)
        yield worker


def counted(node: forebay.Node, kind: str) -> int:
    return node._instruments.counts["external_changes", kind]


async def assert_told(node: forebay.Node, *, set: int = 0, deleted: int = 0) -> None:
    """So many changes are told of; they are counted once their notices are out."""
    await until(
        lambda: (counted(node, "set"), counted(node, "deleted")) == (set, deleted),
        what=f"set={set} deleted={deleted}",
    )


async def at_work(node: forebay.Node) -> None:
    """Elected, and past the doubt of the beginning."""
    await until(lambda: counted(node, "missed"), what="the election")
    await until(lambda: current(node), what="the first reset")


def current(node: forebay.Node) -> bool:
    return all(view.generation for view in node._parts.follower.views)


async def dealt_with(shop: Shop, node: forebay.Node) -> None:
    """Everything that was changed so far was looked at: what comes after it was told."""
    mark = f"mark:{len(shop.told(node))}"
    shop.server.execute("SET", shop.entry(node, mark), "null")
    await until(lambda: mark in shop.told(node), what="the mark")


@pytest.fixture
def shop(valkey_server: ValkeyServer, namespace: str) -> Shop:
    return Shop(valkey_server, namespace)


async def near(node: forebay.Node, key: str) -> forebay.Node:
    """Have the node keep a copy."""
    with anyio.fail_after(PATIENCE_S):
        while (read := await node.read(key)) is None or read.tier != "near":
            pass  # what it promises may have lapsed, on a busy machine
    return node


async def put(node: forebay.Node, product: Product) -> None:
    """Store it as the newest, past the near cache."""
    tail = make_tail(msgspec.msgpack.encode(product), kind="v", codec="m", meta=EntryMeta())
    shared = node._parts.shared
    await shared.put(f"product:{product.id}", soft_ms=60_000, hard_ms=60_000, tail=tail)


async def test_what_others_set_is_read_by_every_node(shop: Shop) -> None:
    """V1: near copies go, and the bare JSON is served by the shared tier, also the next one."""
    async with shop.node() as elected, shop.node(elect=False) as other, following(elected):
        await at_work(elected)
        for node in (elected, other):
            await near(node, "product:7")
        for price in (990, 991):
            value = b'{"id":7,"price":%d}' % price
            shop.server.execute("SET", shop.entry(elected, "product:7"), value)
            for node in (elected, other):

                async def read(node: forebay.Node = node) -> bytes:
                    found = await node.read("product:7")
                    assert found is not None
                    return found.json

                with anyio.fail_after(PATIENCE_S):
                    while await read() != value:
                        await anyio.sleep(0.005)
        await assert_told(elected, set=2)
        assert shop.told(elected) == ["product:7"] * 2
    assert shop.loads == [7]


async def test_without_the_worker_nobody_sees_it(shop: Shop) -> None:
    """Negative control: the copy is served on, sweep after sweep."""
    async with shop.node() as node:
        await near(node, "product:7")
        shop.server.execute("SET", shop.entry(node, "product:7"), b'{"id":7,"price":990}')
        sweeps = node._parts.follower.statistics().sweeps
        await until(lambda: node._parts.follower.statistics().sweeps > sweeps + 3)
        copy = await until(lambda: node.caches[0]._cache.path.near.get("product:7"))
        assert copy.value == Product(7, 1)


@pytest.mark.parametrize("command", [("DEL",), ("UNLINK",), ("GETDEL",), ("RENAME", "else")])
async def test_what_others_delete_is_loaded_again(shop: Shop, command: tuple[str, ...]) -> None:
    """V1: by DEL and by other ways of making a key go."""
    async with shop.node() as elected, shop.node(elect=False) as other, following(elected):
        await at_work(elected)
        for node in (elected, other):
            await near(node, "product:7")
        name = shop.entry(elected, "product:7")
        shop.server.execute(command[0], name, *(f"{name}{word}" for word in command[1:]))
        await until(lambda: "product:7" in shop.told(elected))
        for node in (elected, other):
            near_cache = node.caches[0]._cache.path.near
            await until(lambda near=near_cache: near.get("product:7") is None)
            found = await node.read("product:7")
            assert found is not None
            assert found.json == b'{"id":7,"price":2}'
    assert shop.loads == [7, 7]


async def test_a_value_of_another_type_is_told(shop: Shop) -> None:
    """B2: a list in the place of an entry."""
    async with shop.node() as node, following(node):
        await at_work(node)
        await near(node, "product:7")
        name = shop.entry(node, "product:7")
        shop.server.execute(
            "EVAL", "redis.call('DEL', KEYS[1]) redis.call('LPUSH', KEYS[1], 1)", 1, name
        )
        await until(lambda: shop.told(node) == ["product:7"])
        await assert_told(node, set=1)


async def test_our_own_changes_make_no_notice(shop: Shop) -> None:
    """V2, B1: fills, puts, write-behinds and their sinking, soft and hard invalidations, tags."""
    async with shop.node() as node, following(node):
        await at_work(node)
        product = node.caches[0]
        before = len(shop.notices(node))
        for n in range(50):
            await product(n)
            await put(node, Product(n, 5))
        for n in range(50, 100):
            await product.write_behind(n, Product(n, 6))
        await until(lambda: len(shop.sunk) == 50)
        await node.invalidate([f"product:{n}" for n in range(30)])
        await node.invalidate([f"product:{n}" for n in range(20, 60)], soft=True)
        for n in range(20):
            await product(n)
        await node.invalidate(tags=["catalog"])
        await dealt_with(shop, node)
        assert [key for key in shop.told(node) if not key.startswith("mark:")] == []
        await assert_told(node, set=1)
        own = 50 * 2 + 50 + SHARDS * 2 + 20 + 1
        assert len(shop.notices(node)) - before == own + 1


async def test_the_end_of_a_lifetime_makes_no_notice(shop: Shop) -> None:
    """V2: entries that were seen when they were stored end in silence."""
    async with shop.node() as node, following(node):
        await at_work(node)
        brief = node.caches[1]
        for n in range(40):
            await brief(n)
        names = [shop.entry(node, f"brief:{n}") for n in range(40)]
        await until(lambda: not shop.server.execute("EXISTS", *names))
        await dealt_with(shop, node)
        assert [key for key in shop.told(node) if not key.startswith("mark:")] == []


async def test_a_load_that_finds_its_entry_expired_is_stored(shop: Shop) -> None:
    """V2: the end of a lifetime takes no lease away from the load that it starts."""
    async with shop.node() as node, following(node):
        await at_work(node)
        brief = node.caches[1]
        for _ in range(5):
            await brief(1)
            await until(lambda: not shop.server.execute("EXISTS", shop.entry(node, "brief:1")))
        assert node._instruments.counts["fills_refused", "brief"] == 0


async def test_an_unknown_entry_that_ends_is_told(shop: Shop) -> None:
    """Stored before the node was elected, it looks deleted when its time is over."""
    async with shop.node() as node:
        await node.caches[1](1)
        name = shop.entry(node, "brief:1")
        # Long enough for what follows to begin before it ends, also on a busy machine.
        shop.server.execute("PEXPIRE", name, 2_000)
        async with following(node):
            await at_work(node)
            # Looked at, it ends at once; among many keys the server may take long to come by.
            await until(lambda: not shop.server.execute("EXISTS", name))
            await until(lambda: "brief:1" in shop.told(node))
            await assert_told(node, deleted=1)


async def test_a_deletion_right_after_our_own_put_is_told(shop: Shop) -> None:
    """B3: what is known of the key may be older than the put; the log is waited for."""
    async with shop.node() as node, following(node):
        await at_work(node)
        for n in range(30):
            await node.invalidate([f"product:{n}"])
            await put(node, Product(n, 5))
            shop.server.execute("DEL", shop.entry(node, f"product:{n}"))
            await until(lambda n=n: f"product:{n}" in shop.told(node))
        await assert_told(node, deleted=30)


async def test_a_load_under_way_cannot_fill_over_what_others_set(shop: Shop) -> None:
    """V1: its lease goes with the notice; the caller gets what was loaded, the rest the JSON."""
    async with shop.node() as node, following(node):
        await at_work(node)
        shop.gate = gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(node.read, "product:7")
            await until(lambda: shop.loads)
            shop.server.execute("SET", shop.entry(node, "product:7"), b'{"id":7,"price":990}')
            await until(lambda: shop.told(node))
            gate.set()
        assert node._instruments.counts["fills_refused", "product"] == 1
        found = await node.read("product:7")
        assert found is not None
        assert (found.tier, found.json) == ("shared", b'{"id":7,"price":990}')


async def test_names_that_are_no_entries_are_passed_over(shop: Shop) -> None:
    """Other caches' versions, keys that no cache can have, and those in a wrong shard."""
    async with shop.node() as node, following(node):
        await at_work(node)
        names = node._parts.names
        right = names.prefixes[names.shard("a")]
        wrong = names.prefixes[(names.shard("a") + 1) % SHARDS]
        foreign = [f"{right}e1:a", f"{wrong}e0:a", f"{right}e0:", f"{right}e0:a b", f"{right}x:a"]
        for name in (*foreign, f"{right}e0:".encode() + b"\xff"):
            shop.server.execute("SET", name, "1")
        await dealt_with(shop, node)
        await assert_told(node, set=1)
        assert all(key.startswith("mark:") for key in shop.told(node))


async def test_a_newer_format_is_ours(shop: Shop) -> None:
    """B1: the entries of a newer version are told by its scripts; they are left alone."""
    async with shop.node() as node, following(node):
        await at_work(node)
        shop.server.execute("SET", shop.entry(node, "product:7"), b"\xfbE2" + b"x" * 90)
        await dealt_with(shop, node)
        await assert_told(node, set=1)
        assert all(key.startswith("mark:") for key in shop.told(node))


async def test_a_flush_resets_every_shard(make_server: MakeServer, namespace: str) -> None:
    """V3: every copy is asked for again."""
    shop = Shop(make_server(), namespace)
    async with shop.node() as node, following(node):
        await at_work(node)
        await near(node, "product:7")
        shop.server.execute("FLUSHDB")
        await until(lambda: counted(node, "flushed"))
        await until(lambda: shop.resets(node) >= SHARDS)
        await until(lambda: node.caches[0]._cache.path.near.get("product:7") is None)
        found = await node.read("product:7")
        assert found is not None
        assert found.json == b'{"id":7,"price":2}'


async def test_what_was_missed_is_asked_for_again(shop: Shop) -> None:
    """V3: a value set while the connection was away is read once it is back."""
    gate = Gate(dialer_to(shop.server.socket_url)._endpoint, Valkey(**SPEEDY), "forebay-test")
    gate.opened = anyio.Event()
    gate.opened.set()
    async with shop.node() as node, following(node, gate) as worker:
        await at_work(node)
        await near(node, "product:7")
        gate.opened = anyio.Event()
        assert worker.tracking is not None
        tracking = worker.tracking._wire
        assert tracking is not None
        tracking.drop("by the test")
        await until(lambda: worker.tracking and not worker.tracking.live)
        shop.server.execute("SET", shop.entry(node, "product:7"), b'{"id":7,"price":990}')
        await near(node, "product:7")
        gate.opened.set()
        await until(lambda: node.caches[0]._cache.path.near.get("product:7") is None)
        found = await node.read("product:7")
        assert found is not None
        assert found.json == b'{"id":7,"price":990}'
        assert counted(node, "missed") == 2
        assert node._instruments.counts["backend_reconnects", "tracking"] == 1


async def test_a_storm_is_one_reset(shop: Shop) -> None:
    """V3, V4: 5,000 keys set at once, with room for 100, cost one notice for each shard."""
    async with shop.node() as node, following(node, queue_max=100):
        await at_work(node)
        await near(node, "product:7")
        before = len(shop.notices(node))
        names = [shop.entry(node, f"product:{n}") for n in range(5_000)]
        words = [word for name in names for word in (name, b'{"id":1,"price":990}')]
        shop.server.execute("MSET", *words)
        await until(lambda: counted(node, "overflow"))
        await until(lambda: shop.resets(node) == 2 * SHARDS)
        await dealt_with(shop, node)
        assert len(shop.notices(node)) - before == SHARDS + 1
        found = await node.read("product:7")
        assert found is not None
        assert found.json == b'{"id":1,"price":990}'


async def test_resets_keep_a_distance(shop: Shop) -> None:
    """V4: flush upon flush, one reset of each shard in a second; the last one is not lost."""
    async with shop.node() as node, following(node) as worker:
        await at_work(node)
        began = node._parts.clock.monotonic()
        for _ in range(50):
            worker._changes.flushed()
            await anyio.sleep(0.01)
        await until(lambda: not worker._changes.doubtful)
        took_s = node._parts.clock.monotonic() - began
        assert counted(node, "flushed") == 50
        assert shop.resets(node) // SHARDS <= 2 + took_s


async def test_telling_keeps_to_its_pace(shop: Shop) -> None:
    """V4: after 100 keys at 200 a second, the next is told half a second later, in one batch."""
    async with shop.node() as node, following(node, told_per_s_max=200):
        await at_work(node)
        names = [shop.entry(node, f"product:{n}") for n in range(100)]
        began = node._parts.clock.monotonic()
        shop.server.execute("MSET", *(word for name in names for word in (name, "1")))
        await until(lambda: len(shop.told(node)) == 100)
        for _ in range(20):
            shop.server.execute("SET", shop.entry(node, "product:7"), "2")
        await until(lambda: len(shop.told(node)) > 100)
        assert node._parts.clock.monotonic() - began > 100 / 200
        assert len(shop.told(node)) == 101


async def test_a_broken_shard_costs_the_others_nothing(shop: Shop) -> None:
    """B4: its keys wait; those of the other shards are told, once, and it when it is mended."""
    async with shop.node() as node, following(node):
        await at_work(node)
        names = node._parts.names
        log = names.part(names.shard("product:0"), "log")
        aside = f"{log}:aside"
        shop.server.execute("RENAME", log, aside)
        shop.server.execute("SET", log, "no stream")
        ids = range(20)
        written = [word for i in ids for word in (shop.entry(node, f"product:{i}"), "1")]
        shop.server.execute("MSET", *written)
        fine = {f"product:{i}" for i in ids} - {
            f"product:{i}" for i in ids if names.shard(f"product:{i}") == names.shard("product:0")
        }
        await until(lambda: counted(node, "set") == len(fine))
        shop.server.execute("RENAME", aside, log)
        await until(lambda: counted(node, "set") == len(ids))
        assert sorted(shop.told(node)) == sorted(f"product:{i}" for i in ids)


async def test_another_node_takes_over(shop: Shop) -> None:
    """V3: the owner dies; what is set before another is elected is read then, and after."""
    async with shop.node(ownership_ttl_ms=1_000) as first:
        await until(lambda: EVENTS in first._parts.crew.ownership.tenures)
        async with shop.node(ownership_ttl_ms=1_000) as second, following(second):
            async with following(first):
                await at_work(first)
                assert counted(second, "missed") == 0
                await near(second, "product:7")
                first._parts.crew.ownership._left = True  # it beats no more
            shop.server.execute("SET", shop.entry(second, "product:7"), b'{"id":7,"price":990}')
            await near(second, "product:7")
            await until(lambda: counted(second, "missed"))
            await until(lambda: second.caches[0]._cache.path.near.get("product:7") is None)
            found = await second.read("product:7")
            assert found is not None
            assert found.json == b'{"id":7,"price":990}'
            await dealt_with(shop, second)


async def test_where_tracking_is_refused_it_is_off(make_server: MakeServer, namespace: str) -> None:
    """V5: one warning, and the node works on."""
    acl = ("user default on nopass ~* &* +@all", "user app on >pw ~* &* +@all -client|tracking")
    synced = {"appendonly": "yes", "appendfsync": "always"}  # or the start warns of it
    shop = Shop(make_server(acl=acl, config=synced), namespace)
    with capture_logs() as lines:
        async with shop.node() as node:
            dialer = dialer_to(shop.server.socket_url, username="app", password="pw")
            async with following(node, dialer):
                await until(lambda: [x for x in lines if x["event"] == "external_writers.off"])
                await near(node, "product:7")
                assert shop.resets(node) == 0
    warnings = [line for line in lines if line["log_level"] in ("warning", "error")]
    assert [line["event"] for line in warnings] == ["external_writers.off"]
    assert "NOPERM" in warnings[0]["reason"]


async def test_without_a_server_that_tracks_it_is_off(shop: Shop) -> None:
    """V5: on fakeredis there is nothing to dial."""
    async with shop.node() as node:
        with capture_logs() as lines:
            await worker_of(node, None).run()
    assert [line["event"] for line in lines] == ["external_writers.off"]


@asynccontextmanager
async def deaf(node: forebay.Node, key: str) -> AsyncIterator[Callable[[int], None]]:
    """The node's follower hears nothing of the key's shard, until it is told how far it is."""
    follower = node._parts.follower
    view, commands = follower.views[node._parts.names.shard(key)], follower._commands
    behind = view.seq

    def caught_up(seq: int) -> None:
        view.seq = seq

    follower._commands = Away()
    caught_up(-10)
    try:
        yield caught_up
    finally:
        caught_up(behind)
        follower._commands = commands


async def test_old_knowledge_explains_nothing(shop: Shop) -> None:
    """B3: an invalidation was heard of, a put since then was not; so its deletion is told."""
    async with shop.node() as node:
        foreign = worker_of(node, None)._foreign
        await node.read("product:7")
        await node.invalidate(["product:7"])
        await until(lambda: node._parts.follower.views[node._parts.names.shard("product:7")].seq)
        foreign.noticed(10**16 - 1, Dropped(("product:7",)))
        assert (await foreign.tell(["product:7"])).deleted == 0
        async with deaf(node, "product:7"):
            await put(node, Product(7, 1))
            shop.server.execute("DEL", shop.entry(node, "product:7"))
            assert (await foreign.tell(["product:7"])).deleted == 1
        assert shop.told(node) == ["product:7"]


async def test_an_explanation_that_is_late_is_waited_for(shop: Shop) -> None:
    """B3: the key's absence is seen before its invalidation is heard of; it is not told."""
    async with shop.node() as node:
        foreign = worker_of(node, None)._foreign
        await node.read("product:7")
        done = []

        async def tell() -> None:
            done.append(await foreign.tell(["product:7"]))

        async with deaf(node, "product:7") as caught_up, anyio.create_task_group() as tasks:
            await node.invalidate(["product:7"])
            waiting = foreign._heard
            tasks.start_soon(tell)
            await until(lambda: foreign._heard is not waiting, what="the wait")
            caught_up(1_000)
            foreign.noticed(10**16 - 1, Dropped(("product:7",)))
        assert [outcome.deleted for outcome in done] == [0]
        assert shop.told(node) == []


class Away:
    """A server that does not answer."""

    async def call_many(self, *args: Any, **options: Any) -> Any:
        raise forebay.Unavailable("by the test")


def test_no_version_reads_a_reset() -> None:
    """V3: a notice of its kind resets the shard on old nodes and on new ones."""
    assert read_notice(RESET) is None

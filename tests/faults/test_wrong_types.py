"""A key of another type costs its shard, or its part, only: each kind of key, on whole nodes.

``TABLE`` has every kind of key that there is. Each is planted with another type in shard 0, which
is then used in every way; meanwhile everything in other shards works, what is read is right, the
key is named in a health check or in the log, a new node starts, and all is well again when the key
is deleted.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, get_args

import anyio
import msgspec
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

import forebay
from faults.service import SHARDS, Service, lock_of, subject_of, works
from forebay.coordinator.valkey.link import Commands
from forebay.coordinator.valkey.scripting import granted
from forebay.nodes.explain.collect import explain
from forebay.nodes.status import gauges
from forebay.nodes.web.health import verdict
from forebay.nodes.web.protocols import Check
from forebay.schemas.errors import ForebayError, StartupError
from forebay.schemas.errors_limits import UnknownReservation
from forebay.schemas.errors_locks import LockNotAcquired
from forebay.schemas.keys import EVENTS, TYPES, Names, Part, type_of
from support.eventually import until
from support.valkey_server import ValkeyServer

SHARD = 0
POISON = 666_666
RESERVED = "0" * 32
PARTS = ("schemas", "coordinator", "nodes")
PACKAGE = Path(forebay.__file__).parent
CHANNELS = {"bell", "limits", "reply", "wake", "work"}


class Case(NamedTuple):
    key: Callable[[Names], str]
    is_silent: bool = False  #: nothing of it is lost, so nothing is reported
    stops_events: bool = False  #: all events go through it
    stops_starts: bool = False  #: a node cannot start without it
    begins_grace: bool = False  #: once it is gone, its shard grants no locks for 30 s


def part(name: Part, **more: bool) -> Case:
    return Case(lambda names: names.part(SHARD, name), **more)


def of_ingress(name: Part) -> Case:
    return Case(lambda names: names.part(EVENTS, name), stops_events=name not in ("dead", "held"))


def item_of(names: Names, prefix: str = "item:") -> str:
    return next(f"{prefix}{n}" for n in range(1_000) if names.shard(f"{prefix}{n}") == SHARD)


def named(index: int) -> Case:
    return Case(lambda names: names.lock(lock_of(names, SHARD))[index])


def limited(kind: str, limit: str) -> Case:
    return Case(lambda names: names.limit(kind, limit, subject_of(names, SHARD)))


def reservation(names: Names) -> str:
    subject = subject_of(names, SHARD)
    return names.limit("rr", "api", f"{subject}:{RESERVED}", subject)


TABLE: dict[str, Case] = {
    "head": part("head"),
    "log": part("log"),
    "seen": part("seen"),
    "writes": part("writes"),
    "refreshes": part("refreshes"),
    "own": part("own"),
    "done": part("done"),
    "dead": part("dead"),
    "held": part("held"),
    "tried": part("tried"),
    "legacy": part("legacy", is_silent=True),
    "locks": part("locks"),
    "era": part("era", begins_grace=True),
    "e": Case(lambda names: names.entry(item_of(names))),
    "l": Case(lambda names: names.lease(item_of(names))),
    "t": Case(lambda names: names.tag(item_of(names, "group:"))),
    "f": Case(lambda names: names.fence(item_of(names))),
    "k": named(0),
    "kq": named(1),
    "kw": named(2),
    "r": limited("r", "api"),
    "rs": limited("rs", "slots"),
    "rr": Case(reservation),
    "fence": Case(lambda names: "{guarded}:fence"),
    "events": Case(lambda names: names.events, stops_events=True),
    "ingress own": of_ingress("own"),
    "ingress done": of_ingress("done"),
    "ingress dead": of_ingress("dead"),
    "ingress held": of_ingress("held"),
    "ingress before": of_ingress("before"),
    "nodes": Case(lambda names: names.nodes),
    "members": Case(lambda names: names.members),
    "meta": Case(lambda names: names.meta, is_silent=True, stops_starts=True),
    "failing": Case(lambda names: names.failing("flaky")),
    "mark": Case(lambda names: names.marker("x"), is_silent=True),
    "none": Case(lambda names: names.none, is_silent=True),
}


def test_the_table_has_every_kind_of_key() -> None:
    """A kind that is added to the code is added here: by its type, its name, and its use."""
    names = Names("shop", SHARDS)
    kinds = [kind.rpartition(" ")[2] for kind in TABLE]
    assert set(kinds) == set(TYPES)
    keys = [case.key(names) for case in TABLE.values()]
    assert len(set(keys)) == len(keys)
    assert [type_of(key) for key in keys] == [TYPES[kind] for kind in kinds]
    assert set(get_args(Part)) <= set(TYPES)


def test_every_name_is_a_key_of_the_table_or_a_channel() -> None:
    """What ``Names`` gives is known to ``type_of``, unless it is a channel."""
    names = Names("shop", SHARDS)
    given: dict[str, Any] = {
        "entry": names.entry("a"),
        "events": names.events,
        "failing": names.failing("a"),
        "fence": names.fence("a"),
        "lease": names.lease("a"),
        "limit": names.limit("r", "a", "b"),
        "lock": names.lock("a"),
        "marker": names.marker("a"),
        "members": names.members,
        "meta": names.meta,
        "nodes": names.nodes,
        "none": names.none,
        "of_key": names.of_key("a"),
        "part": [names.part(0, each) for each in get_args(Part)],
        "tag": names.tag("a"),
    }
    others = {"cache_version", "database", "is_reply", "namespace", "prefixes", "process", "shard"}
    others |= {"channel_patterns", "key_patterns", "shards", "with_shards"}
    public = {name for name, _ in inspect.getmembers(names) if not name.startswith("_")}
    assert public == set(given) | CHANNELS | others
    for keys in given.values():
        assert all(type_of(key) for key in ([keys] if isinstance(keys, str) else keys))
    assert type_of(names.bell) is None
    assert type_of("somebody:else") is None


def test_keys_are_named_in_one_place() -> None:
    """No other module makes names of a shard by itself; one takes names apart."""
    sources = [path for part in PARTS for path in (PACKAGE / part).rglob("*.py")]
    makers = [path.name for path in sources if "names.prefixes" in path.read_text()]
    assert len(sources) > 100
    assert makers == ["external.py"]


class Shop(Service):
    """The service, with everything that a key can be for."""

    def __init__(self, server: ValkeyServer, namespace: str) -> None:
        super().__init__(server, namespace)
        self.fails = self.in_grace = False
        self.flaky: list[Any] = []
        self.tagged: list[Any] = []
        self.table.poison.add(POISON)
        workers = replace(self.settings.workers, ownership_ttl_ms=1_000, handover_ms=1_000)
        cache = replace(self.settings.cache, breaker_failures=1, breaker_recovery_ms=100)
        self.settings = replace(self.settings, workers=workers, cache=cache)

    def make(self) -> forebay.Node:
        node = super().make()

        @node.cached("tagged:{id}", ttl=60, tags=["group:{id}"])
        async def tagged(id: str) -> int:
            return self.source.get(id, 0)

        @node.cached("flaky:{id}", ttl=60)
        async def flaky(id: str) -> int:
            if self.fails:
                raise RuntimeError("as told")
            return 1

        self.tagged.append(tagged)
        self.flaky.append(flaky)
        node.limit("slots", rate=1_000, concurrency=5)
        return node

    async def read(self, number: int) -> None:
        """What was not invalidated is as it was, and an invalidation is seen everywhere."""
        node, _ = self.nodes[:2]
        key = item_of(node._parts.names)
        item_id = key.partition(":")[2]
        before = self.source.get(item_id, 0)
        for item in self.items[:2]:
            assert await item(item_id) == before
        self.source[item_id] = number
        await node.invalidate([key])
        for item in self.items[:2]:
            await until(partial(is_right, item, item_id, number))

    async def read_tagged(self, number: int) -> None:
        node, _ = self.nodes[:2]
        tag = item_of(node._parts.names, "group:")
        item_id = tag.partition(":")[2]
        for tagged in self.tagged[:2]:
            assert await tagged(item_id) == self.source.get(item_id, 0)
        self.source[item_id] = number
        await node.invalidate(tags=[tag])
        for tagged in self.tagged[:2]:
            await until(partial(is_right, tagged, item_id, number))

    async def put(self, number: int) -> None:
        item_id = item_of(self.nodes[0]._parts.names).partition(":")[2]
        self.source[item_id] = number
        await self.items[0].put(item_id, number, token=number)

    async def publish(self, number: int) -> None:
        names, link = self.nodes[0]._parts.names, self.nodes[0]._parts.backend.link
        rows = [item_of(names, prefix) for prefix in ("row:", "bad:", "nosink:")]
        events = [
            {"type": "write", "key": rows[0], "value": number, "id": f"e{number}"},
            {"type": "write", "key": rows[1], "value": POISON},
            {"type": "write", "key": rows[2], "value": number},
            {"type": "dev.forebay.cache.write.v2", "specversion": "1.0", "id": "x", "source": "x"},
            {"type": "nonsense"},
        ]
        encoded = [msgspec.json.encode(each) for each in events]
        granted(await link.call_many([("XADD", names.events, "*", "event", e) for e in encoded]))

    async def lock(self, number: int) -> None:
        one, two = self.nodes[:2]
        name = lock_of(one._parts.names, SHARD)
        with suppress(LockNotAcquired) if self.in_grace else nullcontext():
            async with one.lock(name, timeout=0.1 if self.in_grace else 5):
                with suppress(LockNotAcquired):
                    async with two.lock(name, timeout=0.05):
                        raise AssertionError("two hold it")

    async def limit(self, number: int) -> None:
        node = self.nodes[0]
        subject = subject_of(node._parts.names, SHARD)
        await node.limit("api", rate=1_000, per=1).take(subject)
        async with node.limit("slots").slot(subject):
            pass
        with suppress(UnknownReservation):
            await node.limit("api").settle(subject, RESERVED, 1)

    async def guard(self, number: int) -> None:
        await self.nodes[0].guards.set("guarded", "x", token=number)

    async def fail(self, number: int) -> None:
        """A failing source is asked again, and found well."""
        self.fails = True
        with pytest.raises((RuntimeError, ForebayError)):
            await self.flaky[0](f"{number}")
        self.fails = False
        await until(partial(is_right, self.flaky[0], f"{number}", 1))

    async def look(self) -> None:
        """What is for people has an answer at all times."""
        node = self.nodes[0]
        parts, names = node._parts, node._parts.names
        key = item_of(names)
        await explain(parts.backend, names, key, nonce="0" * 16, bytes_max=1_000, wait_s=0.01)
        await parts.locks.list()
        assert (await node.stats())["keys"]
        assert list(gauges(node._parts_if_running()))
        await parts.crew.leader_metrics.round()

    async def use(self, number: int) -> list[ForebayError]:
        """Everything in the planted shard; what was refused."""
        refused = []
        uses = (self.read, self.read_tagged, self.put, self.publish, self.lock, self.limit)
        for use in (*uses, self.guard, self.fail):
            try:
                await use(number)
            except ForebayError as error:
                refused.append(error)
        await self.look()
        return refused


async def is_right(item: Any, item_id: str, value: int) -> bool:
    """Read as it is, flagged, or refused."""
    try:
        hit = await item.get_with_info(item_id)
    except ForebayError:
        return True
    return bool(hit.stale or hit.value == value)


def tells(shop: Shop, lines: list[Any], key: str) -> bool:
    """Whether a check of a node names the key, or a line of the log."""
    found = [each.detail for node in shop.nodes[:2] for each in node.checks()]
    found += [str(line) for line in lines if line["log_level"] in ("warning", "error")]
    return any(key in each for each in found)


@pytest.mark.parametrize("kind", TABLE)
async def test_a_key_of_another_type_costs_its_part_only(
    valkey_server: ValkeyServer, namespace: str, kind: str
) -> None:
    """Other shards work, what is read is right, the key is named, and it heals."""
    case, shop, numbers = TABLE[kind], Shop(valkey_server, namespace), count(1)
    shop.in_grace = case.begins_grace
    key = case.key(Names(namespace, SHARDS))
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(shop.make())
        link = shop.nodes[0]._parts.backend.link
        with capture_logs() as lines:
            await link.call_many([("DEL", key), ("RPUSH", key, "x")])

            async def is_told() -> bool:
                await shop.use(next(numbers))
                return case.is_silent or tells(shop, lines, key)

            await until(is_told)
            await works(shop, next(numbers), events=not case.stops_events)
            await start_another(shop, case, key)
        assert all(node.is_running for node in shop.nodes[:2])
        await until(lambda: all(verdict(n.checks(), "ready") != "fail" for n in shop.nodes[:2]))
        await link.call("DEL", key)
        await until(partial(is_well, shop, numbers))
        await works(shop, next(numbers))
        assert await misplaced(link, namespace) == []


async def start_another(shop: Shop, case: Case, key: str) -> None:
    if case.stops_starts:
        with pytest.raises(StartupError, match=re.escape(key)):
            await shop.make().start()
        return
    async with shop.make() as late:
        assert late.is_running


async def is_well(shop: Shop, numbers: Iterator[int]) -> bool:
    """Nothing is refused, events arrive, and no check but for what is held says anything."""
    number = next(numbers)
    if await shop.use(number):
        return False
    row = item_of(shop.nodes[0]._parts.names, "row:")
    with anyio.move_on_after(1):
        await until(lambda: shop.table.rows.get(row, (0, 0))[1] == number)
        await until(lambda: not unwell(shop))
        return True
    return False


def unwell(shop: Shop) -> list[Check]:
    found = [each for node in shop.nodes[:2] for each in node.checks()]
    return [each for each in found if each.state != "pass" and each.name != "held writes"]


async def misplaced(link: Commands, namespace: str) -> list[str]:
    """The keys of the namespace that are of no known kind, or of another type."""
    keys = [key.decode() for key in await link.call("KEYS", f"*{namespace}*")]
    found = await link.call_many([("TYPE", key) for key in keys])
    pairs = zip(keys, found, strict=True)
    return [key for key, each in pairs if bytes(each).decode() not in (type_of(key), "none")]

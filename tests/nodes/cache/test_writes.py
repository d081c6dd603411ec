"""Writes through a cache, on a real server and two nodes: X1-X7, and P, T, A, B of the levels."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache import node_writes
from forebay.nodes.cache import write as write_module
from forebay.nodes.cache.shared import Receipt
from forebay.nodes.sinks.base import SinkBatch
from forebay.schemas.entry import Entry, read_entry
from forebay.schemas.errors import (
    ConfigError,
    DeadLettered,
    FatalSinkError,
    InvalidValue,
    KeyBusy,
    PoisonSinkError,
    SinkError,
    TransientSinkError,
    Unavailable,
    Unconfirmed,
)
from forebay.schemas.settings import (
    CacheDefaults,
    Http,
    NodeSettings,
    Settings,
    Valkey,
    Workers,
)
from support.eventually import until
from support.valkey_server import ValkeyServer
from support.workers import Cut, Table

KEY = "row:1"
LEASE_MS = 60_000


class Place:
    """A node with one cache, over a table that it shares with the other nodes."""

    def __init__(
        self,
        server: ValkeyServer,
        namespace: str,
        table: Any,
        *,
        workers: bool = False,
        declared: dict[str, Any] | None = None,
        **cache: Any,
    ) -> None:
        self.table = table
        self.loads = 0
        self.loading = anyio.Event()
        self.gate = anyio.Event()
        self.gate.set()
        self.node = forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=namespace, shards=4),
                valkey=Valkey(url=server.socket_url, command_timeout_ms=2_000),
                http=Http(enabled=False),
                workers=Workers(enabled=workers, flush_delay_ms=0, beat_ms=100, attempts_max=1),
                cache=CacheDefaults(**{"lease_ms": LEASE_MS, **cache}),
            )
        )

        @self.node.cached("row:{id}", **{"ttl": 600.0, "stale_for": 300.0, **(declared or {})})
        async def row(id: int) -> str | None:
            self.loads += 1
            found = self.table.values().get(f"row:{id}")
            self.loading.set()
            await self.gate.wait()
            return found

        self.row = row
        if table.name:
            self.node.sink("row:{id}", table)

    @property
    def parts(self) -> Any:
        return self.node._parts

    def name(self, of: str) -> str:
        return str(getattr(self.parts.names, of)(KEY))

    async def call(self, *words: Any) -> Any:
        return await self.parts.backend.link.call(*words)

    async def entry(self) -> Entry | None:
        raw = await self.call("GET", self.name("entry"))
        return None if raw is None else read_entry(raw, bytes_max=10_000)

    async def lease(self) -> bytes | None:
        found: bytes | None = await self.call("GET", self.name("lease"))
        return found

    async def log(self) -> list[Any]:
        names = self.parts.names
        found: list[Any] = await self.call("XRANGE", names.part(names.shard(KEY), "log"), "-", "+")
        return found

    def hold_loads(self) -> None:
        self.loading, self.gate = anyio.Event(), anyio.Event()

    def near(self) -> Any:
        found = self.row._cache.path.near.get(KEY)
        return None if found is None else found.value

    def counted(self, way: str, end: str) -> int:
        return self.node._instruments.counts.get(("writes", "row", way, end), 0)


OpenPlace = Callable[..., Awaitable[Place]]


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def open_place(
    valkey_server: ValkeyServer, namespace: str, table: Table
) -> AsyncIterator[OpenPlace]:
    async with AsyncExitStack() as stack:

        async def opened(of: Any = None, **options: Any) -> Place:
            place = Place(valkey_server, namespace, of or table, **options)
            await stack.enter_async_context(place.node)
            return place

        yield opened


@pytest.fixture
async def here(open_place: OpenPlace) -> Place:
    return await open_place()


@pytest.fixture
async def there(open_place: OpenPlace) -> Place:
    return await open_place()


async def write(place: Place, way: str, value: str | None, **options: Any) -> Receipt:
    method = {"put": place.row.put, "through": place.row.write_through,
              "around": place.row.write_around, "behind": place.row.write_behind}[way]  # fmt: skip
    if way == "put":
        stored(place.table, value)
    found: Receipt = await method(1, value, **options)
    return found


def stored(table: Table, value: str | None, key: str = KEY) -> None:
    """Change the source without the cache."""
    table.rows[key] = (table.rows.get(key, (0, None))[0] + 1, value)


async def check_all_read(*places: Place, on: str | None) -> None:
    """All nodes read this value within their staleness, and it is the row."""
    assert places[0].table.values().get(KEY) == on
    for place in places:
        await until(lambda place=place: _reads(place, on))
        assert await place.row(1) == on


async def _reads(place: Place, value: str | None) -> bool:
    return bool(await place.row(1) == value)


# X1: reading a write


@pytest.mark.parametrize("way", ["put", "through", "behind"])
async def test_the_writer_reads_its_own_write_at_once(here: Place, there: Place, way: str) -> None:
    """X1: it reads from the near cache without a load; the other node reads it after the notice."""
    stored(here.table, "old")
    assert await here.row(1) == await there.row(1) == "old"
    receipt = await write(here, way, "new")
    assert here.near() == "new"
    hit = await here.row.get_with_info(1)
    assert receipt.stamp is not None
    assert (hit.value, hit.tier, hit.version) == ("new", "near", receipt.stamp.version)
    await until(lambda: _reads(there, "new"))
    assert (here.loads, there.loads) == (1, 0)
    assert here.counted(way, "stored") == 1


async def test_a_write_around_leaves_no_entry(here: Place, there: Place) -> None:
    """A: the next reader loads from the source."""
    stored(here.table, "old")
    assert await here.row(1) == await there.row(1) == "old"
    receipt = await write(here, "around", "new")
    assert (receipt.stamp, receipt.reached) == (None, "sink")
    assert (here.near(), await here.entry(), await here.lease()) == (None, None, None)
    await check_all_read(here, there, on="new")
    assert here.loads + there.loads == 2


@pytest.mark.parametrize("way", ["put", "through", "around", "behind"])
async def test_a_write_replaces_a_negative_entry_at_once(
    here: Place, there: Place, way: str
) -> None:
    """X1: a known absence does not hide a row that was just written."""
    assert await here.row(1) is None
    assert await there.row(1) is None
    await write(here, way, "new")
    assert await here.row(1) == "new"
    await until(lambda: _reads(there, "new"))


@pytest.mark.parametrize("way", ["put", "through"])
async def test_none_is_a_known_absence(here: Place, there: Place, way: str) -> None:
    """P, T: the row is deleted, and readers get None without a load."""
    stored(here.table, "old")
    await there.row(1)
    await write(here, way, None)
    assert here.table.values()[KEY] is None
    entry = await here.entry()
    assert entry is not None
    assert entry.negative
    assert (await here.row.get_with_info(1)).tier == "near"
    await until(lambda: _reads(there, None))
    assert (here.loads, there.loads) == (0, 1)


@pytest.mark.parametrize("way", ["put", "through"])
async def test_none_invalidates_if_absences_are_not_cached(open_place: OpenPlace, way: str) -> None:
    """P, T: no entry is stored."""
    place = await open_place(declared={"negative_ttl": 0.0})
    stored(place.table, "old")
    await place.row(1)
    receipt = await write(place, way, None)
    assert (receipt.stamp, place.near(), await place.entry()) == (None, None, None)
    assert await place.lease() is None


async def test_a_put_may_have_a_lifetime_of_its_own(here: Place) -> None:
    """P: the lifetime is in seconds; an invalid one is refused with its origin."""
    receipt = await here.row.put(1, "new", ttl=5)
    assert receipt.stamp is not None
    lifetime_ms = receipt.stamp.soft_at_ms - receipt.stamp.version // 1000
    assert 4_000 <= lifetime_ms <= 5_001
    with pytest.raises(ConfigError) as caught:
        await here.row.put(1, "new", ttl=-1)
    assert (caught.value.setting, caught.value.origin) == ("ttl", "a put of row")


async def test_the_row_has_a_version_that_grows(here: Place) -> None:
    """X2: versions of a key grow over all kinds of writes; the version of the entry is later than
    that of the row.
    """
    versions = []
    for value in ("a", "b", "c"):
        receipt = await write(here, "through", value)
        assert receipt.stamp is not None
        versions += [here.table.rows[KEY][0], receipt.stamp.version]
    assert versions == sorted(set(versions))


# Refusals


@pytest.mark.parametrize("way", ["through", "around", "behind"])
async def test_without_a_sink_the_fix_is_named(open_place: OpenPlace, way: str) -> None:
    """The error names the key and the missing declaration."""
    place = await open_place(Table(name=""))
    with pytest.raises(ConfigError) as caught:
        await write(place, way, "new")
    assert (caught.value.value, "@node.sink" in caught.value.fix) == (KEY, True)
    assert await place.entry() is None


@pytest.mark.parametrize("way", ["put", "through", "behind"])
async def test_a_value_that_no_entry_can_hold_is_refused_first(
    open_place: OpenPlace, way: str
) -> None:
    """X6: the sink is not called."""
    place = await open_place(value_bytes_max=100)
    with pytest.raises(InvalidValue, match="value_bytes_max") as caught:
        await write(place, way, "x" * 200)
    assert (caught.value.cache, caught.value.key) == ("row", KEY)
    with pytest.raises(InvalidValue, match="return the loader's declared type"):
        await write(place, way, 7)
    assert (place.table.batches, await place.entry(), await place.lease()) == ([], None, None)
    assert place.counted(way, "refused") == 2


async def test_a_level_that_a_write_does_not_have_is_refused(here: Place) -> None:
    """An invalid level or timeout is refused before anything is written."""
    with pytest.raises(ConfigError, match="accepted, replicated"):
        await here.row.put(1, "new", until="sink")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="accepted, replicated, sink"):
        await here.row.write_behind(1, "new", until="fsynced")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="timeout"):
        await here.row.write_through(1, "new", timeout=-1)
    assert await here.entry() is None


# X4: failures of the sink

FAILURES = [
    PoisonSinkError("no such colour"),
    FatalSinkError("no such table"),
    TransientSinkError("no connection"),
]


@pytest.mark.parametrize("way", ["through", "around"])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_a_sink_that_fails_changes_nothing(
    here: Place, there: Place, way: str, error: SinkError
) -> None:
    """X4: entry, near caches and log are unchanged; the error is the sink's own, and the lease is
    released.
    """
    stored(here.table, "old")
    assert await here.row(1) == await there.row(1) == "old"
    before = await here.entry(), await here.log()
    here.table.faults = [error]
    with pytest.raises(SinkError) as caught:
        await write(here, way, "new")
    assert caught.value is error
    assert (await here.entry(), await here.log()) == before
    assert (here.near(), there.near(), await here.lease()) == ("old", "old", None)
    assert here.counted(way, "refused") == 1


@pytest.mark.parametrize(
    "error",
    [TransientSinkError("no answer to the commit", outcome_unknown=True), RuntimeError("a bug")],
    ids=["unknown", "no sink error"],
)
async def test_an_unknown_outcome_invalidates(here: Place, there: Place, error: Exception) -> None:
    """X4: the next reader loads from the source; an exception other than SinkError is fatal."""
    stored(here.table, "old")
    assert await here.row(1) == await there.row(1) == "old"
    here.table.faults = [error]
    with pytest.raises(SinkError) as caught:
        await write(here, "through", "new")
    assert caught.value is error or isinstance(caught.value, FatalSinkError)
    assert (here.near(), await here.entry(), await here.lease()) == (None, None, None)
    stored(here.table, "new")  # the sink had stored it
    await check_all_read(here, there, on="new")
    assert here.counted("through", "unknown") == 1


async def test_a_sink_has_no_longer_than_the_lease(open_place: OpenPlace) -> None:
    """X5: the sink is cancelled, and the outcome is unknown."""
    place = await open_place(lease_ms=100)
    stored(place.table, "old")
    await place.row(1)
    place.table.hang_at = 1
    with pytest.raises(TransientSinkError, match="longer than its share of the lease") as caught:
        await write(place, "through", "new")
    assert caught.value.outcome_unknown
    assert (place.near(), await place.entry(), await place.lease()) == (None, None, None)


class Away:
    """Commands that fail from the ``at``-th on."""

    def __init__(self, commands: Any, at: int) -> None:
        self._commands = commands
        self._left = at - 1

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        if self._left <= 0:
            raise Unavailable("it is away")
        self._left -= 1
        return await self._commands.call(*args, timeout_ms=timeout_ms)

    async def call_many(self, commands: Any, *, timeout_ms: int | None = None) -> Any:
        if self._left <= 0:
            raise Unavailable("it is away")
        self._left -= 1
        return await self._commands.call_many(commands, timeout_ms=timeout_ms)


def by_way_of(place: Place, commands: Any) -> None:
    """Make the writes of this node use these commands."""
    place.parts.shared._commands = commands
    place.parts.backend.link = commands


async def test_without_valkey_the_sink_is_not_called(here: Place) -> None:
    """T: nothing is written without a lease."""
    link = here.parts.backend.link
    by_way_of(here, Away(link, at=1))
    with pytest.raises(Unavailable):
        await write(here, "through", "new")
    by_way_of(here, link)
    assert here.table.batches == []


async def test_a_fill_that_fails_raises(here: Place) -> None:
    """T: the source has the value, the caller gets an error, and the lease expires."""
    link = here.parts.backend.link
    by_way_of(here, Away(link, at=2))
    with pytest.raises(Unavailable):
        await write(here, "through", "new")
    by_way_of(here, link)
    assert here.table.values()[KEY] == "new"
    assert 0 < await here.call("PTTL", here.name("lease")) <= LEASE_MS


# X2, X3: races


async def waits_for_the_lease(place: Place) -> None:
    """Wait until a write of this node waits for the lease of another."""
    await until(lambda: KEY in place.parts.waits._watched)


async def test_a_write_waits_for_a_running_load(here: Place, there: Place) -> None:
    """X2: the load stores the old row, which the write then replaces."""
    stored(here.table, "old")
    there.hold_loads()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(there.row, 1)
        await there.loading.wait()
        tasks.start_soon(write, here, "through", "new")
        await waits_for_the_lease(here)
        assert here.table.batches == []
        there.gate.set()
    await check_all_read(here, there, on="new")
    assert there.loads == 1


async def test_a_load_that_lost_its_lease_is_not_stored(here: Place, there: Place) -> None:
    """X2: a load that ends after the write does not store the old row."""
    stored(here.table, "old")
    there.hold_loads()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(there.row, 1)
        await there.loading.wait()
        await here.call("DEL", here.name("lease"))
        await write(here, "through", "new")
        there.gate.set()
    await check_all_read(here, there, on="new")


async def test_readers_wait_for_a_write_instead_of_loading(here: Place, there: Place) -> None:
    """X2: they do not load the row that is about to be replaced."""
    here.table.hang_at = 1
    got: list[Any] = []

    async def read() -> None:
        got.append(await there.row(1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, here, "through", "new")
        await here.table.hanging.wait()
        tasks.start_soon(read)
        await waits_for_the_lease(there)
        here.table.go_on.set()
    assert (got, there.loads) == (["new"], 0)


async def test_two_writers_run_one_after_the_other(here: Place, there: Place) -> None:
    """X2: the second reaches the sink after the first has filled."""
    here.table.hang_at = 1
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, here, "through", "first")
        await here.table.hanging.wait()
        tasks.start_soon(write, there, "through", "second")
        await waits_for_the_lease(there)
        assert len(here.table.batches) == 1
        here.table.go_on.set()
    assert [each.value for each in here.table.stored] == ["first", "second"]
    await check_all_read(here, there, on="second")


async def blind(place: Place, value: str) -> None:
    """A wrong write-through: the sink, then the entry, without a lease."""
    path = place.row._cache.writes
    outlet, params = path._sink_of(KEY)
    version = 1 + max(place.table.rows.get(KEY, (0, None))[0], len(place.table.batches))
    write_ = forebay.Write(key=KEY, params=params, value=value, version=version)
    await outlet.write(SinkBatch(writes=(write_,)))
    packed = path._loads.pack(value, {})
    stamp = await place.parts.shared.put(
        KEY, soft_ms=packed.soft_ms, hard_ms=packed.hard_ms, tail=packed.tail
    )
    assert stamp.version


class Stopped:
    """Holds back every change that a node makes to the entry."""

    def __init__(self, place: Place) -> None:
        self.reached, self.go_on = anyio.Event(), anyio.Event()
        shared, writes = place.parts.shared, place.parts.writing
        writes.fill, shared.put = self._after(writes.fill), self._after(shared.put)

    def _after(self, change: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stopped(*args: Any, **options: Any) -> Any:
            self.reached.set()
            await self.go_on.wait()
            return await change(*args, **options)

        return stopped


async def overtaken(here: Place, there: Place, write_: Callable[..., Awaitable[Any]]) -> Any:
    """``there`` writes row and entry after ``here`` wrote its row and before it fills; returns the
    value that all read.
    """
    stopped = Stopped(here)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write_, here, "first")
        await stopped.reached.wait()
        await here.call("DEL", here.name("lease"))  # evicted or expired
        await write_(there, "second")
        stopped.go_on.set()
    assert here.table.values()[KEY] == "second"
    entry = await here.entry()
    return None if entry is None else there.row._cache.path.codec.value(entry)


async def through(place: Place, value: str) -> None:
    await write(place, "through", value)


async def test_a_writer_that_was_overtaken_leaves_no_old_value(here: Place, there: Place) -> None:
    """X3: its fill is refused, and the key is invalidated."""
    assert await overtaken(here, there, through) is None
    await check_all_read(here, there, on="second")
    assert here.node._instruments.counts["fills_refused", "row"] == 1


async def test_the_race_is_detected_without_a_lease(here: Place, there: Place) -> None:
    """Negative control: without a lease the entry ends up older than the row."""
    assert await overtaken(here, there, blind) == "first"


@pytest.mark.parametrize("kept", [False, True], ids=["before it is stored", "after"])
@pytest.mark.parametrize("other", ["through", "around", "put", "invalidate"])
async def test_readers_get_the_row_after_any_concurrent_change(
    here: Place, there: Place, other: str, kept: bool
) -> None:
    """X2, X3: the writer loses its lease while the sink is written."""
    here.table.hang_at, here.table.hang_stored = 1, kept
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, here, "through", "first")
        await here.table.hanging.wait()
        if other in ("through", "around"):
            await here.call("DEL", here.name("lease"))
        if other == "invalidate":
            await there.row.invalidate(1)
        elif other == "put":
            await there.row.put(1, "second")
        else:
            await write(there, other, "second")
        here.table.go_on.set()
    await check_all_read(here, there, on="second" if other in ("through", "around") else "first")


async def test_many_writers_and_readers_end_with_the_row(here: Place, there: Place) -> None:
    """X2, X3: on two nodes at once, in every way that writes the source."""
    places = (here, there)

    async def work(number: int) -> None:
        for turn in range(6):
            place = places[(number + turn) % 2]
            way = ("through", "around", "through")[turn % 3]
            await write(place, way, f"{number}-{turn}", timeout=20)
            await place.row(1)
            if turn == 3:
                await place.row.invalidate(1)

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(work, number)
    await check_all_read(here, there, on=here.table.values()[KEY])
    assert await here.lease() is None


async def test_a_busy_key_raises_with_its_holder(here: Place, there: Place) -> None:
    """E4: nothing was written, and the lease of the holder is unchanged."""
    there.hold_loads()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(there.row, 1)
        await there.loading.wait()
        holder = await here.lease()
        with pytest.raises(KeyBusy) as caught:
            await write(here, "through", "new", timeout=0.02)
        assert (caught.value.key, caught.value.holder) == (KEY, "lease")
        assert (here.table.batches, await here.lease()) == ([], holder)
        there.gate.set()
    assert here.counted("through", "refused") == 1


# Cancellation


class Slowly:
    """Commands that are sent a moment after the call; a call cancelled before that is not sent."""

    def __init__(self, commands: Any) -> None:
        self._commands = commands

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        await anyio.sleep(0.002)
        return await self._commands.call(*args, timeout_ms=timeout_ms)

    async def call_many(self, commands: Any, *, timeout_ms: int | None = None) -> Any:
        await anyio.sleep(0.002)
        return await self._commands.call_many(commands, timeout_ms=timeout_ms)


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2], ids=["begin", "fill"])
@pytest.mark.parametrize("way", ["through", "around"])
async def test_cancelled_during_a_command_leaves_nothing_stale(
    here: Place, there: Place, way: str, at: int, answered: bool
) -> None:
    """X4, X5: at each await, before the server got the command or its answer was read; no lease
    stays.
    """
    stored(here.table, "old")
    assert await here.row(1) == await there.row(1) == "old"
    link = here.parts.backend.link
    cut = Cut(Slowly(link), at=at, answered=answered)
    by_way_of(here, cut)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, here, way, "new")
        await cut.reached.wait()
        tasks.cancel_scope.cancel()
    by_way_of(here, link)
    assert await here.lease() is None
    await check_all_read(here, there, on="old" if at == 1 else "new")
    assert here.counted(way, "unknown") == 1


async def test_cancelled_during_the_last_invalidation(here: Place, there: Place) -> None:
    """X3, X4: after a refused fill, the invalidation is still executed."""
    stored(here.table, "old")
    link = here.parts.backend.link
    cut = Cut(Slowly(link), at=3)
    here.table.hang_at, here.table.hang_stored = 1, True
    async with anyio.create_task_group() as tasks:
        by_way_of(here, cut)
        tasks.start_soon(write, here, "through", "new")
        await here.table.hanging.wait()
        await there.call("DEL", there.name("lease"))
        await there.row.put(1, "older")
        here.table.go_on.set()
        await cut.reached.wait()
        tasks.cancel_scope.cancel()
    by_way_of(here, link)
    await check_all_read(here, there, on="new")


@pytest.mark.parametrize("kept", [False, True], ids=["before it is stored", "after"])
async def test_cancelled_in_the_sink_leaves_nothing_stale(
    here: Place, there: Place, kept: bool
) -> None:
    """X4: the outcome is unknown, so the next reader loads from the source."""
    stored(here.table, "old")
    assert await here.row(1) == await there.row(1) == "old"
    here.table.hang_at, here.table.hang_stored = 1, kept
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, here, "through", "new")
        await here.table.hanging.wait()
        tasks.cancel_scope.cancel()
    assert (here.near(), await here.entry(), await here.lease()) == (None, None, None)
    await check_all_read(here, there, on="new" if kept else "old")


async def test_cancelled_while_waiting_leaves_the_others_lease(here: Place, there: Place) -> None:
    """E4: the holder is not affected."""
    there.hold_loads()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(there.row, 1)
        await there.loading.wait()
        async with anyio.create_task_group() as writers:
            writers.start_soon(write, here, "through", "new")
            await waits_for_the_lease(here)
            writers.cancel_scope.cancel()
        assert await here.lease() is not None
        there.gate.set()
    assert await here.lease() is None
    assert len(here.parts.waits) == len(here.parts.writing.checkpoints) == 0


# Write-behind next to write-through


async def test_a_pending_write_behind_goes_first(open_place: OpenPlace) -> None:
    """E1, E2: the sink stores it before the write-through; the wait does not poll."""
    place = await open_place(workers=True)
    place.table.hang_at = 1
    async with anyio.create_task_group() as tasks:
        await place.row.write_behind(1, "behind")
        await place.table.hanging.wait()
        tasks.start_soon(write, place, "through", "through")
        await until(lambda: len(place.parts.writing.checkpoints) > 0)
        place.table.go_on.set()
    assert [each.value for each in place.table.stored] == ["behind", "through"]
    await check_all_read(place, on="through")


async def test_a_pending_write_behind_that_is_never_stored_is_reported(here: Place) -> None:
    """E1: without a worker the write-through is refused in the end, and the sink is not called."""
    await here.row.write_behind(1, "behind")
    with pytest.raises(KeyBusy) as caught:
        await write(here, "through", "through", timeout=0.02)
    assert caught.value.holder == "write_behind"
    assert (here.table.batches, await here.row(1)) == ([], "behind")


async def test_a_later_write_behind_wins(open_place: OpenPlace) -> None:
    """X2: a write-behind during a write-through has the later version."""
    place = await open_place(workers=True)
    place.table.hang_at = 1
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, place, "through", "through")
        await place.table.hanging.wait()
        await place.row.write_behind(1, "behind")
        place.table.go_on.set()
    await until(lambda: place.table.values()[KEY] == "behind")
    await check_all_read(place, on="behind")


class Crowded(Table):
    """A table that records the number of concurrent writes."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.inside_max = self.opened = 0

    async def open(self, namespace: str = "") -> None:
        self.opened += 1
        await super().open(namespace)

    async def write(self, batch: SinkBatch) -> None:
        self.inside += 1
        self.inside_max = max(self.inside_max, self.inside)
        await super().write(batch)
        await anyio.lowlevel.checkpoint()
        self.inside -= 1

    async def aclose(self) -> None:
        self.closed += 1


async def test_sink_workers_and_write_throughs_take_turns(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """G1: a sink has one batch at a time, and is opened and closed once for both."""
    sink = Crowded()
    place = Place(valkey_server, namespace, sink, workers=True)
    async with place.node:
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(place.row.write_through, number, "through")
                tasks.start_soon(place.row.write_behind, 100 + number, "behind")
        await until(lambda: len(sink.rows) == 40)
    assert (sink.inside_max, sink.opened, sink.closed) == (1, 1, 1)


async def test_a_node_without_workers_opens_the_sink_when_it_writes(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """G1: it closes the sink at its stop; a node that never writes opens nothing."""
    writer, reader = Crowded(), Crowded()
    one = Place(valkey_server, namespace, writer)
    two = Place(valkey_server, namespace, reader)
    async with one.node, two.node:
        await write(one, "through", "new")
        assert (writer.opened, writer.closed) == (1, 0)
    assert (writer.opened, writer.closed, reader.opened, reader.closed) == (1, 1, 0, 0)


# Levels


async def test_until_the_sink_has_stored_it(open_place: OpenPlace, monkeypatch: Any) -> None:
    """P1, P2: the caller is woken by the commit, not before the row is stored."""
    monkeypatch.setattr(node_writes, "_POLL_MS", 600_000)
    place = await open_place(workers=True)
    place.table.hang_at = 1
    got: list[Any] = []

    async def waiting() -> None:
        receipt = await place.row.write_behind(1, "new", until="sink", timeout=60)
        got.append((receipt.reached, place.table.values()[KEY]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waiting)
        await place.table.hanging.wait()
        assert await place.row(1) == "new"
        assert got == []
        place.table.go_on.set()
    assert got == [("sink", "new")]


@pytest.mark.parametrize("what", ["sink", "lease"])
async def test_a_lost_notification_costs_a_quarter_of_a_second(
    open_place: OpenPlace, what: str
) -> None:
    """P2, E2: waiting callers poll."""
    place = await open_place(workers=True)
    place.parts.writing.checkpoint_moved = lambda shard: None
    if what == "sink":
        receipt = await place.row.write_behind(1, "new", until="sink", timeout=20)
        assert receipt.reached == "sink"
    else:
        await place.row.write_behind(1, "old")
        await write(place, "through", "new", timeout=20)
    assert place.table.values()[KEY] == "new"


async def test_without_a_worker_the_sink_is_not_reached(here: Place) -> None:
    """P3: the write is accepted, but Unconfirmed."""
    with pytest.raises(Unconfirmed) as caught:
        await here.row.write_behind(1, "new", until="sink", timeout=0.02)
    assert (caught.value.level, caught.value.reached) == ("sink", "accepted")
    assert caught.value.waited_ms >= 20
    assert await here.row(1) == "new"


async def test_a_write_that_the_sink_refuses_raises(open_place: OpenPlace) -> None:
    """P1: the checkpoint passes a dead letter, but the source does not have it."""
    place = await open_place(workers=True)
    place.table.poison = {"bad"}
    with pytest.raises(DeadLettered) as caught:
        await place.row.write_behind(1, "bad", until="sink", timeout=20)
    assert (caught.value.key, caught.value.reason) == (KEY, "sink_refused")
    receipt = await place.row.write_behind(1, "good", until="sink", timeout=20)
    assert receipt.reached == "sink"


async def test_a_dead_letter_is_found_behind_others(
    open_place: OpenPlace, monkeypatch: Any
) -> None:
    """P1: it is found behind any number of later dead letters of the shard."""
    monkeypatch.setattr(node_writes, "_PAGE", 1)
    place = await open_place(workers=True)
    place.table.poison = {"bad"}
    receipt = await place.row.write_behind(1, "bad", until="accepted")
    dead = place.parts.names.part(receipt.shard, "dead")

    async def is_dead() -> bool:
        return bool(await place.call("XLEN", dead))

    await until(is_dead)
    ((_, fields),) = await place.call("XRANGE", dead, "-", "+")
    await place.call("DEL", dead)
    for _ in range(3):
        await place.call("XADD", dead, "*", "from", "1-1", "reason", "another")
    await place.call("XADD", dead, "*", *fields)
    with pytest.raises(DeadLettered):
        await place.parts.writing._check_dead_letters(KEY, receipt)


async def test_a_write_that_a_newer_one_replaced_is_done_with_it(open_place: OpenPlace) -> None:
    """P1: a coalesced write counts as stored with the newer write of its key."""
    place = await open_place(workers=True)
    place.table.hang_at = 1
    await place.row.write_behind(2, "first")
    await place.table.hanging.wait()
    async with anyio.create_task_group() as tasks:
        for value in ("a", "b", "c"):
            tasks.start_soon(_until_sink, place, value)
        await until(lambda: len(place.parts.writing.checkpoints) > 0)
        place.table.go_on.set()
    assert place.table.values()[KEY] == "c"


async def _until_sink(place: Place, value: str) -> None:
    await place.row.write_behind(1, value, until="sink", timeout=20)


async def test_cancelled_while_waiting_for_the_sink(here: Place) -> None:
    """P2: no watch stays; the write does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_until_sink, here, "new")
        await until(lambda: len(here.parts.writing.checkpoints) > 0)
        tasks.cancel_scope.cancel()
    assert len(here.parts.writing.checkpoints) == 0
    assert await here.row(1) == "new"


@pytest.mark.parametrize("way", ["put", "behind"])
async def test_without_a_replica_nothing_is_replicated(here: Place, way: str) -> None:
    """P3: the write was stored on the primary, and the error says so."""
    with pytest.raises(Unconfirmed) as caught:
        await write(here, way, "new", until="replicated", timeout=0.05)
    assert (caught.value.level, caught.value.reached) == ("replicated", "accepted")
    assert await here.row(1) == "new"


@pytest.mark.parametrize("way", ["put", "behind"])
async def test_with_a_replica_it_is_replicated(
    make_server: Any, namespace: str, table: Table, way: str
) -> None:
    """P: when the call returns, the replica has the entry."""
    primary, replica = make_server(config={"repl-diskless-sync-delay": "0"}), make_server()
    replica.execute("REPLICAOF", "127.0.0.1", primary.port)
    place = Place(primary, namespace, table)
    async with place.node:
        receipt = await write(place, way, "new", until="replicated", timeout=20)
        assert receipt.reached == "replicated"
        assert replica.execute("GET", place.name("entry")) is not None


def test_the_poll_is_bounded() -> None:
    """P2, E2: callers poll at least every 250 ms."""
    assert node_writes._POLL_MS == write_module._POLL_MS == 250

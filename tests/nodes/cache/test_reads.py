"""The read path on a real server: one load for all, nothing stale stored, nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import msgspec
import pytest

import forebay
from forebay.nodes.cache import read as reads_module
from forebay.nodes.cache.cached import Cached
from forebay.schemas.entry import read_entry
from forebay.schemas.errors import Backpressure, InvalidKey, LoaderError, Unavailable
from forebay.schemas.jobs import RefreshJob
from forebay.schemas.settings import Limits

Row = dict[str, int]


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    """The cache that most tests use: rows by id, all with two tags."""
    options = {"ttl": 600.0, "tags": ["rows", "number:{id}"], **options}

    @node.cached("row:{id}", **options)
    async def row(id: int) -> Row | None:
        return await source.get(id)

    node.sink("row:{id}")(into_nothing)
    return row


async def into_nothing(writes: list[forebay.Write[Any]]) -> None:
    """A sink, which no worker of these nodes is there to use."""


def counts(node: forebay.Node, *labels: str) -> int:
    return node._instruments.counts.get(labels, 0)


def stored(node: forebay.Node, server: Any, key: str) -> bytes | None:
    raw: bytes | None = server.execute("GET", node._parts.names.entry(key))
    return raw


def leased(node: forebay.Node, server: Any, key: str) -> bytes | None:
    raw: bytes | None = server.execute("GET", node._parts.names.lease(key))
    return raw


def calls_of(server: Any, command: str) -> int:
    """How often the server was given this command."""
    info = server.execute("INFO", "commandstats").decode()
    for line in info.splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            return int(line.split("calls=")[1].split(",")[0])
    return 0


@pytest.fixture
async def node(make_node, source) -> AsyncIterator[forebay.Node]:
    made = make_node(lease_ms=60_000)
    made.row = declare(made, source)
    source.values[1] = {"n": 1}
    async with made:
        yield made


@pytest.fixture
async def cluster(make_node, source) -> AsyncIterator[list[forebay.Node]]:
    """Three nodes that share a namespace and a source."""
    nodes = [make_node(lease_ms=60_000) for _ in range(3)]
    for each in nodes:
        each.row = declare(each, source, stale_for=300.0)
    source.values[1] = {"n": 1}
    async with AsyncExitStack() as stack:
        for each in nodes:
            await stack.enter_async_context(each)
        yield nodes


async def test_cache_aside_and_where_a_value_is_from(make_node, source) -> None:
    """The source first, then the near cache, then, on another node, the shared tier."""
    one, two = make_node(), make_node()
    row, again = declare(one, source), declare(two, source)
    source.values[1] = {"n": 1}
    async with one, two:
        first = await row.get_with_info(1)
        assert (first.value, first.tier, first.stale, first.age_ms) == (
            {"n": 1}, "source", False, 0,
        )  # fmt: skip
        second = await row.get_with_info(1)
        assert (second.value, second.tier, second.version) == ({"n": 1}, "near", first.version)
        third = await again.get_with_info(1)
        assert (third.value, third.tier, third.version) == ({"n": 1}, "shared", first.version)
        assert (await again.get_with_info(1)).tier == "near"
        assert second.age_ms <= third.age_ms < 20_000
        assert await row(1) == await again(1) == {"n": 1}
    assert source.loads == 1


async def test_a_thousand_callers_of_a_cold_key_make_one_load(node, source) -> None:
    """R2: in one process; no lease is left."""
    source.hold()
    async with anyio.create_task_group() as tasks:
        for _ in range(1_000):
            tasks.start_soon(node.row, 1)
        await source.began.wait()
        source.let_go()
    assert source.loads == 1
    assert await node.row(1) == {"n": 1}


async def test_a_thousand_callers_on_three_nodes_make_one_load(
    cluster, source, valkey_server
) -> None:
    """R2: in the cluster."""
    source.hold()
    got: list[Row] = []

    async def call(node: Any) -> None:
        got.append(await node.row(1))

    async with anyio.create_task_group() as tasks:
        for number in range(1_000):
            tasks.start_soon(call, cluster[number % 3])
        await source.began.wait()
        await anyio.sleep(0.05)  # so that the others have found the lease taken
        source.let_go()
    assert source.loads == 1
    assert got == [{"n": 1}] * 1_000
    assert leased(cluster[0], valkey_server, "row:1") is None


async def test_waiters_on_other_nodes_are_woken_by_the_notice(cluster, source, monkeypatch) -> None:
    """Not by looking again and again: that would come after a minute here."""
    monkeypatch.setattr(reads_module, "_POLL_MS", 60_000)
    source.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cluster[0].row, 1)
        await source.began.wait()
        for other in cluster[1:]:
            tasks.start_soon(other.row, 1)
        await anyio.sleep(0.1)
        assert all("row:1" in other._parts.waits._watched for other in cluster[1:])
        with anyio.fail_after(20):
            source.let_go()
            assert await cluster[2].row(1) == {"n": 1}
    assert source.loads == 1


async def test_a_waiter_finds_out_without_a_notice(cluster, source) -> None:
    """A lease that is given back says nothing: those who wait look again now and then."""
    source.hold()
    source.error = ValueError("the first fails")
    got = []

    async def fail() -> None:
        with pytest.raises(ValueError, match="first"):
            await cluster[0].row(1)

    async def wait() -> None:
        got.append(await cluster[1].row(1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await source.began.wait()
        tasks.start_soon(wait)
        await anyio.sleep(0.05)
        source.error = None
        source.let_go()
    assert got == [{"n": 1}]
    assert source.loads == 2


async def test_an_absence_is_remembered_for_a_while(make_node, source, valkey_server) -> None:
    """A negative entry is read on every node, and is invalidated like others."""
    one, two = make_node(), make_node()
    row, again = declare(one, source), declare(two, source, negative_ttl=600.0)
    async with one, two:
        assert await again(7) is None
        assert await row(7) is None
        assert await row(7) is None
        hit = await row.get_with_info(7)
        assert (hit.value, hit.tier, source.loads) == (None, "near", 1)
        assert counts(one, "cache_requests", "row", "shared", "negative") == 1
        source.values[7] = {"n": 7}
        await row.invalidate(7)
        assert await row(7) == {"n": 7}


async def test_an_absence_is_not_stored_if_so_declared(make_node, source, valkey_server) -> None:
    """negative_ttl 0: each read asks the source; the lease is given back."""
    node = make_node()
    row = declare(node, source, negative_ttl=0)
    async with node:
        assert [await row(7), await row(7)] == [None, None]
        assert source.loads == 2
        assert stored(node, valkey_server, "row:7") is None
        assert leased(node, valkey_server, "row:7") is None


async def test_what_is_gone_from_the_source_is_not_served_as_stale(
    make_node, source, valkey_server, eventually
) -> None:
    """L6: also where absences are not remembered, so that nothing takes the old value's place."""
    one, two = make_node(), make_node()
    rows = [declare(node, source, stale_for=300.0, negative_ttl=0) for node in (one, two)]
    source.values[1] = {"n": 1}
    async with one, two:
        assert [await row(1) for row in rows] == [{"n": 1}] * 2
        source.values[1] = None
        await one.invalidate(["row:1"], soft=True)
        assert (await rows[0].get_with_info(1)).stale
        await eventually(lambda: stored(one, valkey_server, "row:1") is None)
        for row in rows:

            async def gone(row: Any = row) -> bool:
                return bool(await row(1) is None)

            await eventually(gone)


async def test_a_stale_value_is_served_at_once_and_refreshed_once(
    cluster, source, eventually
) -> None:
    """D3: by a job, on some node, however many read it meanwhile."""
    assert [await node.row(1) for node in cluster] == [{"n": 1}] * 3
    source.values[1] = {"n": 2}
    source.hold()
    await cluster[0].invalidate(["row:1"], soft=True)
    hits = [await node.row.get_with_info(1) for node in cluster[:1] * 50]
    assert all((hit.value, hit.stale, hit.tier) == ({"n": 1}, True, "shared") for hit in hits)
    with anyio.fail_after(20):
        await source.began.wait()
    assert (await cluster[0].row.get_with_info(1)).stale, "served while it is being refreshed"
    source.let_go()

    async def refreshed() -> bool:
        hit = await cluster[0].row.get_with_info(1)
        return hit.value == {"n": 2} and not hit.stale

    await eventually(refreshed, what="the refreshed value")
    assert source.loads == 2
    assert sum(counts(node, "refresh_requests", "published") for node in cluster) == 1


async def test_what_is_stale_by_its_age_is_refreshed_too(make_node, source, eventually) -> None:
    """D3: between soft and hard lifetime, on the server's clock."""
    node = make_node(jitter=0.0)
    row = declare(node, source, ttl=0.05, stale_for=600.0)
    source.values[1] = {"n": 1}
    async with node:
        await row(1)
        source.values[1] = {"n": 2}

        async def seen() -> set[tuple[int, bool]]:
            hit = await row.get_with_info(1)
            found.add((hit.value["n"], hit.stale))
            return found & {(2, False)}

        found: set[tuple[int, bool]] = set()
        await eventually(seen)
        assert found == {(1, False), (1, True), (2, False)} or found == {(1, True), (2, False)}


async def test_an_invalidation_is_visible_here_before_it_returns(node, source) -> None:
    """By key, and by each of the tags; also for a tag that nobody carries."""
    for number, invalidation in enumerate(
        [
            lambda: node.row.invalidate(1),
            lambda: node.invalidate(["row:1"]),
            lambda: node.invalidate(tags=["rows"]),
            lambda: node.invalidate(tags=["number:1", "nobody"]),
            lambda: node.invalidate(["row:1", "row:2"], tags=["rows"]),
        ],
        start=1,
    ):
        assert await node.row(1) == {"n": number}
        source.values[1] = {"n": number + 1}
        assert (await node.row.get_with_info(1)).tier == "near"
        await invalidation()
        assert await node.row(1) == {"n": number + 1}
    await node.invalidate(tags=["number:2"])
    assert (await node.row.get_with_info(1)).tier == "near"


@pytest.mark.parametrize("by", ["key", "tag"])
async def test_an_invalidation_is_visible_elsewhere_within_the_promise(
    cluster, source, by: str
) -> None:
    """Whatever is read later than max_staleness after it is new, on every node."""
    promise_s = cluster[0].settings.cache.max_staleness_ms / 1000
    for round_ in range(2):
        assert [await node.row(1) for node in cluster] == [{"n": round_ + 1}] * 3
        source.values[1] = {"n": round_ + 2}
        if by == "key":
            await cluster[0].row.invalidate(1)
        else:
            await cluster[0].invalidate(tags=["number:1"])
        clock = cluster[0]._parts.clock
        due = clock.monotonic() + promise_s
        late: list[Row] = []
        while len(late) < 4:
            for node in cluster[1:]:
                asked_at = clock.monotonic()
                value = await node.row(1)
                if asked_at > due:
                    late.append(value)
            await anyio.sleep(0.01)
        assert all(value == {"n": round_ + 2} for value in late)


@pytest.mark.parametrize("by", ["key", "tag"])
async def test_what_was_invalidated_while_it_was_loaded_is_not_stored(
    node, source, valkey_server, eventually, by: str
) -> None:
    """L1: the callers from before get it; later ones do not wait for it, and load anew (R3)."""
    source.hold()
    got: dict[str, Row] = {}

    async def call(name: str) -> None:
        got[name] = await node.row(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "leader")
        await source.began.wait()
        tasks.start_soon(call, "waiter")
        await eventually(lambda: node.row._cache.path.flights.waiting == 2)
        source.values[1] = {"n": 2}
        if by == "key":
            await node.row.invalidate(1)
        else:
            await node.invalidate(tags=["rows"])
        first_gate = source._gate
        source.hold()
        tasks.start_soon(call, "late")
        if by == "key":
            await source.began.wait()  # the lease of the first is gone
        first_gate.set()
        source.let_go()
    assert got == {"leader": {"n": 1}, "waiter": {"n": 1}, "late": {"n": 2}}
    assert await node.row(1) == {"n": 2}
    assert source.loads == 2
    entry = read_entry(stored(node, valkey_server, "row:1") or b"", bytes_max=10_000)
    assert msgspec.msgpack.decode(entry.payload) == {"n": 2}
    assert counts(node, "fills_refused", "row") == (1 if by == "key" else 0)


async def test_a_tag_bumped_elsewhere_during_a_load_counts(cluster, source) -> None:
    """L1: tags are captured before the loader starts, not when it ends."""
    source.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cluster[0].row, 1)
        await source.began.wait()
        source.values[1] = {"n": 2}
        await cluster[1].invalidate(tags=["rows"])
        source.let_go()
    assert await cluster[1].row(1) == {"n": 2}
    assert await cluster[2].row(1) == {"n": 2}


async def test_a_value_that_is_too_large_is_returned_and_not_stored(
    make_node, source, valkey_server
) -> None:
    """And counted; the next caller need not wait for a lease."""
    node = make_node(value_bytes_max=100)

    @node.cached("text:{id}", ttl=600)
    async def text(id: int) -> str:
        return await source.get(id)

    source.values.update({1: "x" * 500, 2: "x" * 50})
    async with node:
        assert [await text(1), await text(1), await text(2), await text(2)] == [
            "x" * 500, "x" * 500, "x" * 50, "x" * 50,
        ]  # fmt: skip
        assert source.asked == [1, 1, 2]
        assert stored(node, valkey_server, "text:1") is None
        assert leased(node, valkey_server, "text:1") is None
        assert counts(node, "limit_reached", "value_bytes") == 2


async def test_a_value_that_cannot_be_encoded_is_the_callers_to_know(
    make_node, source, valkey_server
) -> None:
    """It is a fault of the loader, not of the cache; the lease is given back."""
    node = make_node()

    @node.cached("thing:{id}", ttl=600)
    async def thing(id: int) -> Any:
        return object()

    async with node:
        with pytest.raises(LoaderError, match="type object"):
            await thing(1)
        assert leased(node, valkey_server, "thing:1") is None


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"\x80\x04garbage" * 20, "bad_magic"),
        (b"\xfbE9" + b"0" * 100, "newer_format"),
        (b"\xfbE1c" + b"x" * 100, "bad_header"),
        (b"\xfbE1c" + b"7" * 42 + b"0" * 16 + b"vm\0\0\xc1", "bad_value"),
        (b"\xfbE1c" + b"7" * 42 + b"0" * 16 + b"v?\0\0\x01", "bad_codec"),
        (b'["not", "a", "row"]', "bad_value"),
        (b'{"n": "one"}', "bad_value"),
    ],
)
async def test_bytes_that_cannot_be_read_are_a_miss_and_a_count(
    node, source, valkey_server, raw: bytes, fault: str
) -> None:
    """R4: they are loaded over."""
    valkey_server.execute("SET", node._parts.names.entry("row:1"), raw)
    assert await node.row(1) == {"n": 1}
    assert counts(node, "cache_decode_errors", "row") == 1
    assert counts(node, "entry_faults", fault) == 1
    entry = read_entry(stored(node, valkey_server, "row:1") or b"", bytes_max=10_000)
    assert msgspec.msgpack.decode(entry.payload) == {"n": 1}
    assert source.loads == 1


async def test_unreadable_bytes_are_replaced_by_one_node(cluster, source, valkey_server) -> None:
    """R4: the others wait for it, and take what it stored."""
    valkey_server.execute("SET", cluster[0]._parts.names.entry("row:1"), b'{"n": "one"}')
    source.hold()
    async with anyio.create_task_group() as tasks:
        for node in cluster:
            tasks.start_soon(node.row, 1)
        await source.began.wait()
        await anyio.sleep(0.05)
        source.let_go()
    assert source.loads == 1


async def test_a_pending_write_that_cannot_be_read_is_passed_by(
    make_node, source, valkey_server
) -> None:
    """A node of another version wrote it. It is not loaded over, nor asked for in a circle."""
    newer, older = make_node(), make_node()

    @newer.cached("row:{id}", ttl=600, name="row")
    async def row_as_text(id: int) -> str:
        return "loaded"

    newer.sink("row:{id}")(into_nothing)
    row = declare(older, source)
    source.values[1] = {"n": 1}
    async with newer, older:
        await row_as_text.write_behind(1, "written")
        before = calls_of(valkey_server, "evalsha")
        assert await row(1) == {"n": 1}
        assert calls_of(valkey_server, "evalsha") - before < 10
        assert await row_as_text(1) == "written"
        assert (await row_as_text.get_with_info(1)).value == "written"
        assert read_entry(stored(older, valkey_server, "row:1") or b"", bytes_max=999).pending


async def test_legacy_forms_are_read_in_one_go_with_ours(node, source, valkey_server) -> None:
    """Three forms, one MGET; the wrapped one is served stale after its time, and refreshed."""
    entry = node._parts.names.entry
    await node.row(1)
    node.row._cache.path.near.clear()
    valkey_server.execute("SET", entry("row:2"), b'{"n": 2}')
    valkey_server.execute("SET", entry("row:3"), b'{"value": {"n": 3}, "stale_at": 32503680000}')
    valkey_server.execute("SET", entry("row:4"), b'{"value": {"n": 4}, "stale_at": 1.5}')
    before = calls_of(valkey_server, "mget")
    hits = await asyncio.gather(*[node.row.get_with_info(number) for number in (1, 2, 3, 4)])
    assert calls_of(valkey_server, "mget") - before == 1
    assert [hit.value for hit in hits] == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]
    assert [hit.stale for hit in hits] == [False, False, False, True]
    assert [hit.version > 0 for hit in hits] == [True, False, False, False]
    assert source.loads == 1
    await node.row.invalidate(2)
    source.values[2] = {"n": 22}
    assert await node.row(2) == {"n": 22}


async def test_a_loaders_error_reaches_all_and_is_not_stored(node, source, valkey_server) -> None:
    """L2, L3: the lease is back before the callers hear of it, and the next one tries anew."""
    source.error = ConnectionRefusedError(111, "the database")
    source.hold()
    errors: list[BaseException] = []

    async def call() -> None:
        with pytest.raises(ConnectionRefusedError) as caught:
            await node.row(1)
        errors.append(caught.value)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(call)
        await source.began.wait()
        assert leased(node, valkey_server, "row:1")
        source.let_go()
    assert len({id(error) for error in errors}) == 20
    assert leased(node, valkey_server, "row:1") is None
    assert stored(node, valkey_server, "row:1") is None
    assert source.loads == 1
    source.error = None
    assert await node.row(1) == {"n": 1}


async def test_an_error_invalidates_nothing(node, source, valkey_server) -> None:
    """L3: what is stale stays, and is served while the source fails."""
    await node.row(1)
    raw = stored(node, valkey_server, "row:1")
    source.error = ValueError("down")
    job = RefreshJob(cache="row", key="row:1", token="token")
    valkey_server.execute("SET", node._parts.names.lease("row:1"), "token", "PX", 60_000)
    with pytest.raises(ValueError, match="down"):
        await node.row._cache.refresh(job)
    assert stored(node, valkey_server, "row:1") == raw
    assert (await node.row.get_with_info(1)).tier == "near"
    assert leased(node, valkey_server, "row:1") == b"!", "no token: its source is left alone"
    name = node._parts.names.lease("row:1")
    assert 0 < valkey_server.execute("PTTL", name) <= node.settings.cache.throttle_ms


async def test_a_loader_that_takes_longer_than_its_lease_is_stopped(
    make_node, source, valkey_server
) -> None:
    """L4: the callers are told, and the lease is given back."""
    node = make_node(lease_ms=200)
    row = declare(node, source)
    source.values[1] = {"n": 1}
    async with node:
        source.hold()
        with pytest.raises(LoaderError, match="longer than its lease"):
            await row(1)
        assert leased(node, valkey_server, "row:1") is None
        source.let_go()
        assert await row(1) == {"n": 1}


async def test_a_loader_that_is_cancelled_from_inside_ends_nothing_else(node, source) -> None:
    """L4: it waited for something that was cancelled; the node goes on."""

    async def wait_for_the_cancelled() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    source.before = wait_for_the_cancelled
    with pytest.raises(LoaderError, match="cancelled from inside"):
        await node.row(1)
    job = RefreshJob(cache="row", key="row:1", token="token")
    await node._parts.shared.begin("row:1", "token", lease_ms=10_000, seen=-1)
    with pytest.raises(LoaderError, match="cancelled from inside"):
        await node.row._cache.refresh(job)
    source.before = None
    assert await node.row(1) == {"n": 1}


async def test_a_loaders_own_unavailable_is_not_taken_for_ours(node, source) -> None:
    """R5: or the loader would be called twice, and its value not stored."""
    source.error = Unavailable("another valkey")
    with pytest.raises(Unavailable, match="another valkey"):
        await node.row(1)
    assert source.loads == 1


async def test_a_cancelled_caller_takes_nobody_along(node, source) -> None:
    """Flights F1, with the real thing: the load goes on, and is stored."""
    source.hold()
    got = []

    async def wait() -> None:
        got.append(await node.row(1))

    async with anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as first:
            first.start_soon(node.row, 1)
            await source.began.wait()
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        source.let_go()
    assert (got, source.loads) == ([{"n": 1}], 1)
    assert (await node.row.get_with_info(1)).tier == "near"


async def test_a_loader_that_asks_for_itself_is_told(make_node, source, valkey_server) -> None:
    """Flights F5, by way of another cache."""
    node = make_node()

    @node.cached("one:{id}", ttl=600)
    async def one(id: int) -> int:
        return await two(id)

    @node.cached("two:{id}", ttl=600)
    async def two(id: int) -> int:
        return await one(id)

    async with node:
        with anyio.fail_after(5), pytest.raises(LoaderError, match="itself"):
            await one(1)
        assert leased(node, valkey_server, "one:1") is None
        assert leased(node, valkey_server, "two:1") is None


async def test_loads_are_bounded_and_reads_are_not(make_node, source) -> None:
    """Flights F4: what the shared tier has needs no loader."""
    warm = make_node()
    row = declare(warm, source)
    source.values.update({n: {"n": n} for n in range(300)})
    node = make_node(limits=Limits(loads_max=2, waiters_max=100))
    bounded = declare(node, source)
    async with warm, node:
        for number in range(200):
            await row(number)
        got = await asyncio.gather(*[bounded(n) for n in range(200)])
        assert got == [{"n": n} for n in range(200)]
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bounded, 201)
            tasks.start_soon(bounded, 202)
            await anyio.sleep(0.05)
            with pytest.raises(Backpressure):
                await bounded(203)
            source.let_go()
        assert await bounded(203) == {"n": 203}


async def test_a_write_is_read_at_once_where_it_was_made(node, source, monkeypatch) -> None:
    """Also a deletion, and also by those who come while a load is under way."""
    monkeypatch.setattr(node._parts.follower, "bell", lambda payload: None)  # none comes to help
    await node.row(1)
    receipt = await node.row.write_behind(1, {"n": 5})
    hit = await node.row.get_with_info(1)
    assert (hit.value, hit.tier, hit.version) == ({"n": 5}, "near", receipt.stamp.version)
    await node.row.write_behind(1, None)
    assert await node.row(1) is None
    await node.row.write_behind(1, {"n": 6})
    assert await node.row(1) == {"n": 6}
    source.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(node.row, 2)
        await source.began.wait()
        await node.row.write_behind(2, {"n": 7})
        assert await node.row(2) == {"n": 7}
        source.let_go()
    assert await node.row(2) == {"n": 7}, "the load from before must not be stored over it"
    assert source.asked == [1, 2]


async def test_a_write_too_large_for_the_near_cache_is_read_at_once(
    make_node, source, monkeypatch
) -> None:
    """The value that it replaces is gone from there, before any notice comes."""
    node = make_node(near_bytes_max=600)

    @node.cached("text:{id}", ttl=600)
    async def text(id: int) -> str:
        return await source.get(id)

    node.sink("text:{id}")(into_nothing)
    source.values[1] = "small"
    async with node:
        monkeypatch.setattr(node._parts.follower, "bell", lambda payload: None)
        await text(1)
        assert (await text.get_with_info(1)).tier == "near"
        await text.write_behind(1, "x" * 500)
        hit = await text.get_with_info(1)
        assert (hit.value, hit.tier) == ("x" * 500, "shared")


async def test_a_pending_write_neither_expires_nor_is_loaded_over(
    make_node, source, valkey_server
) -> None:
    """D1: the source does not have it yet; not even an invalidation or a bump changes that."""
    node = make_node(jitter=0.0)
    row = declare(node, source, ttl=0.001)
    source.values[1] = {"n": 1}
    async with node:
        await row.write_behind(1, {"n": 5})
        await anyio.sleep(0.02)
        assert valkey_server.execute("PTTL", node._parts.names.entry("row:1")) == -1
        assert (await row.get_with_info(1)).value == {"n": 5}
        await row.invalidate(1)
        hit = await row.get_with_info(1)
        assert (hit.value, hit.tier, hit.stale) == ({"n": 5}, "shared", False)
        assert (await row.get_with_info(1)).tier == "shared", "not kept: it is to be dropped"
        await node.invalidate(tags=["rows"])
        assert await row(1) == {"n": 5}
        job = RefreshJob(cache="row", key="row:1", token="token")
        assert not await row._cache.refresh(job)
    assert source.loads == 0


async def test_a_refresh_whose_lease_is_over_loads_nothing(node, source, valkey_server) -> None:
    """The source is not asked for what could not be stored; nor for what cannot be called."""
    await node.row(1)
    job = RefreshJob(cache="row", key="row:1", token="token")
    assert not await node.row._cache.refresh(job)
    valkey_server.execute("SET", node._parts.names.lease("row:1"), "another's", "PX", 60_000)
    assert not await node.row._cache.refresh(job)
    assert leased(node, valkey_server, "row:1") == b"another's"
    bad = RefreshJob(cache="row", key="row:x", token="token")
    valkey_server.execute("SET", node._parts.names.lease("row:x"), "token", "PX", 60_000)
    with pytest.raises(InvalidKey):
        await node.row._cache.refresh(bad)
    assert leased(node, valkey_server, "row:x") is None
    assert source.loads == 1


async def test_a_refresh_is_kept_here_and_told_elsewhere(cluster, source, eventually) -> None:
    """It goes the way of every fill."""
    assert [await node.row(1) for node in cluster] == [{"n": 1}] * 3
    source.values[1] = {"n": 2}
    await cluster[0]._parts.shared.begin("row:1", "token", lease_ms=60_000, seen=2**60)
    assert await cluster[0].row._cache.refresh(RefreshJob(cache="row", key="row:1", token="token"))
    hit = await cluster[0].row.get_with_info(1)
    assert (hit.value, hit.tier) == ({"n": 2}, "near")
    await eventually(lambda: _reads(cluster[1], {"n": 2}))
    assert source.loads == 2


async def _reads(node: Any, value: Row) -> bool:
    return bool(await node.row(1) == value)


async def test_a_lease_whose_fill_got_no_answer_is_given_back(
    node, source, valkey_server, eventually, monkeypatch
) -> None:
    """L2: the callers get their value, and the next one does not wait for the lease's end."""

    async def unanswered(*args: Any, **options: Any) -> None:
        raise Unavailable("no answer", outcome_unknown=True)

    monkeypatch.setattr(node._parts.shared, "fill", unanswered)
    assert await node.row(1) == {"n": 1}
    await eventually(lambda: leased(node, valkey_server, "row:1") is None)
    monkeypatch.undo()
    assert await node.row(1) == {"n": 1}
    assert source.loads == 2


async def test_a_lease_whose_grant_got_lost_is_given_back(
    node, source, valkey_server, monkeypatch
) -> None:
    """L2: it may have been granted before the connection went."""
    begin = node._parts.shared.begin

    async def lost(*args: Any, **options: Any) -> None:
        await begin(*args, **options)
        raise Unavailable("no answer", outcome_unknown=True)

    monkeypatch.setattr(node._parts.shared, "begin", lost)
    assert await node.row(1) == {"n": 1}, "by policy from the source"
    assert leased(node, valkey_server, "row:1") is None
    assert stored(node, valkey_server, "row:1") is None


async def test_two_caches_do_not_mix(make_node, source) -> None:
    """Keys tell them apart; a notice reaches the right one."""
    node = make_node()
    row = declare(node, source)

    @node.cached("other:{id}", ttl=600)
    async def other(id: int) -> int:
        return id * 100

    source.values[1] = {"n": 1}
    async with node:
        assert (await row(1), await other(1)) == ({"n": 1}, 100)
        await other.invalidate(1)
        assert (await row.get_with_info(1)).tier == "near"
        assert (await other.get_with_info(1)).tier == "source"


async def test_what_a_write_may_invalidate_is_bounded_and_checked(node) -> None:
    """Or its job could not be read by the worker, and the write would be lost."""
    with pytest.raises(InvalidKey, match="invalidates_keys"):
        await node.row.write_behind(1, {"n": 1}, invalidates_keys=[f"k{n}" for n in range(1_001)])
    with pytest.raises(InvalidKey, match="invalidates_tags"):
        await node.row.write_behind(1, {"n": 1}, invalidates_tags=["no key"])
    with pytest.raises(InvalidKey, match="write a list"):
        await node.row.write_behind(1, {"n": 1}, invalidates_tags="catalog")
    receipt = await node.row.write_behind(
        1, {"n": 1}, invalidates_keys=[f"k{n}" for n in range(1_000)]
    )
    assert receipt.stamp is not None


async def test_nothing_is_left_of_reads_that_ended(node, source) -> None:
    """No reservation, flight, watch or task, after hits, misses, errors and cancellations."""
    source.values.update({n: {"n": n} for n in range(50)})

    async def some(id: int) -> None:
        with anyio.move_on_after(0.002 * (id % 5) if id % 3 else 20):
            await node.row(id)

    for _ in range(3):
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(some, number)
        await node.invalidate(tags=["rows"])
    path = node.row._cache.path
    with anyio.fail_after(20):
        while len(path.flights):
            await anyio.sleep(0.01)
    assert not path.near._reservations
    assert not path.flights._flights
    assert path.flights.waiting == 0
    assert len(node._parts.waits) == 0
    lookups = node._parts.shared.get.__self__
    assert not lookups._asked
    assert not lookups._reading

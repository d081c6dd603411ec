"""Many keys in one read: one look, one load, and each key's fate its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.nodes.cache.core import Hit
from forebay.nodes.request_scope import outside
from forebay.schemas.errors import LoaderError, PartialFailure
from support.eventually import until

Row = dict[str, int]


class Table:
    """A source that is asked for many rows at once; answers can be held back, and replaced."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.answers: dict[Any, Any] = {}
        self.missing: set[Any] = set()
        self.error: Exception | None = None
        self.returns: Any = None
        self.began = anyio.Event()
        self.gate = anyio.Event()
        self.gate.set()

    @property
    def asked(self) -> list[Any]:
        return [item for call in self.calls for item in call]

    def hold(self) -> None:
        self.began, self.gate = anyio.Event(), anyio.Event()

    async def get(self, items: list[Any]) -> Any:
        self.calls.append(list(items))
        self.began.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if self.returns is not None:
            return self.returns
        made = {item: self.answers.get(item, {"n": item}) for item in items}
        return {item: value for item, value in made.items() if item not in self.missing}


def declare(node: forebay.Node, table: Table, **options: Any) -> Cached[Any, Row | None]:
    @node.cached("row:{id}", **{"ttl": 600.0, "tags": ["rows", "number:{id}"], **options})
    async def row(id: int) -> Row | None:
        raise AssertionError("the batch loader is there")

    @row.batch
    async def rows(ids: list[int]) -> Mapping[int, Row | None]:
        found: Mapping[int, Row | None] = await table.get(ids)
        return found

    return row


def rows(*numbers: int) -> list[Row]:
    return [{"n": number} for number in numbers]


def count(cached: Cached[Any, Any], node: forebay.Node, *labels: str) -> int:
    return node._instruments.counts.get((labels[0], cached.name, *labels[1:]), 0)


def calls_of(server: Any, command: str) -> int:
    for line in server.execute("INFO", "commandstats").decode().splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            return int(line.split("calls=")[1].split(",")[0])
    return 0


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def nodes(make_node, table) -> AsyncIterator[list[forebay.Node]]:
    """Two, with the cache as ``row``."""
    made = [make_node(lease_ms=60_000, breaker_failures=1_000, jitter=0.0) for _ in range(2)]
    for each in made:
        each.row = declare(each, table)
    async with AsyncExitStack() as stack:
        for each in made:
            await stack.enter_async_context(each)
        yield made


async def test_values_come_in_the_order_of_the_items(nodes, table) -> None:
    """Also one that is asked for twice; all misses are one call of the batch loader."""
    row = nodes[0].row
    assert await row.many([3, 1, 2, 3, 1]) == rows(3, 1, 2, 3, 1)
    assert [sorted(call) for call in table.calls] == [[1, 2, 3]]
    assert await row.many([]) == []
    assert await row.many(iter([2, 3])) == rows(2, 3)
    assert len(table.calls) == 1


async def test_near_shared_and_missing_are_told_apart(nodes, table) -> None:
    """Each is from where it is nearest; only what is missing is loaded."""
    row, again = nodes[0].row, nodes[1].row
    await row.many([1, 2])
    await again.many([3])
    hits = await again.many_with_info([1, 3, 4])
    assert [(hit.value["n"], hit.tier, hit.stale) for hit in hits] == [
        (1, "shared", False), (3, "near", False), (4, "source", False),
    ]  # fmt: skip
    assert table.calls[2:] == [[4]]
    assert [hit.tier for hit in await again.many_with_info([1, 3, 4])] == ["near"] * 3
    assert hits[0].version == (await row.get_with_info(1)).version


async def test_older_forms_and_broken_entries_are_read_in_one_go(
    nodes, table, valkey_server
) -> None:
    """M3: what can be read is a hit, what cannot is loaded over and counted, once each."""
    node = nodes[0]
    names, row = node._parts.names, node.row
    await row.many([1, 2])
    row._cache.path.near.clear()
    valkey_server.execute("SET", names.entry("row:3"), b'{"n": 3}')
    valkey_server.execute("SET", names.entry("row:4"), b'{"value": {"n": 4}, "stale_at": 1.5}')
    valkey_server.execute("SET", names.entry("row:5"), b"\x80\x04garbage" * 20)
    valkey_server.execute("SET", names.entry("row:6"), b"\xfbE9" + b"0" * 100)
    valkey_server.execute("SET", names.entry("row:7"), b'["no", "row"]')
    before = calls_of(valkey_server, "mget")
    hits = await row.many_with_info(range(1, 9))
    assert calls_of(valkey_server, "mget") - before == 1
    assert [hit.value for hit in hits] == rows(*range(1, 9))
    assert [hit.tier for hit in hits] == ["shared"] * 4 + ["source"] * 4
    assert [hit.stale for hit in hits] == [False] * 3 + [True] + [False] * 4
    await until(lambda: len(table.calls) == 3)  # the stale one is refreshed in the background
    assert sorted(table.calls[1:]) == [[4], [5, 6, 7, 8]]
    for fault in ("bad_magic", "newer_format", "bad_value"):
        assert node._instruments.counts["entry_faults", fault] == 1
    assert count(row, node, "cache_decode_errors") == 3
    assert count(row, node, "cache_requests", "shared", "hit") == 3
    assert count(row, node, "cache_requests", "shared", "stale") == 1


async def test_what_the_batch_loader_leaves_out_is_absent(nodes, table) -> None:
    """G2: None, remembered as such, on every node."""
    table.missing = {2}
    assert await nodes[0].row.many([1, 2, 3]) == [{"n": 1}, None, {"n": 3}]
    assert await nodes[1].row(2) is None
    assert len(table.asked) == 3


async def test_an_exception_as_a_value_fails_its_key_alone(nodes, table) -> None:
    """G2: the others are stored; many() raises one error that holds both."""
    row = nodes[0].row
    table.answers = {2: KeyError("no such row"), 4: ValueError("bad row")}
    hits = await row.many_with_info([1, 2, 3, 4])
    assert [hit.value if isinstance(hit, Hit) else type(hit) for hit in hits] == [
        {"n": 1}, KeyError, {"n": 3}, ValueError,
    ]  # fmt: skip
    with pytest.raises(PartialFailure, match="2 of 4 items of row failed") as caught:
        await row.many([1, 2, 3, 4])
    error = caught.value
    assert error.cache == "row"
    assert error.values == {1: {"n": 1}, 3: {"n": 3}}
    assert {item: str(each) for item, each in error.errors.items()} == {
        2: "'no such row'", 4: "bad row",
    }  # fmt: skip
    assert sorted(table.asked) == [1, 2, 2, 3, 4, 4]


async def test_a_batch_loader_that_raises_fails_all_of_its_keys(
    nodes, table, valkey_server
) -> None:
    """G2: with an object each; what was stored before is given, and no lease is left."""
    row = nodes[0].row
    await row.many([1])
    table.error = ConnectionError("down")
    with pytest.raises(PartialFailure) as caught:
        await row.many([1, 2, 3])
    assert caught.value.values == {1: {"n": 1}}
    errors = caught.value.errors
    assert [type(errors[item]) for item in (2, 3)] == [ConnectionError] * 2
    assert errors[2] is not errors[3]
    for item in (2, 3):
        assert valkey_server.execute("GET", nodes[0]._parts.names.lease(f"row:{item}")) is None
    table.error = None
    assert await row.many([1, 2, 3]) == rows(1, 2, 3)


async def test_what_is_no_mapping_is_an_error_that_says_so(nodes, table) -> None:
    """A list, such as a query returns, in the wrong order or too short, is not guessed at."""
    table.returns = [{"n": 1}, {"n": 2}]
    for hit in await nodes[0].row.many_with_info([1, 2]):
        assert isinstance(hit, LoaderError)
        assert "list, and no mapping" in hit.problem


async def test_two_nodes_that_ask_for_the_same_load_each_key_once(nodes, table) -> None:
    """M2: whoever has a lease loads; the other takes what it stored, and holds up nobody."""
    table.hold()
    got: dict[int, list[Row]] = {}

    async def read(index: int, numbers: range) -> None:
        got[index] = await nodes[index].row.many(numbers)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, 0, range(30))
            await table.began.wait()
            tasks.start_soon(read, 1, range(10, 40))
            while len(table.calls) < 2:
                await anyio.sleep(0.005)  # the second does not wait for what the first holds
            assert sorted(table.calls[1]) == list(range(30, 40))
            table.gate.set()
    assert got == {0: rows(*range(30)), 1: rows(*range(10, 40))}
    assert sorted(table.asked) == list(range(40))


async def test_two_nodes_that_ask_at_once_do_not_wait_for_each_other(nodes, table) -> None:
    """M2: in whatever order the items were given."""
    with anyio.fail_after(30):
        for round_ in range(5):
            numbers = range(100 * round_, 100 * round_ + 60)
            one, two = await asyncio.gather(
                nodes[0].row.many(numbers), nodes[1].row.many(reversed(numbers))
            )
            assert one == rows(*numbers)
            assert two == rows(*reversed(numbers))
    assert len(table.asked) == 300


async def test_a_load_under_way_here_holds_up_no_other_key(nodes, table) -> None:
    """M2: what another caller loads is waited for beside the load of the rest."""
    row = nodes[0].row
    table.hold()
    got = []

    async def read() -> None:
        got.append(await row.many([1, 2]))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(row, 1)
            await table.began.wait()
            tasks.start_soon(read)
            while len(table.calls) < 2:
                await anyio.sleep(0.005)
            assert table.calls == [[1], [2]]
            table.gate.set()
    assert got == [rows(1, 2)]


async def test_a_cancelled_bulk_read_leaves_its_loads_to_the_others(
    nodes, table, eventually
) -> None:
    """G4, Flights F1: they are stored, and those who wait for them get them."""
    row = nodes[0].row
    table.hold()
    got = []

    async def read() -> None:
        got.append(await row(2))

    async with anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as first:
            first.start_soon(row.many, [1, 2, 3])
            await table.began.wait()
            tasks.start_soon(read)
            await eventually(lambda: row._cache.path.flights.waiting == 4)
            first.cancel_scope.cancel()
        assert row._cache.path.flights.waiting == 1
        table.gate.set()
    assert got == rows(2)
    await eventually(lambda: not len(row._cache.path.flights))
    assert await nodes[1].row.many([1, 2, 3]) == rows(1, 2, 3)
    assert len(table.calls) == 1


async def test_a_bulk_read_that_is_cut_off_anywhere_leaves_nothing(nodes, table) -> None:
    """No reservation, load, group or lease that others would wait for."""
    row = nodes[0].row
    for number in range(60):
        numbers = range(10 * number, 10 * number + 10)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(row.many, numbers)
            for _ in range(number % 20):
                await anyio.sleep(0)
            tasks.cancel_scope.cancel()
        if number % 10 == 9:
            with anyio.fail_after(20):
                assert await nodes[1].row.many(numbers) == rows(*numbers)
    with anyio.fail_after(20):
        while len(row._cache.path.flights):
            await anyio.sleep(0.005)
    assert not row._cache.path.near._reservations
    assert not row._cache.path.flights._flights
    assert len(nodes[0]._parts.waits) == 0


async def test_in_a_request_scope_each_key_is_read_once(nodes, table, valkey_server) -> None:
    """Scope S1: by many and by single reads alike; what was changed here is read anew (S2)."""
    row = nodes[0].row
    async with forebay.request_scope():
        assert await row(1) == {"n": 1}
        assert await row.many([1, 2]) == rows(1, 2)
        table.answers = {1: {"n": 11}, 2: {"n": 22}}
        with outside():  # somebody else
            await nodes[1].invalidate(tags=["rows"])
        assert await row.many([2, 1]) == rows(2, 1)
        assert await row(2) == {"n": 2}
        await row.invalidate(2)
        assert await row.many([1, 2]) == rows(1, 22)
    table.error = ConnectionError("down")
    async with forebay.request_scope():
        with pytest.raises(PartialFailure):
            await row.many([5, 2])
        table.error = None
        assert await row.many([5, 2]) == rows(5, 22), "errors are not kept"


@pytest.mark.parametrize("size", [201, 1_201])
async def test_large_reads_are_cut_into_few_pieces(
    nodes, table, valkey_server, eventually, size: int
) -> None:
    """M1: an MGET for 200, a call for 500; on another node, no tag is asked for by itself."""
    numbers = range(size)
    assert await nodes[0].row.many(numbers) == rows(*numbers)
    assert len(table.calls) == -(-size // 500)
    assert sorted(table.asked) == list(numbers)
    before = {name: calls_of(valkey_server, name) for name in ("mget", "evalsha")}
    assert await nodes[1].row.many(numbers) == rows(*numbers)
    assert calls_of(valkey_server, "mget") - before["mget"] == -(-size // 200)
    shards, pages = 4, -(-size // 200)
    assert calls_of(valkey_server, "evalsha") - before["evalsha"] <= shards * pages
    assert len(table.asked) == size

    async def all_near() -> bool:  # as soon as the node is current again, on a busy machine
        return {hit.tier for hit in await nodes[1].row.many_with_info(numbers)} == {"near"}

    await eventually(all_near)


async def test_items_of_two_parameters_are_tuples(make_node) -> None:
    """For the caller and for the batch loader; single reads go there too."""
    node, calls = make_node(), []

    @node.cached("seat:{flight}:{row}", ttl=600)
    async def seat(flight: str, row: int) -> str:
        raise AssertionError("the batch loader is there")

    @seat.batch
    async def seats(asked: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
        calls.append(sorted(asked))
        return {(flight, row): f"{flight}-{row}" for flight, row in asked}

    async with node:
        assert await seat.many([("a", 2), ("b", 1), ("a", 2)]) == ["a-2", "b-1", "a-2"]
        assert await seat("a", 1) == "a-1"
        assert await seat(row=3, flight="a") == "a-3"
        assert calls == [[("a", 2), ("b", 1)], [("a", 1)], [("a", 3)]]


async def test_single_reads_of_one_moment_share_a_call(nodes, table) -> None:
    """G1: as many callers as there are."""
    row = nodes[0].row
    assert await asyncio.gather(*[row(number % 20) for number in range(100)]) == rows(
        *[number % 20 for number in range(100)]
    )
    assert sorted(table.asked) == list(range(20))
    assert len(table.calls) <= 3


async def test_without_a_batch_loader_each_miss_is_a_load(make_node, source) -> None:
    """At the same time; the failure of one is its own."""
    node = make_node()

    @node.cached("row:{id}", ttl=600)
    async def row(id: int) -> Row:
        if id == 3:
            raise KeyError(id)
        value: Row = await source.get(id)
        return value

    source.values.update({1: {"n": 1}, 2: {"n": 2}})
    source.hold()
    async with node:
        got: list[Any] = []

        async def read() -> None:
            got.extend(await row.many_with_info([1, 2, 3]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            with anyio.fail_after(20):
                while source.loads < 2:
                    await anyio.sleep(0.005)
            source.let_go()
        assert [hit.value for hit in got[:2]] == rows(1, 2)
        assert isinstance(got[2], KeyError)


async def test_old_values_are_served_where_the_batch_fails(make_node, table, grow_old) -> None:
    """Reads R5, for each key by itself: one has an old value, the other has none."""
    node = make_node(jitter=0.0)
    row = declare(node, table, stale_if_error=600.0, ttl=60.0)
    async with node:
        await row(1)
        grow_old("row:1", 90.0, row)
        table.error = ConnectionError("down")
        old, none = await row.many_with_info([1, 2])
        assert (old.value, old.stale) == ({"n": 1}, True)
        assert isinstance(none, ConnectionError)


async def test_one_failed_call_is_one_failure_of_the_source(make_node, table) -> None:
    """Source O1: of many keys, but it was asked once; the next call goes through."""
    node = make_node(breaker_failures=3, breaker_recovery_ms=60_000)
    row = declare(node, table)
    async with node:
        table.error = ConnectionError("a moment")
        with pytest.raises(PartialFailure):
            await row.many(range(10))
        assert row._cache.path.loads.source.breaker.closed
        table.error = None
        assert await row.many(range(10)) == rows(*range(10))


async def test_a_batch_loader_that_asks_for_its_own_keys_is_told(nodes, make_node) -> None:
    """Flights F5: also for the key of another load of the same call."""
    node = make_node(lease_ms=60_000)

    @node.cached("loop:{id}", ttl=600)
    async def loop(id: int) -> int:
        raise AssertionError("the batch loader is there")

    @loop.batch
    async def loops(ids: list[int]) -> dict[int, int]:
        return {each: await loop(min(ids)) for each in ids}

    async with node:
        with anyio.fail_after(5):
            hits = await loop.many_with_info([1, 2, 3])
        assert all(isinstance(hit, LoaderError) and "itself" in hit.problem for hit in hits)


@pytest.mark.parametrize("given", ["12", b"12"])
async def test_one_string_is_no_list_of_items(make_node: Any, given: Any) -> None:
    """Its characters would be read as two keys."""
    row = declare(make_node(), Table())
    for read in (row.many, row.many_with_info):
        with pytest.raises(forebay.InvalidKey, match="write a list"):
            await read(given)


async def test_an_item_that_does_not_fit_names_the_cache(make_node: Any) -> None:
    """Too few arguments, too many, or a tuple where there is one."""
    node = make_node()

    @node.cached("pair:{a}:{b}", ttl=60)
    async def pair(a: int, b: int) -> int:
        return a + b

    row = declare(node, Table())
    for item in (1, (1,), (1, 2, 3)):
        with pytest.raises(forebay.InvalidKey, match=r"an item of pair, .* does not fit pair:"):
            await pair.many([item])
    with pytest.raises(forebay.InvalidKey, match=r"id of row, .*is of type tuple"):
        await row.many([(1, 2)])

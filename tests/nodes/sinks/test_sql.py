"""The contract of a sink, kept by SqlSink on SQLite and on PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct

from forebay.nodes.sinks.base import Progress, SinkBatch, Write
from forebay.nodes.sinks.sql import SqlSink
from forebay.schemas.errors import FatalSinkError, Fenced, PoisonSinkError, TransientSinkError


class Flight(Struct, omit_defaults=True):
    id: int
    gate: str | None = None
    delay: int = 0


def put(number: int, version: int, gate: str | None = "A1", **fields: Any) -> Write[object]:
    value = Flight(id=number, gate=gate, **fields)
    return Write(key=f"flight:{number}", params={"id": str(number)}, value=value, version=version)


def gone(number: int, version: int) -> Write[object]:
    return Write(key=f"flight:{number}", params={"id": str(number)}, value=None, version=version)


def batch(*writes: Write[object], progress: Sequence[Progress] = ()) -> SinkBatch:
    return SinkBatch(writes=writes, progress=progress)


def upto(position: str, *, shard: int = 3, epoch: int = 1) -> Progress:
    return Progress(shard=shard, epoch=epoch, position=position)


async def test_batch_is_stored_with_its_progress(database: Any) -> None:
    """I1: rows and progress are there together."""
    async with database.opened() as sink:
        await sink.write(batch(put(1, 10), put(2, 11, gate=None), progress=[upto("5-0")]))
        assert await database.rows() == [(1, "A1", 10), (2, None, 11)]
        assert await sink.progress([3, 4]) == {3: "5-0"}


@pytest.mark.parametrize("method, unknown", [("commit", True), ("execute", False)])
async def test_only_at_the_commit_the_outcome_is_unknown(
    database: Any, monkeypatch: pytest.MonkeyPatch, method: str, unknown: bool
) -> None:
    """I5: the answer may be lost, and the batch stored."""
    from forebay.nodes.sinks.sql_database import Session

    async with database.opened() as sink:
        before = getattr(Session, method)

        async def lost(self: Session, *args: Any) -> None:
            await before(self, *args)
            raise ConnectionResetError("the answer is lost")

        monkeypatch.setattr(Session, method, lost)
        with pytest.raises(TransientSinkError) as caught:
            await sink.write(batch(put(1, 10)))
        monkeypatch.setattr(Session, method, before)
        assert caught.value.outcome_unknown is unknown
        assert await database.rows() == ([(1, "A1", 10)] if unknown else [])


async def test_replay_has_no_effect(database: Any) -> None:
    """I2: the same batch again changes nothing and raises nothing."""
    again = batch(put(1, 10), put(2, 11), progress=[upto("5-0")])
    async with database.opened() as sink:
        await sink.write(again)
        await database.run(f"UPDATE {database.table} SET gate = 'seen'")
        await sink.write(again)
        assert await database.rows() == [(1, "seen", 10), (2, "seen", 11)]


async def test_older_version_never_overwrites(database: Any) -> None:
    """I2: what is stored stays unless the write is newer."""
    async with database.opened() as sink:
        await sink.write(batch(put(1, 20, gate="new")))
        await sink.write(batch(put(1, 19, gate="old"), put(2, 1)))
        assert await database.rows() == [(1, "new", 20), (2, "A1", 1)]


async def test_row_without_a_version_is_older_than_any(database: Any) -> None:
    """I2: rows that were there before write-behind are taken over."""
    await database.run(f"INSERT INTO {database.table} (id, gate) VALUES (1, 'old'), (2, 'old')")
    async with database.opened() as sink:
        await sink.write(batch(put(1, 1, gate="new"), gone(2, 2)))
        assert await database.rows() == [(1, "new", 1)]


async def test_field_that_returns_to_its_default_is_written(database: Any) -> None:
    """omit_defaults is for the wire: the row gets every field."""
    async with database.opened() as sink:
        await sink.write(batch(put(1, 10, delay=25)))
        await sink.write(batch(put(1, 11, gate=None, delay=0)))
        assert await database.rows("id, gate, delay") == [(1, None, 0)]


async def test_delete_removes_older_rows_only(database: Any) -> None:
    """I2: a delete is guarded by its version like any write."""
    async with database.opened() as sink:
        await sink.write(batch(put(1, 10), put(2, 20)))
        await sink.write(batch(gone(1, 11), gone(2, 19), gone(3, 5)))
        assert await database.rows() == [(2, "A1", 20)]


async def test_fields_that_a_value_lacks_are_left_alone(database: Any) -> None:
    """A mapping with some columns updates those; both shapes go in one batch."""
    async with database.opened() as sink:
        await sink.write(batch(put(1, 10, gate="A1"), put(2, 11)))
        some = Write(key="flight:1", params={"id": "1"}, value={"delay": 7}, version=12)
        await sink.write(batch(some, put(2, 13, gate="B2")))
        assert await database.rows("id, gate, delay") == [(1, "A1", 7), (2, "B2", 0)]


async def test_two_keys_for_one_row_leave_the_newer(database: Any) -> None:
    """Keys that differ as text and mean the same row do not disturb each other."""
    other = Write(key="flight:-0", params={"id": "-0"}, value={"gate": "Z9"}, version=11)
    async with database.opened() as sink:
        await sink.write(batch(put(0, 10), other))
        assert await database.rows() == [(0, "Z9", 11)]


async def test_older_epoch_is_refused_and_stores_nothing(database: Any) -> None:
    """I3: once a later epoch was there, an older owner's batch has no effect."""
    async with database.opened() as sink:
        await sink.write(batch(put(1, 10), progress=[upto("5-0", epoch=7), upto("1-0", shard=4)]))
        late = [upto("2-0", shard=4), upto("9-0", epoch=6)]
        with pytest.raises(Fenced) as refusal:
            await sink.write(batch(put(1, 99), put(2, 99), progress=late))
        assert (refusal.value.epoch, refusal.value.current_epoch) == (6, 7)
        assert await database.rows() == [(1, "A1", 10)]
        assert await database.progress() == {3: (7, "5-0"), 4: (1, "1-0")}


async def test_positions_are_compared_as_numbers_and_never_go_back(database: Any) -> None:
    """Within an epoch the furthest position stays: 10-2 is before 10-10 and 9-99 before 10-0."""
    async with database.opened() as sink:
        for position, kept in (
            ("10-10", "10-10"),
            ("10-2", "10-10"),
            ("9-99", "10-10"),
            ("11-0",) * 2,
        ):
            await sink.write(batch(progress=[upto(position)]))
            assert await sink.progress([3]) == {3: kept}


async def test_new_epoch_sets_its_own_position(database: Any) -> None:
    """The stream may have lost its end in a failover; the new owner knows where it is."""
    async with database.opened() as sink:
        await sink.write(batch(progress=[upto("10-0", epoch=1)]))
        await sink.write(batch(progress=[upto("4-0", epoch=2)]))
        assert await database.progress() == {3: (2, "4-0")}


async def test_sinks_of_one_database_keep_progress_apart(database: Any) -> None:
    """Progress belongs to the name of the sink."""
    async with database.opened(name="one") as one, database.opened(name="two") as two:
        await one.write(batch(progress=[upto("10-0", epoch=5)]))
        await two.write(batch(progress=[upto("4-0", epoch=2)]))
        assert await one.progress(range(64)) == {3: "10-0"}
        assert await two.progress(range(64)) == {3: "4-0"}


async def test_two_thousand_rows_in_one_batch(database: Any) -> None:
    """A batch is as large as the worker makes it; no limit of parameters is met."""
    async with database.opened() as sink:
        await sink.write(batch(*(put(number, 1) for number in range(2_000))))
        await sink.write(batch(*(gone(number, 2) for number in range(1, 2_000))))
        assert await database.rows() == [(0, "A1", 1)]


@pytest.mark.parametrize(
    "fields",
    [{"colour": "red"}, {"delay": "late"}, {"delay": [1]}, {"delay": 2**70}, {"gate": "\ud800"}],
)
async def test_poison_stores_nothing(database: Any, fields: dict[str, object]) -> None:
    """I1: a value that the table cannot take fails the whole batch, progress and all."""
    bad = Write(key="flight:2", params={"id": "2"}, value=fields, version=10)
    async with database.opened() as sink:
        with pytest.raises(PoisonSinkError):
            await sink.write(batch(put(1, 10), bad, progress=[upto("5-0")]))
        assert await database.rows() == []
        assert await sink.progress([3]) == {}
        await sink.write(batch(put(1, 10)))
        assert await database.rows() == [(1, "A1", 10)]


async def test_what_the_database_refuses_is_poison_and_rolls_back(database: Any) -> None:
    """I1: the rows before the refused one, and the progress, are undone."""
    await database.run(f"CREATE UNIQUE INDEX ix_{database.table} ON {database.table} (gate)")
    async with database.opened() as sink:
        with pytest.raises(PoisonSinkError) as refusal:
            await sink.write(batch(put(1, 10), put(2, 10), progress=[upto("5-0")]))
        assert "flight" in str(refusal.value) or "nique" in str(refusal.value)
        assert await database.rows() == []
        assert await database.progress() == {}


@pytest.mark.parametrize(
    "change,named",
    [
        ("DROP TABLE {0}", "no table"),
        ("ALTER TABLE {0} DROP COLUMN version", "ADD COLUMN version BIGINT"),
        ("ALTER TABLE {0} RENAME COLUMN id TO number", "no column id"),
        ("DROP TABLE {0}; CREATE TABLE {0} (id INTEGER, version BIGINT)", "not unique"),
        ("DROP TABLE {0}; CREATE TABLE {0} (id INTEGER PRIMARY KEY, version TEXT)", "64 bits"),
    ],
)
async def test_unfit_table_is_fatal_and_says_what_to_do(
    database: Any, change: str, named: str
) -> None:
    """A table that cannot be written behind is found out when the sink opens."""
    await database.run(*change.format(database.table).split("; "))
    with pytest.raises(FatalSinkError, match=named):
        await database.sink().open()


async def test_table_dropped_later_is_fatal(database: Any) -> None:
    """No batch can work without the table, so the sink stops and loses nothing."""
    async with database.opened() as sink:
        await database.run(f"DROP TABLE {database.table}")
        with pytest.raises(FatalSinkError, match=database.table):
            await sink.write(batch(put(1, 10)))


async def test_unique_index_serves_as_key(database: Any) -> None:
    """The key need not be the primary key, and may have several columns."""
    await database.run(
        f"DROP TABLE {database.table}",
        f"CREATE TABLE {database.table} (id INTEGER, gate VARCHAR(8), version BIGINT)",
        f"CREATE UNIQUE INDEX ix_{database.table} ON {database.table} (gate, id)",
    )
    params = {"id": "1", "gate": "A1"}
    async with database.opened(key=("id", "gate")) as sink:
        for version in (10, 11):
            await sink.write(batch(Write(key="k", params=params, value={}, version=version)))
        assert await database.rows() == [(1, "A1", 11)]


async def test_sink_that_is_not_open_says_so(database: Any) -> None:
    """Writing before open, or after aclose, is a mistake of the caller."""
    sink = database.sink()
    with pytest.raises(FatalSinkError, match="not open"):
        await sink.write(batch(put(1, 10)))
    await sink.open()
    await sink.aclose()
    with pytest.raises(FatalSinkError, match="not open"):
        await sink.progress([1])


async def test_sink_opens_again_after_closing(database: Any) -> None:
    """A worker that closed a sink may open it anew."""
    sink: SqlSink = database.sink()
    for version in (1, 2):
        await sink.open()
        await sink.write(batch(put(1, version)))
        await sink.aclose()
    assert await database.rows() == [(1, "A1", 2)]


async def write_till_stored(sink: SqlSink, one: SinkBatch) -> None:
    """As a worker does it: a transient error is tried again."""
    for _ in range(50):
        try:
            return await sink.write(one)
        except TransientSinkError:
            await anyio.lowlevel.checkpoint()
    raise AssertionError("fifty attempts failed")


async def test_sinks_that_write_at_once_leave_the_newest(database: Any) -> None:
    """Several nodes share a table: opened at once, writing the same rows at once."""
    keys, rounds = range(20), 10
    sinks = [database.sink(name=f"node-{number}") for number in range(3)]
    async with anyio.create_task_group() as opening:
        for sink in sinks:
            opening.start_soon(sink.open)

    async def play(sink: SqlSink, node: int) -> None:
        for turn in range(rounds):
            version = turn * 3 + node + 1
            writes = [put(key, version, gate=f"V{version}") for key in keys]
            await write_till_stored(sink, batch(*writes, progress=[upto(f"{turn}-0", shard=node)]))

    try:
        async with anyio.create_task_group() as playing:
            for node, sink in enumerate(sinks):
                playing.start_soon(play, sink, node)
    finally:
        for sink in sinks:
            await sink.aclose()
    newest = rounds * 3
    assert await database.rows() == [(key, f"V{newest}", newest) for key in keys]
    assert await database.progress() == dict.fromkeys(range(3), (1, f"{rounds - 1}-0"))


versioned = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=5, unique_by=lambda one: one[0]),
    max_size=8,
)


def shuffled(history: list[Any]) -> st.SearchStrategy[tuple[list[Any], list[int]]]:
    """The history, and an order in which each of its batches comes twice."""
    return st.tuples(st.just(history), st.permutations([*range(len(history))] * 2))


relaxed = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def numbered(history: list[list[tuple[int, bool]]], *, deletes: bool) -> list[SinkBatch]:
    """Batches in the order of their making: every write has a version above all before it."""
    made = []
    for number, keys in enumerate(history, start=1):
        writes = [
            gone(k, number) if d and deletes else put(k, number, f"G{number}") for k, d in keys
        ]
        made.append(batch(*writes))
    return made


def final(batches: list[SinkBatch]) -> list[tuple[int, str, int]]:
    rows: dict[int, tuple[int, str, int]] = {}
    for write in (write for one in batches for write in one.writes):
        number = int(write.params["id"])
        rows.pop(number, None)
        if write.value is not None:
            rows[number] = (number, f"G{write.version}", write.version)
    return [rows[number] for number in sorted(rows)]


@relaxed
@given(order=versioned.flatmap(shuffled))
async def test_any_order_of_upserts_ends_with_the_newest(
    database: Any, order: tuple[list[Any], list[int]]
) -> None:
    """I2: shuffled and repeated batches leave the newest version of each key."""
    batches = numbered(order[0], deletes=False)
    await database.run(f"DELETE FROM {database.table}")
    async with database.opened() as sink:
        for index in order[1]:
            await sink.write(batches[index])
    assert await database.rows() == final(batches)


@relaxed
@given(history=versioned, rewinds=st.lists(st.integers(0, 8), max_size=4))
async def test_any_replay_of_deletes_ends_with_the_newest(
    database: Any, history: list[list[tuple[int, bool]]], rewinds: list[int]
) -> None:
    """I2: a worker goes back to a checkpoint and on from there; deletes stay deleted."""
    batches = numbered(history, deletes=True)
    await database.run(f"DELETE FROM {database.table}")
    async with database.opened() as sink:
        for start in [0, *rewinds]:
            for one in batches[start:]:
                await sink.write(one)
    assert await database.rows() == final(batches)


async def test_two_namespaces_with_one_table_keep_their_progress_apart(database: Any) -> None:
    """I3: an epoch of another namespace's owner fences nobody here."""
    shop, mall = database.sink(), database.sink()
    try:
        await shop.open("shop")
        await mall.open("mall")
        await shop.write(batch(progress=[upto("5-0", epoch=9)]))
        await mall.write(batch(progress=[upto("1-0", epoch=2)]))
        assert await shop.progress([3]) == {3: "5-0"}
        assert await mall.progress([3]) == {3: "1-0"}
    finally:
        await shop.aclose()
        await mall.aclose()

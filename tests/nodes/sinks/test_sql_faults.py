"""What SqlSink does when the database does not do what it should, or nobody waits any more."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint
from sqlalchemy import text
from sqlalchemy.exc import InterfaceError
from sqlalchemy.ext.asyncio import AsyncConnection
from structlog.testing import capture_logs

import forebay
from forebay.nodes.sinks.base import Progress, SinkBatch, Write
from forebay.nodes.sinks.sql import SqlSink
from forebay.schemas.errors import (
    BusySinkError,
    ConfigError,
    FatalSinkError,
    Fenced,
    PoisonSinkError,
    TransientSinkError,
)
from forebay.schemas.keys import Names
from forebay.schemas.settings import NodeSettings, Secret, Settings, Valkey, Workers
from support.postgres import PostgresServer
from support.valkey_server import ValkeyServer

SECRET = "hunter2"
PATIENCE_S = 40.0  #: for whatever has to come
OURS = "FROM pg_stat_activity WHERE application_name = 'forebay'"


def flights(version: int, *numbers: int) -> SinkBatch:
    writes = [
        Write(
            key=f"flight:{n}", params={"id": str(n)}, value={"gate": f"V{version}"}, version=version
        )
        for n in numbers or (1, 2)
    ]
    return SinkBatch(writes=writes, progress=[Progress(shard=3, epoch=1, position=f"{version}-0")])


def at(version: int) -> list[tuple[int, str, int]]:
    return [(number, f"V{version}", version) for number in (1, 2)]


def begin_blocking(database: Any) -> str:
    """What another process says to keep the sink from writing."""
    table = database.table
    return "BEGIN IMMEDIATE" if database.is_sqlite else f"LOCK TABLE {table} IN EXCLUSIVE MODE"


@pytest.mark.parametrize("ticks", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
async def test_cancelled_during_write(database: Any, ticks: int) -> None:
    """I5: wherever it is cancelled, all of the batch is stored or nothing, and the pool lives."""
    async with database.opened(pool_size=1) as sink:
        await sink.write(flights(1))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sink.write, flights(2))
            for _ in range(ticks):
                await checkpoint()
            tasks.cancel_scope.cancel()
        stored = await database.rows()
        assert stored in (at(1), at(2))
        assert await database.progress() == {3: (1, f"{stored[0][2]}-0")}
        await sink.write(flights(3))
        assert await database.rows() == at(3)


async def test_cancelled_while_waiting_for_a_lock(database: Any) -> None:
    """I5: a write that hangs in the database is given up when it is cancelled."""
    async with database.opened(pool_size=1, statement_timeout_ms=500) as sink:
        await sink.write(flights(1))
        async with database.engine.connect() as other:
            await other.execute(text(begin_blocking(database)))
            with anyio.move_on_after(0.1) as scope:
                await sink.write(flights(2))
            assert scope.cancelled_caught
            await other.rollback()
        assert await database.rows() == at(1)
        await sink.write(flights(3))
        assert await database.rows() == at(3)


async def test_lock_held_by_another_is_transient(database: Any) -> None:
    """I3: waiting for a lock ends, as an error that is tried again."""
    async with database.opened(pool_size=1, statement_timeout_ms=1_000) as sink:
        async with database.engine.connect() as other:
            await other.execute(text(begin_blocking(database)))
            with pytest.raises(TransientSinkError):
                await sink.write(flights(1))
            await other.rollback()
        await eventually_stored(sink, flights(2))
        assert await database.rows() == at(2)


PROCESS = """
import sys, anyio
from forebay.nodes.sinks.base import Progress, SinkBatch, Write
from forebay.nodes.sinks.sql import SqlSink

async def main(url, table, progress_table, node):
    sink = SqlSink(url, table=table, progress_table=progress_table, name="shared")
    await sink.open()
    for turn in range(40):
        version = turn * 3 + node + 1
        writes = [
            Write(key=str(n), params={"id": str(n)}, value={"gate": f"V{version}"}, version=version)
            for n in range(20)
        ]
        reached = Progress(shard=node, epoch=1, position=f"{turn}-0")
        await sink.write(SinkBatch(writes=writes, progress=[reached]))
    await sink.aclose()

anyio.run(main, *sys.argv[1:4], int(sys.argv[4]))
"""


async def test_three_processes_share_one_file(sqlite: Any) -> None:
    """Nodes on one machine write one file: nobody fails for a lock, the newest stays."""
    words = [sys.executable, "-c", PROCESS, sqlite.url, sqlite.table, sqlite.progress_table]
    async with anyio.create_task_group() as tasks:
        for node in range(3):
            tasks.start_soon(anyio.run_process, [*words, str(node)])
    assert await sqlite.rows() == [(number, "V120", 120) for number in range(20)]
    assert await sqlite.progress() == dict.fromkeys(range(3), (1, "39-0"))


async def test_lost_connections_are_transient(postgres: Any) -> None:
    """Connections that the server ended cost one attempt each, at most."""
    async with postgres.opened(pool_size=1) as sink:
        await sink.write(flights(1))
        assert await postgres.all(f"SELECT pg_terminate_backend(pid) {OURS}") == [(True,)]
        with pytest.raises(TransientSinkError):
            await sink.write(flights(2))
        await sink.write(flights(2))
        assert await postgres.rows() == at(2)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_restarted_server_is_transient(
    postgres: Any, postgres_server: PostgresServer, how: signal.Signals
) -> None:
    """While the server is away each attempt fails as transient; then it works, nothing lost."""
    async with postgres.opened() as sink:
        await sink.write(flights(1))
        postgres_server.stop(how)
        for _ in range(3):
            with pytest.raises(TransientSinkError):
                await sink.write(flights(2))
        postgres_server.start()
        await sink.write(flights(2))
        assert await postgres.rows() == at(2)
        assert await sink.progress([3]) == {3: "2-0"}


async def test_frozen_server_is_transient(postgres: Any) -> None:
    """I3: a server that does not answer at all holds up the sink for a bounded time only."""
    async with postgres.opened(pool_size=1, statement_timeout_ms=1_000) as sink:
        await eventually_stored(sink, flights(1))
        pids = [pid for (pid,) in await postgres.all(f"SELECT pid {OURS}")]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            with anyio.fail_after(PATIENCE_S), pytest.raises(TransientSinkError):
                await sink.write(flights(2))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        await eventually_stored(sink, flights(3))
        assert await postgres.rows() == at(3)


async def test_owner_that_stopped_inside_its_transaction_locks_nobody_out(postgres: Any) -> None:
    """The server ends the transaction of a process that hangs, so the next owner gets on."""
    async with (
        postgres.opened(pool_size=1, statement_timeout_ms=1_000) as hanging,
        postgres.opened() as next_owner,
    ):
        await next_owner.write(flights(1))
        with pytest.raises(TransientSinkError):
            async with hanging._database.transaction() as session:
                await session.execute(text(f"DELETE FROM {postgres.table}"))
                await _written_in_the_end(next_owner, flights(2))
        assert await postgres.rows() == at(2)


async def _written_in_the_end(sink: Any, batch: Any) -> None:
    """As delivery does it: rows that another transaction has locked are tried again."""
    with anyio.fail_after(40):
        while True:
            with suppress(BusySinkError):
                return await sink.write(batch)


@pytest.mark.parametrize("password", [SECRET, ""])
async def test_wrong_password_is_fatal(
    postgres: Any, postgres_server: PostgresServer, password: str
) -> None:
    """The error names server and user, says what to check, and does not tell the password."""
    await postgres.run(
        "DROP ROLE IF EXISTS guarded", "CREATE ROLE guarded LOGIN PASSWORD 'something else'"
    )
    sink = postgres.sink(url=Secret(postgres_server.url_of("guarded", password)))
    with pytest.raises(FatalSinkError, match="password") as refusal:
        await sink.open()
    assert "guarded" in str(refusal.value)
    assert_no_secret(refusal.value, sink)


async def test_missing_database_is_fatal(postgres: Any) -> None:
    """A database that does not exist will not come by waiting."""
    sink = postgres.sink(url=postgres.url.replace("/postgres?", "/nowhere?"))
    with pytest.raises(FatalSinkError, match=r"nowhere.*create the database"):
        await sink.open()


async def test_missing_rights_are_fatal(postgres: Any, postgres_server: PostgresServer) -> None:
    """The fix names the rights that are needed."""
    await postgres.run("DROP ROLE IF EXISTS reader", "CREATE ROLE reader LOGIN")
    async with postgres.opened() as owner:
        await owner.write(flights(1))
    await postgres.run(f"GRANT SELECT ON {postgres.table}, {postgres.progress_table} TO reader")
    async with postgres.opened(url=postgres_server.url_of("reader")) as sink:
        with pytest.raises(FatalSinkError, match="grant SELECT, INSERT, UPDATE and DELETE"):
            await sink.write(flights(2))
    await postgres.run(f"REVOKE ALL ON {postgres.table}, {postgres.progress_table} FROM reader")


async def test_narrow_version_column_is_fatal(postgres: Any) -> None:
    """Versions are microseconds: in 32 bits none of them would fit."""
    await postgres.run(f"ALTER TABLE {postgres.table} ALTER COLUMN version TYPE INTEGER")
    with pytest.raises(FatalSinkError, match="TYPE BIGINT"):
        await postgres.sink().open()


async def test_table_of_a_schema(postgres: Any) -> None:
    """Names may be qualified, and may need quotes."""
    await postgres.run(
        'DROP SCHEMA IF EXISTS "Of Air" CASCADE',
        'CREATE SCHEMA "Of Air"',
        'CREATE TABLE "Of Air"."Flights" (id INT PRIMARY KEY, "Gate %" TEXT, "Version" BIGINT)',
    )
    options = {"table": "Of Air.Flights", "progress_table": "Of Air.Progress"}
    value = {"Gate %": "A1"}
    async with postgres.opened(version_column="Version", **options) as sink:
        one = Write(key="flight:1", params={"id": "1"}, value=value, version=10)
        gone = Write(key="flight:1", params={"id": "1"}, value=None, version=11)
        await sink.write(SinkBatch(writes=[one]))
        assert await postgres.all('SELECT * FROM "Of Air"."Flights"') == [(1, "A1", 10)]
        await sink.write(SinkBatch(writes=[gone]))
        assert await postgres.all('SELECT * FROM "Of Air"."Flights"') == []


async def test_missing_file_is_fatal(tmp_path: Path) -> None:
    """A wrong path is named; no empty database is left there."""
    path = tmp_path / "nowhere.db"
    with pytest.raises(FatalSinkError, match="no such file"):
        await SqlSink(f"sqlite:///{path}", table="flights").open()
    assert not path.exists()


async def test_file_that_is_no_database_is_fatal(tmp_path: Path) -> None:
    """Whatever stands in the file is left as it is."""
    path = tmp_path / "flights.csv"
    path.write_text("id,gate\n" * 200)
    with pytest.raises(FatalSinkError, match="name a file that is an SQLite database"):
        await SqlSink(f"sqlite:///{path}", table="flights").open()
    assert path.read_text() == "id,gate\n" * 200


async def test_read_only_file_is_fatal(sqlite: Any) -> None:
    """A database that may not be written is found out by the first batch at the latest."""
    async with sqlite.opened() as owner:
        await owner.write(flights(1))
    sink = sqlite.sink(url=f"{sqlite.url.replace('///', '///file:')}?mode=ro&uri=true")
    with pytest.raises(FatalSinkError, match="make the file and its directory writable"):
        await sink.open()
        await sink.write(flights(2))
    await sink.aclose()


async def test_file_is_in_wal_mode_and_fully_synchronous(sqlite: Any) -> None:
    """Readers do not wait for the sink, and what is committed survives a power failure."""
    async with sqlite.opened() as sink:
        assert await sqlite.all("PRAGMA journal_mode") == [("wal",)]
        async with sink._database.session() as session:
            assert (await session.execute(text("PRAGMA synchronous"))).scalar() == 2


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://app:{SECRET}@db/shop",
        f"postgresql+psycopg://app:{SECRET}@db/shop",
        f"app:{SECRET}@db/shop",
        f"postgresql://db:{SECRET}/shop",
        f"postgresql:/app:{SECRET}@db/shop",
        "",
    ],
)
def test_unusable_url_is_told_without_its_password(url: str) -> None:
    """A URL that cannot be used is a ConfigError with an example, at once."""
    with pytest.raises(ConfigError, match="write postgresql://") as refusal:
        SqlSink(Secret(url), table="flights")
    assert_no_secret(refusal.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_database_in_memory_is_refused(url: str) -> None:
    """What a sink stores has to outlive the process."""
    with pytest.raises(ConfigError, match="name a file"):
        SqlSink(url, table="flights")


async def test_closed_port_is_transient_and_masked() -> None:
    """A server that is not there may come; repr and error show where, but no password."""
    url = f"postgres://app:{SECRET}@127.0.0.1:1/shop?sslmode=disable"
    sink = SqlSink(url, table="flights")
    with pytest.raises(TransientSinkError, match=r"127\.0\.0\.1") as refusal:
        await sink.open()
    assert_no_secret(refusal.value, sink)


async def test_unknown_parameter_of_the_url_is_fatal() -> None:
    """What the driver does not know is a mistake in the URL, not in a value."""
    sink = SqlSink(f"postgres://app:{SECRET}@127.0.0.1:1/shop?colour=red", table="flights")
    with pytest.raises(FatalSinkError, match="colour") as refusal:
        await sink.open()
    assert_no_secret(refusal.value, sink)


@pytest.mark.parametrize("missing", ["sqlalchemy", "aiosqlite"])
def test_missing_package_is_told_with_its_fix(missing: str) -> None:
    """The module can be imported without the extra; making a sink says what to install."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from forebay.nodes.sinks.sql import SqlSink\n"
        "SqlSink('sqlite:///x.db', table='flights')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.endswith(f"the package {missing} is not installed; pip install 'forebay[sql]'")


def assert_no_secret(error: BaseException | None, *others: object) -> None:
    shown = [repr(other) for other in others]
    while error is not None:
        shown += [str(error), repr(error)]
        error = error.__cause__ if error.__cause__ is not None else None
    assert not [each for each in shown if SECRET in each]


POISON = "a gate that is longer than its column"


@pytest.mark.parametrize("seed", range(3))
async def test_terminated_backends_cost_no_error_of_others(postgres: Any, seed: int) -> None:
    """I2 of the database: every failure is transient, or the poison; no other error is raised."""
    rng = random.Random(seed)
    kill = text(f"SELECT pg_terminate_backend(pid) {OURS}")
    ends: Counter[type] = Counter()

    async def terminate(*, task_status: TaskStatus[None]) -> None:
        async with postgres.engine.connect() as other:
            await other.execute(kill)
            task_status.started()
            while True:
                await anyio.sleep(rng.uniform(0, 0.006))
                await other.execute(kill)

    async def write(sink: SqlSink, version: int) -> None:
        value = {"gate": POISON if version % 2 else "A1"}
        batch = SinkBatch(
            writes=[Write(key="flight:1", params={"id": "1"}, value=value, version=version)],
            progress=[Progress(shard=version % 4, epoch=1, position=f"{version}-0")],
        )
        try:
            await sink.write(batch)
        except BaseException as error:
            ends[type(error)] += 1

    async with postgres.opened(pool_size=2) as sink:
        async with anyio.create_task_group() as tasks:
            await tasks.start(terminate)
            for version in range(0, 100, 2):
                async with anyio.create_task_group() as both:
                    both.start_soon(write, sink, version)
                    both.start_soon(write, sink, version + 1)
            tasks.cancel_scope.cancel()
        # Where a backend took long, the other writer may have found the row locked.
        assert set(ends) <= {TransientSinkError, BusySinkError, PoisonSinkError}, ends
        assert ends[TransientSinkError] > 0
        await eventually_stored(sink, flights(1_000))  # no connection was leaked


async def eventually_stored(sink: SqlSink, batch: SinkBatch) -> None:
    """Each connection of the pool may be a dead one, each login slow, and the timeout short."""
    for _ in range(20):
        try:
            return await sink.write(batch)
        except TransientSinkError:
            continue
    return await sink.write(batch)


OF_OTHERS = (
    asyncpg.InterfaceError("another operation is in progress"),
    asyncpg.ConnectionDoesNotExistError("closed in the middle of operation"),
    InterfaceError("ROLLBACK", {}, Exception("gone")),
    OSError("network is unreachable"),
    TimeoutError(),
    ValueError("not for the application"),
)


@pytest.mark.parametrize("real", ["poison", "fenced", "none"])
async def test_failing_to_give_a_connection_back_hides_nothing(
    database: Any, monkeypatch: pytest.MonkeyPatch, real: str
) -> None:
    """I2 of the database: the error of the batch is raised; the other one is logged."""
    close, faults = AsyncConnection.close, list(OF_OTHERS)

    async def fail_after(self: AsyncConnection) -> None:
        await close(self)
        raise faults.pop()

    await database.run(f"CREATE UNIQUE INDEX of_{database.table} ON {database.table} (gate)")
    batch = {"poison": poisoned(), "fenced": flights(5, 1), "none": SinkBatch(writes=())}[real]
    expected = {"poison": PoisonSinkError, "fenced": Fenced}.get(real)
    async with database.opened(pool_size=1) as sink:
        newer = Progress(shard=3, epoch=2, position="1-0")
        await sink.write(SinkBatch(writes=(), progress=[newer]))
        with monkeypatch.context() as patched, capture_logs() as lines:
            patched.setattr(AsyncConnection, "close", fail_after)
            for _ in OF_OTHERS:
                with pytest.raises(expected) if expected else nullcontext():
                    await sink.write(batch)
        told = [line for line in lines if line["event"] == "sink.connection_not_closed"]
        assert len(told) == len(OF_OTHERS)
        assert told[0]["log_level"] == "warning"
        await sink.write(SinkBatch(writes=flights(7, 1).writes))
        assert await database.rows() == at(7)[:1]


def poisoned() -> SinkBatch:
    """Two rows of one gate, where an index wants gates to be unique."""
    value = {"gate": "A1"}
    return SinkBatch(
        writes=[
            Write(key=f"flight:{n}", params={"id": str(n)}, value=value, version=1) for n in (1, 2)
        ]
    )


async def test_a_locked_row_is_told_with_its_table_after_the_lock_timeout(postgres: Any) -> None:
    """I6: a worker's batch waits that long and no longer; all else waits for the statement."""
    options = {"lock_timeout_ms": 100, "statement_timeout_ms": 10_000}
    async with postgres.opened(**options) as sink:
        await sink.write(flights(1))
        async with postgres.engine.connect() as other:
            await other.execute(text(f"UPDATE {postgres.table} SET gate = 'X' WHERE id = 1"))
            with pytest.raises(BusySinkError) as caught:
                await sink.write(flights(2))
            assert caught.value.table == postgres.table
            assert not caught.value.outcome_unknown
            await sink.write(flights(2, 2))  # the other row is free
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sink.write, SinkBatch(writes=flights(3, 1).writes))
                await waits_for_a_lock(postgres)
                await anyio.sleep(0.3)  # longer than a worker's batch would wait
                await other.rollback()
        assert await postgres.rows() == [(1, "V3", 3), (2, "V2", 2)]


async def waits_for_a_lock(postgres: Any) -> None:
    with anyio.fail_after(20):
        while not await postgres.all(f"SELECT 1 {OURS} AND wait_event_type = 'Lock'"):
            await anyio.sleep(0.01)


async def test_a_row_locked_by_another_holds_up_its_own_shard_only(
    postgres: Any, valkey_server: ValkeyServer, namespace: str
) -> None:
    """A node brings all other writes to the table meanwhile, and says which row it waits for."""
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=4),
        valkey=Valkey(url=valkey_server.socket_url),
        workers=Workers(flush_delay_ms=0),
    )
    node = forebay.Node(settings=settings)
    node.sink("flight:{id}", postgres.sink(lock_timeout_ms=100))
    shard_of, numbers = Names(namespace, 4, "1").shard, range(1, 41)

    @node.cached("flight:{id}", ttl=60)
    async def flight(id: int) -> dict[str, str] | None:
        return None

    async def stored(expected: set[int]) -> None:
        with anyio.fail_after(20):
            while {row[0] for row in await postgres.rows() if row[1] == "new"} != expected:
                await anyio.sleep(0.02)

    await postgres.run(f"INSERT INTO {postgres.table} (id, gate, version) VALUES (7, 'old', 0)")
    with capture_logs() as lines:
        async with node, postgres.engine.connect() as other:
            await other.execute(text(f"UPDATE {postgres.table} SET gate = 'X' WHERE id = 7"))
            for number in (7, *(each for each in numbers if each != 7)):
                await flight.write_behind(number, {"gate": "new"})
            elsewhere = {n for n in numbers if shard_of(f"flight:{n}") != shard_of("flight:7")}
            with anyio.fail_after(20):
                while not elsewhere <= {r[0] for r in await postgres.rows() if r[1] == "new"}:
                    await anyio.sleep(0.02)
                while not any(line["event"] == "sink.row_locked" for line in lines):
                    await anyio.sleep(0.02)
            await other.rollback()
            await stored(set(numbers))
    named = next(line for line in lines if line["event"] == "sink.row_locked")
    assert (named["table"], named["key"]) == (postgres.table, "flight:7")

"""Rows per second into SQLite and PostgreSQL: coalesced by SqlSink, and one upsert at a time.

usage: python tests/benchmarks/bench_sinks.py [--rounds 3] [--json]

Both write the same rows under the same guard, in turns in the same run. One at a time is
what a service does without write-behind: the driver itself, a prepared statement, a commit
for each row. Databases keep their usual durability: fsync is on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import aiosqlite
import anyio
import asyncpg
import msgspec
import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))

from forebay.nodes.sinks.base import Progress, SinkBatch, Write
from forebay.nodes.sinks.sql import SqlSink
from support.postgres import PostgresServer

BATCH_ROWS = 1_000
BATCHES = 20
SINGLES = 1_000
KEYS = 50_000

CREATE = """CREATE TABLE flights (
  id INTEGER PRIMARY KEY, carrier VARCHAR(2), number INTEGER, origin VARCHAR(3), dest VARCHAR(3),
  gate VARCHAR(8), delay INTEGER, departs TIMESTAMP, version BIGINT)"""
COLUMNS = ("id", "carrier", "number", "origin", "dest", "gate", "delay", "departs", "version")


class Flight(msgspec.Struct):
    id: int
    carrier: str
    number: int
    origin: str
    dest: str
    gate: str
    delay: int
    departs: datetime


class Rates(NamedTuple):
    name: str
    coalesced: float
    single: float

    @property
    def ratio(self) -> float:
        return self.coalesced / self.single

    def __str__(self) -> str:
        rates = (
            f"coalesced {self.coalesced:9,.0f} rows/s   one at a time {self.single:7,.0f} rows/s"
        )
        return f"{self.name:10} {rates}   ratio {self.ratio:5.1f}"


class Flights:
    """An endless series of writes, half of them to rows that exist."""

    def __init__(self) -> None:
        self._versions = count(1)

    def writes(self, number: int) -> list[Write[object]]:
        return [self._write(next(self._versions)) for _ in range(number)]

    def _write(self, version: int) -> Write[object]:
        key = version * 7_919 % KEYS
        departs = datetime(2013, 1, 1, tzinfo=UTC).replace(tzinfo=None) + timedelta(minutes=version)
        value = Flight(key, "UA", key % 2_000, "EWR", "IAH", f"A{key % 90}", version % 60, departs)
        return Write(key=f"flight:{key}", params={"id": str(key)}, value=value, version=version)


Upsert = Callable[[tuple[Any, ...]], Any]


async def coalesced(sink: SqlSink, flights: Flights) -> float:
    batches = [
        SinkBatch(
            writes=flights.writes(BATCH_ROWS),
            progress=[Progress(shard=0, epoch=1, position=f"{number}-0")],
        )
        for number in range(BATCHES)
    ]
    start = time.perf_counter()
    for batch in batches:
        await sink.write(batch)
    return BATCHES * BATCH_ROWS / (time.perf_counter() - start)


async def one_at_a_time(upsert: Upsert, flights: Flights) -> float:
    rows = [(*msgspec.structs.astuple(w.value), w.version) for w in flights.writes(SINGLES)]
    start = time.perf_counter()
    for row in rows:
        await upsert(row)
    return SINGLES / (time.perf_counter() - start)


def upsert_sql(mark: str) -> str:
    marks = ", ".join(mark.format(number) for number in range(1, len(COLUMNS) + 1))
    changes = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[1:])
    return (
        f"INSERT INTO flights ({', '.join(COLUMNS)}) VALUES ({marks}) ON CONFLICT (id) "
        f"DO UPDATE SET {changes} WHERE flights.version < excluded.version"
    )


@asynccontextmanager
async def on_sqlite(url: str) -> AsyncIterator[Upsert]:
    async with aiosqlite.connect(url.removeprefix("sqlite:///"), isolation_level=None) as direct:
        statement = upsert_sql("?{}")
        yield lambda row: direct.execute(statement, [*row[:7], str(row[7]), row[8]])


@asynccontextmanager
async def on_postgres(url: str) -> AsyncIterator[Upsert]:
    direct = await asyncpg.connect(url)
    try:
        prepared = await direct.prepare(upsert_sql("${}"))
        yield lambda row: prepared.fetch(*row)
    finally:
        await direct.close()


async def measured(name: str, url: str, opened: Callable[[str], Any], rounds: int) -> Rates:
    sink = SqlSink(url, table="flights")
    await sink.open()
    flights = Flights()
    many, single = [], []
    try:
        async with opened(url) as upsert:
            await coalesced(sink, flights)  # the table is half full then, the statements known
            for _ in range(rounds):
                single.append(await one_at_a_time(upsert, flights))
                many.append(await coalesced(sink, flights))
    finally:
        await sink.aclose()
    return Rates(name, median(many), median(single))


@contextmanager
def sqlite_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as directory:
        path = f"{directory}/flights.db"
        with sqlite3.connect(path) as connection:
            connection.execute(CREATE)
        connection.close()
        yield f"sqlite:///{path}"


async def create_on_postgres(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("DROP TABLE IF EXISTS flights, forebay_progress")
    await connection.execute(CREATE)
    await connection.close()


async def compare(rounds: int) -> list[Rates]:
    with sqlite_file() as url:
        sqlite = await measured("SQLite", url, on_sqlite, rounds)
    with PostgresServer(fsync=True) as server:
        await create_on_postgres(server.url)
        return [sqlite, await measured("PostgreSQL", server.url, on_postgres, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    rates = anyio.run(compare, options.rounds)
    if options.json:
        print(json.dumps([each._asdict() | {"ratio": round(each.ratio, 1)} for each in rates]))
        return
    print(f"batches of {BATCH_ROWS}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(*rates, sep="\n")


if __name__ == "__main__":
    main()

"""Databases for the tests of sinks: a file of SQLite, and a PostgreSQL server of our own.

FOREBAY_TEST_PG_DSN names a PostgreSQL server to use instead of ours. Where ours cannot be
started the tests are skipped, with the reason; where CI runs, they fail.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from forebay.nodes.sinks.sql import SqlSink
from support.postgres import PostgresServer

COLUMNS = "id {} PRIMARY KEY, gate VARCHAR(8), delay INTEGER, departs TIMESTAMP, version BIGINT"


class Database:
    """A database with the tables of one test, looked at without the sink."""

    def __init__(self, url: str, engine: AsyncEngine) -> None:
        suffix = uuid4().hex[:12]
        self.url = url
        self.engine = engine
        self.table = f"flights_{suffix}"
        self.progress_table = f"progress_{suffix}"

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def sink(self, **options: Any) -> SqlSink:
        defaults = {"url": self.url, "table": self.table, "progress_table": self.progress_table}
        return SqlSink(**defaults | options)

    @asynccontextmanager
    async def opened(self, **options: Any) -> AsyncIterator[SqlSink]:
        sink = self.sink(**options)
        await sink.open()
        try:
            yield sink
        finally:
            await sink.aclose()

    async def run(self, *statements: str) -> None:
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))

    async def rows(self, columns: str = "id, gate, version") -> list[tuple[Any, ...]]:
        return await self.all(f"SELECT {columns} FROM {self.table} ORDER BY id")

    async def progress(self) -> dict[int, tuple[int, str]]:
        """For each shard its epoch and position."""
        found = await self.all(f"SELECT shard, epoch, ms, seq FROM {self.progress_table}")
        return {shard: (epoch, f"{ms}-{seq}") for shard, epoch, ms, seq in found}

    async def all(self, query: str) -> list[tuple[Any, ...]]:
        async with self.engine.connect() as connection:
            return [tuple(row) for row in await connection.execute(text(query))]


@asynccontextmanager
async def database_at(url: str) -> AsyncIterator[Database]:
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    driver = drivers[parsed.get_backend_name()]
    engine = create_async_engine(parsed.set(drivername=driver), poolclass=NullPool)
    database = Database(url, engine)
    await database.run(f"CREATE TABLE {database.table} ({COLUMNS.format('INTEGER')})")
    try:
        yield database
    finally:
        if not database.is_sqlite:
            for table in (database.table, database.progress_table):
                await database.run(f"DROP TABLE IF EXISTS {table} CASCADE")
        await engine.dispose()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An empty database in a file."""
    path = tmp_path / "flights.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server that a test may stop, or be superuser of."""
    if os.environ.get("FOREBAY_TEST_PG_DSN"):
        pytest.skip("FOREBAY_TEST_PG_DSN names a server that is not ours to stop")
    try:
        server = PostgresServer().__enter__()
    except (OSError, RuntimeError) as error:
        reason = f"PostgreSQL cannot be started here: {error}"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    dsn = os.environ.get("FOREBAY_TEST_PG_DSN")
    if dsn:
        return dsn
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.url


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """Each kind of database in turn, with an empty table of flights."""
    async with database_at(request.getfixturevalue(f"{request.param}_url")) as database:
        yield database


@pytest.fixture
async def sqlite(sqlite_url: str) -> AsyncIterator[Database]:
    async with database_at(sqlite_url) as database:
        yield database


@pytest.fixture
async def postgres(postgres_server: PostgresServer) -> AsyncIterator[Database]:
    """PostgreSQL on a server of our own."""
    if not postgres_server.runs:
        postgres_server.start()
    async with database_at(postgres_server.url) as database:
        yield database

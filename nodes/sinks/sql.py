"""A sink that is a table of SQLite or PostgreSQL.

I1  A batch is one transaction: the fence, the rows, the deletes, the progress.
I2  A row changes only for a newer version, so a replay has no effect.
I3  A batch of an older epoch than one seen before is refused with ``Fenced``.
I4  Of two writes of a batch that mean one row (keys ``7`` and ``+7``), the newer counts.
I5  Cancelled or failed, nothing of the batch is stored, and the pool stays usable. Only
    when the answer to the commit is lost is the outcome unknown; the batch is repeated.
I6  A batch of a worker (it has progress) waits for a row that another transaction has locked no
    longer than ``lock_timeout_ms``; it then fails with ``BusySinkError``. Any other batch waits
    for ``statement_timeout_ms``.
I7  On PostgreSQL it takes ``concurrency`` batches at a time, of different rows.

The table belongs to the application: it needs the key columns, unique, a BIGINT for the
version, and a column for each field of the value. The progress table is made if missing.
SQLAlchemy and the driver are imported by the constructor: ``pip install 'forebay[sql]'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import structlog

from ...coordinator.modules import load
from ...schemas.errors import BusySinkError, ConfigError, FatalSinkError, Fenced, SinkError
from ...schemas.extras import pip_install
from ...schemas.settings import Secret
from .base import Progress, SinkBatch, Write

if TYPE_CHECKING:
    from sqlalchemy import Executable, Table

    from .sql_database import Database, Session
    from .sql_rows import Identity, Row, Rows
    from .sql_statements import Statements

__all__ = ["SqlSink"]

log = structlog.get_logger(__name__)

_POOL_SIZE_MAX, _TIMEOUT_MS_MAX = 1_000, 86_400_000
_CHUNK_ROWS = 500  #: sent, or made, without letting others run; each has its own deadline


class SqlSink:
    """``name`` stands, with the namespace, in the progress table; it must tell two sinks of a
    namespace and a database apart.
    """

    def __init__(
        self,
        url: str | Secret,
        *,
        table: str,
        key: Sequence[str] = ("id",),
        version_column: str = "version",
        progress_table: str = "forebay_progress",
        statement_timeout_ms: int = 5_000,
        lock_timeout_ms: int = 1_000,
        pool_size: int = 4,
        name: str = "",
    ) -> None:
        _check_number("pool_size", pool_size, 1, _POOL_SIZE_MAX)
        _check_number("statement_timeout_ms", statement_timeout_ms, 1, _TIMEOUT_MS_MAX)
        _check_number("lock_timeout_ms", lock_timeout_ms, 1, _TIMEOUT_MS_MAX)
        self.name = name or f"sql:{table}"
        self._progress_of = self.name
        self._table_name = table
        self._key = tuple(key)
        self._version_column = version_column
        self._progress_name = progress_table
        self._database = _database(url, statement_timeout_ms, lock_timeout_ms, pool_size)
        self.concurrency = pool_size if self._database.dialect == "postgresql" else 1
        self._rows: Rows | None = None
        self._statements: Statements | None = None

    async def open(self, namespace: str = "") -> None:
        """Find and check the table; make the progress table where it is missing."""
        await load(*(f"{__package__}.sql_{part}" for part in ("rows", "statements", "tables")))
        from .sql_rows import Rows
        from .sql_statements import Statements
        from .sql_tables import found, progress_table

        self._progress_of = f"{namespace}/{self.name}" if namespace else self.name
        progress = progress_table(self._progress_name)
        try:
            await self._database.open()
            async with self._database.session() as session:
                table = await session.inspect(
                    found, self._table_name, self._key, self._version_column
                )
            await self._make_progress_table(progress)
        except BaseException:
            await self.aclose()
            raise
        self._rows = Rows(table, self._key, self._version_column)
        self._statements = Statements(
            self._database.dialect,
            table,
            progress,
            key=self._key,
            version_column=self._version_column,
        )
        log.info("sink.opened", sink=self.name, address=self._database.address)

    async def write(self, batch: SinkBatch) -> None:
        from .sql_statements import progress_rows

        statements, rows = self._opened()
        stored, deleted = await _planned(batch.writes, rows)
        positions = progress_rows(self._progress_of, batch.progress)
        try:
            async with self._database.transaction(impatient=bool(positions)) as session:
                if positions:
                    answer = await session.execute(statements.fence, positions)
                    self._check_epochs(batch.progress, {row.shard: row.epoch for row in answer})
                for columns, group in _by_columns(stored).items():
                    await _execute(session, statements.upsert(columns), group)
                gone = [statements.delete_parameters(row) for row in deleted]
                await _execute(session, statements.delete, gone)
        except BusySinkError as error:
            error.table = self._table_name
            raise

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        statements, _ = self._opened()
        async with self._database.session() as session:
            answer = await session.execute(statements.positions(self._progress_of, shards))
            return {row.shard: f"{row.ms}-{row.seq}" for row in answer}

    async def aclose(self) -> None:
        self._rows = self._statements = None
        await self._database.aclose()

    def __repr__(self) -> str:
        state = "open" if self._rows is not None else "closed"
        return f"<SqlSink {self.name!r} {self._database.address} {state}>"

    def _opened(self) -> tuple[Statements, Rows]:
        if self._statements is None or self._rows is None:
            raise FatalSinkError(f"{self.name}: the sink is not open; await its open() first")
        return self._statements, self._rows

    def _check_epochs(self, progress: Sequence[Progress], in_force: Mapping[int, int]) -> None:
        for entry in progress:
            if in_force[entry.shard] > entry.epoch:
                resource = f"{self.name} shard {entry.shard}"
                raise Fenced(resource, entry.epoch, in_force[entry.shard])

    async def _make_progress_table(self, progress: Table) -> None:
        from sqlalchemy.schema import CreateTable

        from .sql_tables import exists

        async def is_there() -> bool:
            async with self._database.session() as session:
                return await session.inspect(exists, progress)

        if await is_there():
            return
        try:
            async with self._database.transaction() as session:
                await session.execute(CreateTable(progress, if_not_exists=True))
        except SinkError:
            if not await is_there():  # else another node made it at the same moment
                raise


def _check_number(setting: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            setting=setting,
            value=repr(value)[:80],
            origin="SqlSink",
            problem=f"must be a whole number from {low} to {high}",
            fix="correct it, or leave it out",
        )


def _database(
    url: str | Secret, statement_timeout_ms: int, lock_timeout_ms: int, pool_size: int
) -> Database:
    try:
        from .sql_database import Database

        return Database(
            url.reveal() if isinstance(url, Secret) else url,
            statement_timeout_ms=statement_timeout_ms,
            lock_timeout_ms=lock_timeout_ms,
            pool_size=pool_size,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            setting="sink",
            value="SqlSink",
            origin="the application",
            problem=f"the package {error.name} is not installed",
            fix=pip_install("sql"),
        ) from error


async def _planned(writes: Sequence[Write[Any]], rows: Rows) -> tuple[list[Row], list[Row]]:
    """What to store and what to delete: of each row the newest, in one order for all."""
    newest: dict[Identity, tuple[Row, Write[Any]]] = {}
    for count, write in enumerate(sorted(writes, key=lambda write: write.key), start=1):
        row = rows.row(write)
        known = newest.get(identity := rows.identity(row))
        if known is None or known[1].version < write.version:
            newest[identity] = (row, write)
        if count % _CHUNK_ROWS == 0:
            await anyio.lowlevel.checkpoint()
    stored = [row for row, write in newest.values() if write.value is not None]
    deleted = [row for row, write in newest.values() if write.value is None]
    return stored, deleted


def _by_columns(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    return groups


def _chunks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield rows[start : start + _CHUNK_ROWS]


async def _execute(session: Session, statement: Executable, rows: Sequence[Row]) -> None:
    for chunk in _chunks(rows):
        await session.execute(statement, chunk)

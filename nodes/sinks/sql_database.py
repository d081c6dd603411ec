"""The database of a sink: its address, its pool, its transactions, its errors.

I1  What is done in ``transaction`` is committed as a whole at its end, or rolled back: on
    an error, on cancellation, when the process dies.
I2  Each error of SQLAlchemy, the driver or the network leaves here as a SinkError. An error while
    a connection is given back is logged; it never replaces that of the transaction.
I3  Every wait has an end: connecting, a statement, a lock, a commit, giving back.
I4  ``address`` has no password, nor has any error.

SQLite transactions take the write lock when they begin, so that they cannot fail half-way
for lack of it; files are in WAL mode and keep the durability of synchronous=FULL. On
PostgreSQL a transaction that its owner has left idle (a stopped process) is ended by the
server, so that it does not lock out the next owner.

A connection that could not be given back is dropped, and the pool makes a new one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import anyio
import structlog
from anyio.lowlevel import checkpoint_if_cancelled
from sqlalchemy import URL, CursorResult, Executable, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from ...coordinator.log_once import LogOnce
from ...schemas.errors import (
    ConfigError,
    FatalSinkError,
    ForebayError,
    SinkError,
    TransientSinkError,
)
from ...schemas.masking import mask_url
from .sql_errors import summary_of, translated
from .sql_rows import Row

__all__ = ["Database", "Session"]

log = structlog.get_logger(__name__)

T = TypeVar("T")

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
_WAL_PAUSE_S = 0.01
_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :ms, true)")
_EXAMPLE = "write postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:///PATH"


class Session:
    """A connection in use.

    Calls of SQLite run in a thread, where a call that nobody waits for any more goes on, and
    may keep the lock for good. They are ``uninterrupted``: a cancellation waits for the end
    of the call, and is raised before the next.
    """

    def __init__(self, connection: AsyncConnection, *, uninterrupted: bool) -> None:
        self.connection = connection
        self._uninterrupted = uninterrupted

    async def start(self) -> None:
        await self._finish(self.connection.start)

    async def execute(
        self, statement: Executable, rows: Sequence[Row] | None = None
    ) -> CursorResult[Any]:
        return await self._finish(lambda: self.connection.execute(statement, rows))

    async def inspect(self, look: Callable[..., T], *arguments: object) -> T:
        return await self._finish(lambda: self.connection.run_sync(look, *arguments))

    async def commit(self) -> None:
        await self._finish(self.connection.commit)

    async def _finish(self, call: Callable[[], Awaitable[T]]) -> T:
        await checkpoint_if_cancelled()
        try:
            with anyio.CancelScope(shield=self._uninterrupted):
                value = await call()
        except Exception:
            await checkpoint_if_cancelled()  # who waits no more wants no error either
            raise
        return value


class Database:
    """May be opened again after ``aclose``."""

    def __init__(
        self, url: str, *, statement_timeout_ms: int, lock_timeout_ms: int, pool_size: int
    ) -> None:
        self._url = _parsed(url)
        self.address = mask_url(self._url.render_as_string(hide_password=False))
        self.dialect = self._url.get_backend_name()
        self._timeout_ms = statement_timeout_ms
        self._timeout_s = statement_timeout_ms / 1_000
        self._lock_timeout_ms = min(lock_timeout_ms, statement_timeout_ms)
        self._pool_size = pool_size
        self._not_closed = LogOnce()
        self._beginning: Executable = self._statement_of_beginning()
        self._engine = self._new_engine()  # connects when it is asked to

    async def open(self) -> None:
        if self.dialect == "sqlite":
            await self._prepare_file()

    async def aclose(self) -> None:
        with anyio.move_on_after(self._timeout_s, shield=True), self._translating():
            await self._engine.dispose()

    @asynccontextmanager
    async def transaction(self, *, impatient: bool = False) -> AsyncIterator[Session]:
        """An ``impatient`` one waits for a lock of PostgreSQL for ``lock_timeout_ms`` at most."""
        async with self.session() as session:
            await session.execute(self._beginning)
            if impatient and self.dialect == "postgresql":
                await session.execute(_LOCK_TIMEOUT, [{"ms": str(self._lock_timeout_ms)}])
            yield session
            try:
                await session.commit()
            except Exception as error:
                fault = translated(error, self.address)
                # Only the answer may be lost; what the database refuses for good is not stored.
                fault.outcome_unknown = isinstance(fault, TransientSinkError)
                raise fault from error

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """For reading; what is not committed when it is given back is rolled back."""
        session = Session(self._engine.connect(), uninterrupted=self.dialect == "sqlite")
        await self._connect(session)
        try:
            with self._translating():
                yield session
        finally:
            await self._give_back(session.connection)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Translates the errors of others: none of them leaves this block."""
        try:
            yield
        except ForebayError:
            raise
        except Exception as error:
            raise translated(error, self.address) from error

    async def _give_back(self, connection: AsyncConnection) -> None:
        """Roll back an open transaction, and return the connection to the pool. Never raises."""
        fault: SinkError = TransientSinkError(f"no answer within {self._timeout_s:g} s")
        with anyio.move_on_after(self._timeout_s, shield=True):
            try:
                return await connection.close()
            except Exception as error:
                fault = translated(error, self.address)
        self._not_closed.say(log, "sink.connection_not_closed", fault, address=self.address)
        with anyio.move_on_after(self._timeout_s, shield=True):
            try:
                if not connection.closed:
                    await connection.invalidate()
            except Exception as error:  # treat it as lost
                log.debug("sink.connection_not_dropped", error=summary_of(error))

    async def _connect(self, session: Session) -> None:
        with self._translating():
            try:
                await session.start()
            except (TypeError, ValueError) as error:  # of an argument, not of a value
                raise FatalSinkError(
                    f"{self.address}: {summary_of(error)}; check the URL and its parameters"
                ) from error

    async def _prepare_file(self) -> None:
        path = self._url.database or ""
        if not path.startswith("file:") and not await anyio.Path(path).exists():
            raise FatalSinkError(
                f"{self.address}: there is no such file; create the database, or correct the path"
            )
        give_up_at = anyio.current_time() + self._timeout_s
        while True:
            try:
                return await self._turn_to_wal()
            except TransientSinkError:  # several may do so at once, and SQLite does not wait here
                if anyio.current_time() > give_up_at:
                    raise
            await anyio.sleep(_WAL_PAUSE_S)

    async def _turn_to_wal(self) -> None:
        async with self.session() as session:
            mode = (await session.execute(text("PRAGMA journal_mode"))).scalar()
            if mode != "wal":
                await session.execute(text("PRAGMA journal_mode=WAL"))

    def _statement_of_beginning(self) -> Executable:
        if self.dialect == "sqlite":
            return text("BEGIN IMMEDIATE")
        # Not as parameters of the connection: poolers such as PgBouncer refuse those.
        return text(
            "SELECT set_config('statement_timeout', :ms, true), "
            "set_config('idle_in_transaction_session_timeout', :ms, true)"
        ).bindparams(ms=str(self._timeout_ms))

    def _new_engine(self) -> AsyncEngine:
        arguments: dict[str, Any] = {"timeout": self._timeout_s}
        if self.dialect == "sqlite":
            arguments["isolation_level"] = None  # transactions begin where we say so
        else:
            arguments["command_timeout"] = self._timeout_s + 1  # the server's comes first
            arguments["server_settings"] = {"application_name": "forebay"}
        return create_async_engine(
            self._url,
            connect_args=arguments,
            hide_parameters=True,
            poolclass=AsyncAdaptedQueuePool,
            pool_size=self._pool_size,
            max_overflow=0,
            pool_timeout=self._timeout_s,
        )


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # its text may quote a part of the password
        raise _unusable(url, "is no database URL", _EXAMPLE) from None
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise _unusable(url, f"{parsed.drivername} is not supported", _EXAMPLE)
    if driver.startswith("sqlite") and (parsed.database or ":memory:") == ":memory:":
        raise _unusable(url, "keeps the table in memory, where it is lost", "name a file")
    query = dict(parsed.query)
    if "sslmode" in query:  # as libpq calls what asyncpg calls ssl
        query["ssl"] = query.pop("sslmode")
    return parsed.set(drivername=driver, query=query)


def _unusable(url: str, problem: str, fix: str) -> ConfigError:
    return ConfigError(
        setting="url", value=mask_url(url), origin="SqlSink", problem=problem, fix=fix
    )

"""The verdict on each kind of error, as a table."""

from __future__ import annotations

import sqlite3
from typing import Any

import asyncpg
import pytest
from sqlalchemy import exc
from sqlalchemy.dialects.postgresql.asyncpg import dialect

from forebay.nodes.sinks.sql_errors import fault_of, summary_of, translated
from forebay.schemas.errors import (
    BusySinkError,
    FatalSinkError,
    PoisonSinkError,
    TransientSinkError,
)

FATAL, POISON, TRANSIENT = FatalSinkError, PoisonSinkError, TransientSinkError
BUSY = BusySinkError
postgres: Any = dialect.import_dbapi()


def of_sqlite(kind: type[sqlite3.Error], code: int) -> exc.DBAPIError:
    error = kind("told by SQLite")
    error.sqlite_errorcode = code
    return wrapped(error)


def of_postgres(sqlstate: str) -> exc.DBAPIError:
    driver = asyncpg.PostgresError("told by PostgreSQL")
    driver.sqlstate = sqlstate
    adapted = postgres.Error("told by PostgreSQL", driver)
    adapted.__cause__ = driver
    return wrapped(adapted)


def of_client(driver: Exception) -> exc.DBAPIError:
    adapted = postgres.InterfaceError(str(driver), driver)
    adapted.__cause__ = driver
    return wrapped(adapted)


def wrapped(error: Exception, kind: type[exc.DBAPIError] = exc.DBAPIError) -> exc.DBAPIError:
    return kind("INSERT INTO flights", {"gate": "A1"}, error)


@pytest.mark.parametrize(
    "code,verdict",
    [
        (sqlite3.SQLITE_BUSY, TRANSIENT),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, TRANSIENT),
        (sqlite3.SQLITE_LOCKED, TRANSIENT),
        (sqlite3.SQLITE_IOERR_FSYNC, TRANSIENT),
        (sqlite3.SQLITE_FULL, TRANSIENT),
        (sqlite3.SQLITE_CONSTRAINT_NOTNULL, POISON),
        (sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY, POISON),
        (sqlite3.SQLITE_CONSTRAINT_TRIGGER, POISON),
        (sqlite3.SQLITE_MISMATCH, POISON),
        (sqlite3.SQLITE_TOOBIG, POISON),
        (sqlite3.SQLITE_ERROR, FATAL),
        (sqlite3.SQLITE_READONLY_DIRECTORY, FATAL),
        (sqlite3.SQLITE_CANTOPEN, FATAL),
        (sqlite3.SQLITE_NOTADB, FATAL),
        (sqlite3.SQLITE_CORRUPT, FATAL),
    ],
)
def test_verdict_on_codes_of_sqlite(code: int, verdict: type[Exception]) -> None:
    """I1: the result code decides, extended or not, whatever the class of the error."""
    assert fault_of(of_sqlite(sqlite3.OperationalError, code))[0] is verdict


@pytest.mark.parametrize(
    "sqlstate,verdict",
    [
        ("08006", TRANSIENT),  # connection failure
        ("0A000", TRANSIENT),  # a cached plan after a change of the table
        ("25P02", TRANSIENT),
        ("25P03", TRANSIENT),  # idle in transaction for too long
        ("40001", TRANSIENT),  # serialization
        ("40P01", TRANSIENT),  # deadlock
        ("53100", TRANSIENT),  # disk full
        ("53300", TRANSIENT),  # too many connections
        ("55P03", BUSY),  # lock not available
        ("57014", BUSY),  # statement timeout
        ("57P01", TRANSIENT),  # shutdown
        ("57P03", TRANSIENT),  # starting up
        ("XX000", TRANSIENT),
        ("ZZ999", TRANSIENT),  # never heard of
        ("21000", POISON),
        ("22001", POISON),  # too long
        ("22003", POISON),  # out of range
        ("22P02", POISON),
        ("23502", POISON),
        ("23503", POISON),
        ("23505", POISON),
        ("23514", POISON),
        ("44000", POISON),
        ("54000", POISON),
        ("P0001", POISON),  # RAISE in a trigger
        ("25006", FATAL),  # read-only
        ("28000", FATAL),
        ("28P01", FATAL),  # wrong password
        ("3D000", FATAL),
        ("3F000", FATAL),
        ("42501", FATAL),  # permission denied
        ("42703", FATAL),
        ("42P01", FATAL),  # no such table
    ],
)
def test_verdict_on_sqlstates(sqlstate: str, verdict: type[Exception]) -> None:
    """I1: the SQLSTATE decides; a fatal one comes with a way out."""
    fault, fix = fault_of(of_postgres(sqlstate))
    assert fault is verdict
    assert bool(fix) == (verdict is FATAL)


@pytest.mark.parametrize(
    "error,verdict",
    [
        (of_client(asyncpg.DataError("invalid input for query argument $1")), POISON),
        (of_client(asyncpg.InterfaceError("connection is closed")), TRANSIENT),
        (of_client(asyncpg.InternalClientError("out of sync")), TRANSIENT),
        (wrapped(sqlite3.ProgrammingError("closed")), TRANSIENT),
        (wrapped(Exception("?"), exc.IntegrityError), POISON),
        (wrapped(Exception("?"), exc.DataError), POISON),
        (wrapped(Exception("?"), exc.OperationalError), TRANSIENT),
        (exc.StatementError("bind", "INSERT", {}, TypeError("no datetime")), POISON),
        (exc.TimeoutError("no connection in the pool"), TRANSIENT),
        (exc.PendingRollbackError("rolled back"), TRANSIENT),
        (exc.NoSuchTableError("flights"), FATAL),
        (exc.CompileError("unconsumed column names"), FATAL),
        (asyncpg.InvalidPasswordError("password authentication failed"), FATAL),
        (asyncpg.CannotConnectNowError("the database system is starting up"), TRANSIENT),
        (ConnectionRefusedError(111, "refused"), TRANSIENT),
        (TimeoutError(), TRANSIENT),
        (OverflowError("Python int too large"), POISON),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), POISON),
        (RuntimeError("?"), TRANSIENT),
    ],
)
def test_verdict_on_classes(error: Exception, verdict: type[Exception]) -> None:
    """I2: without a code the class decides, and in doubt nothing is thrown away."""
    assert fault_of(error)[0] is verdict


def test_text_holds_one_line_without_sql_parameters_or_password() -> None:
    """I3: DETAIL lines quote rows, SQLAlchemy quotes statements; neither is shown."""
    error = wrapped(Exception("refused by postgresql://app:hunter2@db\nDETAIL: row (A1)\x1b[2J"))
    said = str(translated(error, "postgresql://db/shop"))
    assert said == "postgresql://db/shop: refused by postgresql://app:***@db"


def test_text_is_short_and_never_empty() -> None:
    """I3: an error without a text is told by its class."""
    assert summary_of(TimeoutError()) == "TimeoutError"
    assert len(summary_of(ValueError("x" * 10_000))) == 300

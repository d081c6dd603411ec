"""The database of the demo: a SQLite file with the flights of the day and their history.

    flights         initially the timetable; the sink updates its rows
    flight_history  every change of a row, written by a trigger in the transaction of the sink

I1  ``create`` may be called repeatedly, also by several processes at once; it adds missing parts.
I2  Every update of a flight adds a line to the history. A row that returns to ``scheduled`` starts
    a new day: its old lines are deleted, so the file stays small.
I3  ``order_fault`` finds a flight whose version or status went back.

``Departures`` is the reading side, as in a service: one connection, one query per call.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import aiosqlite
import msgspec
from msgspec import Struct, structs

from .flights import Flight, Status, as_scheduled

_BUSY_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS flights (
    id             TEXT PRIMARY KEY,
    status         TEXT NOT NULL
                   CHECK (status IN ('scheduled', 'delayed', 'departed', 'cancelled')),
    month          INTEGER NOT NULL,
    day            INTEGER NOT NULL,
    sched_dep_time INTEGER NOT NULL,
    dep_time       INTEGER,
    dep_delay      INTEGER,
    sched_arr_time INTEGER NOT NULL,
    arr_time       INTEGER,
    arr_delay      INTEGER,
    carrier        TEXT NOT NULL,
    flight         INTEGER NOT NULL,
    tailnum        TEXT,
    origin         TEXT NOT NULL,
    dest           TEXT NOT NULL,
    air_time       INTEGER,
    distance       INTEGER NOT NULL,
    version        BIGINT
);
CREATE INDEX IF NOT EXISTS flights_origin ON flights (origin);
CREATE INDEX IF NOT EXISTS flights_dest ON flights (dest);

CREATE TABLE IF NOT EXISTS flight_history (
    flight_id TEXT NOT NULL,
    version   BIGINT,
    status    TEXT NOT NULL,
    at        TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS flight_history_flight ON flight_history (flight_id);

CREATE TRIGGER IF NOT EXISTS flight_changed AFTER UPDATE ON flights
BEGIN
    DELETE FROM flight_history WHERE flight_id = NEW.id AND NEW.status = 'scheduled';
    INSERT INTO flight_history
    VALUES (NEW.id, NEW.version, NEW.status, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'));
END;
"""
_COLUMNS = tuple(field.name for field in structs.fields(Flight))
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM flights"  # noqa: S608 - our own names
_RANKS: dict[Status, int] = {"scheduled": 0, "delayed": 1, "departed": 2, "cancelled": 2}


class Change(Struct, frozen=True, kw_only=True):
    """A line of the history."""

    flight_id: str
    version: int | None
    status: Status


class Departures:
    """Reads the flights, for the loaders of the caches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: aiosqlite.Connection | None = None

    async def open(self) -> None:
        # No transaction stays open between queries, so each query sees the last commit.
        self._connection = await aiosqlite.connect(
            self._path, timeout=_BUSY_S, isolation_level=None
        )

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def flight(self, flight_id: str) -> Flight | None:
        found = await self._read("WHERE id = ?", flight_id)
        return found[0] if found else None

    async def of_airport(self, airport: str) -> list[Flight]:
        """All flights from or to the airport."""
        return await self._read("WHERE origin = ?1 OR dest = ?1", airport)

    async def _read(self, where: str, value: str) -> list[Flight]:
        if self._connection is None:
            raise RuntimeError("the database is not open")
        rows = await self._connection.execute_fetchall(f"{_SELECT} {where}", (value,))
        return [_flight(row) for row in rows]


def create(path: Path, day: Iterable[Flight]) -> None:
    """Create the tables and insert the timetable of the day."""
    places = ", ".join("?" * len(_COLUMNS))
    insert = f"INSERT OR IGNORE INTO flights ({', '.join(_COLUMNS)}) VALUES ({places})"  # noqa: S608
    with closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
        # WAL lets readers continue while the sink writes.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        with connection:
            connection.executemany(insert, (structs.astuple(as_scheduled(each)) for each in day))


def read_flights(path: Path) -> list[Flight]:
    """The whole table, ordered by id."""
    with closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
        return [_flight(row) for row in connection.execute(f"{_SELECT} ORDER BY id")]


def read_changes(path: Path) -> list[Change]:
    """The history in the order of writing."""
    query = "SELECT flight_id, version, status FROM flight_history ORDER BY rowid"
    with closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
        return [
            Change(flight_id=flight_id, version=version, status=status)
            for flight_id, version, status in connection.execute(query)
        ]


def order_fault(changes: Iterable[Change]) -> str:
    """Description of the first change that went back; empty if there is none."""
    newest: dict[str, Change] = {}
    for change in changes:
        before = newest.get(change.flight_id)
        if before is not None:
            if (change.version or 0) <= (before.version or 0):
                return f"{change.flight_id}: version {change.version} after {before.version}"
            if _RANKS[change.status] < _RANKS[before.status] or before.status == "cancelled":
                return f"{change.flight_id}: {change.status} after {before.status}"
        newest[change.flight_id] = change
    return ""


def _flight(row: Sequence[object]) -> Flight:
    return msgspec.convert(dict(zip(_COLUMNS, row, strict=True)), Flight)

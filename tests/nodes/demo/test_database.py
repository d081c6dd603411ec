"""The database of the demo: timetable, history, and the check of its order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from forebay.nodes.demo.database import (
    Change,
    Departures,
    create,
    order_fault,
    read_changes,
    read_flights,
)
from forebay.nodes.demo.flights import as_scheduled, read_day

DAY = read_day()
ONE = "UA1545-EWR-IAH"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create(tmp_path / "flights.db", DAY)
    return tmp_path / "flights.db"


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def update(path: Path, status: str, version: int) -> None:
    with writing(path) as connection:
        connection.execute(
            "UPDATE flights SET status = ?, version = ? WHERE id = ?", (status, version, ONE)
        )


def test_the_table_begins_with_the_timetable(path: Path) -> None:
    """At first every flight is scheduled without a version, and the history is empty."""
    timetable = sorted((as_scheduled(flight) for flight in DAY), key=lambda flight: flight.id)

    assert read_flights(path) == timetable
    assert read_changes(path) == []


def test_create_again_keeps_what_has_happened(path: Path) -> None:
    """I1: a second create() does not reset the day."""
    update(path, "departed", 7)

    create(path, DAY)

    (row,) = [flight for flight in read_flights(path) if flight.id == ONE]
    assert row.status == "departed"


def test_each_update_leaves_a_line(path: Path) -> None:
    """I2: every update adds a line to the history."""
    update(path, "delayed", 5)
    update(path, "departed", 9)

    assert read_changes(path) == [
        Change(flight_id=ONE, version=5, status="delayed"),
        Change(flight_id=ONE, version=9, status="departed"),
    ]


def test_an_upsert_leaves_a_line_only_if_it_changes_the_row(path: Path) -> None:
    """I2: an upsert that the version guard refuses adds no line."""
    upsert = (
        "INSERT INTO flights SELECT * FROM flights WHERE id = ? "
        "ON CONFLICT (id) DO UPDATE SET status = 'departed', version = ? "
        "WHERE version IS NULL OR version < ?"
    )
    for version in (5, 5, 4, 6):
        with writing(path) as connection:
            connection.execute(upsert, (ONE, version, version))

    assert [change.version for change in read_changes(path)] == [5, 6]


def test_a_new_day_begins_the_history_anew(path: Path) -> None:
    """I2: a flight that returns to scheduled loses its old lines."""
    update(path, "departed", 5)
    update(path, "scheduled", 6)

    assert read_changes(path) == [Change(flight_id=ONE, version=6, status="scheduled")]


def test_an_unknown_status_is_refused(path: Path) -> None:
    """The table refuses an unknown status."""
    with pytest.raises(sqlite3.IntegrityError):
        update(path, "vanished", 5)


def change(version: int | None, status: str, flight_id: str = "a") -> Change:
    return Change(flight_id=flight_id, version=version, status=status)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [change(1, "scheduled"), change(2, "delayed"), change(3, "departed")],
        [change(1, "departed"), change(2, "departed")],
        [change(9, "departed"), change(1, "delayed", "b")],
    ],
)
def test_good_orders_pass(changes: list[Change]) -> None:
    """I3: versions rise within each flight, independently of other flights."""
    assert order_fault(changes) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([change(2, "delayed"), change(1, "departed")], "version 1 after 2"),
        ([change(2, "delayed"), change(2, "departed")], "version 2 after 2"),
        ([change(2, "delayed"), change(None, "departed")], "version None after 2"),
        ([change(1, "departed"), change(2, "delayed")], "delayed after departed"),
        ([change(1, "cancelled"), change(2, "departed")], "departed after cancelled"),
    ],
)
def test_going_back_is_found(changes: list[Change], words: str) -> None:
    """I3: an older or equal version, or an earlier status, is a fault."""
    assert words in order_fault(changes)


async def test_departures_see_what_was_last_committed(path: Path) -> None:
    """Each query of the reading side sees the last commit."""
    departures = Departures(path)
    await departures.open()
    try:
        before = await departures.flight(ONE)
        update(path, "departed", 5)
        after = await departures.flight(ONE)
        board = await departures.of_airport("IAH")
        missing = await departures.flight("XX1-JFK-LAX")
    finally:
        await departures.aclose()

    assert before is not None
    assert after is not None
    assert (before.status, after.status) == ("scheduled", "departed")
    assert {flight.dest for flight in board} == {"IAH"}
    assert missing is None

"""One real day of departures from New York City, as rows and as events in their real order.

I1  The data set is not corrected; ``NA`` is an absent value.
I2  The id of a flight is unique on the day, and the same in its first and its last row.
I3  The events of a flight are ordered in time: ``delayed`` at the scheduled minute if it departs
    late, then ``departed``; or ``cancelled`` at the scheduled minute. The last event carries the
    complete row of the data set, so that after all events the table equals the data set.
I4  The day is ordered by ``at_min`` (minutes since midnight, beyond 1440 for flights that depart
    the next morning), then by id.

This module does not import Forebay: the replayer, which stands for a publishing service, takes its
events from it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct, structs

DATA = Path(__file__).with_name("data")
NEW_YORK = ("EWR", "JFK", "LGA")

Status = Literal["scheduled", "delayed", "departed", "cancelled"]

_ABSENT = ("NA", "")
_TEXT = ("carrier", "tailnum", "origin", "dest")
_KNOWN_AFTERWARDS = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")


class Flight(Struct, frozen=True, kw_only=True):
    """A row: the columns of the data set, an id and a status. Times are HHMM."""

    id: str  #: such as UA1545-EWR-IAH
    status: Status
    month: int
    day: int
    sched_dep_time: int
    dep_time: int | None = None
    dep_delay: int | None = None  #: minutes
    sched_arr_time: int
    arr_time: int | None = None
    arr_delay: int | None = None
    carrier: str
    flight: int
    tailnum: str | None = None
    origin: str
    dest: str
    air_time: int | None = None
    distance: int

    @property
    def airports(self) -> tuple[str, str]:
        return (self.origin, self.dest)


class DayEvent(Struct, frozen=True, kw_only=True):
    """A change of a flight, and its time."""

    at_min: int
    flight: Flight


def read_day(path: Path = DATA / "flights.csv") -> list[Flight]:
    """The final state of the day: every flight has departed or was cancelled."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_final(row) for row in csv.DictReader(file)]


def read_names(path: Path) -> dict[str, str]:
    """Names by code, from the first two columns of airports.csv or airlines.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows)
        return {row[0]: row[1] for row in rows}


def as_scheduled(flight: Flight, status: Status = "scheduled") -> Flight:
    """The flight as in the timetable, without the values known only afterwards."""
    return structs.replace(flight, status=status, **dict.fromkeys(_KNOWN_AFTERWARDS))


def events_of(day: Iterable[Flight]) -> list[DayEvent]:
    """All events of the day, in order."""
    events = [event for flight in day for event in _events_of_one(flight)]
    return sorted(events, key=lambda event: (event.at_min, event.flight.id))


def minutes_of(hhmm: int) -> int:
    """Minutes since midnight; 2400 is the end of the day."""
    return hhmm // 100 * 60 + hhmm % 100


def _events_of_one(flight: Flight) -> Sequence[DayEvent]:
    due_min = minutes_of(flight.sched_dep_time)
    if flight.dep_delay is None:
        return (DayEvent(at_min=due_min, flight=flight),)
    departed = DayEvent(at_min=due_min + flight.dep_delay, flight=flight)
    if flight.dep_delay <= 0:
        return (departed,)
    return (DayEvent(at_min=due_min, flight=as_scheduled(flight, "delayed")), departed)


def _final(row: dict[str, str]) -> Flight:
    cells: dict[str, str | int | None] = {
        name: None if cell in _ABSENT else cell if name in _TEXT else int(cell)
        for name, cell in row.items()
    }
    return Flight(
        id=f"{row['carrier']}{row['flight']}-{row['origin']}-{row['dest']}",
        status="cancelled" if cells["dep_time"] is None else "departed",
        **cells,  # type: ignore[arg-type]  # the columns of the file are the fields
    )

"""The departure board of one airport.

A board depends on the rows of its airport only. So the database behind the cache and the data set
give the same board exactly if they hold the same rows for that airport. EWR, JFK and LGA show
the destinations of their flights; all other airports show the flights from New York.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import get_args

from msgspec import Struct

from .flights import Flight, Status, minutes_of

LINES_MAX = 10


class Line(Struct, frozen=True, kw_only=True):
    """One flight on a board."""

    flight: str
    airline: str
    other_end: str  #: destination or origin
    due: str  #: HH:MM
    left: str | None  #: HH:MM
    delay_min: int | None
    status: Status


class Board(Struct, frozen=True, kw_only=True):
    """The next flights, the last flights, and the totals of the day."""

    airport: str
    name: str
    counts: dict[Status, int]
    delay_min_total: int  #: over all departed flights; each late flight changes it
    next: list[Line]
    last: list[Line]  #: latest first


def board_of(
    airport: str,
    rows: Iterable[Flight],
    *,
    airports: Mapping[str, str],
    airlines: Mapping[str, str],
) -> Board:
    """The board of the airport; rows of other airports are ignored."""
    mine = [row for row in rows if airport in row.airports]
    waiting = sorted((row for row in mine if row.status in ("scheduled", "delayed")), key=_due)
    gone = sorted((row for row in mine if row.status == "departed"), key=_left, reverse=True)
    counted = Counter(row.status for row in mine)
    return Board(
        airport=airport,
        name=airports.get(airport, airport),
        counts={status: counted[status] for status in get_args(Status)},
        delay_min_total=sum(row.dep_delay or 0 for row in gone),
        next=[_line(airport, row, airlines) for row in waiting[:LINES_MAX]],
        last=[_line(airport, row, airlines) for row in gone[:LINES_MAX]],
    )


def _due(row: Flight) -> tuple[int, str]:
    return minutes_of(row.sched_dep_time), row.id


def _left(row: Flight) -> tuple[int, str]:
    return minutes_of(row.sched_dep_time) + (row.dep_delay or 0), row.id


def _line(airport: str, row: Flight, airlines: Mapping[str, str]) -> Line:
    return Line(
        flight=f"{row.carrier} {row.flight}",
        airline=airlines.get(row.carrier, row.carrier),
        other_end=row.dest if airport == row.origin else row.origin,
        due=_time_text(row.sched_dep_time),
        left=None if row.dep_time is None else _time_text(row.dep_time),
        delay_min=row.dep_delay,
        status=row.status,
    )


def _time_text(hhmm: int) -> str:
    return f"{hhmm // 100:02}:{hhmm % 100:02}"

"""The flights of the day: rows, ids, events and their order."""

from __future__ import annotations

import csv
from collections import defaultdict

import pytest

from forebay.nodes.demo.flights import (
    DATA,
    NEW_YORK,
    DayEvent,
    Flight,
    as_scheduled,
    events_of,
    minutes_of,
    read_day,
    read_names,
)

DAY = read_day()
EVENTS = events_of(DAY)


def by_flight(events: list[DayEvent]) -> dict[str, list[DayEvent]]:
    found: dict[str, list[DayEvent]] = defaultdict(list)
    for event in events:
        found[event.flight.id].append(event)
    return found


def test_rows_are_the_lines_of_the_data_set() -> None:
    """I1: a row contains every cell of the file, and NA is None."""
    with (DATA / "flights.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    assert len(lines) == len(DAY) == 842
    for line, flight in zip(lines, DAY, strict=True):
        shown = {name: getattr(flight, name) for name in line}
        assert {name: "NA" if v is None else str(v) for name, v in shown.items()} == line


def test_ids_are_unique() -> None:
    """I2: the ids of the day are unique."""
    assert len({flight.id for flight in DAY}) == len(DAY)
    assert "UA1545-EWR-IAH" in {flight.id for flight in DAY}


def test_the_timetable_knows_nothing_of_later() -> None:
    """I2: a timetable row has the same id, and no value known only afterwards."""
    for flight in DAY:
        row = as_scheduled(flight)
        later = (row.dep_time, row.dep_delay, row.arr_time, row.arr_delay, row.air_time)
        assert later == (None,) * 5
        assert (row.id, row.status) == (flight.id, "scheduled")


def test_the_last_event_of_a_flight_is_its_row() -> None:
    """I3: after all events in order the table equals the data set."""
    table: dict[str, Flight] = {event.flight.id: event.flight for event in EVENTS}

    assert table == {flight.id: flight for flight in DAY}


def test_only_late_flights_are_delayed_first() -> None:
    """I3: a late flight has two events, delayed and departed; the others have one."""
    for events in by_flight(EVENTS).values():
        last = events[-1]
        late = (last.flight.dep_delay or 0) > 0
        assert [e.flight.status for e in events[:-1]] == (["delayed"] if late else [])
        assert last.flight.status in ("departed", "cancelled")
        if late:
            assert events[0].at_min == minutes_of(last.flight.sched_dep_time) < last.at_min


def test_the_day_is_in_order() -> None:
    """I4: events are ordered in time, and those of the next morning come last."""
    moments = [(event.at_min, event.flight.id) for event in EVENTS]

    assert moments == sorted(moments)
    assert EVENTS[-1].flight.dep_time == 848
    assert EVENTS[-1].at_min == 24 * 60 + minutes_of(848)


def test_departures_are_at_their_real_time() -> None:
    """I4: a departure has the minute of the data set."""
    for event in EVENTS:
        if event.flight.status == "departed":
            assert event.flight.dep_time is not None
            assert event.at_min % 1440 == minutes_of(event.flight.dep_time) % 1440


def test_the_order_does_not_depend_on_the_order_of_the_rows() -> None:
    """I4: events of one minute are ordered by id."""
    assert events_of(reversed(DAY)) == EVENTS


def test_every_flight_leaves_new_york() -> None:
    """Exactly one airport of a flight is in New York."""
    for flight in DAY:
        assert flight.origin in NEW_YORK
        assert flight.dest not in NEW_YORK


@pytest.mark.parametrize(("hhmm", "minutes"), [(0, 0), (515, 315), (2359, 1439), (2400, 1440)])
def test_minutes_of(hhmm: int, minutes: int) -> None:
    """HHMM becomes minutes since midnight, and 2400 is the end of the day."""
    assert minutes_of(hhmm) == minutes


def test_airlines_all_have_names() -> None:
    """The shipped names include every airline of the day."""
    names = read_names(DATA / "airlines.csv")

    assert {flight.carrier for flight in DAY} <= set(names)
    assert names["UA"] == "United Air Lines Inc."

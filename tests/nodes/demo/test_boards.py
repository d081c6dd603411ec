"""Boards: next flights, last flights, and totals."""

from __future__ import annotations

from forebay.nodes.demo.boards import LINES_MAX, Board, board_of
from forebay.nodes.demo.flights import DATA, Flight, as_scheduled, read_day, read_names

DAY = read_day()
AIRPORTS = read_names(DATA / "airports.csv")
AIRLINES = read_names(DATA / "airlines.csv")


def shown(airport: str, rows: list[Flight]) -> Board:
    return board_of(airport, rows, airports=AIRPORTS, airlines=AIRLINES)


def test_the_morning_board_shows_the_next_departures() -> None:
    """Before the first departure the board shows the start of the timetable."""
    board = shown("JFK", [as_scheduled(flight) for flight in DAY])

    dues = [line.due for line in board.next]
    assert len(dues) == LINES_MAX
    assert dues == sorted(dues)
    assert board.last == []
    assert board.counts == {"scheduled": 297, "delayed": 0, "departed": 0, "cancelled": 0}


def test_the_evening_board_shows_the_latest_first() -> None:
    """After the day the flight that departed the next morning is at the top."""
    board = shown("JFK", DAY)

    assert board.next == []
    assert board.last[0].flight == "MQ 3944"
    assert (board.last[0].left, board.last[0].delay_min) == ("08:48", 853)
    assert board.counts == {"scheduled": 0, "delayed": 0, "departed": 296, "cancelled": 1}


def test_a_board_elsewhere_shows_where_flights_come_from() -> None:
    """Outside New York a board shows the origins of the flights."""
    board = shown("BOS", DAY)

    assert board.name == "General Edward Lawrence Logan Intl"
    assert {line.other_end for line in board.last} <= {"EWR", "JFK", "LGA"}
    assert {line.other_end for line in shown("JFK", DAY).last}.isdisjoint({"JFK"})


def test_every_flight_counts_on_two_boards() -> None:
    """Over all airports each flight counts twice: at its origin and at its destination."""
    airports = {airport for flight in DAY for airport in flight.airports}

    assert sum(sum(shown(each, DAY).counts.values()) for each in airports) == 2 * len(DAY)


def test_rows_of_other_airports_change_nothing() -> None:
    """A board is the same whether the loader passes its own rows or all rows."""
    own = [flight for flight in DAY if "ATL" in flight.airports]

    assert shown("ATL", own) == shown("ATL", DAY)


def test_each_change_of_a_row_shows() -> None:
    """Every row that is not in its final state changes the board."""
    final = shown("ATL", DAY)
    own = [flight for flight in DAY if "ATL" in flight.airports]
    for number, flight in enumerate(own):
        rows = [*own[:number], as_scheduled(flight), *own[number + 1 :]]
        assert shown("ATL", rows) != final


def test_an_airport_without_a_name_shows_its_code() -> None:
    """San Juan is missing in the list of airports, so its code is shown."""
    assert shown("SJU", DAY).name == "SJU"

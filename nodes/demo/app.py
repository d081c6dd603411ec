"""Departure boards of the New York airports: a node to copy and change.

    forebay run --app forebay.nodes.demo.app:node

The flights are in a SQLite database. Events change them, and any program may publish events:

    XADD forebay:flights:events * event '{"type": "write", "key": "flight:UA1545-EWR-IAH",
        "value": {...}, "invalidates": {"tags": ["airport:EWR", "airport:IAH"]}}'

The new flight is visible at once. The node that owns its shard writes it to the database, and
then invalidates the boards of both airports on every node.
"""

from __future__ import annotations

import os
from pathlib import Path

import forebay

from .boards import Board, board_of
from .database import Departures, create
from .flights import DATA, Flight, read_day, read_names

DATABASE = Path(os.environ.get("FOREBAY_DEMO_DB") or "flights.db").absolute()
AIRPORTS = read_names(DATA / "airports.csv")
AIRLINES = read_names(DATA / "airlines.csv")

departures = Departures(DATABASE)
node = forebay.Node("flights")


# A board is fresh for 2 s unless an event invalidates it earlier. For another 30 s the stale
# board is served while a new one loads, so no reader waits for the database.
@node.cached("board:{airport}", ttl=2, stale_for=30, tags=["airport:{airport}"])
async def board(airport: str) -> Board:
    rows = await departures.of_airport(airport)
    return board_of(airport, rows, airports=AIRPORTS, airlines=AIRLINES)


# An absent flight is cached too.
@node.cached("flight:{id}", ttl=3600)
async def flight(id: str) -> Flight | None:
    return await departures.flight(id)


# Writes of flights go to this table: in order, in batches, each exactly once.
node.sink(
    "flight:{id}",
    forebay.SqlSink(f"sqlite+aiosqlite:///{DATABASE}", table="flights", key=("id",)),
)


@node.on_start
async def open_database() -> None:
    create(DATABASE, read_day())
    await departures.open()


@node.on_stop
async def close_database() -> None:
    await departures.aclose()

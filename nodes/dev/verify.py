"""Checks at the end of the day: nothing is lost, repeated or out of order.

Each check compares the state of the cluster with the data set, and returns a ``Finding`` that
describes the first differences. Checks over HTTP ask every node.

A board with the stale flag may show an older state, so it is read again until the flag is
gone; a board without the flag must show the final state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct, structs

from ...coordinator.valkey.link import Commands
from ...schemas.keys import EVENTS, Names
from ..demo.boards import Board, board_of
from ..demo.database import Change, order_fault, read_changes, read_flights
from ..demo.flights import DATA, Flight, read_names
from .processes import Cluster, NodeProcess
from .readers import ReadReport

MAX_STALENESS_S = 0.5  #: cache.max_staleness_ms of the nodes
_POLL_S = 0.1
_STALE_READS_MAX = 50
_DIFFERENCES_SHOWN = 5


class Finding(Struct, frozen=True, kw_only=True):
    ok: bool
    problem: str = ""
    count: int = 0  #: of compared items


def rows_equal(stored: Sequence[Flight], day: Sequence[Flight]) -> Finding:
    """Row for row, all columns."""
    have = {flight.id: flight for flight in stored}
    want = {flight.id: flight for flight in day}
    wrong = [_row_difference(key, have.get(key), want.get(key)) for key in sorted(have | want)]
    return _finding([each for each in wrong if each], count=len(want))


def order_kept(changes: Sequence[Change], day: Sequence[Flight]) -> Finding:
    """No version and no status went back, and every flight was changed."""
    if fault := order_fault(changes):
        return Finding(ok=False, problem=fault, count=len(changes))
    untouched = {flight.id for flight in day} - {change.flight_id for change in changes}
    return _finding([f"{key} was never written" for key in sorted(untouched)], count=len(changes))


def expected_boards(day: Sequence[Flight]) -> dict[str, Board]:
    """The final boards by airport, computed from the data set."""
    airports, airlines = read_names(DATA / "airports.csv"), read_names(DATA / "airlines.csv")
    return {
        airport: board_of(airport, day, airports=airports, airlines=airlines)
        for airport in sorted({airport for flight in day for airport in flight.airports})
    }


async def boards_shown(cluster: Cluster, expected: Mapping[str, Board]) -> Finding:
    """Every node shows every expected board."""
    wrong: list[str] = []

    async def ask(node: NodeProcess) -> None:
        for airport, board in expected.items():
            if problem := await _board_fault(cluster, node, airport, board):
                wrong.append(f"{node.child.name} board:{airport}: {problem}")

    async with anyio.create_task_group() as tasks:
        for node in cluster.nodes:
            tasks.start_soon(ask, node)
    return _finding(sorted(wrong), count=len(expected) * len(cluster.nodes))


async def no_dead_letters(commands: Commands, names: Names) -> Finding:
    """No dead letter exists, in any shard or in the ingress stream."""
    streams = [names.part(shard, "dead") for shard in (EVENTS, *range(names.shards))]
    dead = sum([int(await commands.call("XLEN", stream)) for stream in streams])
    return Finding(ok=dead == 0, problem=f"{dead} dead letters" if dead else "", count=dead)


def never_back(reads: ReadReport) -> Finding:
    """No node returned an older board after a newer one."""
    problem = f"{reads.went_back} of {reads.reads_total} reads" if reads.went_back else ""
    return Finding(ok=not reads.went_back, problem=problem, count=reads.reads_total)


async def until_drained(cluster: Cluster, database: Path, *, limit_s: float) -> Finding:
    """Wait until no node has a backlog and every flight in the table has its final status."""
    with anyio.move_on_after(limit_s):
        idle_in_a_row = 0
        while idle_in_a_row < 2:
            await anyio.sleep(_POLL_S)
            idle_in_a_row = idle_in_a_row + 1 if await _idle(cluster, database) else 0
        # The invalidations of the last writes may still be on their way to the near caches.
        await anyio.sleep(MAX_STALENESS_S)
        return Finding(ok=True)
    await cluster.observe()
    backlogs = ", ".join(f"{node.child.name} {_backlog_text(node)}" for node in cluster.nodes)
    return Finding(ok=False, problem=f"not drained within {limit_s:g} s: {backlogs}")


def all_final(stored: Sequence[Flight]) -> bool:
    return all(flight.status in ("departed", "cancelled") for flight in stored)


async def read_table(database: Path) -> tuple[list[Flight], list[Change]]:
    """The flights and their history."""
    flights = await anyio.to_thread.run_sync(read_flights, database)
    return flights, await anyio.to_thread.run_sync(read_changes, database)


async def _idle(cluster: Cluster, database: Path) -> bool:
    await cluster.observe()
    for node in cluster.nodes:
        backlog = node.scene.backlog
        if backlog is None or backlog.events or backlog.writes:
            return False
    return all_final(await anyio.to_thread.run_sync(read_flights, database))


async def _board_fault(cluster: Cluster, node: NodeProcess, airport: str, expected: Board) -> str:
    for _ in range(_STALE_READS_MAX):
        response = await cluster.get(node, f"/v1/cache/board:{airport}")
        if response is None or response.status != 200:
            return "no response" if response is None else f"status {response.status}"
        if not response.stale:
            return _board_difference(response.body, expected)
        await anyio.sleep(_POLL_S)
    return "stays stale"


def _board_difference(body: bytes, expected: Board) -> str:
    try:
        shown = msgspec.json.decode(body, type=Board)
    except msgspec.DecodeError as error:
        return f"unreadable: {error}"
    return "; ".join(_differences(shown, expected))


def _row_difference(key: str, have: Flight | None, want: Flight | None) -> str:
    if have is None or want is None:
        return f"{key} is {'missing' if have is None else 'not in the data set'}"
    differences = _differences(have, want)
    return f"{key}: {', '.join(differences)}" if differences else ""


def _differences(have: Struct, want: Struct) -> list[str]:
    names = (field.name for field in structs.fields(want))
    pairs = ((name, getattr(have, name), getattr(want, name)) for name in names)
    return [f"{name} is {ours!r}, not {theirs!r}" for name, ours, theirs in pairs if ours != theirs]


def _finding(wrong: Sequence[str], *, count: int) -> Finding:
    shown = "; ".join(each[:300] for each in wrong[:_DIFFERENCES_SHOWN])
    more = len(wrong) - _DIFFERENCES_SHOWN
    return Finding(
        ok=not wrong, problem=shown + (f"; and {more} more" if more > 0 else ""), count=count
    )


def _backlog_text(node: NodeProcess) -> str:
    backlog = node.scene.backlog
    return "does not report it" if backlog is None else f"{backlog.events}+{backlog.writes}"

"""The checks at the end of the day: each finds a planted fault."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from forebay.nodes.demo.database import Change
from forebay.nodes.demo.flights import as_scheduled, read_day
from forebay.nodes.dev.processes import Cluster, free_ports
from forebay.nodes.dev.readers import Tally
from forebay.nodes.dev.verify import (
    all_final,
    boards_shown,
    expected_boards,
    never_back,
    order_kept,
    rows_equal,
)

DAY = read_day()
FULL = [Change(flight_id=f.id, version=n, status=f.status) for n, f in enumerate(DAY, 1)]

#: Serves the boards of a file; BOS as argv[1] says.
BOARDS = """
import http.server, json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
how, boards = sys.argv[1], json.load(open(sys.argv[2]))
asked = {}

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        airport = self.path.rpartition(":")[2]
        asked[airport] = asked.get(airport, 0) + 1
        board, odd = boards.get(airport), airport == "BOS"
        old = odd and (how == "old" or (how == "stale" and asked[airport] < 3))
        if old:
            board = {**board, "delay_min_total": -1}
        self.send_response(503 if odd and how == "fails" else 200)
        self.send_header("X-Forebay-Stale", "true" if old and how == "stale" else "false")
        self.end_headers()
        self.wfile.write(json.dumps(board).encode())
    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[4])), Answers).serve_forever()
"""


def test_equal_rows_pass() -> None:
    """Rows are compared by content and not by order."""
    finding = rows_equal(list(reversed(DAY)), DAY)

    assert (finding.ok, finding.count) == (True, len(DAY))


def test_a_wrong_cell_is_named() -> None:
    """One wrong column of one row fails the check, and the problem names it."""
    wrong = structs.replace(DAY[7], tailnum="N0")

    finding = rows_equal([*DAY[:7], wrong, *DAY[8:]], DAY)

    assert not finding.ok
    assert finding.problem == f"{wrong.id}: tailnum is 'N0', not {DAY[7].tailnum!r}"


def test_missing_and_added_rows_are_named() -> None:
    """A lost row and an unknown row are both named."""
    added = structs.replace(DAY[0], id="XX1-JFK-LAX")

    finding = rows_equal([*DAY[1:], added], DAY)

    assert f"{DAY[0].id} is missing" in finding.problem
    assert "XX1-JFK-LAX is not in the data set" in finding.problem


def test_many_differences_are_counted_not_listed() -> None:
    """A long list of differences is cut, with a count."""
    finding = rows_equal([], DAY)

    assert finding.problem.endswith(f"and {len(DAY) - 5} more")


def test_a_full_history_in_order_passes() -> None:
    """A history passes if every flight was written and none went back."""
    assert order_kept(FULL, DAY).ok


def test_a_flight_that_was_never_written_is_found() -> None:
    """A lost event is found even if the row is right by accident."""
    finding = order_kept(FULL[1:], DAY)

    assert not finding.ok
    assert finding.problem == f"{DAY[0].id} was never written"


def test_a_doubled_write_is_found() -> None:
    """A repeated version fails the check."""
    assert not order_kept([*FULL, FULL[0]], DAY).ok


def test_a_day_is_over_when_no_flight_is_to_leave() -> None:
    """The day is over when every flight has its final status."""
    assert all_final(DAY)
    assert not all_final([*DAY[1:], as_scheduled(DAY[0])])


def test_a_board_that_went_back_fails_the_check() -> None:
    """A read of an older board fails the check."""
    tally = Tally()
    for version, floor in ((5, 0), (4, 5)):
        tally.count_read("n", "JFK", tier="near", stale=False, version=version, floor=floor, ms=1)

    finding = never_back(tally.report())

    assert (finding.ok, finding.problem) == (False, "1 of 2 reads")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("right", ""),
        ("stale", ""),
        ("old", "node-1 board:BOS: delay_min_total is -1"),
        ("fails", "node-1 board:BOS: status 503"),
    ],
)
async def test_boards_are_compared_on_every_node(tmp_path: Path, how: str, problem: str) -> None:
    """An old board fails the check, unless it has the stale flag and is right later."""
    expected = expected_boards(DAY)
    (tmp_path / "boards.json").write_bytes(msgspec.json.encode(expected))
    (tmp_path / "boards.py").write_text(BOARDS)
    cluster = Cluster(
        [sys.executable, str(tmp_path / "boards.py"), how, str(tmp_path / "boards.json")],
        ports=free_ports(0, 1),
        environ=dict(os.environ),
        directory=tmp_path,
    )
    async with cluster:
        finding = await boards_shown(cluster, expected)

    assert finding.ok is (problem == "")
    assert finding.problem.startswith(problem)
    assert finding.count == len(expected) == 90

"""Histories: what is written down by several processes is one story afterwards."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from faults.history import History, read_history


def test_records_of_all_processes_come_in_the_order_of_time(tmp_path: Path) -> None:
    """H1: whoever wrote it, what happened first comes first."""
    one, two = History(tmp_path, "one"), History(tmp_path, "two")
    for number in range(20):
        (one, two)[number % 2].write("bump", "ok", subject="a", version=number)
    one.close()
    two.close()
    records = read_history(tmp_path)
    assert [record.version for record in records] == list(range(20))
    assert {record.process for record in records} == {"one", "two"}


def test_what_was_written_at_once_survives_the_writer(tmp_path: Path) -> None:
    """H3: it is in the file before the process goes on."""
    history = History(tmp_path, "one")
    history.write("load", "invoke", subject="a", at_once=True)
    assert [record.subject for record in read_history(tmp_path)] == ["a"]
    history.close()


def test_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    """H3: a killed process may leave half a line, in the end only."""
    history = History(tmp_path, "one")
    history.write("bump", "ok", subject="a", version=1)
    history.close()
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes() * 2 + path.read_bytes()[:20])
    assert len(read_history(tmp_path)) == 2
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(msgspec.MsgspecError):
        read_history(tmp_path)

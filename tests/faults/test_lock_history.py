"""What processes wrote down of locks is read as it was meant: L2 and L3 of lock_history.py."""

from __future__ import annotations

from pathlib import Path

from faults.lock_history import Began, Ended, LockHistory, Wrote, grants_of, read, writes_of


def test_a_grant_without_an_end_was_believed_until_its_process_died(tmp_path: Path) -> None:
    """And what is only half a line is none."""
    history = LockHistory(tmp_path, "one")
    history.write(Began(name="l", token=1, asked_at=1.0, granted_at=2.0))
    history.write(Ended(name="l", token=1, believed_until=3.0))
    history.write(Began(name="l", token=2, asked_at=1.0, granted_at=4.0))
    history.close()
    with (tmp_path / "one.locks.jsonl").open("a") as file:
        file.write('{"type":"ended","name":"l","tok')
    ended, killed = grants_of(read(tmp_path), {"one": 5.0})
    assert (ended.believed_until, killed.believed_until) == (3.0, 5.0)


def test_what_is_known_later_counts(tmp_path: Path) -> None:
    """A loss that only the release told of is one; a write that a guard refused is none."""
    history = LockHistory(tmp_path, "one")
    history.write(Began(name="l", token=1, asked_at=1.0, granted_at=2.0))
    history.write(Ended(name="l", token=1, believed_until=3.0))
    history.write(Ended(name="l", token=1, believed_until=3.0, lost="taken"))
    history.write(Wrote(key="k", token=1, sent_at=4.0, done_at=5.0, refused=True))
    history.close()
    (grant,) = grants_of(read(tmp_path), {})
    assert grant.lost == "taken"
    assert writes_of(read(tmp_path)) == []

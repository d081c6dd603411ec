"""Notices and bells: the wire that nodes of different versions share."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas.notices import (
    Bumped,
    Changed,
    Dropped,
    Extended,
    Notification,
    Position,
    read_notice,
    read_notification,
    write_notice,
)

names = st.text(max_size=30)
many = st.lists(names, max_size=5).map(tuple)
notices = st.one_of(
    st.builds(Changed, names, names, st.booleans(), st.integers(0, 2**50)),
    st.builds(Dropped, many, st.booleans(), names, st.integers(0, 2**50)),
    st.builds(Bumped, many, names, st.booleans(), st.integers(0, 2**50)),
    st.builds(Extended, names, st.integers(0, 2**60), st.integers(0, 2**50), st.integers(0, 2**50)),
)


@given(notices)
def test_a_notice_comes_back_as_it_was(notice) -> None:
    """Round trip over the wire."""
    assert read_notice(write_notice(notice)) == notice


@pytest.mark.parametrize(
    ("notice", "wire"),
    [
        (Changed("k", "n1"), ["c", "k", "n1", False, 0]),
        (Dropped(("k", "l"), True, "n1", 9), ["d", ["k", "l"], True, "n1", 9]),
        (Bumped(("t",), "n1"), ["t", ["t"], "n1", False, 0]),
        (Extended("k", 1, 2, 3), ["x", "k", 1, 2, 3]),
    ],
)
def test_the_wire_stays_as_it_is(notice, wire) -> None:
    """Nodes of two versions follow one log during a deployment."""
    assert msgspec.msgpack.decode(write_notice(notice)) == wire


@pytest.mark.parametrize(
    "wire",
    [["c", "k"], ["c", "k", "n1", True], ["c", "k", "n1", True, 0, "later", {"more": 1}]],
)
def test_fields_may_be_missing_or_added_at_the_end(wire) -> None:
    """A notice of a newer version is understood as far as it goes."""
    found = read_notice(msgspec.msgpack.encode(wire))
    assert isinstance(found, Changed)
    assert found.key == "k"


@pytest.mark.parametrize("wire", [["new-kind", "k"], ["c"], ["c", 1], {"a": 1}, None, [], "c"])
def test_what_is_not_known_is_none(wire) -> None:
    """The follower then doubts the whole shard; it must not fail."""
    assert read_notice(msgspec.msgpack.encode(wire)) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_notice_or_none(raw: bytes) -> None:
    """No exception, whatever comes."""
    found = read_notice(raw)
    assert found is None or read_notice(write_notice(found)) == found


@given(
    st.integers(0, 1023), st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**53),
    st.binary(max_size=100),
)  # fmt: skip
def test_a_bell_says_what_the_script_said(shard, epoch, seq, version, notice) -> None:
    """The notice is binary and may hold spaces."""
    payload = b"%d %d %d %d %b" % (shard, epoch, seq, version, notice)
    assert read_notification(payload) == Notification(shard, Position(epoch, seq), version, notice)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_bell_or_none(payload: bytes) -> None:
    """Anybody may publish on the channel."""
    found = read_notification(payload)
    assert found is None or payload.endswith(found.notice)


@pytest.mark.parametrize("payload", [b"", b"1 2 3 4", b"a b c d e", b"1 2 x 4 n", b"9" * 5_000])
def test_what_is_no_bell_is_none(payload: bytes) -> None:
    """Too few parts, or parts that are no numbers."""
    assert read_notification(payload) is None


@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_a_position_is_a_stream_id(epoch: int, seq: int) -> None:
    """Its text is what XADD and XREAD say, as bytes or text."""
    position = Position(epoch, seq)
    assert Position.parse(str(position)) == Position.parse(str(position).encode()) == position


def test_positions_are_in_the_order_of_the_log() -> None:
    """Any later epoch is later than any number of an earlier one."""
    in_order = [Position(0, 0), Position(7, 0), Position(7, 1), Position(7, 10), Position(8, 0)]
    assert all(one < other for one, other in pairwise(in_order))
    assert Position.parse("7") == Position(7, 0)

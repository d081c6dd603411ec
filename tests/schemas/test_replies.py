"""The checked parsers: any reply of Valkey is a value, or UnreadableRecord; V1, V2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas.errors import UnreadableRecord
from forebay.schemas.replies import (
    LAST_ID,
    array,
    digits,
    field_map,
    following,
    integer,
    order,
    pairs,
    raw_bytes,
    stream_id,
    text,
)

PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "integer": integer,
    "raw_bytes": raw_bytes,
    "text": text,
    "array": array,
    "pairs": pairs,
    "stream_id": stream_id,
}
replies = st.recursive(
    st.none() | st.integers() | st.binary(max_size=40) | st.text(max_size=10),
    lambda each: st.lists(each, max_size=4),
    max_leaves=8,
)
NOT_WHOLE = [
    b"",
    b"x",
    b"1e3",
    b"1_0",
    b" 1",
    b"1\n",
    b"0x1",
    b"9" * 21,
    b"9" * 5_000,
    "\u0661",
    None,
    [],
]


@pytest.mark.parametrize("name", PARSERS)
@given(reply=replies)
def test_any_reply_is_a_value_or_unreadable(name: str, reply: Any) -> None:
    """V1: no other exception, for any reply."""
    refused: list[str] = []
    try:
        PARSERS[name](reply, "a record")
    except UnreadableRecord as error:
        refused.append(error.name)
    assert refused in ([], ["a record"])


@given(replies)
def test_the_fields_of_any_entry_are_bytes(reply: Any) -> None:
    """Of an entry that is gone, cut off or made up there are as many fields as can be read."""
    fields = reply if isinstance(reply, list) else None
    assert all(type(part) is bytes for pair in field_map(fields).items() for part in pair)


@pytest.mark.parametrize("raw", NOT_WHOLE)
def test_what_is_no_whole_number_is_refused(raw: Any) -> None:
    """V1: also text that int() would take, or for which it raises another error."""
    with pytest.raises(UnreadableRecord):
        integer(raw, "it")
    if isinstance(raw, bytes):
        assert digits(raw) is None


@pytest.mark.parametrize("raw, number", [(5, 5), (b"0", 0), (b"007", 7), (True, 1), ("12", 12)])
def test_whole_numbers_are_read(raw: Any, number: int) -> None:
    """As an integer reply or as digits."""
    assert integer(raw, "it") == number


@pytest.mark.parametrize("raw", [b"-1", -1, b"11", 11])
def test_numbers_have_bounds(raw: Any) -> None:
    """Outside of them they are as unreadable as text."""
    with pytest.raises(UnreadableRecord, match="between 0 and 10"):
        integer(raw, "it", high=10)


def test_an_error_names_the_record_and_shows_little_of_it() -> None:
    """V2: a megabyte of garbage makes one line."""
    with pytest.raises(UnreadableRecord) as caught:
        text(b"\xff" * 1_000_000, "the name")
    assert str(caught.value).startswith("the name has 1000000 bytes")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "raw",
    [b"", b"1", b"1-", b"-1", b"1-1-1", b"*", b"1-x", b"18446744073709551616-0", b"9" * 5_000],
)
def test_what_is_no_id_is_refused(raw: bytes) -> None:
    """Two whole numbers below 2^64."""
    with pytest.raises(UnreadableRecord):
        stream_id(raw, "it")


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_the_following_id_is_the_next(ms: int, seq: int) -> None:
    """None stands between; after the last there is none."""
    after = following(f"{ms}-{seq}")
    if f"{ms}-{seq}" == LAST_ID:
        assert after == ""
    else:
        assert order(after) == ((ms, seq + 1) if seq < 2**64 - 1 else (ms + 1, 0))


def test_nothing_follows_the_last_id() -> None:
    """The carry of the number goes into the milliseconds, but for the very last."""
    assert following(LAST_ID) == ""
    assert following("5-18446744073709551615") == "6-0"

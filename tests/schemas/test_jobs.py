"""Jobs: msgpack between nodes of different versions."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas.jobs import (
    Invalidates,
    RefreshJob,
    WriteJob,
    read_refresh,
    read_write,
    write_job,
)

UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
texts = st.text(max_size=20)
names = st.lists(texts, max_size=3).map(tuple)


@given(
    st.builds(
        WriteJob,
        key=texts,
        value=st.none() | st.binary(max_size=50),
        invalidates=st.builds(Invalidates, keys=names, tags=names),
        event_id=texts,
        traceparent=texts,
    )
)
def test_write_job_comes_back_as_it_was(job: WriteJob) -> None:
    """I1: the stream alone is enough to do the write."""
    assert read_write(write_job(job)) == job


@given(st.builds(RefreshJob, cache=texts, key=texts, token=texts, traceparent=texts))
def test_refresh_job_comes_back_as_it_was(job: RefreshJob) -> None:
    """I2: the token of the lease is part of it."""
    assert read_refresh(write_job(job)) == job


def test_a_field_of_a_newer_version_is_ignored() -> None:
    """A newer node may write more than this one reads."""
    raw = msgspec.msgpack.encode({"type": "w", "key": "a", "value": b"1", "urgency": 9})
    assert read_write(raw) == WriteJob(key="a", value=b"1")


def test_a_deletion_is_told_from_a_missing_value() -> None:
    """None deletes the row; a job that lacks the value is none."""
    assert read_write(write_job(WriteJob(key="a", value=None))).value is None
    with pytest.raises(msgspec.ValidationError):
        read_write(msgspec.msgpack.encode({"type": "w", "key": "a"}))


def test_one_kind_of_job_is_never_taken_for_the_other() -> None:
    """The kind stands in the job."""
    with pytest.raises(msgspec.ValidationError):
        read_write(write_job(RefreshJob(cache="c", key="a", token="t")))
    with pytest.raises(msgspec.ValidationError):
        read_refresh(write_job(WriteJob(key="a", value=None)))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        write_job(WriteJob(key="a", value=b"1"))[:-1],
        write_job(WriteJob(key="a", value=b"1")) + b"\x00",
        msgspec.msgpack.encode({"type": "w", "key": 1, "value": b""}),
        msgspec.msgpack.encode({"type": "w", "key": "a", "value": 7}),
        b"\x83\xa4type\xa1w\xa3key\xa1\xff\xa5value\xc0",
        b"null",
    ],
    ids=lambda raw: raw[:12].hex() or "empty",
)
def test_what_is_no_job_is_refused_by_an_error_that_callers_know(raw: bytes) -> None:
    """Truncated, hostile or foreign: one of three errors, whatever the bytes."""
    with pytest.raises(UNDECODABLE):
        read_write(raw)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_job_or_a_known_error(raw: bytes) -> None:
    """Nothing else gets out."""
    for reader in (read_write, read_refresh):
        try:
            job = reader(raw)
        except UNDECODABLE:
            continue
        assert isinstance(job, WriteJob | RefreshJob)


def test_invalidates_is_true_when_there_is_something_to_do() -> None:
    """Keys or tags; neither is nothing."""
    assert not Invalidates()
    assert Invalidates(keys=("a",))
    assert Invalidates(tags=("t",))

"""From values to what is stored: lifetimes, and what is there already."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.cache.policy import Policy
from forebay.nodes.values.codec import ValueCodec
from forebay.nodes.values.packing import Packed, Packer
from forebay.schemas.entry import Entry, EntryMeta, read_entry
from forebay.schemas.errors import InvalidEntry

BYTES_MAX = 10_000
PLAIN = Policy(ttl_ms=60_000, stale_ms=5_000, error_ms=3_000, negative_ms=700)


def packer(policy: Policy = PLAIN, *, of: Any = Any, compress_over: int = 100) -> Packer[Any]:
    codec: ValueCodec[Any] = ValueCodec(of, bytes_max=BYTES_MAX, compress_over_bytes=compress_over)
    return Packer(policy, codec, random.Random(5))


def stored(packed: Packed, *, version: int = 9, state: bytes = b"c", pending: int = 0) -> Entry:
    """As a script would store it, and as it is read again."""
    numbers = f"{version:016}{1_000 + packed.soft_ms:013}{1_000 + packed.hard_ms:013}{pending:016}"
    return read_entry(b"\xfbE1" + state + numbers.encode() + packed.tail, bytes_max=BYTES_MAX)


def test_lifetimes_are_the_policy_s() -> None:
    """P1: what is kept for stale and for errors comes after the lifetime, in this order."""
    packed = packer().pack("value", {"t": 5}, etag="e1")
    assert (packed.soft_ms, packed.hard_ms) == (60_000, 68_000)
    meta = EntryMeta(tags={"t": 5}, etag="e1", soft_ms=60_000, stale_ms=5_000, error_ms=3_000)
    assert stored(packed).meta == packed.meta == meta


@pytest.mark.parametrize(
    ("asked", "soft_ms", "hard_ms", "stale_ms"),
    [
        ({"ttl_ms": 1_000}, 1_000, 9_000, 5_000),
        ({"stale_ms": 0}, 60_000, 68_000, 0),
        ({"stale_ms": 50}, 60_000, 68_000, 50),
        ({"ttl_ms": 1, "stale_ms": 0}, 1, 8_001, 0),
        ({"stale_ms": 7_000}, 60_000, 68_000, 7_000),
        ({"stale_ms": 9_000}, 60_000, 69_000, 9_000),
    ],
)
def test_a_loader_may_ask_for_other_lifetimes(asked, soft_ms, hard_ms, stale_ms) -> None:
    """P1: what is kept for errors ends when it did, counted from the end of ttl."""
    packed = packer().pack("value", {}, **asked)
    assert (packed.soft_ms, packed.hard_ms) == (soft_ms, hard_ms)
    assert (packed.meta.soft_ms, packed.meta.stale_ms) == (soft_ms, stale_ms)
    assert packed.meta.error_ms == hard_ms - soft_ms - stale_ms


@pytest.mark.parametrize(("negative_ms", "lifetime_ms"), [(700, 700), (0, 1)])
def test_a_known_absence_lives_for_its_own_time(negative_ms: int, lifetime_ms: int) -> None:
    """P1: neither stale nor for errors, but with its tags."""
    policy = Policy(ttl_ms=60_000, stale_ms=5_000, error_ms=3_000, negative_ms=negative_ms)
    packed = packer(policy).pack(None, {"t": 5})
    assert (packed.soft_ms, packed.hard_ms, packed.payload) == (lifetime_ms, lifetime_ms, None)
    entry = stored(packed)
    assert (entry.negative, entry.meta.tags, entry.meta.error_ms) == (True, {"t": 5}, 0)


@given(st.integers(1, 10**9), st.floats(0, 1), st.randoms())
def test_jitter_only_shortens_and_never_to_nothing(ttl_ms, jitter, rng) -> None:
    """P1: by at most its fraction; what was asked for is remembered as it was asked for."""
    codec: ValueCodec[Any] = ValueCodec(Any, bytes_max=BYTES_MAX, compress_over_bytes=100)
    policy = Policy(ttl_ms=60_000, stale_ms=20, error_ms=3, jitter=jitter)
    packed = Packer(policy, codec, rng).pack("value", {}, ttl_ms=ttl_ms)
    assert max(1, int(ttl_ms * (1 - jitter)) - 1) <= packed.soft_ms <= ttl_ms
    assert packed.hard_ms == packed.soft_ms + 23
    assert packed.meta.soft_ms == ttl_ms


def test_what_is_stored_together_does_not_end_together() -> None:
    """P1: over the whole of the fraction."""
    jittery = packer(Policy(ttl_ms=60_000, jitter=0.1))
    lifetimes = [jittery.pack("value", {}).soft_ms for _ in range(500)]
    assert 54_000 <= min(lifetimes) < 54_600
    assert 59_400 < max(lifetimes) <= 60_000
    assert len(set(lifetimes)) > 400


@pytest.mark.parametrize("value", [object(), "x" * (BYTES_MAX + 1), 1 << 80, {1j: 2}])
def test_what_cannot_be_stored_is_refused(value: Any) -> None:
    """Too large, or nothing that can be encoded."""
    with pytest.raises(InvalidEntry):
        packer().pack(value, {})


@pytest.mark.parametrize("compress_over", [10, 10_000])
def test_the_same_bytes_are_the_same(compress_over: int) -> None:
    """Compressed or not; lifetimes and etags do not matter, for these are extended."""
    value = {"a": ["b" * 50] * 10}
    before = packer(compress_over=compress_over)
    entry = stored(before.pack(value, {"t": 5}, ttl_ms=7, etag="e1"))
    assert entry.codec == ("z" if compress_over == 10 else "m")
    after = packer().pack(value, {"t": 6}, etag="e2")
    assert packer().same(after, entry)
    assert not packer().same(packer().pack({"a": []}, {"t": 6}), entry)


def test_a_value_under_more_tags_is_another() -> None:
    """Copies on nodes live on by the tags that they have; fewer of them do no harm."""
    made = packer()
    entry = stored(made.pack("value", {"t": 5, "u": 5}))
    assert made.same(made.pack("value", {"u": 6}), entry)
    assert made.same(made.pack("value", {"t": 6, "u": 6}), entry)
    assert not made.same(made.pack("value", {"t": 6, "new": 6}), entry)


def test_absences_older_forms_and_what_cannot_be_read_are_never_the_same() -> None:
    """They are stored in whole."""
    made = packer()
    packed, absent = made.pack("value", {}), made.pack(None, {})
    assert not made.same(packed, None)
    assert not made.same(absent, stored(absent))
    assert not made.same(packed, stored(absent))
    assert not made.same(absent, stored(packed))
    assert not made.same(packed, stored(packed, version=0))
    assert not made.same(packed, read_entry(b'"value"', bytes_max=99))
    damaged = Entry(9, 1, 2, "v", "z", b"no zlib", EntryMeta())
    assert not made.same(packed, damaged)


@pytest.mark.parametrize("compress_over", [10, 10_000])
def test_what_is_extended_keeps_its_payload_in_its_form(compress_over: int) -> None:
    """The part that is sent says how the old payload is to be read, and brings none."""
    value = "x" * 200
    entry = stored(packer(compress_over=compress_over).pack(value, {"t": 5}))
    packed = packer(compress_over=5_000).pack(value, {"t": 6}, etag="e2")
    middle = packed.middle(entry)
    numbers = f"{10:016}{1:013}{2:013}{0:016}".encode()
    again = read_entry(b"\xfbE1c" + numbers + middle + entry.payload, bytes_max=BYTES_MAX)
    assert (again.payload, again.codec, again.kind) == (entry.payload, entry.codec, "v")
    assert again.meta == packed.meta
    assert packer().same(packed, again)

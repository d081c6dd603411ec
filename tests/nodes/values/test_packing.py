"""Packing values into entries: lifetimes, and comparison with the stored entry."""

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
    """The entry as a script stores it and a node reads it."""
    numbers = f"{version:016}{1_000 + packed.soft_ms:013}{1_000 + packed.hard_ms:013}{pending:016}"
    return read_entry(b"\xfbE1" + state + numbers.encode() + packed.tail, bytes_max=BYTES_MAX)


def test_lifetimes_come_from_the_policy() -> None:
    """P1: the stale period follows the lifetime, and the error period follows the stale period."""
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
def test_a_loader_may_set_other_lifetimes(asked, soft_ms, hard_ms, stale_ms) -> None:
    """P1: the error period still ends at the same time after ttl."""
    packed = packer().pack("value", {}, **asked)
    assert (packed.soft_ms, packed.hard_ms) == (soft_ms, hard_ms)
    assert (packed.meta.soft_ms, packed.meta.stale_ms) == (soft_ms, stale_ms)
    assert packed.meta.error_ms == hard_ms - soft_ms - stale_ms


@pytest.mark.parametrize(("negative_ms", "lifetime_ms"), [(700, 700), (0, 1)])
def test_a_known_absence_lives_for_its_own_time(negative_ms: int, lifetime_ms: int) -> None:
    """P1: a negative entry has its own lifetime and its tags, and no stale or error period."""
    policy = Policy(ttl_ms=60_000, stale_ms=5_000, error_ms=3_000, negative_ms=negative_ms)
    packed = packer(policy).pack(None, {"t": 5})
    assert (packed.soft_ms, packed.hard_ms, packed.payload) == (lifetime_ms, lifetime_ms, None)
    entry = stored(packed)
    assert (entry.negative, entry.meta.tags, entry.meta.error_ms) == (True, {"t": 5}, 0)


@given(st.integers(1, 10**9), st.floats(0, 1), st.randoms())
def test_jitter_only_shortens_and_never_to_nothing(ttl_ms, jitter, rng) -> None:
    """P1: jitter shortens a lifetime by at most its fraction; the meta keeps the full lifetime."""
    codec: ValueCodec[Any] = ValueCodec(Any, bytes_max=BYTES_MAX, compress_over_bytes=100)
    policy = Policy(ttl_ms=60_000, stale_ms=20, error_ms=3, jitter=jitter)
    packed = Packer(policy, codec, rng).pack("value", {}, ttl_ms=ttl_ms)
    assert max(1, int(ttl_ms * (1 - jitter)) - 1) <= packed.soft_ms <= ttl_ms
    assert packed.hard_ms == packed.soft_ms + 23
    assert packed.meta.soft_ms == ttl_ms


def test_entries_stored_together_expire_apart() -> None:
    """P1: lifetimes spread over the whole fraction."""
    jittery = packer(Policy(ttl_ms=60_000, jitter=0.1))
    lifetimes = [jittery.pack("value", {}).soft_ms for _ in range(500)]
    assert 54_000 <= min(lifetimes) < 54_600
    assert 59_400 < max(lifetimes) <= 60_000
    assert len(set(lifetimes)) > 400


@pytest.mark.parametrize("value", [object(), "x" * (BYTES_MAX + 1), 1 << 80, {1j: 2}])
def test_a_value_that_cannot_be_stored_is_refused(value: Any) -> None:
    """An oversized value and one that cannot be encoded are refused."""
    with pytest.raises(InvalidEntry):
        packer().pack(value, {})


@pytest.mark.parametrize("compress_over", [10, 10_000])
def test_the_same_bytes_are_the_same(compress_over: int) -> None:
    """Equal payloads are the same, compressed or not, with any lifetimes and etags."""
    value = {"a": ["b" * 50] * 10}
    before = packer(compress_over=compress_over)
    entry = stored(before.pack(value, {"t": 5}, ttl_ms=7, etag="e1"))
    assert entry.codec == ("z" if compress_over == 10 else "m")
    after = packer().pack(value, {"t": 6}, etag="e2")
    assert packer().same(after, entry)
    assert not packer().same(packer().pack({"a": []}, {"t": 6}), entry)


def test_a_value_under_more_tags_is_another() -> None:
    """An additional tag makes it another value; a missing tag does not."""
    made = packer()
    entry = stored(made.pack("value", {"t": 5, "u": 5}))
    assert made.same(made.pack("value", {"u": 6}), entry)
    assert made.same(made.pack("value", {"t": 6, "u": 6}), entry)
    assert not made.same(made.pack("value", {"t": 6, "new": 6}), entry)


def test_absences_old_formats_and_unreadable_entries_are_never_the_same() -> None:
    """They are always stored in full."""
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
def test_an_extended_entry_keeps_its_stored_payload(compress_over: int) -> None:
    """The tail names the format of the stored payload and contains no payload."""
    value = "x" * 200
    entry = stored(packer(compress_over=compress_over).pack(value, {"t": 5}))
    packed = packer(compress_over=5_000).pack(value, {"t": 6}, etag="e2")
    middle = packed.middle(entry)
    numbers = f"{10:016}{1:013}{2:013}{0:016}".encode()
    again = read_entry(b"\xfbE1c" + numbers + middle + entry.payload, bytes_max=BYTES_MAX)
    assert (again.payload, again.codec, again.kind) == (entry.payload, entry.codec, "v")
    assert again.meta == packed.meta
    assert packer().same(packed, again)

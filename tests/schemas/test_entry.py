"""The envelope: what goes in comes out, and whatever else comes is refused as such."""

from __future__ import annotations

import pickle
import sys
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from forebay.schemas import entry as entry_module
from forebay.schemas.entry import (
    FOREVER_MS,
    MAGIC,
    Entry,
    EntryMeta,
    decompressed,
    make_tail,
    read_entry,
    version_of,
)
from forebay.schemas.errors import InvalidEntry

LIMIT = 10_000
HEADER = 66

versions = st.integers(0, 10**16 - 1)
times = st.integers(0, 10**13 - 1)
metas = st.builds(
    EntryMeta,
    tags=st.dictionaries(st.text(max_size=20), st.integers(0, 2**63), max_size=5),
    etag=st.text(max_size=20),
    soft_ms=st.integers(0, 10**12),
    stale_ms=st.integers(0, 10**12),
)


def envelope(
    tail: bytes,
    *,
    version: int = 7,
    soft_at_ms: int = 1_000,
    hard_at_ms: int = 2_000,
    pending: int = 0,
    state: bytes = b"c",
) -> bytes:
    """What a script puts before the tail."""
    numbers = b"%016d%013d%013d%016d" % (version, soft_at_ms, hard_at_ms, pending)
    return MAGIC + state + numbers + tail


def value_tail(payload: bytes, *, codec: str = "m", meta: EntryMeta | None = None) -> bytes:
    return make_tail(payload, kind="v", codec=codec, meta=meta or EntryMeta())  # type: ignore[arg-type]


def fault_of(raw: bytes, *, bytes_max: int = LIMIT) -> str:
    with pytest.raises(InvalidEntry) as caught:
        decompressed(read_entry(raw, bytes_max=bytes_max), bytes_max=bytes_max)
    return caught.value.fault


@given(
    st.binary(max_size=500),
    st.sampled_from("vn"),
    st.sampled_from("mz"),
    metas,
    versions,
    times,
    times,
    versions,
    st.booleans(),
)
def test_a_round_trip_loses_nothing(
    plain, kind, codec, meta, version, soft_at_ms, hard_at_ms, pending, doomed
) -> None:
    """Every field that goes in comes out, and the payload as it was before compression."""
    stored = zlib.compress(plain) if codec == "z" else plain
    tail = make_tail(stored, kind=kind, codec=codec, meta=meta)
    raw = envelope(
        tail,
        version=version,
        soft_at_ms=soft_at_ms,
        hard_at_ms=hard_at_ms,
        pending=pending,
        state=b"x" if doomed else b"c",
    )
    found = read_entry(raw, bytes_max=LIMIT)
    assert found == Entry(
        version=version,
        soft_at_ms=soft_at_ms,
        hard_at_ms=hard_at_ms,
        kind=kind,
        codec=codec,
        payload=stored,
        meta=meta,
        pending=pending,
        doomed=doomed,
    )
    assert found.negative == (kind == "n")
    assert decompressed(found, bytes_max=LIMIT) == plain
    assert version_of(raw) == version


@pytest.mark.parametrize("codec", ["z", "s"])
def test_a_compressed_entry_cut_anywhere_is_refused(codec: str) -> None:
    """I2: no prefix of it is an entry, and none raises anything else."""
    plain = b"some value, some value, some value" * 20
    packed = zlib.compress(plain) if codec == "z" else zstandard.compress(plain)
    raw = envelope(value_tail(packed, codec=codec, meta=EntryMeta(tags={"a": 1})))
    assert decompressed(read_entry(raw, bytes_max=LIMIT), bytes_max=LIMIT) == plain
    for length in range(len(raw)):
        assert fault_of(raw[:length]), length


def test_a_plain_entry_cut_before_its_payload_is_refused() -> None:
    """I2: header and meta are whole, or it is no entry."""
    whole = envelope(value_tail(b"", meta=EntryMeta(tags={"a": 1})))
    for length in range(len(whole)):
        assert fault_of(whole[:length]), length


@given(
    st.binary(max_size=300),
    st.sampled_from([
        b"", MAGIC, MAGIC + b"c", envelope(b"vz"), b"{", envelope(b"vs\0\0"),
        envelope(b"vs\0\0\x28\xb5\x2f\xfd"), envelope(b"vz\0\0\x78\x01"),
    ]),
)  # fmt: skip
def test_any_bytes_are_an_entry_or_refused(garbage: bytes, prefix: bytes) -> None:
    """I2: no other exception, neither on reading nor on decompressing."""
    with suppress(InvalidEntry):
        entry = read_entry(prefix + garbage, bytes_max=LIMIT)
        assert len(decompressed(entry, bytes_max=LIMIT)) <= LIMIT


def unsized(plain: bytes, *, window_log: int = 20) -> bytes:
    """A frame as streaming writers make it: its header does not say how long the content is."""
    writer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            window_log=window_log, write_content_size=False
        )
    ).compressobj()
    return writer.compress(plain) + writer.flush()


@given(
    st.binary(max_size=200),
    st.integers(0, 199),
    st.integers(0, 255),
    st.sampled_from([("z", zlib.compress), ("s", zstandard.compress), ("s", unsized)]),
)
def test_a_damaged_byte_is_an_entry_or_refused(payload: bytes, at: int, byte: int, by) -> None:
    """I2: also when only one byte of a good entry was changed."""
    codec, compress = by
    raw = bytearray(envelope(value_tail(compress(payload), codec=codec)))
    raw[at % len(raw)] = byte
    with suppress(InvalidEntry):
        assert len(decompressed(read_entry(bytes(raw), bytes_max=LIMIT), bytes_max=LIMIT)) <= LIMIT


class _Trap:
    sprung = False

    def __reduce__(self):
        return exec, ("_Trap.sprung = True",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_refused_unopened(protocol: int) -> None:
    """Another library's bytes are no entry, and nothing in them is run."""
    for thing in (_Trap(), {"a": 1}, [1, 2], "text", 1.5, None, 12):
        assert fault_of(pickle.dumps(thing, protocol=protocol)) in ("bad_magic", "too_short")
    assert not _Trap.sprung


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "too_short"),
        (b"\xfbE", "newer_format"),
        (b"\xfbE2" + b"0" * 100, "newer_format"),
        (b"\xfbF1" + b"0" * 100, "bad_magic"),
        (b"<html>" + b" " * 100, "bad_magic"),
        (MAGIC, "too_short"),
        (envelope(b"")[:-1], "too_short"),
        (envelope(value_tail(b"x"), state=b"q"), "bad_header"),
        (envelope(b"wm\0\0x"), "bad_header"),
        (envelope(b"vj\0\0x"), "bad_codec"),
        (envelope(b"v?\0\0x"), "bad_codec"),
        (envelope(b"vm\xff\xffx"), "too_short"),
        (envelope(b"vm\0\1\xc1"), "bad_header"),
        (envelope(b"vm\0\1\x90"), "bad_header"),
        (envelope(value_tail(b"x")).replace(b"000", b"00-", 1), "bad_header"),
        (envelope(value_tail(b"not zlib", codec="z")), "bad_value"),
        (envelope(value_tail(zlib.compress(b"x") + b"more", codec="z")), "bad_value"),
        (envelope(value_tail(b"not zstd", codec="s")), "bad_value"),
    ],
)
def test_what_is_wrong_is_said(raw: bytes, fault: str) -> None:
    """The fault is a label of the metric, so it has to be the right one."""
    assert fault_of(raw) == fault


@pytest.mark.parametrize("codec", ["z", "s"])
def test_a_bomb_is_not_unpacked(codec: str) -> None:
    """I1: the memory that decompression takes is bounded by the limit, not by the bomb."""
    plain = bytes(50_000_000)
    packed = zlib.compress(plain, 9) if codec == "z" else zstandard.compress(plain)
    raw = envelope(value_tail(packed, codec=codec))
    del plain
    tracemalloc.start()
    try:
        assert fault_of(raw, bytes_max=100_000) == "oversized"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("over", [0, 1])
def test_a_zstd_frame_need_not_say_its_size(over: int) -> None:
    """I1: it is read up to the limit, and not a byte further."""
    plain = bytes(index * 7 % 251 for index in range(1_000 + over))
    raw = envelope(value_tail(unsized(plain), codec="s"))
    if over:
        assert fault_of(raw, bytes_max=1_000) == "oversized"
    else:
        assert decompressed(read_entry(raw, bytes_max=1_000), bytes_max=1_000) == plain


def test_a_zstd_frame_without_a_size_cut_anywhere_is_refused() -> None:
    """I2: what was decompressed so far is not taken for all of it."""
    packed = unsized(b"some value, some other value" * 50)
    for length in range(len(packed)):
        assert fault_of(envelope(value_tail(packed[:length], codec="s"))) == "bad_value", length


def test_a_bomb_that_does_not_say_its_size_is_not_unpacked() -> None:
    """I1: nor does the window that it asks for take more than the limit allows."""
    assert fault_of(envelope(value_tail(unsized(bytes(30_000_000)), codec="s"))) == "oversized"
    wide = unsized(bytes(200_000_000), window_log=27)
    assert fault_of(envelope(value_tail(wide, codec="s"))) == "bad_value"


@pytest.mark.parametrize(
    "packed",
    [
        zstandard.compress(b"one") + zstandard.compress(b"two"),
        unsized(b"one") + unsized(b"two"),
        zstandard.compress(b"one") + b"more",
        b"\x50\x2a\x4d\x18\x05\0\0\0hello",
        b"\x50\x2a\x4d\x18\x05\0\0\0hello" + zstandard.compress(b"one"),
        b"\x28\xb5\x2f\xfd",
        b"",
    ],
)
def test_zstd_is_one_frame(packed: bytes) -> None:
    """I2: nothing before it, nothing after it."""
    assert fault_of(envelope(value_tail(packed, codec="s"))) == "bad_value"


@pytest.mark.parametrize("packed", [zlib.compress(b"one") + zlib.compress(b"two"), b""])
def test_zlib_is_one_stream(packed: bytes) -> None:
    """I2: as with zstd."""
    assert fault_of(envelope(value_tail(packed, codec="z"))) == "bad_value"


@pytest.mark.parametrize("over", [1, 100, 10_000])
def test_zlib_just_over_the_limit_is_oversized(over: int) -> None:
    """I1: also when all input was taken and only output is left."""
    raw = envelope(value_tail(zlib.compress(bytes(1_000 + over)), codec="z"))
    assert fault_of(raw, bytes_max=1_000) == "oversized"


def test_zstd_is_read_by_several_threads() -> None:
    """Each has a context of its own: they are not safe to share."""
    plain = bytes(index * 7 % 251 for index in range(9_000))
    raw = envelope(value_tail(zstandard.compress(plain), codec="s"))

    def read(_: int) -> bytes:
        return decompressed(read_entry(raw, bytes_max=LIMIT), bytes_max=LIMIT)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(200))) == {plain}


def test_without_zstandard_its_entries_are_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """I2: the counter tells what is missing, and the others are read."""
    packed = zstandard.compress(b"one")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    entry_module._zstd.cache_clear()
    assert fault_of(envelope(value_tail(packed, codec="s"))) == "bad_codec"


@pytest.mark.parametrize("codec", ["m", "z", "s"])
@pytest.mark.parametrize("over", [0, 1])
def test_the_limit_is_exact(codec: str, over: int) -> None:
    """I1: a value of just the size allowed is read, one byte more is refused."""
    plain = bytes(index * 7 % 251 for index in range(1_000 + over))
    packed = {"m": plain, "z": zlib.compress(plain), "s": zstandard.compress(plain)}[codec]
    raw = envelope(value_tail(packed, codec=codec))
    if over:
        assert fault_of(raw, bytes_max=1_000) == "oversized"
    else:
        assert decompressed(read_entry(raw, bytes_max=1_000), bytes_max=1_000) == plain


def test_raw_bytes_over_the_limit_are_not_looked_at() -> None:
    """I1: whatever they are."""
    assert fault_of(b"{" * (LIMIT + HEADER + 0xFFFF + 1)) == "oversized"


def test_too_many_tags_are_refused_when_written() -> None:
    """The length of the meta part has two bytes."""
    meta = EntryMeta(tags={f"tag-{n}": n for n in range(10_000)})
    with pytest.raises(InvalidEntry, match="oversized"):
        value_tail(b"", meta=meta)


@pytest.mark.parametrize(
    "raw", [b'{"a": 1}', b"[1]", b'"text"', b"12", b"-1.5", b"true", b"null", b" {}", b"\n1"]
)
def test_bare_json_is_an_entry_of_version_0(raw: bytes) -> None:
    """I3: it is fresh for good, and whatever is written next replaces it."""
    entry = read_entry(raw, bytes_max=LIMIT)
    assert (entry.version, entry.codec, entry.payload) == (0, "j", raw)
    assert (entry.soft_at_ms, entry.hard_at_ms, entry.negative) == (FOREVER_MS, FOREVER_MS, False)
    assert version_of(raw) == 0


def test_a_wrapped_value_says_when_it_gets_stale() -> None:
    """I3: ``stale_at`` is in seconds; further fields are passed over."""
    raw = b'{"stale_at": 1700000000.25, "value": {"a": [1, 2]}, "who": "me"}'
    entry = read_entry(raw, bytes_max=LIMIT)
    assert (entry.soft_at_ms, entry.payload) == (1_700_000_000_250, b'{"a": [1, 2]}')
    assert entry.hard_at_ms == FOREVER_MS


@pytest.mark.parametrize(
    "raw",
    [
        b'{"value": 1}',
        b'{"stale_at": 1}',
        b'{"value": 1, "stale_at": "soon"}',
        b'{"value": 1, "stale_at": 1e999}',
        b'{"value": 1, "stale_at": null}',
        b"{" * 500,
        b'{"a":' * 5_000,
    ],
)
def test_what_is_not_quite_a_wrapped_value_is_bare_json(raw: bytes) -> None:
    """I3: the cache that knows the type decides whether it can be read."""
    entry = read_entry(raw, bytes_max=LIMIT * 10)
    assert (entry.payload, entry.soft_at_ms) == (raw, FOREVER_MS)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), st.lists))
def test_wrapped_values_come_out_as_they_are(value) -> None:
    """I3: for any JSON value."""
    raw = msgspec.json.encode({"value": value, "stale_at": 5})
    entry = read_entry(raw, bytes_max=1_000_000)
    assert msgspec.json.decode(entry.payload) == value
    assert entry.soft_at_ms == 5_000


@given(st.binary(max_size=100))
def test_the_version_of_any_bytes_is_a_number(garbage: bytes) -> None:
    """Also of those that cannot be read; they are never newer than they say."""
    assert version_of(garbage) == 0 or garbage.startswith(MAGIC)
    assert version_of(MAGIC + b"c" + garbage) >= 0

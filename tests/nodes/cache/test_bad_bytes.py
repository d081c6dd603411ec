"""Bytes that are no entry, for every kind of codec: a value of the type or InvalidEntry."""

from __future__ import annotations

import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_origin

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from pydantic import BaseModel

from forebay.nodes.values.codec import PackedCodec, ValueCodec
from forebay.schemas.entry import EntryMeta, read_entry
from forebay.schemas.errors import InvalidEntry

LIMIT = 10_000
HEADER = b"\xfbE1c" + b"%016d%013d%013d%016d" % (7, 1, 2, 0)


class Product(Struct):
    id: int
    names: list[str]


@dataclass
class Row:
    id: int
    names: list[str]


class Model(BaseModel):
    id: int
    names: list[str]


SAMPLES: dict[Any, Any] = {
    Product: Product(1, ["name"] * 100),
    Row: Row(1, ["name"] * 100),
    Model: Model(id=1, names=["name"] * 100),
    list[Model]: [Model(id=1, names=["name"] * 100)],
    dict[str, list[int]]: {"a": [1] * 200},
    Any: {"id": 1, "names": ["name"] * 100},
}
types = pytest.mark.parametrize("of", SAMPLES, ids=str)
kinds = pytest.mark.parametrize("kind", [ValueCodec, PackedCodec])
compressions = pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])


def codec_of(of: Any, kind: Any = ValueCodec, compression: Any = "none") -> Any:
    return kind(of, bytes_max=LIMIT, compress_over_bytes=100, compression=compression)


def envelope(of: Any, compression: str = "none") -> bytes:
    codec = codec_of(of, compression=compression)
    return HEADER + codec.tail(codec.pack(SAMPLES[of]), EntryMeta(tags={"a": 1}))


def value_of(codec: Any, raw: bytes) -> Any:
    return codec.value(read_entry(raw, bytes_max=LIMIT))


def is_value_or_refused(codec: Any, raw: bytes, of: Any) -> bool:
    try:
        found = value_of(codec, raw)
    except InvalidEntry:
        return True
    if isinstance(codec, PackedCodec) and found is not None:
        found = codec.own(found)
    return found is None or of is Any or isinstance(found, get_origin(of) or of)


def fault_of(codec: Any, raw: bytes) -> str:
    with pytest.raises(InvalidEntry) as caught:
        value_of(codec, raw)
    return caught.value.fault


def peak_of(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@types
@kinds
@compressions
def test_an_entry_cut_anywhere_is_refused(of, kind, compression) -> None:
    """V1: in the header, the meta part or the value; whole, it is read."""
    codec, raw = codec_of(of, kind), envelope(of, compression)
    found = value_of(codec, raw)
    assert (codec.own(found) if kind is PackedCodec else found) == SAMPLES[of]
    for length in range(len(raw)):
        assert fault_of(codec, raw[:length]) in ("too_short", "bad_value", "newer_format"), length


@types
@kinds
@compressions
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_byte_is_a_value_or_refused(of, kind, compression, at, byte) -> None:
    """V1: and what is handed out packed can be decoded by its caller."""
    raw = bytearray(envelope(of, compression))
    raw[at % len(raw)] = byte
    codec = codec_of(of, kind)
    assert is_value_or_refused(codec, bytes(raw), of)


@types
@kinds
@given(st.binary(max_size=300), st.sampled_from([b"", b"{", HEADER, *(
    HEADER + b"v%c\0\0" % letter + magic
    for letter, magic in [(109, b""), (122, b""), (122, b"\x78\x01"), (115, b"\x28\xb5\x2f\xfd")]
)]))  # fmt: skip
def test_any_bytes_are_a_value_or_refused(of, kind, garbage: bytes, prefix: bytes) -> None:
    """V1: no other exception, for no type."""
    assert is_value_or_refused(codec_of(of, kind), prefix + garbage, of)


@types
@kinds
@pytest.mark.parametrize(
    ("raw", "faults"),
    [
        (b"", "too_short"),
        (b"\xfbE2" + b"0" * 100, "newer_format"),
        (b"\x80\x04" + b"x" * 100, "bad_magic"),
        (pickle.dumps({"id": 1, "names": ["a" * 100]}), "bad_magic"),
        (HEADER + b"vm\0\0" + pickle.dumps({"id": 1}), "bad_value"),
        (HEADER + b"vm\0\0" + b"\x91" * 9_000, "bad_value"),
        (HEADER + b"vm\0\0" + b"\x81\xa1a" * 3_000, "bad_value"),
        (b"[" * 9_000, "bad_value"),
        (b'{"a":' * 1_800, "bad_value"),
        (HEADER + b"vm\0\0" + b"\xdd\xff\xff\xff\xff", "bad_value"),
        (HEADER + b"vm\0\0" + b"\xdf\xff\xff\xff\xff\xa1a", "bad_value"),
        (HEADER + b"vm\0\0" + b"\xc6\xff\xff\xff\xff", "bad_value"),
        (HEADER + b"vm\0\0" + bytes(LIMIT + 1), "oversized"),
        (bytes(LIMIT * 20), "oversized"),
        (HEADER + b"vz\0\0" + zlib.compress(bytes(5_000_000)), "oversized"),
        (HEADER + b"vs\0\0" + zstandard.compress(bytes(5_000_000)), "oversized"),
    ],
    ids=range(16),
)
def test_what_is_wrong_is_said_in_little_memory(of, kind, raw: bytes, faults: str) -> None:
    """V1: lengths that are announced are not believed, and bombs are not unpacked."""
    codec, said = codec_of(of, kind), []
    assert peak_of(lambda: said.append(fault_of(codec, raw))) < 1_000_000
    assert said == [faults]


@types
def test_negative_entries_have_no_value_in_any_type(of) -> None:
    """None, packed or not."""
    raw = HEADER + ValueCodec.negative_tail(EntryMeta())
    assert value_of(codec_of(of), raw) is value_of(codec_of(of, PackedCodec), raw) is None


def test_the_fuzzed_value_is_read_when_nothing_is_wrong_with_it() -> None:
    """Otherwise all of the above would pass for a codec that refuses everything."""
    raw = HEADER + b"vm\0\0" + msgspec.msgpack.encode({"id": 1, "names": []})
    assert value_of(codec_of(Model), raw) == Model(id=1, names=[])
    assert value_of(codec_of(Product), raw) == Product(1, [])

"""The value codec: stored values are decoded to the same value, and invalid bytes are refused."""

from __future__ import annotations

import pickle
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from forebay.nodes.values.codec import PackedCodec, ValueCodec
from forebay.schemas.entry import Entry, EntryMeta, read_entry
from forebay.schemas.errors import InvalidEntry

LIMIT = 4_000
HEADER = b"\xfbE1c" + b"%016d%013d%013d%016d" % (7, 1, 2, 0)


class Product(Struct, frozen=True):
    id: int
    name: str
    price: Decimal
    tags: list[str] = []
    seen: datetime | None = None


class Odd(Struct):
    number: int

    def __post_init__(self) -> None:
        if self.number == 13:
            raise KeyError("not this one")


products = st.builds(
    Product,
    id=st.integers(-(2**63), 2**63 - 1),
    name=st.text(max_size=50),
    price=st.decimals(allow_nan=False, allow_infinity=False, places=2, max_value=10**9),
    tags=st.lists(st.text(max_size=10), max_size=5),
    seen=st.none() | st.datetimes(timezones=st.just(UTC)),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=30)
    | st.floats(allow_nan=False) | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)  # fmt: skip


def codec_of(of: Any, *, compress_over_bytes: int = 200) -> ValueCodec[Any]:
    return ValueCodec(of, bytes_max=LIMIT, compress_over_bytes=compress_over_bytes)


def stored(codec: ValueCodec[Any], value: Any) -> Entry:
    return read_entry(HEADER + codec.tail(codec.pack(value), EntryMeta()), bytes_max=LIMIT)


def fault_of(codec: ValueCodec[Any], payload: bytes, *, kind: str = "m") -> str:
    entry = Entry(
        version=1, soft_at_ms=1, hard_at_ms=2, kind="v", codec=kind, payload=payload,
        meta=EntryMeta(),
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(InvalidEntry) as caught:
        codec.value(entry)
    return caught.value.fault


@given(products, st.sampled_from([0, 20, 10**6]))
def test_a_value_of_the_declared_type_round_trips(product, compress_over_bytes) -> None:
    """V1: a value is decoded equal, with and without compression."""
    codec = codec_of(Product, compress_over_bytes=compress_over_bytes)
    assert codec.value(stored(codec, product)) == product
    assert codec.unpack(codec.pack(product)) == product


@given(plain)
def test_without_a_type_plain_values_round_trip(value) -> None:
    """V1: plain values of a loader without a return annotation are decoded equal."""
    codec = codec_of(Any)
    assert codec.value(stored(codec, value)) == value


def test_compression_is_used_where_it_pays() -> None:
    """A payload is compressed only above the threshold and only if it becomes smaller."""
    codec = codec_of(Any, compress_over_bytes=100)
    assert stored(codec, "a" * 50).codec == "m"
    assert stored(codec, "a" * 500).codec == "z"
    assert len(stored(codec, "a" * 500).payload) < 50
    noise = bytes((number * 2_654_435_761 >> 13) & 255 for number in range(300))
    assert codec.value(stored(codec, noise)) == noise


def test_a_negative_entry_has_no_value() -> None:
    """A negative entry is decoded to None for every declared type."""
    tail = ValueCodec.negative_tail(EntryMeta(tags={"a": 1}))
    entry = read_entry(HEADER + tail, bytes_max=LIMIT)
    assert entry.negative
    assert codec_of(int).value(entry) is None


@given(st.binary(max_size=200), st.sampled_from("mzj"))
def test_any_bytes_are_a_value_of_the_type_or_refused(payload: bytes, kind) -> None:
    """V1: decoding any bytes gives a value of the type or raises InvalidEntry."""
    codec = codec_of(Product)
    entry = Entry(
        version=1, soft_at_ms=1, hard_at_ms=2, kind="v", codec=kind, payload=payload,
        meta=EntryMeta(),
    )  # fmt: skip
    with suppress(InvalidEntry):
        assert isinstance(codec.value(entry), Product)


@given(products)
def test_a_value_cut_anywhere_is_refused(product) -> None:
    """V1: a truncated payload is refused at every length."""
    payload = codec_of(Product).pack(product)
    for length in range(len(payload)):
        assert fault_of(codec_of(Product), payload[:length]) == "bad_value"


@pytest.mark.parametrize(
    ("of", "payload", "kind"),
    [
        (Product, msgspec.msgpack.encode({"id": 1}), "m"),
        (Product, msgspec.msgpack.encode({"id": "1", "name": "a", "price": "1"}), "m"),
        (int, msgspec.msgpack.encode("text"), "m"),
        (int, b"12 ", "m"),
        (int, b'"text"', "j"),
        (int, b"{", "j"),
        (int, b"", "j"),
        (Odd, msgspec.msgpack.encode({"number": 13}), "m"),
        (Odd, b'{"number": 13}', "j"),
        (Any, b"\x91" * 5_0, "m"),
        (Any, b"\x91" * 3_000, "m"),
        (Any, b"[" * 3_000, "j"),
        (Any, pickle.dumps({"a": 1}), "m"),
        (int, b"\xff" * 5_000, "m"),
    ],
)
def test_bytes_of_another_value_are_refused(of, payload: bytes, kind: str) -> None:
    """V1: another type, deep nesting, oversized data and values refused by the type raise
    InvalidEntry.
    """
    assert fault_of(codec_of(of), payload, kind=kind) in ("bad_value", "oversized")


@pytest.mark.parametrize("over", [0, 1])
def test_the_limit_counts_before_compression(over: int) -> None:
    """V2: a value over the limit is refused when it is encoded; one at the limit can be read."""
    codec = codec_of(bytes)
    value = bytes(LIMIT - 3 + over)  # msgpack says the length in three bytes
    if over:
        with pytest.raises(InvalidEntry, match="oversized"):
            codec.pack(value)
    else:
        assert codec.value(stored(codec, value)) == value


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", {(1, 2): lambda: 0}])
def test_a_value_that_cannot_be_encoded_is_refused(value) -> None:
    """V1: every reason raises the same error class."""
    with pytest.raises(InvalidEntry, match="bad_value"):
        codec_of(Any).pack(value)


def test_published_json_is_checked_against_the_type() -> None:
    """A published value of another type raises an error that describes the problem."""
    codec = codec_of(Product)
    raw = b'{"id": 1, "name": "a", "price": "1.50"}'
    assert codec.from_json(raw) == Product(1, "a", Decimal("1.50"))
    with pytest.raises(msgspec.ValidationError, match="id"):
        codec.from_json(b'{"id": "x", "name": "a", "price": "1"}')


class Basket(Struct):
    items: list[str]


def packed_codec(of: Any) -> PackedCodec[Any]:
    return PackedCodec(of, bytes_max=LIMIT, compress_over_bytes=200)


def test_each_caller_has_a_value_of_its_own() -> None:
    """V5: a change by one caller is invisible to the next."""
    codec = packed_codec(Basket)
    payload = codec.encode(Basket(["a"])).payload
    first = codec.own(payload)
    first.items.append("b")
    assert codec.own(payload) == Basket(["a"])


@given(products, st.sampled_from([0, 10**6]))
def test_packed_values_are_stored_as_all_others(product, compress_over_bytes) -> None:
    """V5: the stored bytes do not depend on whether the cache is mutable."""
    mutable = PackedCodec[Any](Product, bytes_max=LIMIT, compress_over_bytes=compress_over_bytes)
    shared = codec_of(Product, compress_over_bytes=compress_over_bytes)
    payload = mutable.encode(product).payload
    assert payload == mutable.pack(payload) == shared.pack(product)
    assert mutable.own(mutable.value(stored(shared, product)) or b"") == product
    assert shared.value(stored(mutable, payload)) == product


def test_packed_published_values_are_converted() -> None:
    """V5: published JSON, also in old entries, is converted under the type and the limit of the
    cache.
    """
    codec = packed_codec(Basket)
    payload = codec.from_json(b'{"items": ["a"]}')
    assert codec.own(payload) == Basket(["a"])
    old = read_entry(b'{"items": ["a"]}', bytes_max=LIMIT)
    assert codec.value(old) == payload
    with pytest.raises(msgspec.ValidationError, match="items"):
        codec.from_json(b'{"items": 1}')
    long = packed_codec(list[float])  # "1," is nine bytes of msgpack
    with pytest.raises(InvalidEntry, match="oversized"):
        long.value(read_entry(b"[" + b"1," * 1_000 + b"1]", bytes_max=LIMIT))


def test_packed_values_are_checked() -> None:
    """V3, V5: a value that cannot be decoded is refused before a caller gets it."""
    wrong: Any = Basket([1])  # type: ignore[list-item]
    for value in (Product(1, "a", Decimal(1)), wrong):
        with pytest.raises(InvalidEntry, match="wrong_type: declared Basket"):
            packed_codec(Basket).encode(value)


def test_a_packed_value_that_is_too_large_is_still_returned() -> None:
    """V2: callers get an oversized value, which is only refused for storage."""
    codec = packed_codec(Basket)
    payload = codec.encode(Basket(["a" * LIMIT])).payload
    assert codec.own(payload) == Basket(["a" * LIMIT])
    with pytest.raises(InvalidEntry, match="oversized"):
        codec.pack(payload)


@pytest.mark.parametrize("kind", [ValueCodec, PackedCodec])
def test_the_size_of_a_value_is_that_before_compression(kind) -> None:
    """The size of a decoded value is that of its payload before compression."""
    codec = codec_of(Any, compress_over_bytes=0)
    entry = stored(codec, "a" * 500)
    assert len(entry.payload) < 100
    measured = kind(Any, bytes_max=LIMIT, compress_over_bytes=0).value_and_size(entry)
    assert measured[1] == len(codec.pack("a" * 500))


def test_packed_bytes_are_decoded_before_they_are_returned() -> None:
    """V1: invalid bytes are refused before ``own`` decodes them for a caller."""
    with pytest.raises(InvalidEntry, match="bad_value"):
        packed_codec(Basket).unpack(msgspec.msgpack.encode({"items": 1}))
    assert packed_codec(Basket).value(stored(codec_of(Any), {"items": []})) == b"\x81\xa5items\x90"

"""Pydantic models as values: they round-trip, or are refused when the cache is declared."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from pydantic import (
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
)
from typing_extensions import TypedDict

from forebay.nodes.values.codec import PackedCodec, ValueCodec
from forebay.nodes.values.pydantic_form import has_pydantic
from forebay.schemas.entry import Entry, EntryMeta, read_entry
from forebay.schemas.errors import ConfigError, InvalidEntry

LIMIT = 20_000
HEADER = b"\xfbE1c" + b"%016d%013d%013d%016d" % (7, 1, 2, 0)
T = TypeVar("T")


class Price(BaseModel):
    amount: Decimal
    currency: str = Field(pattern="^[A-Z]{3}$")


class Product(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: int
    name: str
    price: Price | None = None
    tags: frozenset[str] = frozenset()
    seen: datetime | None = None
    weight: float = 0.0


class Renamed(BaseModel):
    kind: Literal["renamed"] = Field("renamed", alias="Kind")
    user_name: str = Field(validation_alias="userName", serialization_alias="user")


class Other(BaseModel):
    kind: Literal["other"] = Field("other", alias="Kind")
    size: int


class Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )

    raw: bytes
    at: datetime
    pair: tuple[int, float]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def doubled(self) -> bytes:
        return self.raw * 2


class Box(BaseModel, Generic[T]):
    inner: T


class Numbers(RootModel[list[int]]):
    pass


class Node(BaseModel):
    children: list[Node] = []


@dataclass
class Row:
    product: Product
    count: int


@pydantic.dataclasses.dataclass
class Checked:
    count: int = Field(gt=0)


class Pair(NamedTuple):
    left: Product
    right: int


class Options(TypedDict):
    product: Product


class Bursting(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def not_thirteen(cls, number: int) -> int:
        if number == 13:
            raise KeyError("not this one")
        return number


def codec_of(of: Any, *, kind: type[ValueCodec[Any]] = ValueCodec) -> Any:
    return kind(of, bytes_max=LIMIT, compress_over_bytes=200)


def round_trip(of: Any, value: Any) -> Any:
    codec = codec_of(of)
    tail = codec.tail(codec.pack(value), EntryMeta())
    return codec.value(read_entry(HEADER + tail, bytes_max=LIMIT))


def entry_of(payload: bytes, codec: Literal["m", "j"] = "m") -> Entry:
    return Entry(
        version=1, soft_at_ms=1, hard_at_ms=2, kind="v", codec=codec, payload=payload,
        meta=EntryMeta(),
    )  # fmt: skip


prices = st.builds(
    Price,
    amount=st.decimals(allow_nan=False, allow_infinity=False, places=2, max_value=10**9),
    currency=st.sampled_from(["EUR", "USD"]),
)
products = st.builds(
    Product,
    id=st.integers(-(2**63), 2**63 - 1),
    name=st.text(max_size=50),
    price=st.none() | prices,
    tags=st.frozensets(st.text(max_size=10), max_size=5),
    seen=st.none() | st.datetimes(timezones=st.just(UTC)),
    weight=st.floats(allow_nan=False),
)


@given(products)
def test_a_model_round_trips(product) -> None:
    """V1: nested models keep their types."""
    assert round_trip(Product, product) == product


@given(st.lists(products, max_size=4))
def test_models_anywhere_in_the_type_round_trip(some) -> None:
    """V1: models in lists, in dicts and next to None are decoded."""
    first = some[0] if some else None
    assert round_trip(list[Product], some) == some
    assert round_trip(dict[str, Product], {each.name: each for each in some}) == {
        each.name: each for each in some
    }
    if first is not None:
        assert round_trip(Product | None, first) == first
        assert round_trip(tuple[Product, int], (first, 1)) == (first, 1)


AT = datetime(2026, 1, 2, tzinfo=UTC)
PRODUCT = Product(id=1, name="a", tags=frozenset({"x"}), seen=AT)


@pytest.mark.parametrize(
    ("of", "value"),
    [
        (Strict, Strict(raw=b"\xff\0", at=AT, pair=(1, 2.0))),
        (Renamed, Renamed(userName="a")),
        (
            list[Annotated[Renamed | Other, Field(discriminator="kind")]],
            [Renamed(userName="a"), Other(size=1)],
        ),
        (Box[Product], Box[Product](inner=PRODUCT)),
        (Box[list[int]] | None, Box[list[int]](inner=[1])),
        (Numbers, Numbers([1, 2])),
        (Node, Node(children=[Node(), Node(children=[Node()])])),
        (Row, Row(PRODUCT, 2)),
        (list[Row], [Row(PRODUCT, 2)]),
        (Checked, Checked(1)),
        (Pair, Pair(PRODUCT, 1)),
        (Options, {"product": PRODUCT}),
        (list[AnyUrl], [AnyUrl("https://example.org/a")]),
        (Product, Product(id=1, name="", weight=math.inf)),
    ],
)
def test_pydantic_features_round_trip(of: Any, value: Any) -> None:
    """V1: aliases, strict mode, bytes, computed fields, generics, dataclasses and inf are kept."""
    assert round_trip(of, value) == value


def test_not_a_number_round_trips() -> None:
    """NaN is decoded as NaN, although JSON cannot represent it."""
    assert math.isnan(round_trip(Product, Product(id=1, name="", weight=math.nan)).weight)


class Mixed(Struct):
    product: Product


class Plain(Struct):
    id: int


class Account(BaseModel):
    password: SecretStr


class Partial(BaseModel):
    shown: int
    hidden: int = Field(1, exclude=True)


class Holder(BaseModel):
    partial: list[Partial]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (Mixed, "Mixed is a msgspec Struct"),
        (list[Plain | Product], "Plain is a msgspec Struct"),
        (Account, "SecretStr is masked"),
        (dict[str, Account] | None, "SecretStr is masked"),
        (list[SecretStr], "SecretStr is masked"),
        (Partial, "Partial.hidden is excluded"),
        (Holder, "Partial.hidden is excluded"),
    ],
)
def test_a_lossy_type_is_refused_when_declared(of: Any, message: str) -> None:
    """P2: a type whose values would differ at the second read raises ConfigError."""
    with pytest.raises(ConfigError, match=message):
        codec_of(of)


def test_an_old_pydantic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old versions validate by alias only."""
    monkeypatch.setattr(pydantic, "VERSION", "2.10.6")
    with pytest.raises(ConfigError, match=r"pydantic 2\.10\.6 is too old"):
        codec_of(Product)


class OneWay(BaseModel):
    number: int

    @field_serializer("number")
    def in_words(self, number: int) -> str:
        return f"number {number}"


@pytest.mark.parametrize(
    ("of", "value"),
    [
        (OneWay, OneWay(number=1)),
        (Product, Product.model_construct(id="hush", name="a")),
        (list[Product], [{"id": "hush"}]),
        (dict[str, Product], {"a": Price(amount=Decimal(1), currency="EUR")}),
        (Box[Any], Box[Any](inner=object())),
        (Box[int], Box[int](inner=2**70)),
        (Bursting, Bursting.model_construct(number=13)),
    ],
)
def test_a_lossy_value_is_refused_when_encoded(of: Any, value: Any) -> None:
    """P3, P4: the caller of the load gets an error that does not show the value."""
    with pytest.raises(InvalidEntry, match="bad_value") as caught:
        codec_of(of).pack(value)
    assert "hush" not in str(caught.value)


def test_a_large_model_is_refused_when_encoded() -> None:
    """V2: the size limit applies to models."""
    with pytest.raises(InvalidEntry, match="oversized"):
        codec_of(Product).pack(Product(id=1, name="a" * LIMIT))


def test_published_json_uses_the_aliases() -> None:
    """P4: a published value is validated by alias, and the error does not show it."""
    codec = codec_of(Renamed)
    assert codec.from_json(b'{"userName": "a"}') == Renamed(userName="a")
    assert codec.value(entry_of(b'{"userName": "a"}', "j")) == Renamed(userName="a")
    with pytest.raises(msgspec.ValidationError, match=r"at `\$\.userName`"):
        codec.from_json(b'{"user_name": "a"}')
    with pytest.raises(msgspec.ValidationError, match=r"at `\$\[0\]\.id`") as caught:
        codec_of(list[Product]).from_json(b'[{"id": "hush", "name": "a"}]')
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("kind", [ValueCodec, PackedCodec])
@pytest.mark.parametrize(
    ("of", "payload", "codec"),
    [
        (Product, msgspec.msgpack.encode({"id": 1}), "m"),
        (Product, msgspec.msgpack.encode([1, "a"]), "m"),
        (Product, msgspec.msgpack.encode({"id": b"\xff", "name": "a"}), "m"),
        (Product, msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"")), "m"),
        (Product, b"\x91" * 5_000, "m"),
        (Node, b"\x81\xa8children\x91" * 900, "m"),
        (Box[Any], b"\x81\xa5inner" + b"\x91" * 900 + b"\1", "m"),
        (Node, b'{"children": [' * 1_000, "j"),
        (Box[Any], b'{"inner": ' + b"[" * 5_000, "j"),
        (Bursting, msgspec.msgpack.encode({"number": 13}), "m"),
        (Bursting, b'{"number": 13}', "j"),
        (Product, b"", "m"),
        (Product, b"\xff", "j"),
    ],
)
def test_bytes_of_another_value_are_refused(kind, of, payload: bytes, codec) -> None:
    """V1: errors of pydantic, of the JSON step and of the type raise InvalidEntry."""
    with pytest.raises(InvalidEntry, match="bad_value"):
        codec_of(of, kind=kind).value(entry_of(payload, codec))


def test_types_without_pydantic_do_not_go_through_it() -> None:
    """P1: a type without a model is decoded by msgspec, also after pydantic was imported."""
    assert not has_pydantic(list[Plain])
    assert not has_pydantic(Any)
    assert has_pydantic(list[Product])


ALONE = """
import dataclasses, sys
from forebay import Node
from forebay.nodes.values.codec import ValueCodec

@dataclasses.dataclass
class Lookalike:
    id: int
    __get_pydantic_core_schema__ = None

for of in (int, list[dict[str, int]], Lookalike):
    ValueCodec(of, bytes_max=1000, compress_over_bytes=100)
assert not [name for name in sys.modules if name.startswith("pydantic")]
"""


def test_pydantic_is_not_imported_without_models() -> None:
    """P1: an application without pydantic does not import it."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

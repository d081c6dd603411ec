"""Inspection of declared types: which values fit, and which types are refused."""

from __future__ import annotations

import asyncio
import enum
import types
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    Protocol,
    TypedDict,
    TypeVar,
)
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct
from pydantic import AnyUrl, BaseModel, EmailStr
from typing_extensions import TypeAliasType
from typing_extensions import TypedDict as BackportedTypedDict

from forebay.nodes.values.codec import ValueCodec
from forebay.nodes.values.introspection import classes_of, fits, name_of, types_in
from forebay.schemas.errors import ConfigError, InvalidEntry

T = TypeVar("T")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Product(Struct):
    id: int


class Fancy(Product):
    extra: str = ""


class Box(Struct, Generic[T]):
    inner: T


@dataclass
class Row:
    id: int


class Point(NamedTuple):
    x: int


class Options(TypedDict):
    colour: str


class Backported(BackportedTypedDict):
    colour: str


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Readable(Protocol):
    def read(self) -> bytes: ...


class Model(BaseModel):
    product: int


UserId = NewType("UserId", int)
Alias = TypeAliasType("Alias", list[int] | int)


def codec_of(of: Any) -> ValueCodec[Any]:
    return ValueCodec(of, bytes_max=4_000, compress_over_bytes=200)


@pytest.mark.parametrize(
    ("of", "value"),
    [
        (Product, Product(1)),
        (Product, Fancy(1)),
        (Product, None),
        (Product | None, Product(1)),
        (Product | None, None),
        (Box[int], Box(1)),
        (Row, Row(1)),
        (Point, Point(1)),
        (Options, {"colour": "red"}),
        (Backported, {"colour": "red"}),
        (Colour, Colour.RED),
        (int, 1),
        (int, Level.LOW),
        (float, 1.5),
        (float, 1),
        (bool, True),
        (bool | int, True),
        (str, "a"),
        (bytes, b"a"),
        (Decimal, Decimal(1)),
        (UUID, UUID(int=1)),
        (datetime, NOW),
        (date, NOW.date()),
        (date | datetime, NOW),
        (list[int], [1]),
        (list, []),
        (dict[str, int], {"a": 1}),
        (tuple[int, ...], (1,)),
        (set[int], {1}),
        (frozenset[int], frozenset({1})),
        (Sequence[int], [1]),
        (Mapping[str, int], {"a": 1}),
        (Literal["a", 1], "a"),
        (Annotated[int, Meta(ge=1)], 1),
        (UserId, 1),
        (Alias, [1]),
        (int | str | list[int], [1]),
        (Any, object),
        (object, True),
        (T, 1),
    ],
)
def test_values_of_the_type_pass(of: Any, value: Any) -> None:
    """V3: the check is not stricter than the declaration."""
    classes = classes_of(of)
    assert not classes or value is None or fits(value, classes)


@pytest.mark.parametrize(
    ("of", "value", "message"),
    [
        (Product, {"id": 1}, "declared Product, got dict"),
        (Product, Row(1), "declared Product, got Row"),
        (Box[int], Product(1), "got Product"),
        (Row, (1,), "declared Row, got tuple"),
        (Point, [1], "declared Point, got list"),
        (Options, Product(1), "declared Options, got Product"),
        (Colour, "red", "declared Colour, got str"),
        (int, True, "declared int, got bool"),
        (float, True, "declared float, got bool"),
        (int, 1.0, "declared int, got float"),
        (int, "1", "declared int, got str"),
        (UserId, "1", "got str"),
        (str, b"a", "declared str, got bytes"),
        (date, NOW, "declared date, got datetime"),
        (datetime, NOW.date(), "declared datetime, got date"),
        (Decimal, 1.5, "declared Decimal, got float"),
        (list[int], (1,), r"declared list\[int\], got tuple"),
        (dict[str, int], [1], r"declared dict\[str, int\], got list"),
        (Mapping[str, int], [1], "got list"),
        (int | None, "1", r"declared int \| None, got str"),
        (int | str, 1.5, "got float"),
        (Literal["a"], 1, "got int"),
        (Annotated[int, Meta(ge=1)], "1", "got str"),
        (Model, {"product": 1}, "declared Model, got dict"),
        (list[Model], Model(product=1), "got Model"),
        (Model | None, Product(1), "got Product"),
    ],
)
def test_values_of_another_type_are_refused_with_both_names(
    of: Any, value: Any, message: str
) -> None:
    """V3: the error is raised before the value is stored."""
    with pytest.raises(InvalidEntry, match=message) as caught:
        codec_of(of).pack(value)
    assert caught.value.fault == "wrong_type"


@pytest.mark.parametrize("of", [Any, object, T, Readable, EmailStr, AnyUrl | Any, int | T])
def test_a_type_without_known_classes_is_not_checked(of: Any) -> None:
    """V3: values of such a type may have other classes."""
    assert classes_of(of) == () or AnyUrl in classes_of(of)


@given(
    st.sampled_from([
        Product, Row, Point, Options, Colour, int, float, bool, str, Decimal, datetime, date,
        list[int], dict[str, int], tuple[int, ...], set[int], Sequence[int], Mapping[str, int],
        Literal["red", 1], UserId, int | None, Box[int], Model, list[Model], Model | None,
    ]),
    st.recursive(
        st.none() | st.booleans() | st.integers(-100, 100) | st.just("red") | st.just(1.5)
        | st.just("2026-01-01") | st.just("2026-01-01T00:00:00Z") | st.just({"id": 1})
        | st.just({"colour": "red"}) | st.just({"inner": 1}) | st.just({"product": 1}),
        st.lists,
        max_leaves=4,
    ),
)  # fmt: skip
def test_decoded_values_are_of_the_type(of: Any, plain: Any) -> None:
    """V3: the check accepts every value that a codec decodes."""
    codec = codec_of(of)
    try:
        value = codec.unpack(msgspec.msgpack.encode(plain))
    except InvalidEntry:
        return
    assert codec.unpack(codec.pack(value)) == value


class Tree(Struct):
    left: Tree | None
    of: list[Annotated[Row, "annotated"]]
    options: Options
    point: Point


def test_all_types_inside_are_found_once() -> None:
    """Fields, arguments and aliases are followed, also in recursive types."""
    found = list(types_in(dict[str, Tree]))
    assert {str, int, Tree, Row, Options, Point} <= {
        each
        for each in found
        if isinstance(each, type) and not isinstance(each, types.GenericAlias)
    }
    assert found.count(Tree) == 1
    assert int in list(types_in(Alias))
    assert Product in list(types_in(Box[Product]))


class Dangling(Struct):
    there: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("of", [Dangling, list[Dangling], Product | Row, "Product"])
def test_a_type_that_cannot_be_decoded_is_refused_when_declared(of: Any) -> None:
    """The error contains the name of the type and the reason."""
    with pytest.raises(ConfigError, match="the type of the values = ") as caught:
        codec_of(of)
    assert caught.value.value == name_of(of)


class Opaque:
    pass


class Described(Protocol):
    def describe(self) -> str: ...


class Holder(Struct):
    inner: list[Opaque]
    again: Holder | None = None


@dataclass
class Record:
    inner: Opaque | None


class Lacking(Struct):
    id: int | msgspec.UnsetType = msgspec.UNSET
    again: Lacking | None = None


@pytest.mark.parametrize(
    ("of", "named"),
    [
        (Opaque, "Opaque"),
        (asyncio.Lock, "Lock"),
        (Path, "Path"),
        (complex, "complex"),
        (AsyncIterator[int], "AsyncIterator"),
        (OrderedDict[str, int], "OrderedDict"),
        (Described, "Described"),
        (list[Opaque], "Opaque"),
        (dict[str, Opaque | None], "Opaque"),
        (Holder, "Opaque"),
        (Record, "Opaque"),
        (Box[Opaque], "Opaque"),
        (Annotated[Opaque, "a note"], "Opaque"),
    ],
)
def test_an_undecodable_class_is_refused_when_declared(of: Any, named: str) -> None:
    """T2: the error names the class, also if it is nested."""
    with pytest.raises(ConfigError, match=f"a stored {named} could not be read again"):
        codec_of(of)


@pytest.mark.parametrize(
    ("of", "value"),
    [(object, 1), (Iterable[int], [1]), (Hashable, "a"), (Lacking, Lacking()), (Box[Any], Box(1))],
)
def test_a_base_of_a_decodable_class_may_be_declared(of: Any, value: Any) -> None:
    """T2: a base of a decoded type, an optional field and a recursive type are accepted."""
    codec = codec_of(of)
    assert codec.unpack(codec.pack(value)) == value

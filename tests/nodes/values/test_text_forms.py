"""Text forms of arguments: they round-trip through a key, or are refused."""

from __future__ import annotations

import enum
import math
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal, NewType, Optional, TypeVar
from zoneinfo import ZoneInfo

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

import forebay
from forebay.nodes.values.keying import Keying
from forebay.schemas.errors import ConfigError, InvalidKey

PATIENCE_S = 20.0


class Color(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    A = "a"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Unnamed(enum.Enum):
    PAIR = (1, 2)


class Twins(enum.Enum):
    NUMBER = 1
    TEXT = "1"


class Sku(str):
    __slots__ = ()


class Number(int):
    pass


class Clock(datetime):
    pass


NAIVE = datetime(2026, 7, 1)  # noqa: DTZ001 - some are
UserId = NewType("UserId", int)
Bounded = TypeVar("Bounded", bound=int)


def keying_of(annotation: Any, **options: Any) -> Keying:
    async def loader(x: Any) -> None:
        return None

    loader.__annotations__["x"] = annotation
    return Keying(loader, "the cache", "k:{x}", **options)


@pytest.mark.parametrize(
    ("annotation", "given", "text", "got"),
    [
        (int, -7, "-7", -7),
        (int, Level.LOW, "1", 1),
        (int, Number(7), "7", 7),
        (str, "a b", "a%20b", "a b"),
        (str, "7", "7", "7"),
        (str, Word.A, "a", "a"),
        (str, Sku("s"), "s", "s"),
        (bool, True, "True", True),
        (float, 1, "1.0", 1.0),
        (float, 1.0, "1.0", 1.0),
        (float, -0.0, "0.0", 0.0),
        (float, math.inf, "inf", math.inf),
        (Decimal, Decimal("9.90"), "9.9", Decimal("9.9")),
        (Decimal, Decimal("1E+2"), "100", Decimal(100)),
        (Decimal, Decimal("-0.00"), "0", Decimal(0)),
        (uuid.UUID, uuid.UUID(int=1), str(uuid.UUID(int=1)), uuid.UUID(int=1)),
        (date, date(2026, 7, 1), "2026-07-01", date(2026, 7, 1)),
        (datetime, NAIVE, "2026-07-01%2000%3A00%3A00", NAIVE),
        (
            datetime,
            datetime(2026, 7, 1, 3, tzinfo=ZoneInfo("Europe/Berlin")),
            "2026-07-01%2003%3A00%3A00%2B02%3A00",
            datetime(2026, 7, 1, 3, tzinfo=timezone(timedelta(hours=2))),
        ),
        (time, time(3, 4, 5), "03%3A04%3A05", time(3, 4, 5)),
        (timedelta, timedelta(hours=1, minutes=30), "PT5400S", timedelta(seconds=5400)),
        (Color, Color.RED, "red", Color.RED),
        (Color, Color.BLUE, "2", Color.BLUE),
        (Level, Level.LOW, "1", Level.LOW),
        (Right, Right.READ | Right.WRITE, "3", Right.READ | Right.WRITE),
        (Literal["a", 2, True], 2, "2", 2),
        (Literal["a", 2, True], True, "True", True),
        (Literal[Color.RED], Color.RED, "red", Color.RED),
        (UserId, 7, "7", 7),
        (Bounded, 7, "7", 7),
        (Sku, Sku("s"), "s", Sku("s")),
        (Number, Number(7), "7", Number(7)),
        (Annotated[int, Meta(ge=0)], 7, "7", 7),
        (Annotated[UserId, "a note"], 7, "7", 7),
    ],
)
def test_an_argument_round_trips_in_the_declared_type(annotation, given, text, got) -> None:
    """A2, A3: equal arguments have the same key."""
    made = keying_of(annotation)
    assert made.key(given) == made.key(x=given) == f"k:{text}"
    found = made.arguments(f"k:{text}")["x"]
    assert (found, type(found)) == (got, type(got))
    assert str(found) == str(got)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        *[(int, each) for each in ("7", 7.0, True, None, Decimal(7), b"7", [7])],
        *[(str, each) for each in (7, True, None, b"x", "", "\ud800", Color.RED)],
        *[(bool, each) for each in (1, 0, "True", None)],
        *[(float, each) for each in ("1", True, math.nan, 10**400, Decimal(1))],
        *[(Decimal, each) for each in (1, 1.0, "1", Decimal("nan"), Decimal("1E+600"))],
        *[(uuid.UUID, each) for each in (str(uuid.UUID(int=1)), 1)],
        *[(date, each) for each in (NAIVE, Clock(2026, 7, 1), "2026-07-01")],
        *[(datetime, each) for each in (date(2026, 7, 1), 1.0)],
        *[(timedelta, each) for each in (1, 1.5, "PT1S")],
        *[(Color, each) for each in ("red", 2, Level.LOW, [1])],
        *[(Level, each) for each in (1, Color.BLUE)],
        *[(Right, each) for each in (1, Level.LOW)],
        *[(Literal["a", 1], each) for each in ("b", True, 1.0, None, [])],
        *[(Sku, each) for each in ("s", 1)],
        *[(Annotated[int, Meta(ge=0)], each) for each in (-1, "1")],
    ],
)
def test_an_argument_of_another_type_is_refused_at_the_call(annotation, given) -> None:
    """A2: the error names the parameter and the cache, also if the text would be valid."""
    made = keying_of(annotation)
    with pytest.raises(InvalidKey, match="x of the cache,"):
        made.key(given)
    with pytest.raises(InvalidKey, match="x of the cache,"):
        made.of_item(given)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        *[(int, text) for text in ("007", "7.0", "1_0", "%D9%A7", "x")],
        *[(float, text) for text in ("1", "1.00", "1e0", "nan", "-0.0")],
        *[(bool, text) for text in ("true", "1")],
        *[(Decimal, text) for text in ("9.90", "1E%2B2", "NaN")],
        *[(uuid.UUID, text) for text in ("0" * 31 + "1", "x")],
        *[(date, text) for text in ("20260701", "2026-07-32")],
        *[(timedelta, text) for text in ("PT1H", "3600")],
        *[(Color, text) for text in ("RED", "3")],
        (Literal["a"], "b"),
        (Annotated[int, Meta(ge=0)], "-1"),
    ],
)
def test_another_spelling_is_not_a_key_of_the_cache(annotation, text) -> None:
    """A4, Y5: a key that no call produces is refused."""
    with pytest.raises(InvalidKey, match="does not match k:"):
        keying_of(annotation).arguments(f"k:{text}")


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        (Any, "Any"),
        (object, "object"),
        (int | None, "allows None"),
        (Optional[Color], "allows None"),  # noqa: UP045 - both spellings are met
        (int | str, "has several types"),
        (bytes, "bytes"),
        (list[int], "list"),
        (tuple[int, int], "tuple"),
        (dict, "dict"),
        (complex, "complex"),
        (type(None), "NoneType"),
        (Literal["a"] | None, "allows None"),
        (Literal["a", b"b"], "b'b' has no text"),
        (Literal["1", 1], "have the same text"),
        (Literal[""], "has no text"),
        (Unnamed, "has no text"),
        (Twins, "have the same text"),
        (Callable[[], int], "Callable"),
    ],
)
def test_a_type_without_text_form_is_refused_when_declared(annotation, problem) -> None:
    """A1: the error names the parameter, the cache, the problem and the fix."""
    with pytest.raises(ConfigError, match=problem) as caught:
        keying_of(annotation)
    assert caught.value.setting == "the parameter x of the cache"
    assert caught.value.fix


async def unannotated(x) -> int:  # type: ignore[no-untyped-def]
    return 1


async def many(*x: int) -> int:
    return 1


async def named(**x: int) -> int:
    return 1


async def default_none(x: int = None) -> int:  # type: ignore[assignment]  # noqa: RUF013
    return 1


async def default_text(x: int = "7") -> int:  # type: ignore[assignment]
    return 1


async def unknown(x: Missing) -> int:  # type: ignore[name-defined]  # noqa: F821
    return 1


async def unknown_value(x: int) -> Missing:  # type: ignore[name-defined]  # noqa: F821
    return 1


class Repository:
    async def row(self, x: int) -> int:
        return x

    async def __call__(self, x: int, /) -> int:
        return x


@pytest.mark.parametrize(
    ("function", "template", "problem", "fix"),
    [
        (unannotated, "k:{x}", "has no annotation", "such as x: int"),
        (many, "k:{x}", "their number", "name each parameter"),
        (named, "k:{x}", "their number", "name each parameter"),
        (default_none, "k:{x}", "default is of type NoneType", "of the declared type"),
        (default_text, "k:{x}", "default is of type str", "of the declared type"),
        (Repository.row, "k:{self}:{x}", "the object of a method", "repo.method"),
        (Repository.row, "k:{x}", "the object of a method", "repo.method"),
        (unknown, "k:{x}", "'Missing' is not defined", "at run time"),
        (unknown_value, "k:{x}", "'Missing' is not defined", "at run time"),
    ],
)
def test_a_parameter_that_a_key_cannot_hold_is_refused(function, template, problem, fix) -> None:
    """Y3: it is refused when the cache is declared."""
    node = forebay.Node("refused")
    with pytest.raises(ConfigError, match=problem) as caught:
        node.cached(template, ttl=60)(function)
    assert fix in caught.value.fix
    assert "the cache" not in str(caught.value)


@pytest.mark.parametrize(
    "function", [Repository().row, Repository(), partial(Repository.row, Repository())]
)
def test_bound_arguments_are_not_parameters(function) -> None:
    """A bound method, a callable object and a partial have only their free parameters."""
    made = Keying(function, "the cache", "k:{x}")
    assert made.arguments(made.key(7)) == {"x": 7}


def test_a_number_of_too_many_digits_is_refused() -> None:
    """An int that Python refuses to convert to text raises InvalidKey."""
    with pytest.raises(InvalidKey, match=r"x of the cache, .\.\.\.. has too many digits"):
        keying_of(int).key(10**5000)


Decimals = st.decimals(allow_nan=False, allow_infinity=False).filter(
    lambda value: not 400 < abs(value.adjusted()) <= 520
)


@given(st.timedeltas(), Decimals, st.floats(allow_nan=False))
def test_timedeltas_and_numbers_round_trip(span, exact, near) -> None:
    """A2: they are equal to the last digit, or refused as too long."""
    for annotation, value in ((timedelta, span), (Decimal, exact), (float, near)):
        made = keying_of(annotation)
        if annotation is Decimal and value and abs(value.adjusted()) > 400:
            with pytest.raises(InvalidKey, match=r"too many digits|over 512 bytes"):
                made.key(value)
        else:
            assert made.arguments(made.key(value))["x"] == value


Instants = st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones())


@given(Instants, Instants)
def test_datetimes_round_trip_with_their_offset(one, other) -> None:
    """A3: a refresh gets the UTC offset of the call."""
    made = keying_of(datetime)
    found = made.arguments(made.key(one))["x"]
    assert found.replace(tzinfo=None) == one.replace(tzinfo=None)
    assert found.utcoffset() == one.utcoffset()
    same = (one.replace(tzinfo=None), one.utcoffset()) == (
        other.replace(tzinfo=None),
        other.utcoffset(),
    )
    assert (made.key(one) == made.key(other)) == same


@pytest.mark.parametrize("length", range(500, 516))
def test_a_long_plain_text_has_the_limit_of_all_keys(length) -> None:
    """The fast path for a str applies the same length limit."""
    made = keying_of(str)
    if length <= 510:
        assert made.arguments(made.key("x" * length)) == {"x": "x" * length}
    else:
        with pytest.raises(InvalidKey, match="over 512 bytes"):
            made.key("x" * length)


async def test_the_loader_gets_the_same_arguments_from_every_caller(make_node) -> None:
    """Y4: a waiting caller, a background refresh, an HTTP read and a batch give equal arguments."""
    got: list[Any] = []
    node = make_node()

    @node.cached("rate:{at}:{x}", ttl=0.05, stale_for=60)
    async def rate(at: datetime, x: float, /) -> int:
        got.append((at, x))
        return len(got)

    @node.cached("many:{x}", ttl=60)
    async def of_many(x: float) -> float:
        return -x  # the batch loader serves all

    @of_many.batch
    async def batch(xs: list[float]) -> dict[float, float]:
        assert [type(x) for x in xs] == [float] * len(xs)
        return {x: x for x in xs}

    async with node:
        at = datetime(2026, 7, 1, 3, tzinfo=ZoneInfo("Europe/Berlin"))
        assert await rate(at, 1) == 1
        with anyio.fail_after(PATIENCE_S):
            while await rate(at, 1.0) == 1:
                await anyio.sleep(0.01)
        assert (await node.read(rate.key(at, 1))).json != b"1"
        assert len({repr(each) for each in got}) == 1
        assert got[0][0].utcoffset() == timedelta(hours=2)
        assert [await of_many(2), *await of_many.many([1, 1.0, 2])] == [2, 1, 1, 2]
        for wrong in ("7", None):
            with pytest.raises(InvalidKey, match="x of of_many,"):
                await of_many(wrong)
            with pytest.raises(InvalidKey, match="x of of_many,"):
                await of_many.put(wrong, 1.0)
        with pytest.raises(InvalidKey, match=r"its canonical form is many:1\.0"):
            await node.read("many:1")


@pytest.mark.parametrize("way", ["put", "write_through", "write_around", "write_behind"])
@pytest.mark.parametrize("args", [(), (1,), (1, 2, 3)])
async def test_a_write_with_a_wrong_number_of_arguments_raises_type_error(
    make_node, way: str, args: tuple[int, ...]
) -> None:
    """The error names the cache and the expected arguments."""
    node = make_node()

    @node.cached("row:{id}", ttl=60)
    async def row(id: int) -> int:
        return id

    async with node:
        with pytest.raises(TypeError, match=r"a write of row takes the loader's arguments, and"):
            await getattr(row, way)(*args)


async def test_a_value_of_another_type_names_cache_key_and_types(make_node) -> None:
    """A write of a value of another type is refused at the call."""
    node = make_node()

    @node.cached("row:{id}", ttl=60)
    async def row(id: int) -> int:
        return id

    async with node:
        with pytest.raises(forebay.InvalidValue) as caught:
            await row.put(1, "not an int")
    assert (caught.value.cache, caught.value.key) == ("row", "row:1")
    assert "declared int, got str" in str(caught.value)
    assert caught.value.fix

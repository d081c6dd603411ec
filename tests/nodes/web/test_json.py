"""Reads over HTTP of values that JSON can and cannot hold."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import aiohttp
import msgspec
import pytest
from msgspec import Struct
from pydantic import BaseModel, Field

from forebay.schemas.settings import Http


class Size(enum.Enum):
    LARGE = "L"


class Row(Struct):
    at: datetime
    price: Decimal
    size: Size
    ratio: float | None = None


class Model(BaseModel):
    price: Decimal = Field(alias="unitPrice")
    ratio: float | None = None
    note: str | None = None


NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture
def read(make_node) -> Callable[..., Any]:
    """Status and decoded body of the value that a loader of this type returns."""

    async def read_once(annotation: Any, value: Any, **options: Any) -> tuple[int, Any]:
        node = make_node(http=Http(port=0))

        async def row(id: int) -> Any:
            return value

        row.__annotations__["return"] = annotation
        node.cached("row:{id}", ttl=60, **options)(row)
        async with node, node.serving() as url, aiohttp.ClientSession(url) as client:
            answers = []
            for _ in range(2):  # loaded, and from the near cache
                async with client.get("/v1/cache/row:1") as response:
                    answers.append((response.status, msgspec.json.decode(await response.read())))
        assert answers[0] == answers[1]
        return answers[0]

    return read_once


@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize(
    ("annotation", "value", "json"),
    [
        (float, 1.5, 1.5),
        (list[float | None], [1.0, None], [1.0, None]),
        (str, "null", "null"),
        (dict[int, str], {1: "a"}, {"1": "a"}),
        (Any, {"a": (1, None)}, {"a": [1, None]}),
        (bytes, b"a", "YQ=="),
        (
            Row,
            Row(NOON, Decimal("1.50"), Size.LARGE),
            {"at": "2026-07-01T12:00:00Z", "price": "1.50", "size": "L", "ratio": None},
        ),
        (
            Model,
            Model(unitPrice=Decimal("1.50")),
            {"unitPrice": "1.50", "ratio": None, "note": None},
        ),
        (list[Model], [Model(unitPrice=1, ratio=2)],
         [{"unitPrice": "1", "ratio": 2.0, "note": None}]),
    ],
)  # fmt: skip
async def test_what_json_can_hold_is_given(read, annotation, value, json, mutable) -> None:
    """Values with a null, and models by their aliases, are answered as JSON."""
    assert await read(annotation, value, mutable=mutable) == (200, json)


@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize(
    ("annotation", "value", "problem"),
    [
        (float, math.nan, "nan is no number"),
        (float, -math.inf, "-inf is no number"),
        (Any, {"a": [1.0, (None, math.inf)]}, "inf is no number"),
        (Row, Row(NOON, Decimal(1), Size.LARGE, math.nan), "nan is no number"),
        (Model, Model(unitPrice=1, ratio=math.nan), "nan is no number"),
        (Any, {(1, 2): 3}, "keys"),
        (dict[tuple[int, int], str], {(1, 2): "a"}, "keys"),
    ],
)
async def test_what_json_cannot_hold_is_refused(
    read, annotation, value, problem: str, mutable: bool
) -> None:
    """A value that JSON cannot hold is a 406 with key, cache and problem; NaN is not a null."""
    status, body = await read(annotation, value, mutable=mutable)
    assert (status, body["error"]["code"]) == (406, "no_json")
    assert "'row:1' in row" in body["error"]["problem"]
    assert problem in body["error"]["problem"]
    assert body["error"]["fix"]


async def test_a_spelling_that_no_call_has_is_refused(make_node) -> None:
    """A second spelling of a key is a 400: it would be stored under a key of its own."""
    node = make_node(http=Http(port=0))

    @node.cached("rate:{x}", ttl=60)
    async def rate(x: float) -> float:
        return x

    async with node, node.serving() as url, aiohttp.ClientSession(url) as client:
        for path, status in (("rate:1.0", 200), ("rate:1", 400), ("rate:nan", 400)):
            async with client.get(f"/v1/cache/{path}") as response:
                assert response.status == status, path

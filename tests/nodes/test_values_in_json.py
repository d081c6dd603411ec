"""Values of Python at the borders where JSON is spoken: HTTP, published events, declarations."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol

import aiohttp
import pydantic
import pytest

import forebay
from forebay.schemas.settings import Http


class Review(pydantic.BaseModel):
    text: str
    stars: float = 0.0


class Opaque:
    pass


class Sized(Protocol):
    def size(self) -> int: ...


@pytest.fixture
async def client(make_node: Callable[..., forebay.Node]) -> AsyncIterator[aiohttp.ClientSession]:
    node = make_node(http=Http(port=0))

    @node.cached("plain:{id}", ttl=60)
    async def plain(id: int):
        return {1: math.nan, 2: {"a": [math.inf]}, 3: {(1, 2): 3}, 4: {"a": None}}[id]

    @node.cached("review:{id}", ttl=60)
    async def review(id: int) -> Review | None:
        return Review(text="good", stars=4.5) if id == 1 else None

    @node.cached("copied:{id}", ttl=60, mutable=True)
    async def copied(id: int) -> list[float]:
        return [1.5, math.nan] if id == 1 else [1.5]

    async with node, node.serving() as url, aiohttp.ClientSession(url) as session:
        yield session


@pytest.mark.parametrize("key", ["plain:1", "plain:2", "plain:3", "copied:1"])
async def test_a_value_without_a_json_form_is_told(client: aiohttp.ClientSession, key: str) -> None:
    """A NaN was a null, and a mapping with arrays as keys a fault of the node."""
    for _ in range(2):  # loaded, and from the near cache
        async with client.get(f"/v1/cache/{key}") as answer:
            found = await answer.json()
            assert (answer.status, found["error"]["code"]) == (422, "no_json_form"), found
            assert found["error"]["field"] == key


@pytest.mark.parametrize(
    "key, expected",
    [
        ("plain:4", {"a": None}),
        ("review:1", {"text": "good", "stars": 4.5}),
        ("copied:2", [1.5]),
    ],
)
async def test_a_value_with_a_json_form_is_given(
    client: aiohttp.ClientSession, key: str, expected: object
) -> None:
    """Nulls that are meant, pydantic models, and values that callers may change."""
    for _ in range(2):
        async with client.get(f"/v1/cache/{key}") as answer:
            assert (answer.status, await answer.json()) == (200, expected)


async def test_an_event_with_nan_is_not_published(make_node: Callable[..., forebay.Node]) -> None:
    """A null in a write event deletes: a NaN is refused, and names the event."""
    async with make_node() as node:
        good = {"type": "write", "key": "price:1", "value": 1.0}
        with pytest.raises(forebay.InvalidEvent, match=r"value is nan"):
            await node.publish([good, {**good, "value": math.nan}])
        assert await node.parts.backend.link.call("XLEN", node.parts.names.events) == 0


@pytest.mark.parametrize(
    "of", [Opaque, list[Opaque], dict[str, Opaque | None], socket.socket, complex, Sized]
)
def test_a_type_that_nothing_can_encode_is_refused_at_the_declaration(
    make_node: Callable[..., forebay.Node], of: Any
) -> None:
    """Not at the first load."""

    async def load(id: int):
        return None

    load.__annotations__["return"] = of
    with pytest.raises(forebay.ConfigError, match="cannot be encoded"):
        make_node().cached("thing:{id}", ttl=60)(load)


@pytest.mark.parametrize("of", [object, Any, Iterable[int], list[object]])
def test_a_type_that_plain_values_satisfy_is_accepted(
    make_node: Callable[..., forebay.Node], of: Any
) -> None:
    """A list is an Iterable, and everything an object."""

    async def load(id: int):
        return None

    load.__annotations__["return"] = of
    assert make_node().cached("thing:{id}", ttl=60)(load).name == "load"

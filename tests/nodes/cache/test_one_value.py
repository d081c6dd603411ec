"""One version of a key has one value for every caller and every way to read it."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import anyio
import pytest
from msgspec import Struct
from pydantic import BaseModel

import forebay
from forebay.nodes.cache.cached import Cached

BERLIN = datetime(2026, 7, 1, 3, 4, tzinfo=ZoneInfo("Europe/Berlin"))


class Base(Struct, frozen=True):
    id: int


class Derived(Base, frozen=True):
    more: str = "x"


class Word(str):
    __slots__ = ()


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Growing:
    """A value that differs each time it is made."""

    number: int

    def __post_init__(self) -> None:
        self.number += 1


class Model(BaseModel):
    at: datetime
    price: Decimal


class DerivedModel(Model):
    more: int = 1


CASES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "zone": (datetime, lambda: BERLIN),
    "zone inside": (dict[str, list[datetime]], lambda: {"a": [BERLIN]}),
    "naive, untyped": (Any, lambda: {"at": BERLIN.replace(tzinfo=None)}),
    "float": (float, lambda: 3),
    "floats": (list[float], lambda: [1, 2.5, math.inf]),
    "subclass": (Base, lambda: Derived(1)),
    "enum inside": (list[int], lambda: [Level.LOW]),
    "set": (set[int], lambda: {1, 2}),
    "set, untyped": (Any, lambda: {1}),
    "tuple": (tuple[int, ...], lambda: (1, 2)),
    "tuple, untyped": (Any, lambda: (1, [2], (3,))),
    "struct, untyped": (Any, lambda: Derived(1)),
    "integers as keys": (dict[int, str], lambda: {1: "a"}),
    "integers as keys, untyped": (Any, lambda: {1: "a"}),
    "tuples as keys, untyped": (Any, lambda: {(1, 2): "a"}),
    "bytes, untyped": (Any, lambda: [memoryview(b"a"), bytearray(b"b")]),
    "decimal, untyped": (Any, lambda: Decimal("1.50")),
    "made again": (Growing, lambda: Growing(1)),
    "model": (Model, lambda: Model(at=BERLIN, price=Decimal("1.50"))),
    "models": (list[Model], lambda: [DerivedModel(at=BERLIN, price=Decimal(1))]),
    "too large": (list[float], lambda: [1] * 30_000),
    "absence": (int | None, lambda: None),
}


def declare(node: forebay.Node, case: str, **options: Any) -> Cached[Any, Any]:
    annotation, make = CASES[case]

    async def value(id: int) -> Any:
        await anyio.sleep(0.001)
        if id == 404:
            forebay.loading().keep(store=False)
        return make()

    value.__annotations__["return"] = annotation
    return node.cached("value:{id}", **{"ttl": 600, **options})(value)


def seen(value: Any) -> str:
    """All visible properties of a value: class, content, time zone."""
    return f"{type(value)} {value!r}"


@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize("case", CASES)
async def test_every_reader_gets_the_same_value(make_node: Any, case: str, mutable: bool) -> None:
    """V6, L8: the loading caller, waiters and later callers agree, on every tier and node."""
    one, two = (make_node(value_bytes_max=200_000) for _ in range(2))
    first, second = (declare(node, case, mutable=mutable) for node in (one, two))
    found: list[Any] = []

    async def read(id: int) -> None:
        found.append(await first(id))

    async with one, two:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(read, 1)
        found += [await first(1), (await first.get_with_info(1)).value]
        found += await first.many([1, 2])
        first._cache.path.near.clear()
        found += [await first(1), await second(1), (await first._cache.read_key("value:3")).value]
        found += [await first(404), await first(404)]
        async with forebay.request_scope():
            found += [await first(5), await first(5)]
    assert len({seen(each) for each in found}) == 1


@pytest.mark.parametrize("case", CASES)
async def test_a_batch_loader_gives_the_same_values(make_node: Any, case: str) -> None:
    """V6: values of a batch equal values that were loaded one by one."""
    annotation, make = CASES[case]
    node = make_node()

    async def value(id: int) -> Any:
        return None

    value.__annotations__["return"] = annotation
    cached = node.cached("value:{id}", ttl=600)(value)

    @cached.batch
    async def values(ids: list[int]) -> dict[int, Any]:
        return {each: make() for each in ids}

    async with node:
        found = [await cached(1), await cached(1), *await cached.many([1, 2])]
        cached._cache.path.near.clear()
        found += await cached.many([1, 2])
    assert len({seen(each) for each in found}) == 1


@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize("way", ["put", "write_through", "write_behind"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("absence", "too large")])
async def test_a_written_value_is_the_same_for_readers_and_the_sink(
    make_node: Any, case: str, way: str, mutable: bool
) -> None:
    """X7: the writer, other nodes and the sink get equal values."""
    one, two = make_node(workers=True), make_node()
    first, second = (declare(node, case, mutable=mutable) for node in (one, two))
    stored: list[Any] = []

    async def save(writes: list[forebay.Write[Any]]) -> None:
        stored.extend(write.value for write in writes)

    for node in (one, two):
        node.sink("value:{id}")(save)
    async with one, two:
        write: Callable[..., Awaitable[Any]] = getattr(first, way)
        await write(1, CASES[case][1](), **({"until": "sink"} if way == "write_behind" else {}))
        found = [await first(1), await second(1)]
        assert (await first.get_with_info(1)).tier != "source"
        first._cache.path.near.clear()
        found.append(await first(1))
    assert len({seen(each) for each in found + stored}) == 1
    assert len(stored) == (way != "put")


@pytest.mark.parametrize("value", [Word("a"), [Word("a")], {"a": Word("a")}, object(), 1j])
async def test_an_undecodable_value_is_refused_at_the_first_call(make_node: Any, value) -> None:
    """V3: the error names the cache and the key."""
    node = make_node()

    @node.cached("value:{id}", ttl=600)
    async def cached(id: int) -> Any:
        return value

    async with node:
        with pytest.raises(forebay.LoaderError, match="the loader of cached failed for 'value:1'"):
            await cached(1)
        with pytest.raises(forebay.InvalidValue, match="cached cannot hold this value"):
            await cached.put(1, value)


async def test_a_refresh_and_a_bypass_give_the_same_value(make_node, make_server) -> None:
    """L8: this holds in the background, and if nothing can be stored."""
    server = make_server()
    node = make_node(server, max_staleness_ms=200)
    cached = declare(node, "zone", ttl=0.05, stale_for=600)
    found = []
    async with node:
        before = await cached.get_with_info(1)
        with anyio.fail_after(20):
            while (hit := await cached.get_with_info(1)).version == before.version or hit.stale:
                await anyio.sleep(0.01)
        found += [before.value, hit.value]
        server.kill9()
        with anyio.fail_after(20):
            while (hit := await cached.get_with_info(2)).version:
                await anyio.sleep(0.01)
        found.append(hit.value)
    assert [seen(each) for each in found] == [seen(BERLIN.astimezone(UTC))] * 3

"""What a loader returns is what every other node can read, and of the same type everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from msgspec import Struct
from structlog.testing import capture_logs

import forebay


class Product(Struct):
    id: int
    name: str


@dataclasses.dataclass
class Stock:
    counts: dict[str, int]


@pytest.mark.parametrize("mutable", [False, True])
async def test_a_wrong_type_inside_is_the_loaders_fault(make_node: Any, mutable: bool) -> None:
    """V3: the first node is told, where the others would have had a miss at every read."""
    node = make_node()

    @node.cached("product:{id}", ttl=600, mutable=mutable)
    async def product(id: int) -> Product:
        return Product(id, None)  # type: ignore[arg-type]

    @node.cached("stock:{id}", ttl=600, mutable=mutable)
    async def stock(id: int) -> list[Stock]:
        return [Stock({"a": "many"})]  # type: ignore[dict-item]

    async with node:
        with pytest.raises(forebay.LoaderError, match=r"declared Product: .*\$.name"):
            await product(1)
        with pytest.raises(forebay.LoaderError, match=r"declared list\[.*Stock\]: "):
            await stock(1)
        with pytest.raises(forebay.InvalidValue, match=r"\$.name"):
            await product.put(1, Product(1, None))  # type: ignore[arg-type]
        assert (await product.put(1, Product(1, "one"))).stamp is not None


async def test_without_an_annotation_all_tiers_give_the_same_type(make_node: Any) -> None:
    """J3: what the loader made is given as it will be read, from the first read on."""
    one, two = make_node(), make_node()

    async def product(id: int):  # type: ignore[no-untyped-def]
        return Product(id, "one")

    with capture_logs() as logs:
        caches = [each.cached("product:{id}", ttl=600)(product) for each in (one, two)]
    assert [(line["event"], line["cache"]) for line in logs] == [("cache.untyped", "product")] * 2
    plain = {"id": 1, "name": "one"}
    async with one, two:
        first = [await caches[0](1), await caches[0](1), await caches[1](1)]
        assert first == [plain] * 3
        await caches[0].put(2, Product(1, "one"))
        assert [await each(2) for each in caches] == [plain] * 2


async def test_any_by_intention_is_not_warned_of(make_node: Any) -> None:
    """J3: an annotated Any is somebody's decision."""

    async def thing(id: int) -> Any:
        return {id: (1, 2)}

    with capture_logs() as logs:
        cached = make_node().cached("thing:{id}", ttl=600)(thing)
    assert (logs, cached._cache.value_type) == ([], Any)

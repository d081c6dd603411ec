"""Functions that are called and awaited are seen to be async where they are declared."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import forebay
from forebay.nodes.values.introspection import name_of_function, refuse_sync


async def plain(id: int) -> int:
    return id


def sync(id: int) -> int:
    return id


def wrapped(*given: int) -> Any:
    return plain(*given)


class Caller:
    async def __call__(self, id: int) -> int:
        return id

    async def method(self, id: int) -> int:
        return id


class SyncCaller:
    def __call__(self, id: int) -> int:
        return id


async def of_two(base: int, id: int) -> int:
    return base + id


ASYNC = [plain, Caller(), Caller().method, functools.partial(of_two, 1)]
ASYNC += [functools.partial(Caller()), functools.partial(functools.partial(of_two), 1)]


@pytest.mark.parametrize("function", ASYNC)
async def test_whatever_is_async_can_be_a_loader(function: Any) -> None:
    """N1: also a partial, a method, an object; and each has a name, and a type."""
    refuse_sync("the loader", function)
    cached = forebay.Node().cached("a:{id}", ttl=60, name="")(functools.partial(function))
    assert cached.name in ("plain", "Caller", "method", "of_two")
    assert cached._cache.value_type is int


@pytest.mark.parametrize("function", [sync, SyncCaller(), functools.partial(sync, 1), wrapped])
def test_what_is_not_async_is_refused_where_it_is_declared(function: Any) -> None:
    """N1: as a loader, a batch loader and a sink, by name and with the fix."""
    node, fix = forebay.Node(), "write `async def`"
    with pytest.raises(forebay.ConfigError, match=fix) as caught:
        node.cached("a:{id}", ttl=60)(function)
    assert (caught.value.setting, caught.value.value) == ("the loader", name_of_function(function))
    with pytest.raises(forebay.ConfigError, match=fix):
        node.cached("b:{id}", ttl=60)(plain).batch(function)
    with pytest.raises(forebay.ConfigError, match=fix):
        node.sink("b:{id}")(function)


def test_what_cannot_be_called_is_refused_too() -> None:
    """N1: a template that was forgotten, a value."""
    with pytest.raises(forebay.ConfigError, match="async def"):
        forebay.Node().sink("a:{id}")(7)  # type: ignore[type-var]

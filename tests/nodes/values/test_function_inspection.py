"""Async functions are recognised when they are declared."""

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
async def test_every_async_callable_can_be_a_loader(function: Any) -> None:
    """N1: a function, a partial, a method and an object with an async ``__call__`` are accepted."""
    refuse_sync("the loader", function)
    cached = forebay.Node().cached("a:{id}", ttl=60, name="")(functools.partial(function))
    assert cached.name in ("plain", "Caller", "method", "of_two")
    assert cached._cache.value_type is int


@pytest.mark.parametrize("function", [sync, SyncCaller(), functools.partial(sync, 1), wrapped])
def test_a_sync_function_is_refused_when_it_is_declared(function: Any) -> None:
    """N1: a sync loader, batch loader or sink raises an error with its name and the fix."""
    node, fix = forebay.Node(), "write `async def`"
    with pytest.raises(forebay.ConfigError, match=fix) as caught:
        node.cached("a:{id}", ttl=60)(function)
    assert (caught.value.setting, caught.value.value) == ("the loader", name_of_function(function))
    with pytest.raises(forebay.ConfigError, match=fix):
        node.cached("b:{id}", ttl=60)(plain).batch(function)
    with pytest.raises(forebay.ConfigError, match=fix):
        node.sink("b:{id}")(function)


def test_an_object_that_is_not_callable_is_refused() -> None:
    """N1: a value in place of a function is refused, such as after a forgotten template."""
    with pytest.raises(forebay.ConfigError, match="async def"):
        forebay.Node().sink("a:{id}")(7)  # type: ignore[type-var]

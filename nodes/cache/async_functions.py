"""What a declaration needs to know of a function: that it is async, its name, its annotations.

N1  Whatever is called and then awaited is known to be async where it is declared: an ``async def``,
    a partial of one, an object whose ``__call__`` is one. What else returns is not known before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ...schemas.errors import ConfigError

__all__ = ["called", "name_of_function", "refuse_sync"]


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind partials, or that an object's ``__call__`` is."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function
    own: Callable[..., Any] = vars(type(function)).get("__call__", function)
    return own


def name_of_function(function: Callable[..., Any]) -> str:
    """Its own name, or its class's if it is an object."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def refuse_sync(what: str, function: Callable[..., Any]) -> None:
    """``what`` such as "the loader".

    Raises:
        ConfigError: it is no async function.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called(function)):
        return
    raise ConfigError(
        setting=what,
        value=name_of_function(function),
        origin="its declaration",
        problem="is no async function",
        fix="write `async def`",
    )

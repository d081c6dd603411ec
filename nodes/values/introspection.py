"""Inspects the functions and types of a declaration: async or not, names, classes, members.

N1  Every object that is called and then awaited must be declared async: an ``async def``, a
    ``partial`` of one, or an object whose ``__call__`` is one.
T1  Inspecting a type imports no module and creates no value. An unfamiliar type passes unchecked.
T2  ``undecodable_in`` finds a class whose instances msgpack cannot decode.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from msgspec import Struct, UnsetType
from msgspec import inspect as msgspec_inspect

from ...schemas.errors import ConfigError

_DECODED = (dict, list, str, bytes, int, float, datetime)  #: decoded forms without a declared type
_NOT_ITS_BASE = (bool, datetime)  #: instances of int and date that do not pass for these


# Functions


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind partials, or an object's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function
    own: Callable[..., Any] = vars(type(function)).get("__call__", function)
    return own


def name_of_function(function: Callable[..., Any]) -> str:
    """The name of the function; for an object, the name of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def refuse_sync(setting: str, function: Callable[..., Any]) -> None:
    """Check that a function is async; ``setting`` names it in the error, such as "the loader".

    Raises:
        ConfigError: the function is not async.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(unwrapped(function)):
        return
    raise ConfigError(
        setting=setting,
        value=name_of_function(function),
        origin="its declaration",
        problem="is not an async function",
        fix="write `async def`",
    )


# Types


def name_of(of: Any) -> str:
    """A type as it is written in a declaration."""
    return of.__qualname__ if isinstance(of, type) and not get_args(of) else str(of)


def refused(of: Any, problem: str, fix: str) -> ConfigError:
    """The error for a type whose values cannot be cached."""
    return ConfigError(
        setting="the type of the values",
        value=name_of(of),
        origin="the declaration of a cache",
        problem=problem,
        fix=fix,
    )


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def fits(value: Any, classes: tuple[type, ...]) -> bool:
    """Whether a value is an instance of these; a bool is not an int, a datetime not a date."""
    if type(value) in classes:
        return True
    return isinstance(value, classes) and not any(
        isinstance(value, each) and each not in classes for each in _NOT_ITS_BASE
    )


def classes_of(of: Any) -> tuple[type, ...]:
    """The classes of which a value of this type must be an instance; empty if unknown."""
    of = bare(of)
    origin, args = get_origin(of), get_args(of)
    if origin in (Union, UnionType):
        each = [classes_of(arg) for arg in args]
        return tuple(kind for kinds in each for kind in kinds) if all(each) else ()
    if origin is Literal:
        return tuple({type(arg) for arg in args})
    kind = origin or (NoneType if of is None else of)
    if _is_typed_dict(kind):
        return (dict,)
    if kind is float:
        return (float, int)
    return (kind,) if _is_plain_class(kind) else ()


def types_in(of: Any) -> Iterator[Any]:
    """The type and its arguments, members and fields at any depth, each once."""
    seen: list[Any] = []
    left = [of]
    while left:
        each = bare(left.pop())
        if not any(each is other for other in seen):
            seen.append(each)
            left += [*get_args(each), *_fields(get_origin(each) or each)]
            yield each


def undecodable_in(of: Any) -> type | None:
    """A class in this type that msgspec does not know and that is not a base of a known one."""
    seen: set[int] = set()
    left: list[Any] = [msgspec_inspect.type_info(of)]
    while left:
        each = left.pop()
        if isinstance(each, tuple):
            left += each
        elif (
            isinstance(each, msgspec_inspect.Type | msgspec_inspect.Field) and id(each) not in seen
        ):
            seen.add(id(each))
            left += [getattr(each, name) for name in each.__struct_fields__]
            if isinstance(each, msgspec_inspect.CustomType) and not _is_base(each.cls):
                return each.cls
    return None


def _is_base(kind: type) -> bool:
    try:
        return kind is UnsetType or any(issubclass(each, kind) for each in _DECODED)
    except TypeError:  # a protocol that is not runtime-checkable
        return False


def layers(of: Any) -> Iterator[Any]:
    """The type, and the types inside its wrappers: NewType, Annotated, aliases, ..."""
    while True:
        yield of
        if get_origin(of) in (Annotated, Required, Final):
            of = get_args(of)[0]
        elif isinstance(of, TypeVar):
            of = of.__bound__ or Any
        elif not isinstance(of, type) and hasattr(of, "__supertype__"):  # a NewType
            of = of.__supertype__
        elif not isinstance(of, type) and not get_args(of) and hasattr(of, "__value__"):
            of = of.__value__  # of `type X = ...`
        else:
            return


def bare(of: Any) -> Any:
    """The innermost of the ``layers``."""
    *_, innermost = layers(of)
    return innermost


def _is_typed_dict(kind: Any) -> bool:
    """Also true for those of typing_extensions, which ``typing.is_typeddict`` does not know."""
    return isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__required_keys__")


def _is_plain_class(kind: Any) -> bool:
    """Whether values are instances of it: not a protocol, nor a pydantic stand-in for a str."""
    if not isinstance(kind, type) or kind in (Any, object) or getattr(kind, "_is_protocol", False):
        return False
    return hasattr(kind, "__pydantic_validator__") or not hasattr(
        kind, "__get_pydantic_core_schema__"
    )


def _fields(kind: Any) -> Iterable[Any]:
    known = getattr(kind, "__pydantic_fields__", None)
    if isinstance(known, dict):
        return [field.annotation for field in known.values()]
    if not isinstance(kind, type) or not (
        is_struct(kind)
        or dataclasses.is_dataclass(kind)
        or _is_typed_dict(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    ):
        return []
    try:
        return get_type_hints(kind, include_extras=True).values()
    except Exception:  # unresolved names; building a decoder reports them
        return []

"""What a declared type says without a value: its classes, and the types it is made of.

T1  No module is imported, and no value is made: an unfamiliar type is not checked further.
T2  ``unmade_in`` names a class whose instances msgpack cannot give back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
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

from msgspec import Struct, UnsetType, inspect

from ...schemas.errors import ConfigError

__all__ = [
    "bare",
    "classes_of",
    "fits",
    "is_struct",
    "layers",
    "name_of",
    "refused",
    "types_in",
    "unmade_in",
]

_DECODED = (dict, list, str, bytes, int, float, datetime)  #: decoded forms without a declared type
_NOT_ITS_BASE = (bool, datetime)  #: instances of int and of date that are not meant by these


def name_of(of: Any) -> str:
    """As it is written in a declaration, about."""
    return of.__qualname__ if isinstance(of, type) and not get_args(of) else str(of)


def refused(of: Any, problem: str, fix: str) -> ConfigError:
    """What to raise for a type whose values cannot be cached."""
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
    """Whether a value is of one of these; a bool is no int, a datetime no date."""
    if type(value) in classes:
        return True
    return isinstance(value, classes) and not any(
        isinstance(value, each) and each not in classes for each in _NOT_ITS_BASE
    )


def classes_of(of: Any) -> tuple[type, ...]:
    """What a value of this type must be an instance of; empty if that cannot be told."""
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
    """The type and those it is made of, each once: arguments, members and fields."""
    seen: list[Any] = []
    left = [of]
    while left:
        each = bare(left.pop())
        if not any(each is other for other in seen):
            seen.append(each)
            left += [*get_args(each), *_fields(get_origin(each) or each)]
            yield each


def unmade_in(of: Any) -> type | None:
    """A class in this type that no bytes can be decoded to: neither known, nor a base of one."""
    seen: set[int] = set()
    left: list[Any] = [inspect.type_info(of)]
    while left:
        each = left.pop()
        if isinstance(each, tuple):
            left += each
        elif isinstance(each, inspect.Type | inspect.Field) and id(each) not in seen:
            seen.add(id(each))
            left += [getattr(each, name) for name in each.__struct_fields__]
            if isinstance(each, inspect.CustomType) and not _is_base(each.cls):
                return each.cls
    return None


def _is_base(kind: type) -> bool:
    try:
        return kind is UnsetType or any(issubclass(each, kind) for each in _DECODED)
    except TypeError:  # a protocol that is not for the run time
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
    """Also those of typing_extensions, which ``typing.is_typeddict`` does not know."""
    return isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__required_keys__")


def _is_plain_class(kind: Any) -> bool:
    """One whose instances are its values: no protocol, no stand-in of pydantic's for a str."""
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
    except Exception:  # names that cannot be resolved; whoever builds a decoder will say so
        return []

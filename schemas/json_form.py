"""JSON of values that an application made, without loss.

J1  JSON has no NaN and no infinity, and an encoder that writes null for them changes the value: in
    an event a null deletes. Such a value has no JSON form, and neither has a mapping whose
    keys are arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import msgspec

from .errors import NoJsonForm

__all__ = ["json_form"]

_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)


def json_form(value: object, name: str) -> bytes:
    """The JSON of a value; ``name`` is what an error calls it.

    Raises:
        NoJsonForm: it has none.
    """
    try:
        raw = msgspec.json.encode(value)
        if b"null" in raw:
            for path, number in _numbers_of(msgspec.to_builtins(value)):
                if not math.isfinite(number):
                    raise NoJsonForm(name, f"{path or 'it'} is {number}")
    except _UNENCODABLE as error:
        raise NoJsonForm(name, " ".join(str(error).split())) from error
    return raw


def _numbers_of(value: object) -> Iterator[tuple[str, float]]:
    """The floats in builtins, with where they stand: ".prices[2]"."""
    left: list[tuple[str, object]] = [("", value)]
    while left:
        path, each = left.pop()
        if isinstance(each, float):
            yield path, each
        elif isinstance(each, Mapping):
            left += [(f"{path}.{key}", inner) for key, inner in each.items()]
        elif isinstance(each, list | tuple | set | frozenset):
            left += [(f"{path}[{number}]", inner) for number, inner in enumerate(each)]

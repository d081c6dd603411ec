"""JSON of values that an application made, without loss.

J1  JSON has no NaN and no infinity, and an encoder that writes null for them changes the value: in
    an event a null deletes. Such a value has no JSON form, and neither has a mapping whose
    keys are arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import msgspec

__all__ = ["json_form", "not_finite"]

_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)


def json_form(value: object) -> bytes:
    """The JSON of a value.

    Raises:
        ValueError: it has none; the message names the value and the reason.
    """
    try:
        raw = msgspec.json.encode(value)
        problem = not_finite(msgspec.to_builtins(value)) if b"null" in raw else ""
    except _UNENCODABLE as error:
        raise ValueError(" ".join(str(error).split())) from error
    if problem:
        raise ValueError(problem)
    return raw


def not_finite(simple: object) -> str:
    """The first number that JSON cannot hold, and its path; empty if all can be held."""
    for path, number in _numbers_of(simple):
        if not math.isfinite(number):
            return f"{number} is no number in JSON, at {path or 'the top'}"
    return ""


def _numbers_of(value: object) -> Iterator[tuple[str, float]]:
    """The floats in builtins, with their paths: ".prices[2]"."""
    left: list[tuple[str, object]] = [("", value)]
    while left:
        path, each = left.pop()
        if isinstance(each, float):
            yield path, each
        elif isinstance(each, Mapping):
            left += [(f"{path}.{key}", inner) for key, inner in each.items()]
            left += [(f"a key of {path or 'it'}", key) for key in each]
        elif isinstance(each, list | tuple | set | frozenset):
            left += [(f"{path}[{number}]", inner) for number, inner in enumerate(each)]

"""Text forms: how an argument is written in a key, and parsed from it.

    int, str, bool, UUID, date, datetime, time    as str() writes them, with the UTC offset
    float                                         1 and 1.0 are both "1.0"
    Decimal                                       plain digits: 9.90 and 9.9 are both "9.9"
    timedelta                                     ISO 8601, such as "PT5400S"
    Enum, Flag, Literal                           the text of the value
    subclasses of int and str                     as their base

A1  A type without a text form is refused when the cache is declared: background refreshes call the
    loader with arguments parsed from the key alone.
A2  An argument must be of the declared type. An int is accepted as a float, and an instance of a
    subclass as its base. Nothing else is converted: not a str to an int, a bool to an int, or a
    datetime to a date.
A3  Equal arguments have the same text, except datetimes and times of different UTC offsets.
A4  A text that no argument has raises an exception, or gives an argument with another text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from typing import Any, Literal, get_args, get_origin
from uuid import UUID

import msgspec
from msgspec import Meta, Struct

from .introspection import bare, fits, layers, name_of

_TEXTS = (
    "use int, str, bool, float, Decimal, UUID, date, datetime, time, timedelta, an Enum or a "
    "Literal"
)
_DECIMAL_EXPONENT_MAX = 500  #: no key is longer


class Textless(Exception):
    """Raised for a type whose values cannot be parsed from a key."""

    def __init__(self, problem: str, fix: str = _TEXTS) -> None:
        super().__init__(problem, fix)


class TextForm(Struct, frozen=True):
    """``text`` raises ValueError or OverflowError with the problem; ``value`` any exception."""

    text: Callable[[Any], str]
    value: Callable[[str], Any]


def text_form_of(annotation: Any) -> TextForm:
    """The text form of a parameter with this annotation; raises Textless."""
    kind = bare(annotation)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return _of_choices(kind, [(each, _value_of(each)) for each in choices])
    if not isinstance(kind, type) or get_args(kind):
        raise _textless(kind)
    if issubclass(kind, Flag):
        return _of_class(kind, lambda flag: str(flag.value), lambda text: kind(int(text)))
    if issubclass(kind, Enum):
        return _of_choices(kind, [(member, member.value) for member in kind])
    form = _of_known(kind)
    constrained = any(isinstance(each, Meta) for each in _annotated_with(annotation))
    return _constrained(annotation, form) if constrained else form


def _of_known(kind: type) -> TextForm:
    for base, write, read in _FORMS:
        if kind is base:
            return _of_class(kind, write, read)
    for base, write, _ in _FORMS[:2]:
        if issubclass(kind, base):
            return _of_class(kind, write, kind)
    raise _textless(kind)


def _of_class(kind: type, write: Callable[[Any], str], read: Callable[[str], Any]) -> TextForm:
    classes = (float, int) if kind is float else (kind,)
    declared = name_of(kind)

    def text(value: Any) -> str:
        if type(value) is not kind and not fits(value, classes):
            raise ValueError(_mistyped(value, declared))
        return write(value)

    return TextForm(text, read)


def _of_choices(kind: Any, choices: Iterable[tuple[Any, Any]]) -> TextForm:
    """The text form of an Enum or a Literal, whose values must have different texts."""
    by_text: dict[str, Any] = {}
    texts: dict[tuple[type, Any], str] = {}
    for choice, value in choices:
        if type(value) not in (str, int, float, bool) or value == "":
            raise Textless(f"{choice!r} has no text in a key")
        text = str(value)
        if text in by_text:
            problem = f"{by_text[text]!r} and {choice!r} have the same text in a key"
            raise Textless(problem, "give them values of different texts")
        by_text[text] = choice
        texts[type(choice), choice] = text
    declared = name_of(kind)

    def text_of(value: Any) -> str:
        try:
            return texts[type(value), value]
        except (KeyError, TypeError):  # it may be unhashable
            raise ValueError(_mistyped(value, declared)) from None

    return TextForm(text_of, by_text.__getitem__)


def _constrained(annotation: Any, form: TextForm) -> TextForm:
    def text(value: Any) -> str:
        text = form.text(value)
        try:
            msgspec.convert(value, annotation)
        except msgspec.ValidationError as error:
            raise ValueError(f"does not meet its annotation: {error}") from None
        return text

    return TextForm(text, form.value)


def _annotated_with(annotation: Any) -> Iterable[Any]:
    return [meta for layer in layers(annotation) for meta in getattr(layer, "__metadata__", ())]


def _value_of(choice: Any) -> Any:
    return choice.value if isinstance(choice, Enum) else choice


def _mistyped(value: Any, declared: str) -> str:
    return f"is of type {name_of(type(value))}, and declared {declared}; convert it before the call"


def _textless(kind: Any) -> Textless:
    if type(None) in get_args(kind):
        problem = f"{name_of(kind)} allows None, which has no text in a key"
        return Textless(problem, "give it a type without None, and a default value if needed")
    if get_args(kind) and not isinstance(kind, type):
        problem = f"{name_of(kind)} has several types, and a text in a key does not tell which"
        return Textless(problem, "declare one type")
    return Textless(f"a {name_of(kind)} cannot be parsed from a key")


def _int_text(value: int) -> str:
    try:
        return int.__repr__(value)
    except ValueError:
        raise ValueError("has too many digits") from None


def _float_text(value: float) -> str:
    number = float(value) + 0.0  # -0.0 becomes 0.0
    if math.isnan(number):
        raise ValueError("is not a number")
    return repr(number)


def _decimal_text(value: Decimal) -> str:
    if not value.is_finite():
        raise ValueError("is not a finite number")
    if not value:
        return "0"
    if abs(value.adjusted()) > _DECIMAL_EXPONENT_MAX:
        raise ValueError("has too many digits")
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _timedelta_text(value: timedelta) -> str:
    text: str = msgspec.to_builtins(value)
    return text


_FORMS: tuple[tuple[type, Callable[[Any], str], Callable[[str], Any]], ...] = (
    (int, _int_text, int),
    (str, str.__str__, str),
    (bool, str, {"True": True, "False": False}.__getitem__),
    (float, _float_text, float),
    (Decimal, _decimal_text, Decimal),
    (UUID, UUID.__str__, UUID),
    (datetime, lambda value: datetime.isoformat(value, " "), datetime.fromisoformat),
    (date, date.isoformat, date.fromisoformat),
    (time, time.isoformat, time.fromisoformat),
    (timedelta, _timedelta_text, lambda text: msgspec.convert(text, timedelta)),
)

"""Keying: a loader's arguments to its key and tags, and a key back to the arguments.

Y1  The parameters of the loader and the fields of the key template are the same: otherwise two
    different calls would share an entry.
Y2  The arguments parsed from a key have the declared types; otherwise InvalidKey is raised.
Y3  A parameter whose type has no text form (A1) is refused when the cache is declared; an argument
    of another type is refused at the call.
Y4  A loader always gets the arguments parsed from the key, also when a caller waits for the load.
Y5  Each tuple of arguments has one key; any other spelling of it is refused.

The text form of an argument in a key:

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

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from inspect import Parameter
from typing import Any, Literal, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec
from msgspec import Meta, Struct

from ...schemas.errors import ConfigError, InvalidKey
from ...schemas.keys import KEY_BYTES_MAX, PLAIN_INT_MAX, KeyTemplate
from .introspection import bare, fits, layers, name_of, unwrapped

Maker = Callable[[Mapping[str, Any]], str]

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
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


class Keying:
    """The keys of one cache."""

    def __init__(
        self,
        loader: Callable[..., Awaitable[Any]],
        name: str,
        template: str,
        *,
        tags: Sequence[str] = (),
        depends_on: Sequence[str] = (),
        legacy_key: str = "",
    ) -> None:
        """``name`` is the cache's, for error messages.

        Raises:
            ConfigError, InvalidKey: the templates and the loader do not match.
        """
        self.name = name
        self.template = KeyTemplate(template)
        of_tags = [KeyTemplate(text, name="tag") for text in tags]
        of_keys = [KeyTemplate(text, name="depends_on") for text in depends_on]
        self._tags = [_maker(tag) for tag in of_tags]
        self._depends_on = [_maker(key) for key in of_keys]
        self._signature = inspect.signature(loader)
        self.parameters = tuple(self._signature.parameters)
        by_position = [each.kind in _BY_POSITION for each in self._signature.parameters.values()]
        self._positional = sum(by_position)  #: number of positional parameters; they come first
        hints = _hints_of(loader, name)
        forms = _forms_of(self._signature, hints, name)
        _check_fields(self.template, [*of_tags, *of_keys], self.parameters, name)
        self._forms = [forms[field] for field in self.template.fields]
        self._legacy = _legacy_of(legacy_key, self.parameters, name)
        self._in_order = self.template.fields == self.parameters and all(by_position)
        self._check_defaults()
        self.value_type: Any = hints.get("return", Any)
        self.annotated = "return" in hints
        self.key = self._fast_key(hints) or self._key_of

    def labels(self, fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The tags and the dependency keys of these fields."""
        return [tag(fields) for tag in self._tags], [key(fields) for key in self._depends_on]

    def legacy_name(self, key: str) -> str:
        """The name under which another service stored this key's value; raises InvalidKey."""
        assert self._legacy is not None
        return self._legacy.plain(self.fields(key))

    @property
    def labelled(self) -> bool:
        return bool(self._tags or self._depends_on)

    def arguments(self, key: str) -> Mapping[str, Any]:
        """The arguments of the loader for this key.

        Raises:
            InvalidKey: the key does not match the template or the declared types.
        """
        fields = self.fields(key)
        try:
            values = {
                field: form.value(fields[field])
                for field, form in zip(self.template.fields, self._forms, strict=True)
            }
            again = self._key_of_values(values)
        except Exception as error:  # a type's own code may raise anything
            raise InvalidKey("key", key, f"does not match {self.template.text}: {error}") from error
        if again != key:
            raise InvalidKey(
                "key", key, f"does not match {self.template.text}: its canonical form is {again}"
            )
        return {name: values[name] for name in self.parameters}

    def call(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The positional and the keyword arguments of a call of the loader."""
        names = self.parameters
        by_name = {name: values[name] for name in names[self._positional :]}
        return tuple([values[name] for name in names[: self._positional]]), by_name

    def fields(self, key: str) -> Mapping[str, str]:
        """The fields of the key, as text; raises InvalidKey."""
        fields = self.template.match(key)
        if fields is None:
            raise InvalidKey("key", key, f"does not match {self.template.text}")
        return fields

    def of_item(self, item: Any) -> str:
        """The key of one item of ``many``: the one argument, or the tuple of arguments.

        Raises:
            InvalidKey: the loader cannot be called with it.
        """
        args = item if isinstance(item, tuple) and len(self.parameters) > 1 else (item,)
        try:
            return self.key(*args)
        except TypeError as error:
            problem = f"does not fit {self.template.text}: {error}"
            raise InvalidKey(f"an item of {self.name},", repr(item), problem) from None

    def item(self, values: Mapping[str, Any]) -> Any:
        """The item that a batch loader gets: the one argument, or the tuple of arguments."""
        found = tuple(values[name] for name in self.parameters)
        return found[0] if len(found) == 1 else found

    def _key_of(self, *args: Any, **kwargs: Any) -> str:
        if self._in_order and not kwargs and len(args) == len(self._forms):
            return self._key_of_texts(args)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._key_of_values(bound.arguments)

    def _key_of_values(self, values: Mapping[str, Any]) -> str:
        return self._key_of_texts([values[field] for field in self.template.fields])

    def _key_of_texts(self, values: Sequence[Any]) -> str:
        texts = []
        for form, value in zip(self._forms, values, strict=True):
            try:
                texts.append(form.text(value))
            except (ValueError, OverflowError) as error:
                raise self._invalid(len(texts), value, str(error)) from None
        try:
            return self.template.of_texts(texts)
        except InvalidKey as error:
            raise InvalidKey(f"{error.name} of {self.name},", error.value, error.problem) from None

    def _invalid(self, position: int, value: Any, problem: str) -> InvalidKey:
        try:
            shown = value if type(value) is str else repr(value)
        except ValueError:  # an int of over 4,300 digits
            shown = "..."
        return InvalidKey(f"{self.template.fields[position]} of {self.name},", shown, problem)

    def _check_defaults(self) -> None:
        for name, form in zip(self.template.fields, self._forms, strict=True):
            default = self._signature.parameters[name].default
            if default is Parameter.empty:
                continue
            try:
                form.text(default)
            except (ValueError, OverflowError) as error:
                problem, fix = f"its default {error}", "give a default of the declared type"
                raise _refused(name, self.name, repr(default), problem, fix) from None

    def _fast_key(self, hints: Mapping[str, Any]) -> Callable[..., str] | None:
        if len(self.parameters) != 1 or not self._in_order:
            return None
        kind = hints[self.parameters[0]]
        make = _key_of_int if kind is int else _key_of_str if kind is str else None
        return make and make(self.template, self._key_of)


def _key_of_int(template: KeyTemplate, otherwise: Callable[..., str]) -> Callable[..., str]:
    """The key of a plain int without the general checks; part of every near hit."""
    head, tail = template.ends

    def key(*args: Any, **kwargs: Any) -> str:
        if len(args) == 1 and not kwargs:
            value = args[0]
            if type(value) is int and 0 <= value < PLAIN_INT_MAX:
                return f"{head}{value}{tail}"
        return otherwise(*args, **kwargs)

    return key


def _key_of_str(template: KeyTemplate, otherwise: Callable[..., str]) -> Callable[..., str]:
    """As ``_key_of_int``, for a str."""
    head, tail = template.ends
    length_max = KEY_BYTES_MAX - len((head + tail).encode())

    def key(*args: Any, **kwargs: Any) -> str:
        if len(args) == 1 and not kwargs:
            value = args[0]
            plain = type(value) is str and value.isalnum() and value.isascii()
            if plain and len(value) <= length_max:
                return f"{head}{value}{tail}"
        return otherwise(*args, **kwargs)

    return key


def _hints_of(loader: Callable[..., Any], name: str) -> Mapping[str, Any]:
    try:
        return get_type_hints(unwrapped(loader), include_extras=True)
    except Exception as error:  # such as a name imported for type checkers only
        raise ConfigError(
            setting=f"the annotations of {name}",
            value=str(getattr(unwrapped(loader), "__annotations__", {})),
            origin="the declaration of a cache",
            problem=f"cannot be evaluated: {type(error).__name__}: {error}",
            fix="import and define these names at run time, before the function",
        ) from error


def _forms_of(
    signature: inspect.Signature, hints: Mapping[str, Any], cache: str
) -> Mapping[str, TextForm]:
    """The text form of each parameter; raises ConfigError."""
    forms = {}
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        value, fix = str(parameter), f"annotate it, such as {name}: int"
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            problem, fix = "their number cannot be parsed from a key", "name each parameter"
        elif name in hints:
            try:
                forms[name] = text_form_of(hints[name])
            except Textless as error:
                raise _refused(name, cache, name_of(hints[name]), *error.args) from None
            continue
        elif position == 0 and name in ("self", "cls"):
            problem = "the object of a method cannot be parsed from a key"
            fix = "cache a function, or the method of one object: node.cached(...)(repo.method)"
        else:
            problem = "has no annotation, so background refreshes cannot parse it from a key"
        raise _refused(name, cache, value, problem, fix)
    return forms


def _refused(parameter: str, cache: str, value: str, problem: str, fix: str) -> ConfigError:
    return ConfigError(
        setting=f"the parameter {parameter} of {cache}",
        value=value,
        origin="the declaration of a cache",
        problem=problem,
        fix=fix,
    )


def _maker(template: KeyTemplate) -> Maker:
    if len(template.fields) != 1:
        return template.format
    (field,), of_one = template.fields, template.formatter()
    return lambda fields: of_one(fields[field])


def _legacy_of(legacy_key: str, parameters: Sequence[str], name: str) -> KeyTemplate | None:
    if not legacy_key:
        return None
    template = KeyTemplate(legacy_key, name="legacy_key")
    missing = set(parameters) ^ set(template.fields)
    if not missing:
        return template
    raise ConfigError(
        setting=f"legacy_key of {name}",
        value=template.text,
        origin="the declaration of a cache",
        problem=f"fields and parameters differ in {', '.join(sorted(missing))}",
        fix="name every parameter of the function in legacy_key, and no other",
    )


def _check_fields(
    template: KeyTemplate, labels: Sequence[KeyTemplate], parameters: Sequence[str], name: str
) -> None:
    missing = set(parameters) ^ set(template.fields)
    if missing:
        setting, wrong = "the key template", template
        problem = f"fields and parameters differ in {', '.join(sorted(missing))}"
        fix = "name every parameter of the function in the template, and no other"
    else:
        found = [label for label in labels if not set(label.fields) <= set(parameters)]
        if not found:
            return
        setting, wrong = "a tag or dependency", found[0]
        unknown = sorted(set(wrong.fields) - set(parameters))
        problem = f"no parameter of the function is named {', '.join(unknown)}"
        fix = f"use fields of {template.text} only"
    raise ConfigError(
        setting=f"{setting} of {name}",
        value=wrong.text,
        origin="the declaration of a cache",
        problem=problem,
        fix=fix,
    )


# Text forms


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

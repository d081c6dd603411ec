"""Keying: a loader's arguments to its key and tags, and a key back to the arguments.

Y1  The parameters of the loader and the fields of the key template are the same: otherwise two
    different calls would share an entry.
Y2  The arguments parsed from a key have the declared types; otherwise InvalidKey is raised.
Y3  A parameter whose type has no text form (see ``text_forms``) is refused when the cache is
    declared; an argument of another type is refused at the call.
Y4  A loader always gets the arguments parsed from the key, also when a caller waits for the load.
Y5  Each tuple of arguments has one key; any other spelling of it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, get_type_hints

from ...schemas.errors import ConfigError, InvalidKey
from ...schemas.keys import KEY_BYTES_MAX, PLAIN_INT_MAX, KeyTemplate
from .introspection import name_of, unwrapped
from .text_forms import TextForm, Textless, text_form_of

Maker = Callable[[Mapping[str, Any]], str]

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class Keying:
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

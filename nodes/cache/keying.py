"""From the arguments of a loader to its key, its tags, and back.

Y1  Every parameter of the loader is a field of the key template, and the other way round:
    otherwise two different calls would share an entry.
Y2  From a key, the loader gets arguments of the types that it declares, or there is InvalidKey.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, get_type_hints

import msgspec

from ...schemas.errors import ConfigError, InvalidKey
from ...schemas.keys import PLAIN_INT_MAX, KeyTemplate
from .async_functions import called
from .declaration import Declaration

__all__ = ["Keying"]

Maker = Callable[[Mapping[str, Any]], str]


class Keying:
    def __init__(
        self, loader: Callable[..., Awaitable[Any]], declared: Declaration, name: str
    ) -> None:
        self.name = name
        self.template = KeyTemplate(declared.template)
        tags = [KeyTemplate(text, name="tag") for text in declared.tags]
        behind = [KeyTemplate(text, name="depends_on") for text in declared.depends_on]
        self._tags = [_maker(tag) for tag in tags]
        self._behind = [_maker(key) for key in behind]
        self._signature = inspect.signature(loader)
        self.parameters = tuple(self._signature.parameters)
        self._plain = all(
            each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            for each in self._signature.parameters.values()
        )
        hints = get_type_hints(called(loader), include_extras=True)
        self._types = {name: hints.get(name, str) for name in self.parameters}
        self.value_type: Any = hints.get("return", Any)
        self.annotated = "return" in hints
        _check_fields(self.template, [*tags, *behind], self.parameters, name)
        self.key = self._fast_key() or self._slow_key

    def labels(self, fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The tags, and the keys depended on, of these fields."""
        return [tag(fields) for tag in self._tags], [key(fields) for key in self._behind]

    @property
    def labelled(self) -> bool:
        return bool(self._tags or self._behind)

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._plain and not kwargs and len(args) == len(self.parameters):
            return dict(zip(self.parameters, args, strict=True))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def arguments(self, key: str) -> Mapping[str, Any]:
        """What the loader was called with for this key.

        Raises:
            InvalidKey: it is no key of the template, or not of the declared types.
        """
        try:
            return {
                name: msgspec.convert(text, self._types[name], strict=False)
                for name, text in self.fields(key).items()
            }
        except msgspec.ValidationError as error:
            raise InvalidKey("key", key, f"is no key of {self.template.text}: {error}") from error

    def fields(self, key: str) -> Mapping[str, str]:
        """The fields of the key, as text; raises InvalidKey."""
        fields = self.template.match(key)
        if fields is None:
            raise InvalidKey("key", key, f"is no key of {self.template.text}")
        return fields

    def of_item(self, item: Any) -> tuple[str, tuple[Any, ...]]:
        """The key and the arguments of one item of many: an argument, or the tuple of them.

        Raises:
            InvalidKey: the loader could not be called with it.
        """
        args = item if isinstance(item, tuple) and len(self.parameters) > 1 else (item,)
        try:
            return self.key(*args), args
        except TypeError as error:
            problem = f"does not fit {self.template.text}: {error}"
            raise InvalidKey(f"an item of {self.name},", repr(item), problem) from None
        except InvalidKey as error:
            raise InvalidKey(f"{error.name} of {self.name},", error.value, error.problem) from None

    def item(self, values: Mapping[str, Any]) -> Any:
        """The one argument, or the tuple of them: how a batch loader is told of a key."""
        found = tuple(values[name] for name in self.parameters)
        return found[0] if len(found) == 1 else found

    def _slow_key(self, *args: Any, **kwargs: Any) -> str:
        return self.template.format(self.bound(args, kwargs))

    def _fast_key(self) -> Callable[..., str] | None:
        if len(self.parameters) != 1:
            return None
        of_one, slow = self.template.formatter(), self._slow_key
        head, tail = self.template.ends

        def key(*args: Any, **kwargs: Any) -> str:
            if len(args) == 1 and not kwargs:
                value = args[0]
                if type(value) is int and 0 <= value < PLAIN_INT_MAX:  # on every hit
                    return f"{head}{value}{tail}"
                return of_one(value)
            return slow(*args, **kwargs)

        return key


def _maker(template: KeyTemplate) -> Maker:
    if len(template.fields) != 1:
        return template.format
    (field,), of_one = template.fields, template.formatter()
    return lambda fields: of_one(fields[field])


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

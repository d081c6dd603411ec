"""The stored form of types that contain a pydantic model: the model's own JSON form, as msgpack.

    value -> dump (JSON form, by field name) -> msgpack -> JSON -> validate -> value

Pydantic round-trips reliably only through JSON (strict models, bytes as base64, NaN), so decoding
goes through JSON too. Published events use aliases; stored values use field names.

P1  Pydantic is imported only for a type that contains a model, and never before the application
    imports it.
P2  A type whose values cannot be decoded again is refused when it is declared: a secret, which is
    masked in JSON, an excluded field, or a msgspec Struct next to a model.
P3  A serializer and a validator that do not match are an error of the load, not a miss at each
    read: a value is decoded right after it is encoded (see ``codec``).
P4  Error messages never show a value.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from .introspection import is_struct, name_of, refused, types_in

if TYPE_CHECKING:
    from pydantic import ValidationError

_MARK = "__get_pydantic_core_schema__"
_VERSION = (2, 11)  #: the first version that can validate by field name
_SHOWN = re.compile(r"input_value=.*?, input_type", re.DOTALL)


def has_pydantic(of: Any) -> bool:
    """Whether a type is or contains a type that only pydantic decodes."""
    return "pydantic" in sys.modules and any(
        hasattr(each, _MARK) and not is_struct(each) for each in types_in(of)
    )


class PydanticForm:
    """Encodes to msgpack and decodes from it, for a type that ``has_pydantic``."""

    def __init__(self, of: Any) -> None:
        """Build the validator.

        Raises:
            ConfigError: pydantic is too old, or values of the type would be lost.
            Any exception of pydantic for a type that it cannot handle.
        """
        import pydantic
        import pydantic_core

        if tuple(map(int, pydantic.VERSION.split(".")[:2])) < _VERSION:
            raise refused(of, f"pydantic {pydantic.VERSION} is too old", "use 2.11 or newer")
        _check_unmixed(of)
        adapter = pydantic.TypeAdapter(of)
        _check_round_trip(of)  # after the adapter has resolved forward references
        self.published = PublishedForm(adapter.validate_json, pydantic.ValidationError)
        self._invalid = pydantic.ValidationError
        self._dump = adapter.dump_python
        self._validate = adapter.validate_json
        self._to_json = pydantic_core.to_json
        self._pack = msgspec.msgpack.Encoder().encode
        self._unpack = msgspec.msgpack.Decoder().decode

    def encode(self, value: Any) -> bytes:
        """The msgpack of a value.

        Raises:
            ValueError: it is not of the type.
            Any exception of the type's own code.
        """
        try:
            plain = self._dump(
                value, mode="json", round_trip=True, by_alias=False, warnings="error"
            )
        except ValueError as error:
            raise ValueError(_SHOWN.sub("input_type", str(error))) from None
        return self._pack(plain)

    def simple(self, value: Any) -> Any:
        """A value in its JSON form, by aliases, as in published events."""
        return self._dump(value, mode="json", round_trip=True, by_alias=True)

    def to_json(self, value: Any) -> bytes:
        """The result of ``simple``, as JSON."""
        return msgspec.json.encode(self.simple(value))

    def decode(self, payload: bytes) -> Any:
        """The value of msgpack bytes.

        Raises:
            msgspec.ValidationError: it is not of the type. Any exception of the type's own code.
        """
        text = self._to_json(self._unpack(payload), inf_nan_mode="constants")
        try:
            return self._validate(text, by_alias=False, by_name=True)
        except self._invalid as error:
            raise msgspec.ValidationError(_first(error)) from None


class PublishedForm:
    """Decodes the JSON of published events, by aliases."""

    def __init__(self, validate: Callable[[bytes], Any], invalid: type[ValidationError]) -> None:
        self._validate = validate
        self._invalid = invalid

    def decode(self, raw: bytes) -> Any:
        """As ``PydanticForm.decode``."""
        try:
            return self._validate(raw)
        except self._invalid as error:
            raise msgspec.ValidationError(_first(error)) from None


def _check_unmixed(of: Any) -> None:
    for kind in types_in(of):
        if is_struct(kind) and not hasattr(kind, _MARK):
            problem = f"{name_of(kind)} is a msgspec Struct next to or around a pydantic type"
            raise refused(of, problem, "use one kind: models and dataclasses, or Structs")


def _check_round_trip(of: Any) -> None:
    for kind in types_in(of):
        if hasattr(kind, "get_secret_value"):
            problem = f"{name_of(kind)} is masked when it is stored"
            raise refused(of, problem, "keep secrets out of cached values")
        fields = getattr(kind, "__pydantic_fields__", None)
        for name, field in (fields if isinstance(fields, dict) else {}).items():
            if field.exclude:
                problem = f"{name_of(kind)}.{name} is excluded when it is stored"
                raise refused(of, problem, "declare a model without that field")


def _first(error: ValidationError) -> str:
    """The first error in the format of msgspec: the message and its path."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in found["loc"])
    return f"{found['msg']} - at `${path}`" if path else found["msg"]

"""From a write to a row: values become columns, of the types that the table has.

I1  A row holds the fields of the value under their own names, the key columns, and the
    version of the write; nothing is renamed, guessed or left out.
I2  A field that is no column, or does not fit its column, is PoisonSinkError, which names
    field and table; no database was asked.
I3  Key columns come from the fields of the key where the value has none; where both have
    one, they agree, or the write is poison.

A value is a Struct, a dataclass, an attrs class or a mapping. Text is read as date, time,
UUID or number where the column is one. Moments with a zone are stored as UTC in columns
without; those without a zone are UTC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import ARRAY, JSON, Column, DateTime, Table
from sqlalchemy.types import NullType

from ...schemas.errors import PoisonSinkError
from .base import Write

__all__ = ["Identity", "Row", "Rows"]

Row = dict[str, object]
Identity = tuple[object, ...]
Reader = Callable[[Any], object]

_KEPT = (bytes, bytearray, date, datetime, time, timedelta, Decimal, UUID)
_CHECKED = frozenset({bool, int, float, str, bytes, *_KEPT})
_MISFITS = (TypeError, ValueError, OverflowError, msgspec.MsgspecError)


class Rows:
    """Reads writes for one table."""

    def __init__(self, table: Table, key: tuple[str, ...], version_column: str) -> None:
        self._table = table.fullname
        self._key = key
        self._version_column = version_column
        self._types = {column.name: _python_type(column) for column in table.columns}
        self._readers = {
            column.name: _reader(column, self._types[column.name])
            for column in table.columns
            if column.name != version_column
        }

    def row(self, write: Write[Any]) -> Row:
        """The row to store; for a delete only its key and version."""
        row = {} if write.value is None else self._columns(write)
        for name in self._key:
            row[name] = self._key_column(write, name, row)
        row[self._version_column] = write.version
        return row

    def identity(self, row: Row) -> Identity:
        return tuple(row[name] for name in self._key)

    def _columns(self, write: Write[Any]) -> Row:
        row: Row = {}
        for name, value in _fields(write, self._table):
            reader = self._readers.get(name)
            if reader is not None:
                row[name] = None if value is None else self._read(write, name, reader, value)
            elif name != self._version_column:
                raise self._poison(write, name, "is no column of the table")
        return row

    def _key_column(self, write: Write[Any], name: str, row: Row) -> object:
        given, text = row.get(name), write.params.get(name)
        if text is None:
            if given is None:
                raise self._poison(write, name, "is in neither the value nor the key")
            return given
        kind = self._types[name]
        try:
            named: object = text if kind is None else msgspec.convert(text, kind, strict=False)
        except _MISFITS as error:
            raise self._poison(write, name, f"of the key does not fit: {error}") from error
        if given is not None and given != named:
            raise self._poison(write, name, f"is {given!r} in the value, {named!r} in the key")
        return named

    def _read(self, write: Write[Any], name: str, reader: Reader, value: object) -> object:
        try:
            return reader(value)
        except _MISFITS as error:
            raise self._poison(write, name, f"does not fit its column: {error}") from error

    def _poison(self, write: Write[Any], name: str, problem: str) -> PoisonSinkError:
        return PoisonSinkError(f"{write.key}: field {name!r} {problem} (table {self._table})")


def _fields(write: Write[Any], table: str) -> list[tuple[str, Any]]:
    value = write.value
    if isinstance(value, Mapping):
        return list(value.items())
    kind: type = type(value)
    names = _field_names(kind)
    if names is None:
        raise PoisonSinkError(f"{write.key}: a {kind.__name__} has no columns (table {table})")
    named = ((name, getattr(value, name)) for name in names)
    return [(name, field) for name, field in named if field is not msgspec.UNSET]


@lru_cache(maxsize=256)
def _field_names(kind: type) -> tuple[str, ...] | None:
    # Not to_builtins: it leaves out defaults where the Struct says so, and a field that
    # goes back to its default must reach the row as well.
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    attributes = getattr(kind, "__attrs_attrs__", None)
    return None if attributes is None else tuple(field.name for field in attributes)


def _python_type(column: Column[Any]) -> type | None:
    """The type that values of the column have; None: it takes what it gets."""
    if isinstance(column.type, JSON | ARRAY | NullType):
        return None
    try:
        kind = column.type.python_type
    except NotImplementedError:
        return None
    return kind if kind in _CHECKED else None


def _reader(column: Column[Any], kind: type | None) -> Reader:
    if isinstance(column.type, JSON):
        return _document
    if isinstance(column.type, ARRAY):
        return _builtin
    if kind is None:
        return _scalar
    if kind is datetime:
        zoned = isinstance(column.type, DateTime) and column.type.timezone
        return _zoned if zoned else _zoneless
    return _exact_reader(kind)


def _exact_reader(kind: type) -> Reader:
    def read(value: object) -> object:
        if type(value) is kind:
            return value
        if kind is int and type(value) is bool:
            return int(value)  # SQLite has no other column for it
        return msgspec.convert(_builtin(value), kind)

    return read


def _document(value: object) -> object:
    return msgspec.to_builtins(value, str_keys=True)


def _builtin(value: object) -> object:
    return msgspec.to_builtins(value, builtin_types=_KEPT)


def _scalar(value: object) -> object:
    plain = _builtin(value)
    if isinstance(plain, list | tuple | dict | set | frozenset):
        raise TypeError(f"a {type(value).__name__} is no single value")
    return plain


def _moment(value: object) -> datetime:
    moment: datetime = msgspec.convert(_builtin(value), datetime)
    return moment


def _zoned(value: object) -> datetime:
    moment = _moment(value)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _zoneless(value: object) -> datetime:
    moment = _moment(value)
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)

"""The tables of a sink: found and checked before anything is written.

I1  ``found`` is a table that can be written behind: the key is unique, the version column
    holds 64 bits. Anything else is FatalSinkError, which says what to do.
I2  ``progress_table`` is the same for all sinks of a database; it is made where it is
    missing, and left as it is where it exists.

Tables of the application are never created or altered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    MetaData,
    Numeric,
    Table,
    Text,
    UniqueConstraint,
    inspect,
)
from sqlalchemy.exc import NoSuchTableError
from sqlalchemy.types import NullType

from ...schemas.errors import FatalSinkError

__all__ = ["exists", "found", "progress_table"]


def found(connection: Connection, name: str, key: tuple[str, ...], version_column: str) -> Table:
    """The table of this name, checked."""
    schema, bare = _split(name)
    try:
        table = Table(bare, MetaData(), schema=schema, autoload_with=connection, resolve_fks=False)
    except NoSuchTableError:
        raise FatalSinkError(
            f"there is no table {name}; create it, with columns for the fields of the value, "
            f"{_listed(key)} as its primary key, and {version_column} BIGINT"
        ) from None
    _check_key(table, key)
    _check_version_column(table, version_column, connection.dialect.name)
    for column in table.columns:
        if hasattr(column.type, "none_as_null"):
            column.type.none_as_null = True  # None is NULL in a JSON column too
    return table


def progress_table(name: str) -> Table:
    schema, bare = _split(name)
    return Table(
        bare,
        MetaData(),
        Column("sink", Text, primary_key=True),
        Column("shard", Integer, primary_key=True, autoincrement=False),
        Column("epoch", BigInteger, nullable=False),
        Column("ms", BigInteger, nullable=False),  #: of the position, as is seq
        Column("seq", BigInteger, nullable=False),
        schema=schema,
    )


def exists(connection: Connection, table: Table) -> bool:
    return inspect(connection).has_table(table.name, schema=table.schema)


def _check_key(table: Table, key: tuple[str, ...]) -> None:
    for name in key:
        if name not in table.c:
            raise FatalSinkError(
                f"table {table.fullname} has no column {name}; add it, or name the key columns "
                f"in key=(...)"
            )
    if set(key) not in _unique_sets(table):
        raise FatalSinkError(
            f"{_listed(key)} is not unique in table {table.fullname}; make it the primary key, "
            f"or add a unique constraint"
        )


def _unique_sets(table: Table) -> list[set[str]]:
    sets = [{column.name for column in table.primary_key.columns}]
    unique = (each for each in table.constraints if isinstance(each, UniqueConstraint))
    sets.extend({column.name for column in constraint.columns} for constraint in unique)
    sets.extend(_columns_of(index) for index in table.indexes if index.unique)
    return sets


def _columns_of(index: Index) -> set[str]:
    wheres = (index.dialect_options[name].get("where") for name in ("postgresql", "sqlite"))
    if any(where is not None for where in wheres) or len(index.columns) != len(index.expressions):
        return set()  # such an index does not say that every row is unique
    return {column.name for column in index.columns}


def _check_version_column(table: Table, name: str, dialect: str) -> None:
    if name not in table.c:
        raise FatalSinkError(
            f"table {table.fullname} has no column {name}; "
            f"ALTER TABLE {table.fullname} ADD COLUMN {name} BIGINT"
        )
    kind: Any = table.c[name].type
    if dialect == "sqlite":
        wide = isinstance(kind, Integer | Numeric | NullType)  # every integer has 64 bits there
    else:
        wide = isinstance(kind, BigInteger | Numeric)
    if not wide:
        raise FatalSinkError(
            f"column {name} of table {table.fullname} is {kind}, but versions are integers of "
            f"64 bits; ALTER TABLE {table.fullname} ALTER COLUMN {name} TYPE BIGINT"
        )


def _split(name: str) -> tuple[str | None, str]:
    schema, _, bare = name.rpartition(".")
    return schema or None, bare


def _listed(names: Iterable[str]) -> str:
    return "(" + ", ".join(names) + ")"

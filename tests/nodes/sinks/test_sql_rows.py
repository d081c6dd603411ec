"""How values become rows; no database is asked."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import attrs
import msgspec
import pytest
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Float,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Time,
    Uuid,
)
from sqlalchemy.dialects import postgresql

from forebay.nodes.sinks.base import Write
from forebay.nodes.sinks.sql_rows import Row, Rows
from forebay.schemas.errors import PoisonSinkError

TABLE = Table(
    "flights",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("day", Date),
    Column("departs", DateTime),
    Column("seen", DateTime(timezone=True)),
    Column("at", Time),
    Column("fare", Numeric),
    Column("miles", Float),
    Column("late", Boolean),
    Column("gate", String),
    Column("notes", JSON),
    Column("stops", postgresql.ARRAY(String)),
    Column("ticket", Uuid),
    Column("version", BigInteger),
)
ROWS = Rows(TABLE, ("id",), "version")
NOON = datetime(2013, 1, 1, 12, tzinfo=UTC)
ZONELESS = NOON.replace(tzinfo=None)
TICKET = UUID(int=7)
HERE = timezone(timedelta(hours=-5))


def row_of(value: object, params: Mapping[str, str] | None = None) -> Row:
    named = {"id": "7"} if params is None else params
    return ROWS.row(Write(key="flight:7", params=named, value=value, version=1))


class Gate(enum.Enum):
    A1 = "A1"


class AsStruct(msgspec.Struct, rename="camel", omit_defaults=True):
    gate: str = "A1"
    late: bool | msgspec.UnsetType = msgspec.UNSET


@dataclass
class AsDataclass:
    gate: str = "A1"


@attrs.define
class AsAttrs:
    gate: str = "A1"


@pytest.mark.parametrize("value", [AsStruct(), AsDataclass(), AsAttrs(), {"gate": "A1"}])
def test_fields_become_columns_by_their_own_names(value: object) -> None:
    """I1: whatever kind of object it is, and however it looks on the wire."""
    assert row_of(value) == {"gate": "A1", "id": 7, "version": 1}


@pytest.mark.parametrize(
    "name,value,stored",
    [
        ("gate", Gate.A1, "A1"),
        ("gate", None, None),
        ("late", True, True),
        ("miles", 3, 3.0),
        ("fare", 12, Decimal(12)),
        ("fare", "12.50", Decimal("12.50")),
        ("day", "2013-01-01", date(2013, 1, 1)),
        ("day", date(2013, 1, 1), date(2013, 1, 1)),
        ("at", "05:15:00", time(5, 15)),
        ("ticket", str(TICKET), TICKET),
        ("departs", "2013-01-01T12:00:00", ZONELESS),
        ("departs", NOON.astimezone(HERE), ZONELESS),
        ("departs", "2013-01-01T07:00:00-05:00", ZONELESS),
        ("seen", ZONELESS, NOON),
        ("seen", NOON.astimezone(HERE), NOON),
        ("notes", {"by": date(2013, 1, 1), 1: [AsStruct()]}, {"by": "2013-01-01", "1": [{}]}),
        ("stops", ["JFK", Gate.A1], ["JFK", "A1"]),
        ("version", "of the application", 1),
    ],
)
def test_values_take_the_type_of_their_column(name: str, value: object, stored: object) -> None:
    """I1: types are those of the table; moments are moved to UTC where the zone is not kept."""
    row = row_of({name: value})
    assert row[name] == stored
    assert type(row[name]) is type(stored)


@pytest.mark.parametrize(
    "name,value",
    [
        ("colour", "red"),
        ("gate", 7),
        ("gate", b"A1"),
        ("gate", ["A1"]),
        ("late", 1),
        ("day", "yesterday"),
        ("day", NOON),
        ("departs", "soon"),
        ("miles", "3"),
        ("fare", "much"),
        ("notes", object()),
    ],
)
def test_misfit_is_poison_that_names_field_and_table(name: str, value: object) -> None:
    """I2: the dead letter says which field of what is wrong."""
    with pytest.raises(PoisonSinkError, match=f"flight:7: field '{name}'.*table flights"):
        row_of({name: value})


@pytest.mark.parametrize("value", [7, "text", [1], NOON])
def test_value_without_fields_is_poison(value: object) -> None:
    """I2: a scalar or a list has no columns."""
    with pytest.raises(PoisonSinkError, match="has no columns"):
        row_of(value)


def test_key_may_come_from_the_value_alone() -> None:
    """I3: a key template need not hold the key columns."""
    assert row_of({"id": 9}, {})["id"] == 9


@pytest.mark.parametrize(
    "value,params,problem",
    [
        ({"id": 8}, {"id": "7"}, "is 8 in the value, 7 in the key"),
        ({}, {"id": "seven"}, "of the key does not fit"),
        ({}, {"id": "007"}, "of the key does not fit"),
        ({}, {}, "neither the value nor the key"),
        (None, {}, "neither the value nor the key"),
    ],
)
def test_key_that_is_missing_or_contradicts_is_poison(
    value: object, params: dict[str, str], problem: str
) -> None:
    """I3: no row is written that is not that of the key."""
    with pytest.raises(PoisonSinkError, match=problem):
        row_of(value, params)


def test_delete_has_key_and_version_only() -> None:
    """A deleted value has no columns."""
    assert row_of(None) == {"id": 7, "version": 1}


def test_column_of_unknown_type_takes_single_values() -> None:
    """SQLite has columns without a type: they take what SQLite takes."""
    untyped: Any = Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("x"))
    rows = Rows(untyped, ("id",), "version")
    one = Write(key="k", params={}, value={"id": 1, "x": Gate.A1}, version=1)
    assert rows.row(one) == {"id": 1, "x": "A1", "version": 1}
    many = Write(key="k", params={}, value={"id": 1, "x": [1]}, version=1)
    with pytest.raises(PoisonSinkError, match=r"'x'.*no single value"):
        rows.row(many)

"""Copies of exceptions for several callers."""

from __future__ import annotations

import socket
from typing import Self

import msgspec
import pytest
from aiohttp import ClientConnectorError
from aiohttp.client_reqrep import ConnectionKey
from sqlalchemy.exc import IntegrityError

from forebay.nodes.cache.failures import own_copy
from forebay.schemas.errors import (
    Backpressure,
    ConfigError,
    Disconnected,
    LoaderError,
    TimedOut,
    Unavailable,
)


class Picky(Exception):
    made = 0

    def __init__(self, *, number: int, text: str) -> None:
        super().__init__(f"{text} {number}")
        self.number = number
        Picky.made += 1


class Slotted(OSError):
    __slots__ = ("extra", "unset")

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.extra = 7


class Frozen(Exception):
    def __new__(cls, *args: object) -> Self:
        if args != ("only so",):
            raise TypeError("not like this")
        return super().__new__(cls)


KEY = ConnectionKey("db", 5432, False, True, None, None, None)
ERRORS = [
    ValueError("a", 1),
    KeyError("k"),
    FileNotFoundError(2, "No such file", "there"),
    ConnectionResetError(104, "reset"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    TimeoutError(),
    socket.gaierror(-2, "unknown"),
    ExceptionGroup("both", [ValueError(1), KeyError(2)]),
    msgspec.ValidationError("Expected int"),
    IntegrityError("INSERT", {"a": 1}, ValueError("dup")),
    ClientConnectorError(KEY, OSError(111, "refused")),
    Picky(number=3, text="no"),
    Slotted(5, "io"),
    Unavailable("gone", outcome_unknown=True),
    Disconnected("lost"),
    TimedOut(250),
    Backpressure("writes", 5, 5),
    LoaderError("product", "product:1", "no row"),
    ConfigError(setting="a", value="b", origin="c", problem="d", fix="e"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_copy_is_equal_and_another(error: Exception) -> None:
    """Type, text and fields are the same, so whoever catches it can decide as before."""
    made = Picky.made
    twin = own_copy(error, "product", "product:1")
    assert twin is not error
    assert type(twin) is type(error)
    assert (str(twin), repr(twin), twin.args) == (str(error), repr(error), error.args)
    assert vars(twin) == vars(error)
    assert (twin.__traceback__, twin.__context__, twin.__cause__) == (None, None, None)
    assert Picky.made == made, "a copy runs no code of its class"


def test_fields_of_builtin_errors_are_there() -> None:
    """They are not among the attributes."""
    twin = own_copy(FileNotFoundError(2, "No such file", "there"), "", "")
    assert isinstance(twin, FileNotFoundError)
    assert (twin.errno, twin.filename) == (2, "there")
    slotted = own_copy(Slotted(5, "io"), "", "")
    assert isinstance(slotted, Slotted)
    assert (slotted.errno, slotted.extra) == (5, 7)


def test_what_cannot_be_made_again_becomes_a_loader_error() -> None:
    """It says what it was."""
    error = Frozen("only so")
    error.args = ("changed",)
    twin = own_copy(error, "product", "product:1")
    assert isinstance(twin, LoaderError)
    assert (twin.cache, twin.key, twin.problem) == ("product", "product:1", "Frozen: changed")

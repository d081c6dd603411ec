"""What a database's error means for the worker that asked for the write.

I1  The verdict rests on the class of the error, the SQLSTATE or SQLite's result code;
    never on its text.
I2  What is not recognised is transient: a paused sink loses nothing, while a batch that is
    wrongly called poison goes to the dead letters.
I3  The sentence holds the driver's first line only: no SQL, no parameters, no password.
I4  A statement that ran out of time, or a lock that another transaction holds, is busy: other
    rows may well be stored. Deadlocks, serialization failures and too many connections are
    transient: the whole batch is tried again soon. A busy SQLite, which locks a whole file, is
    transient, too.

Pure: nothing here talks to a database.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import exc

from ...schemas.errors import (
    BusySinkError,
    FatalSinkError,
    PoisonSinkError,
    SinkError,
    TransientSinkError,
)
from ...schemas.masking import escape_controls, mask_urls_in

__all__ = ["fault_of", "summary_of", "translated"]

_TEXT_CHARS_MAX = 300
Fault = type[SinkError]

#: SQLSTATE, or the class that its first two characters are; the longer one counts.
_BY_SQLSTATE: dict[str, Fault] = {
    "21": PoisonSinkError,  # cardinality: one row named twice
    "22": PoisonSinkError,  # data: out of range, too long, not valid in the encoding
    "23": PoisonSinkError,  # integrity constraints
    "44": PoisonSinkError,  # refused by the check of a view
    "54": PoisonSinkError,  # a limit of the server: the row or its index entry is too large
    "P0": PoisonSinkError,  # refused by a trigger
    "55P03": BusySinkError,  # lock_timeout
    "57014": BusySinkError,  # statement_timeout, or cancelled by somebody
    "25006": FatalSinkError,  # read-only
    "28": FatalSinkError,  # authentication
    "3D": FatalSinkError,  # no such database
    "3F": FatalSinkError,  # no such schema
    "42": FatalSinkError,  # no such table or column, or no right to it
}
_FIX_BY_SQLSTATE = {
    "25006": "connect to the primary",
    "28": "check user name and password",
    "3D": "create the database, or correct its name in the URL",
    "3F": "create the schema, or correct its name",
    "42": "create what is missing, and open the sink again",
    "42501": "grant SELECT, INSERT, UPDATE and DELETE on the table and on the progress table",
}
#: Primary result codes; see https://sqlite.org/rescode.html
_BY_SQLITE_CODE: dict[int, Fault] = {
    18: PoisonSinkError,  # TOOBIG
    19: PoisonSinkError,  # CONSTRAINT
    20: PoisonSinkError,  # MISMATCH
    25: PoisonSinkError,  # RANGE
    1: FatalSinkError,  # ERROR: no such table or column
    3: FatalSinkError,  # PERM
    8: FatalSinkError,  # READONLY
    11: FatalSinkError,  # CORRUPT
    14: FatalSinkError,  # CANTOPEN
    23: FatalSinkError,  # AUTH
    26: FatalSinkError,  # NOTADB
}
_FIX_BY_SQLITE_CODE = {
    1: "create what is missing, and open the sink again",
    8: "make the file and its directory writable",
    14: "check the path, and that its directory is writable",
    11: "restore the file from a backup",
    26: "name a file that is an SQLite database",
}
_BY_CLASS: tuple[tuple[type[BaseException], Fault], ...] = (
    (exc.IntegrityError, PoisonSinkError),
    (exc.DataError, PoisonSinkError),
    (exc.DBAPIError, TransientSinkError),
    (exc.StatementError, PoisonSinkError),  # a value that its column's type cannot take
    (exc.NoSuchTableError, FatalSinkError),
    (exc.NoSuchColumnError, FatalSinkError),
    (exc.ArgumentError, FatalSinkError),
    (exc.CompileError, FatalSinkError),
    (exc.SQLAlchemyError, TransientSinkError),
    (OSError, TransientSinkError),  # also TimeoutError
    (TypeError, PoisonSinkError),
    (ValueError, PoisonSinkError),
    (OverflowError, PoisonSinkError),
)


def translated(error: Exception, where: str) -> SinkError:
    """The error to raise instead; the caller adds ``from error``."""
    fault, fix = fault_of(error)
    text = f"{where}: {summary_of(error)}"
    return fault(f"{text}; {fix}" if fix else text)


def fault_of(error: BaseException) -> tuple[Fault, str]:
    """The class of the error for the worker, and for a fatal one how to get out of it."""
    for link in _chain(error):
        sqlstate = getattr(link, "sqlstate", None)
        if isinstance(sqlstate, str):
            return _by_sqlstate(sqlstate)
        code = getattr(link, "sqlite_errorcode", None)
        if isinstance(code, int):
            primary = code & 0xFF
            fault = _BY_SQLITE_CODE.get(primary, TransientSinkError)
            return fault, _FIX_BY_SQLITE_CODE.get(primary, "")
    return _by_class(error), ""


def summary_of(error: BaseException) -> str:
    """The first line of what the driver says, or its class if it says nothing."""
    *_, innermost = _chain(error)
    lines = str(innermost).strip().splitlines()
    line = lines[0] if lines else type(innermost).__name__
    shown = escape_controls(mask_urls_in(line))
    return shown if len(shown) <= _TEXT_CHARS_MAX else shown[: _TEXT_CHARS_MAX - 3] + "..."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """SQLAlchemy's error, its adapter's, and the driver's own."""
    yield error
    if isinstance(error, exc.StatementError) and error.orig is not None:
        yield error.orig
        if error.orig.__cause__ is not None:
            yield error.orig.__cause__


def _by_sqlstate(sqlstate: str) -> tuple[Fault, str]:
    short = sqlstate[:2]
    fault = _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get(short, TransientSinkError)
    if fault is not FatalSinkError:
        return fault, ""
    return fault, _FIX_BY_SQLSTATE.get(sqlstate) or _FIX_BY_SQLSTATE.get(short, "")


def _by_class(error: BaseException) -> Fault:
    *_, innermost = _chain(error)
    if isinstance(error, exc.DBAPIError) and isinstance(innermost, TypeError | ValueError):
        return PoisonSinkError  # asyncpg could not encode a parameter
    for kind, fault in _BY_CLASS:
        if isinstance(error, kind):
            return fault
    return TransientSinkError

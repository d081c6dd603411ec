"""Commands that must not run on a connection that many callers share.

A command that blocks delays the replies of all callers. A command that changes the mode of the
connection, or sends no reply or more than one, would deliver replies to the wrong callers. Every
call pays for one set lookup in ``GUARDED``; only the commands in it are checked further. This
protects from mistakes, not from malice: odd spellings such as ``SuBsCrIbE`` pass. Scripts cannot
run these commands.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...schemas.errors import NotShareable

__all__ = ["ALONE", "BLOCKING_READS", "GUARDED", "check_shareable"]

_HOLDS_UP = "holds up the replies of everybody else"
_CHANGES = "changes the connection for everybody else"
_KINDS = {
    "BLPOP BRPOP BRPOPLPUSH BLMOVE BLMPOP BZPOPMIN BZPOPMAX BZMPOP WAIT WAITAOF": _HOLDS_UP,
    "SUBSCRIBE PSUBSCRIBE SSUBSCRIBE UNSUBSCRIBE PUNSUBSCRIBE SUNSUBSCRIBE": _CHANGES,
    "SELECT AUTH HELLO RESET QUIT ASKING READONLY READWRITE": _CHANGES,
    "MULTI EXEC DISCARD WATCH UNWATCH": "opens a transaction for everybody else",
    "MONITOR SYNC PSYNC": "has replies without end",
}
_PROBLEMS = {name: problem for names, problem in _KINDS.items() for name in names.split()}
BLOCKING_READS = ("XREAD", "XREADGROUP")
ALONE = (*BLOCKING_READS, "WAIT")  #: may hold up the connection of whoever has it alone
_CLIENT_MODES = ("REPLY", "TRACKING", "CACHING", "NO-TOUCH")


def _spellings(name: str) -> tuple[str | bytes, ...]:
    return name, name.lower(), name.encode(), name.lower().encode()


GUARDED = frozenset(
    spelling for name in (*_PROBLEMS, *BLOCKING_READS, "CLIENT") for spelling in _spellings(name)
)


def check_shareable(args: Sequence[str | bytes | int | float]) -> None:
    """Raise NotShareable for a command that needs a connection of its own."""
    name, *rest = (_upper(arg) for arg in args[:6])
    if problem := _PROBLEMS.get(name):
        raise NotShareable(name, problem)
    if name in BLOCKING_READS and "BLOCK" in rest:
        raise NotShareable(f"{name} BLOCK", _HOLDS_UP)
    if name == "CLIENT" and rest and rest[0] in _CLIENT_MODES:
        raise NotShareable(f"CLIENT {rest[0]}", _CHANGES)


def _upper(arg: str | bytes | int | float) -> str:
    return (arg.decode("ascii", "replace") if isinstance(arg, bytes) else str(arg)).upper()

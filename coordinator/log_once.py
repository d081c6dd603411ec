"""Logs a lasting failure once a minute, however often it occurs.

F1  The first failure of a kind is a warning. While it lasts, the kind is logged as a warning every
    ``EVERY_S``, with ``left_out``, the number of lines in between; those have level debug.
F2  A kind is an event and a class of error. All errors of an unreachable server are one kind; each
    code with which the server refuses is another.
F3  ``over`` ends all failures: the next one of any kind is a warning at once.
F4  A loop that fails only because there is no connection, or because the breaker is open, logs this
    once: the connection (``connection=True``) repeats it for all.
F5  At most ``_KINDS_MAX`` kinds are remembered; a further one replaces the oldest.

Each loop has its own. ``failing`` is for health: start, count and last error of the failure.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ..schemas.errors import BreakerOpen, Disconnected, ServerRefused, Unavailable
from .clock import Clock, SystemClock

__all__ = ["EVERY_S", "Failing", "LogOnce"]

EVERY_S = 60.0
_KINDS_MAX = 100


class Failing(Struct, frozen=True):
    """A lasting failure."""

    since: float  #: of the monotonic clock
    times: int
    error: str


class _Kind:
    __slots__ = ("left_out", "said_at")

    def __init__(self, said_at: float) -> None:
        self.said_at = said_at
        self.left_out = 0


class LogOnce:
    __slots__ = ("_clock", "_connection", "_kinds", "failing")

    def __init__(self, clock: Clock | None = None, *, connection: bool = False) -> None:
        self.failing: Failing | None = None
        self._clock = clock or SystemClock()
        self._connection = connection
        self._kinds: dict[str, _Kind] = {}

    def __repr__(self) -> str:
        return f"<LogOnce {len(self._kinds)} kinds>"

    def say(
        self,
        log: Any,
        event: str,
        error: BaseException,
        *,
        level: str = "warning",
        **fields: object,
    ) -> None:
        """One line, with the error's text; ``log`` is a structlog logger."""
        now, kind = self._clock.monotonic(), f"{event} {_class_of(error)}"
        before, found = self.failing, self._kinds.get(kind)
        since, times = (before.since, before.times + 1) if before else (now, 1)
        self.failing = Failing(since, times, str(error))
        if found is not None and (
            now - found.said_at < EVERY_S or self._told_by_the_connection(error)
        ):
            found.left_out += 1
            log.debug(event, error=str(error), **fields)
            return
        if found is not None and found.left_out:
            fields["left_out"] = found.left_out
        self._kinds.pop(kind, None)
        if len(self._kinds) >= _KINDS_MAX:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[kind] = _Kind(now)
        getattr(log, level)(event, error=str(error), **fields)

    def _told_by_the_connection(self, error: BaseException) -> bool:
        return isinstance(error, Disconnected | BreakerOpen) and not self._connection

    def over(self) -> None:
        self.failing = None
        self._kinds.clear()


def _class_of(error: BaseException) -> str:
    if isinstance(error, ServerRefused):
        return error.code
    return (Unavailable if isinstance(error, Unavailable) else type(error)).__name__

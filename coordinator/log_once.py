"""Logs a failure that goes on once a minute, however often it happens.

F1  The first failure of a kind is a warning. While it goes on, the kind is a warning again every
    ``EVERY_S``, with ``left_out``, the number of lines in between; those are at level debug.
F2  A kind is an event and a class of error. All that says that the server cannot be reached is one
    kind; each code with which the server refuses is another.
F3  ``over`` ends all failures: the next one of any kind is a warning at once.
F4  At most ``_KINDS_MAX`` kinds are remembered; one more replaces the oldest.

Each loop has one of its own.
"""

from __future__ import annotations

from typing import Any

from ..schemas.errors import ServerRefused, Unavailable
from .clock import Clock, SystemClock

__all__ = ["EVERY_S", "LogOnce"]

EVERY_S = 60.0
_KINDS_MAX = 100


class _Kind:
    __slots__ = ("left_out", "said_at")

    def __init__(self, said_at: float) -> None:
        self.said_at = said_at
        self.left_out = 0


class LogOnce:
    __slots__ = ("_clock", "_kinds")

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
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
        found = self._kinds.get(kind)
        if found is not None and now - found.said_at < EVERY_S:
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

    @property
    def failing(self) -> bool:
        return bool(self._kinds)

    def over(self) -> None:
        self._kinds.clear()


def _class_of(error: BaseException) -> str:
    if isinstance(error, ServerRefused):
        return error.code
    return (Unavailable if isinstance(error, Unavailable) else type(error)).__name__

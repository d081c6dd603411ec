"""Failures that repeat: an outage is one warning for each thing that it stops, not one a round.

F1  The first failure of a kind is a warning; while nothing else happens, the same again is a
    matter for debugging. ``over`` ends it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FirstOfKind"]


class FirstOfKind:
    __slots__ = ("_kind",)

    def __init__(self) -> None:
        self._kind: type[BaseException] | None = None

    def __repr__(self) -> str:
        return f"<FirstOfKind {self._kind.__name__ if self._kind else '-'}>"

    def say(self, log: Any, event: str, error: BaseException, **fields: object) -> None:
        """One line, with the error's text; ``log`` is a structlog logger."""
        say = log.debug if type(error) is self._kind else log.warning
        self._kind = type(error)
        say(event, error=str(error), **fields)

    def over(self) -> None:
        self._kind = None

"""Tells those who asked, at once and in order.

I1  Listeners are called synchronously, in the order in which they were added; they must
    not block. One that raises is logged and costs the others nothing.
I2  ``changed`` returns at the next ``tell`` or ``wake`` after it was called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVarTuple

import anyio
import structlog

__all__ = ["Listeners"]

log = structlog.get_logger(__name__)

Ts = TypeVarTuple("Ts")


class Listeners(Generic[*Ts]):
    __slots__ = ("_listeners", "_name", "_told")

    def __init__(self, name: str) -> None:
        self._name = name
        self._listeners: list[Callable[[*Ts], None]] = []
        self._told: anyio.Event | None = None  # there is one only if somebody waits

    def add(self, listener: Callable[[*Ts], None]) -> Callable[[], None]:
        """Have it called from now on; returns how to end that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, *args: *Ts) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(*args)
            except Exception:
                log.exception("listener.failed", teller=self._name)
        self.wake()

    def wake(self) -> None:
        """Let those who wait look again, though there is nothing to tell."""
        if self._told is not None:
            self._told.set()
            self._told = None

    async def changed(self) -> None:
        if self._told is None:
            self._told = anyio.Event()
        await self._told.wait()

"""Those who wait for replies: in what shape, since when, and until when.

A slot stands for one command; its waiter is a future, or a ``Batch`` that fills all the
slots of one ``call_many``. ``Parked`` holds calls that nothing was written of yet.

I1  A waiter is told once; whoever is done already is passed over.
I2  A batch resolves when its last reply is in, with the replies in their order; a
    refused command is a ServerRefused in its place, any other error is the batch's.
I3  What leaves ``Parked`` in order to be sent still has someone waiting for it.

No clock and no connection here: callers bring the time and do the sending.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ...schemas.errors import ServerRefused, TimedOut

__all__ = ["Arg", "Batch", "Due", "Parked", "Reply", "Slot", "Waiter", "expire"]

Arg = str | bytes | int | float
Reply = Any  # bytes | int | list | None; typed by whoever sent the command


class Waiter(Protocol):
    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: Any, /) -> None: ...


Due = tuple[float, int]  #: monotonic seconds, and the timeout in ms that led there
Slot = tuple[Waiter, Due, Arg]  #: the last is the command's name


class Batch:
    __slots__ = ("_replies", "_size", "future")

    def __init__(self, future: asyncio.Future[list[Reply]], size: int) -> None:
        self.future = future
        self._size = size
        self._replies: list[Reply] = []

    def done(self) -> bool:
        return self.future.done()

    def set_result(self, result: Reply, /) -> None:
        self._replies.append(result)
        if len(self._replies) == self._size:
            self.future.set_result(self._replies)

    def set_exception(self, exception: Exception, /) -> None:
        if isinstance(exception, ServerRefused):
            self.set_result(exception)
        else:
            self.future.set_exception(exception)


def expire(slots: Iterable[Slot], now: float) -> tuple[int, float]:
    """Tell those whose time is over; returns how many, and when the next one is due."""
    expired, nearest = 0, math.inf
    for waiter, due, _ in slots:
        if waiter.done():
            continue
        if due[0] <= now:
            waiter.set_exception(TimedOut(due[1]))
            expired += 1
        elif due[0] < nearest:
            nearest = due[0]
    return expired, nearest


class Parked:
    """Calls that wait for a connection, or for room in its buffer."""

    __slots__ = ("_queue", "commands")

    def __init__(self) -> None:
        self._queue: deque[tuple[list[bytes], list[Slot]]] = deque()
        self.commands = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, packed: list[bytes], slots: list[Slot]) -> None:
        self._queue.append((packed, slots))
        self.commands += len(slots)

    def take(self) -> Iterator[tuple[list[bytes], list[Slot]]]:
        """Empty it; calls that were given up are left out."""
        queue, self._queue, self.commands = self._queue, deque(), 0
        return (entry for entry in queue if not entry[1][0][0].done())

    def expire(self, now: float, error: Callable[[int], Exception]) -> tuple[int, float]:
        """As the function of this name; ``error`` makes what they are told."""
        expired, nearest = 0, math.inf
        for packed, slots in self.take():
            waiter, (at, timeout_ms), _ = slots[0]
            if at <= now:
                waiter.set_exception(error(timeout_ms))
                expired += 1
            else:
                nearest = min(nearest, at)
                self.add(packed, slots)
        return expired, nearest

    def refuse(self, error: Callable[[], Exception]) -> None:
        for _, slots in self.take():
            slots[0][0].set_exception(error())

"""Pending calls: their replies, their deadlines, and the listeners of a connection.

A slot stands for one command. Its waiter is a future, or a ``Batch`` that fills all slots of one
``call_many``. ``Parked`` holds calls of which nothing was written yet.

I1  A waiter gets one result. A waiter that is done is skipped.
I2  A batch resolves when its last reply arrives, with the replies in order. A refused command is a
    ServerRefused in its place; any other error is the error of the batch.
I3  A call that leaves ``Parked`` to be sent still has a waiter.
I4  ``Sweeper`` is one timer for many deadlines. It runs the sweep at the earliest deadline, or at
    most ``STEP_S`` later, and at most once per step. Without a deadline there is no timer.
I5  ``Listeners`` calls its listeners synchronously, in the order in which they were added. They
    must not block. A listener that raises is logged and does not affect the others.
I6  ``Listeners.changed`` returns at the next ``tell`` or ``wake`` after it was called.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVarTuple

import anyio
import structlog

from ...schemas.errors import ServerRefused, TimedOut
from ..clock import Clock

log = structlog.get_logger(__name__)

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


STEP_S = 0.01


class Sweeper:
    __slots__ = ("_at", "_clock", "_sweep", "_timer")

    def __init__(self, clock: Clock, sweep: Callable[[float], float]) -> None:
        self._clock = clock
        self._sweep = sweep
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf

    def by(self, at: float) -> None:
        """Have a sweep no later than ``at`` and a step."""
        if at < self._at:
            self.stop()
            self._at = at
            delay_s = max(0.0, at - self._clock.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._run)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._at = None, math.inf

    def _run(self) -> None:
        self._timer, self._at = None, math.inf
        now = self._clock.monotonic()
        nearest = self._sweep(now)
        if nearest < math.inf:
            self.by(max(nearest, now + STEP_S))


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

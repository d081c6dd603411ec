"""Measures how late the event loop is, by being on it.

Every ``BEAT_S`` it asks to be called again, and looks how much later than asked it was.

I1  ``lag_max_s`` is the longest delay of a beat in the last ``WINDOW_S``, or of the one that is
    overdue now.
I2  Nothing outside the loop is asked: a node whose Valkey is away is alive.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from ...coordinator.clock import Clock
from .protocols import Check

__all__ = ["BEAT_S", "STALLED_S", "WINDOW_S", "Heartbeat"]

BEAT_S = 0.25
WINDOW_S = 15.0
STALLED_S = 10.0


class Heartbeat:
    __slots__ = ("_clock", "_due", "_handle", "_lags")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: float | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._lags: deque[tuple[float, float]] = deque()  # when the beat came, how late

    def __repr__(self) -> str:
        return f"<Heartbeat: {self.lag_max_s():.3f} s late>"

    @contextmanager
    def beating(self) -> Iterator[None]:
        self._ask()
        try:
            yield
        finally:
            if self._handle is not None:
                self._handle.cancel()
            self._due = None

    def lag_max_s(self) -> float:
        self._forget_old()
        return max([*(lag_s for _, lag_s in self._lags), self._overdue_s()])

    def check(self) -> Check:
        overdue_s = self._overdue_s()
        stalled = overdue_s > STALLED_S
        return Check(
            name="event_loop",
            state="fail" if stalled else "pass",
            detail=f"no beat for {overdue_s:.1f} s" if stalled else "",
            gates=frozenset(("live",)),
        )

    def _overdue_s(self) -> float:
        return 0.0 if self._due is None else max(0.0, self._clock.monotonic() - self._due)

    def _beat(self) -> None:
        self._lags.append((self._clock.monotonic(), self._overdue_s()))
        self._forget_old()
        self._ask()

    def _forget_old(self) -> None:
        since = self._clock.monotonic() - WINDOW_S
        while self._lags and self._lags[0][0] < since:
            self._lags.popleft()

    def _ask(self) -> None:
        self._due = self._clock.monotonic() + BEAT_S
        self._handle = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

"""One timer for many deadlines.

I1  ``sweep(now)`` runs at the earliest time asked for, or at most ``STEP_S`` later: with
    many staggered deadlines it runs no more often than once per step.
I2  It returns when it must run next, math.inf if nothing is due any more; then there is
    no timer at all until ``by`` is called.

Sweeping finds out who is late by looking at everybody, so callers need not tell when a
deadline is no longer of interest.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from ..clock import Clock

__all__ = ["STEP_S", "Sweeper"]

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

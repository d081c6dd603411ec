"""Stops asking a dependency that keeps failing, and finds out when it is back.

Closed, everything passes. After ``failures`` failures in a row it is open: ``check``
raises at once. When ``recovery_ms`` have passed it is half open: one probe passes.

I1  Open means that nothing passes until the recovery time is over.
I2  Half open lets exactly one probe pass at a time; its success closes, its failure
    opens again for a whole recovery time, ``abandoned`` lets the next one probe.
I3  Outcomes of work that began before the breaker opened change nothing while it is
    open: they can neither close it early nor prolong it.

Whoever got True from ``check`` holds the probe and must report one of the three
outcomes. Nothing here suspends, and time is only what the clock says.
"""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from ...schemas.errors import BreakerOpen
from ..clock import Clock

__all__ = ["Breaker", "BreakerState", "BreakerStatistics"]

BreakerState = Literal["closed", "open", "half_open"]


class BreakerStatistics(Struct, frozen=True, kw_only=True):
    name: str
    state: BreakerState
    failures: int  #: in a row, as of now
    opened: int  #: times it went from closed to open
    refused: int
    retry_after_ms: int


class Breaker:
    __slots__ = (
        "_clock",
        "_failures",
        "_failures_max",
        "_opened",
        "_probing",
        "_recovery_s",
        "_refused",
        "_retry_at",
        "name",
    )

    def __init__(self, name: str, *, failures: int, recovery_ms: int, clock: Clock) -> None:
        self.name = name
        self._clock = clock
        self._failures_max = failures
        self._recovery_s = recovery_ms / 1000
        self._failures = 0
        self._retry_at: float | None = None  # None: closed
        self._probing = False
        self._opened = 0
        self._refused = 0

    def check(self) -> bool:
        """Return if work may begin, True if it is the probe; raise BreakerOpen if not."""
        if self._retry_at is None:
            return False
        if self._probing or self._clock.monotonic() < self._retry_at:
            raise self.refusal()
        self._probing = True
        return True

    def refusal(self) -> BreakerOpen:
        """The error for a caller that is turned away, counted as such."""
        self._refused += 1
        return BreakerOpen(self.name, self.retry_after_ms)

    def succeeded(self) -> None:
        if self._retry_at is None:
            self._failures = 0
        elif self._probing:
            self._retry_at, self._probing, self._failures = None, False, 0

    def failed(self) -> None:
        if self._retry_at is None:
            self._failures += 1
            if self._failures >= self._failures_max:
                self._opened += 1
                self._retry_at = self._clock.monotonic() + self._recovery_s
        elif self._probing:
            self._failures += 1
            self._retry_at, self._probing = self._clock.monotonic() + self._recovery_s, False

    def trip(self) -> None:
        """Open, or stay open, from now on: others found out that it fails."""
        if self._retry_at is None:
            self._opened += 1
        self._failures = max(self._failures, self._failures_max)
        self._retry_at, self._probing = self._clock.monotonic() + self._recovery_s, False

    def reset(self) -> None:
        """Close: others found out that it works."""
        self._retry_at, self._probing, self._failures = None, False, 0

    def abandoned(self) -> None:
        """Give the probe back: it was cancelled, which says nothing of the dependency."""
        self._probing = False

    @property
    def closed(self) -> bool:
        return self._retry_at is None

    @property
    def state(self) -> BreakerState:
        if self._retry_at is None:
            return "closed"
        if self._probing or self._clock.monotonic() >= self._retry_at:
            return "half_open"
        return "open"

    @property
    def retry_after_ms(self) -> int:
        """How long the next try has to wait; 0 if it has not, or if a probe is under way."""
        if self._retry_at is None:
            return 0
        return max(0, math.ceil((self._retry_at - self._clock.monotonic()) * 1000))

    def statistics(self) -> BreakerStatistics:
        return BreakerStatistics(
            name=self.name,
            state=self.state,
            failures=self._failures,
            opened=self._opened,
            refused=self._refused,
            retry_after_ms=self.retry_after_ms,
        )

    def __repr__(self) -> str:
        return f"<Breaker {self.name} {self.state} failures={self._failures}>"

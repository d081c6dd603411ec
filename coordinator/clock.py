"""The node's own clock, and what it knows of the server's.

I1  Durations are measured on the monotonic clock only; the wall clock is never read.
I2  ``ServerClock.now_ms`` follows the server's TIME: an offset to the monotonic clock,
    taken at the middle of the fastest round trip of late. It serves to compare with the
    lifetimes that the server stamped into entries, never to order events.
I3  A look that contradicts the estimate replaces it, however slow it was: the server's clock
    was set, or is that of another server now.
"""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "ServerClock", "SystemClock"]

_FORGET_AFTER_S = 60.0
_DRIFT_S = 0.005  # by how much two good clocks may part within that time


class Clock(Protocol):
    def monotonic(self) -> float: ...


class SystemClock:
    """The machine's monotonic clock, in seconds."""

    monotonic = staticmethod(time.monotonic)


class ServerClock:
    """An estimate of the server's clock, in milliseconds since 1970."""

    __slots__ = ("_clock", "_offset_s", "_round_trip_s", "_taken_at")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_s = 0.0
        self._round_trip_s = float("inf")
        self._taken_at = float("-inf")

    def observe(self, server_us: int, *, sent_at: float, received_at: float) -> float:
        """Take in a TIME reply; returns by how many seconds the estimate moved."""
        round_trip = received_at - sent_at
        stale = received_at - self._taken_at > _FORGET_AFTER_S
        offset = server_us / 1e6 - (sent_at + received_at) / 2
        moved = offset - self._offset_s if self.known else 0.0
        # Each of the two is right to half its round trip.
        agrees = abs(moved) <= (round_trip + self._round_trip_s) / 2 + _DRIFT_S
        if round_trip > self._round_trip_s and agrees and not stale:
            return 0.0
        self._offset_s, self._round_trip_s, self._taken_at = offset, round_trip, received_at
        return moved

    @property
    def known(self) -> bool:
        return self._taken_at > float("-inf")

    @property
    def offset_s(self) -> float:
        return self._offset_s

    def now_ms(self) -> int:
        return int((self._clock.monotonic() + self._offset_s) * 1000)

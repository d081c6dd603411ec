"""Detects when the event loop, the process or the machine stood still.

S1  A wake-up that comes more than ``STALL_S`` after it was due means that the event loop, the
    process or the machine stood still: it is counted, and logged with its length.

Tasks that wake up anyway do the check. ``ClockSync`` detects jumps of the server's clock.
"""

from __future__ import annotations

import structlog

from .instruments import Instruments

__all__ = ["STALL_S", "Stalls"]

log = structlog.get_logger(__name__)

STALL_S = 0.05


class Stalls:
    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments

    def woke(self, *, due: float, now: float) -> None:
        """A wake-up was due then, and is now; monotonic seconds."""
        if now - due > STALL_S:
            self._instruments.counts["time_anomalies", "loop_stalled"] += 1
            log.warning("loop.stalled", by_s=round(now - due, 3))

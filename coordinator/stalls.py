"""Notices when time did not pass as everybody here assumes.

S1  A wake-up that comes later than ``STALL_S`` after it was due means that the event loop, the
    process or the machine stood still: counted, and told with how long it was.
S2  If between two looks the server's clock and ours moved apart by more than a fifth of the time
    and ``JUMP_S``, the server's clock was set: leases there end earlier or later than was promised.

Looking is left to those who wake up or hear of the server's clock anyway.
"""

from __future__ import annotations

import structlog

from .instruments import Instruments

__all__ = ["JUMP_S", "STALL_S", "Stalls"]

log = structlog.get_logger(__name__)

STALL_S = 0.05
JUMP_S = 0.5


class Stalls:
    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments
        self._server_s = self._ours_s = 0.0

    def woke(self, *, due: float, now: float) -> None:
        """A wake-up was due then, and is now; monotonic seconds."""
        if now - due > STALL_S:
            self._instruments.counts["time_anomalies", "loop_stalled"] += 1
            log.warning("loop.stalled", by_s=round(now - due, 3))

    def heard(self, server_us: int, *, at: float) -> None:
        """The server's clock said so, to a request that was sent at ``at``."""
        server_s, before, self._server_s = server_us / 1e6, self._server_s, server_us / 1e6
        passed, self._ours_s = at - self._ours_s, at
        apart = server_s - before - passed
        if before and abs(apart) > max(JUMP_S, passed / 5):
            self._instruments.counts["time_anomalies", "server_clock_jumped"] += 1
            log.warning("clock.jumped", by_s=round(apart, 3))

    def forget(self) -> None:
        """Another server may answer from now on."""
        self._server_s = 0.0

"""Keeps the estimate of the server's clock fresh: one TIME every few seconds.

A jump of the server's clock by more than ``JUMP_S`` between two looks is counted and logged, once:
leases and lifetimes stamped before it end earlier or later by as much.
"""

from __future__ import annotations

import anyio
import structlog
from anyio.abc import TaskStatus

from ...schemas.errors import ForebayError
from ...schemas.replies import integer
from ..clock import Clock, ServerClock
from ..instruments import Instruments
from ..valkey.link import Commands

__all__ = ["JUMP_S", "ClockSync"]

log = structlog.get_logger(__name__)

JUMP_S = 1.0
_EVERY_S = 5.0
_FIRST_LOOKS = 3


class ClockSync:
    def __init__(
        self,
        commands: Commands,
        server_clock: ServerClock,
        clock: Clock,
        instruments: Instruments,
    ) -> None:
        self._commands = commands
        self._server_clock = server_clock
        self._clock = clock
        self._instruments = instruments

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Look now and then until cancelled; started when the estimate is known."""
        for _ in range(_FIRST_LOOKS):
            await self.look()
        task_status.started()
        while True:
            await anyio.sleep(_EVERY_S)
            try:
                await self.look()
            except ForebayError as error:
                log.debug("clock.unknown", error=str(error))

    async def look(self) -> None:
        """Ask for the time once."""
        sent_at = self._clock.monotonic()
        seconds, micros = await self._commands.call("TIME")
        server_us = integer(seconds, "TIME") * 1_000_000 + integer(micros, "TIME")
        moved_s = self._server_clock.observe(
            server_us, sent_at=sent_at, received_at=self._clock.monotonic()
        )
        if abs(moved_s) > JUMP_S:
            self._instruments.counts["time_anomalies", "server_clock_jumped"] += 1
            log.warning("clock.jumped", by_s=round(moved_s, 3))

"""Releases what nobody here knows the fate of: a request that was cancelled, or got no reply.

P1  A nonce is released again and again until a release was answered in whose connection nothing
    older can be on its way, or the lease that it may have must be over.
P2  At most ``PENDING_MAX`` are kept; what comes beyond that ends by itself, with its lease.
"""

from __future__ import annotations

import anyio
import structlog
from anyio.abc import TaskStatus

from ...schemas.errors import ForebayError
from ..clock import Clock
from ..instruments import Instruments
from .store import LockStore

__all__ = ["Reaper"]

log = structlog.get_logger(__name__)

PENDING_MAX = 10_000
_AT_ONCE = 100
_PAUSE_S = 0.5


class Reaper:
    def __init__(self, records: LockStore, *, clock: Clock, instruments: Instruments) -> None:
        self._records = records
        self._clock = clock
        self._instruments = instruments
        self._pending: dict[str, tuple[str, float]] = {}
        self._rung = anyio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def __repr__(self) -> str:
        return f"<Reaper: {len(self._pending)} pending>"

    def take(self, name: str, nonce: str, *, until: float) -> None:
        """Release this; ``until`` is when it must be over, in monotonic seconds."""
        if len(self._pending) >= PENDING_MAX:
            self._instruments.counts["limit_reached", "lock_reaper"] += 1
            return
        self._pending[nonce] = name, until
        self._rung.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            while not self._pending:
                self._rung = anyio.Event()
                await self._rung.wait()
            await self.round()
            if self._pending:
                await anyio.sleep(_PAUSE_S)

    async def round(self) -> None:
        """Try all of them once."""
        now = self._clock.monotonic()
        pending = [(name, nonce) for nonce, (name, _) in self._pending.items()]
        for at in range(0, len(pending), _AT_ONCE):
            await self._release(pending[at : at + _AT_ONCE])
        for nonce, (_, until) in list(self._pending.items()):
            if until <= now:
                del self._pending[nonce]

    async def _release(self, pairs: list[tuple[str, str]]) -> None:
        try:
            replies = await self._records.release_many(pairs)
        except ForebayError as error:
            log.debug("lock.not_released", count=len(pairs), error=str(error))
            return
        for (_, nonce), released in zip(pairs, replies, strict=True):
            # If not, the request itself may have yet to arrive, on an older connection.
            if released:
                self._pending.pop(nonce, None)
                self._instruments.counts["lock_reaped",] += 1

"""Releases leases with an unknown outcome: the request was cancelled or got no reply.

P1  A nonce is released repeatedly until a release is confirmed on a connection without an older
    request in flight, or until its possible lease has expired.
P2  At most ``PENDING_MAX`` nonces are kept; the leases of further ones end by expiry.
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
        self._added = anyio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def __repr__(self) -> str:
        return f"<Reaper: {len(self._pending)} pending>"

    def add(self, name: str, nonce: str, *, until: float) -> None:
        """Release it; ``until`` is the latest end of its lease, in monotonic seconds."""
        if len(self._pending) >= PENDING_MAX:
            self._instruments.counts["limit_reached", "lock_reaper"] += 1
            return
        self._pending[nonce] = name, until
        self._added.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            while not self._pending:
                self._added = anyio.Event()
                await self._added.wait()
            await self.round()
            if self._pending:
                await anyio.sleep(_PAUSE_S)

    async def round(self) -> None:
        """Release each pending nonce once."""
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
            # Otherwise the request itself may still arrive, on an older connection.
            if released:
                self._pending.pop(nonce, None)
                self._instruments.counts["lock_reaped",] += 1

"""Acquire and release a lease so that a failed or cancelled call leaves nothing behind.

G1  The nonce is chosen before the first request, and every request with it can be repeated.
G2  If a caller is cancelled, or gets no reply, while it acquires or releases, the lease is released
    before the cancellation continues: directly within ``INSIST_S``, else by the reaper.
G3  A waiter keeps its queue entry through an outage, for up to ``OUTAGE_S`` or its timeout; also
    while the server loads its data, or is not a primary.
G4  At level ``replicated`` the caller gets a lease only when replicas have it. If they do not
    have it in time, it is released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from itertools import count

import anyio
import structlog

from ...schemas.errors import CoordinationError, ForebayError, ServerRefused, Unavailable
from ...schemas.errors_locks import LockNotAcquired
from ...schemas.locks import Terms
from ..clock import Clock
from ..instruments import Instruments
from ..log.replication import Confirms
from .lease import Lease
from .queue import LockQueue
from .reaper import Reaper
from .renewals import Renewals
from .store import Grant, LockStore, Mode, Refusal

__all__ = ["Acquisitions"]

log = structlog.get_logger(__name__)

INSIST_S = 1.0
OUTAGE_S = 30.0
_PAUSE_S = 0.1
_PASSING = frozenset({"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY"})


class Acquisitions:
    def __init__(
        self,
        records: LockStore,
        queue: LockQueue,
        renewals: Renewals,
        reaper: Reaper,
        *,
        process: str,
        clock: Clock,
        instruments: Instruments,
        replication: Callable[[], Confirms | None],
    ) -> None:
        self._records = records
        self._queue = queue
        self._renewals = renewals
        self._reaper = reaper
        self._process = process
        self._clock = clock
        self._counts = instruments.counts
        self._instruments = instruments
        self._replication = replication
        self._numbers = count(1)

    def acquire(self, terms: Terms, *, timeout_s: float = math.inf) -> Coroutine[None, None, Lease]:
        """Wait for the lock and return a lease.

        Raises:
            LockNotAcquired: not within ``timeout_s``, or the queue is full. InvalidLock: the name
                belongs to another kind of lock. Unavailable: Valkey does not reply.
        """
        mode: Mode = "wait" if terms.fair else "barge"
        return self._acquire(terms, mode if timeout_s else "try", timeout_s)

    async def try_acquire(self, terms: Terms) -> Lease | None:
        """A lease, or None if the lock is held or has waiters; raises like ``acquire``."""
        try:
            return await self._acquire(terms, "try", 0.0)
        except LockNotAcquired as refused:
            if refused.reason != "held":
                raise
            return None

    async def release(self, lease: Lease) -> None:
        """Release the lease; a second call does nothing."""
        if lease.released or lease.reason is not None:
            return
        lease.released = True
        self._renewals.drop(lease)
        try:
            was_held = await self._records.release(lease.name, lease.nonce)
        except BaseException as error:
            await self._insist(lease.name, lease.nonce, lease.terms.lease_s, error)
            if not isinstance(error, ForebayError):
                raise
            log.warning("lease.not_released", lock=lease.name, error=str(error))
            return
        if not was_held:
            lease.reason = "taken"
            self._counts["lock_losses", "taken"] += 1

    async def _acquire(self, terms: Terms, mode: Mode, timeout_s: float) -> Lease:
        nonce = f"{self._process}.{next(self._numbers)}"
        replication = self._replication() if terms.level == "replicated" else None
        since = replication.since if replication else 0
        try:
            try:
                grant = await self._records.acquire(terms, nonce, mode)
            except ForebayError as error:
                if mode == "try" or not _passes(error):
                    raise
                grant = None  # no reply: repeat the request
            if isinstance(grant, Grant):
                self._counts["lock_acquires", "taken"] += 1
            else:
                grant = await self._wait(terms, nonce, mode, timeout_s, grant)
                since = replication.since if replication else 0
            if terms.level == "replicated":
                await self._confirm(terms, replication, since)
        except BaseException as error:
            self._counts["lock_acquires", _how_it_ended(error)] += 1
            await self._insist(terms.name, nonce, terms.lease_s, error, sure=False)
            raise
        lease = Lease(
            terms,
            nonce,
            grant.token,
            sent_at=grant.sent_at,
            clock=self._clock,
            give_back=self.release,
        )
        self._renewals.add(lease)
        return lease

    async def _wait(
        self, terms: Terms, nonce: str, mode: Mode, timeout_s: float, answer: Refusal | None
    ) -> Grant:
        if mode == "try":
            holder = answer.holder if answer else ""
            raise LockNotAcquired(terms.name, waited_ms=0, holder=holder, reason="held")
        began = answered_at = self._clock.monotonic()
        with self._queue.enqueue(nonce) as entry:
            while True:
                patience_s = self._queue.patience_s(answer) if answer else _PAUSE_S
                left_s = began + timeout_s - self._clock.monotonic()
                await entry.wait(min(patience_s, left_s))
                if entry.grant is not None:
                    return self._waited(began, entry.grant)
                waited_s = self._clock.monotonic() - began
                if waited_s >= timeout_s:
                    holder = answer.holder if answer else ""
                    raise LockNotAcquired(terms.name, waited_ms=int(waited_s * 1000), holder=holder)
                try:
                    reply = await self._records.acquire(terms, nonce, mode)
                except ForebayError as error:
                    late = self._clock.monotonic() - answered_at > OUTAGE_S
                    if late or not _passes(error):
                        raise
                    answer = None
                    continue
                if isinstance(reply, Grant):
                    return self._waited(began, reply)
                answer, answered_at = reply, self._clock.monotonic()

    def _waited(self, began: float, grant: Grant) -> Grant:
        self._counts["lock_acquires", "waited"] += 1
        self._instruments.observe("lock_wait_seconds", self._clock.monotonic() - began)
        self._records.highest = max(self._records.highest, grant.token)
        return grant

    async def _confirm(self, terms: Terms, replication: Confirms | None, since: int) -> None:
        began = self._clock.monotonic()
        try:
            if replication is not None:
                return await replication.confirm(since=since, timeout_ms=terms.lease_us // 6_000)
        except ForebayError as error:
            log.warning("lock.not_replicated", lock=terms.name, error=str(error))
        waited_ms = int((self._clock.monotonic() - began) * 1000)
        raise LockNotAcquired(terms.name, waited_ms=waited_ms, reason="not_replicated")

    async def _insist(
        self, name: str, nonce: str, lease_s: float, error: BaseException, *, sure: bool = True
    ) -> None:
        """Release it in spite of cancellation (G2). ``sure``: it was granted before."""
        if isinstance(error, LockNotAcquired) and error.reason in ("held", "queue_full"):
            return
        until = self._clock.monotonic() + lease_s
        with anyio.move_on_after(INSIST_S, shield=True):
            try:
                if not isinstance(error, Unavailable):
                    done = await self._records.release(name, nonce)
                    if done or sure:
                        return
            except ForebayError as failed:
                log.debug("lock.not_released", lock=name, error=str(failed))
        self._reaper.add(name, nonce, until=until)


def _passes(error: ForebayError) -> bool:
    """Whether the request may be repeated."""
    refused = isinstance(error, ServerRefused) and error.code in _PASSING
    return refused or isinstance(error, Unavailable)


def _how_it_ended(error: BaseException) -> str:
    if isinstance(error, LockNotAcquired):
        return "timed_out" if error.reason == "timed_out" else "refused"
    if isinstance(error, CoordinationError):
        return "refused"
    return "failed" if isinstance(error, Exception) else "cancelled"

"""Renews the leases of this process, and ends leases that it cannot renew.

N1  A lease is renewed after one third of its time, two thirds, and so on. A slow renewal or a busy
    event loop does not move the schedule. A failed renewal is repeated after a twelfth, so two
    may time out and a third is sent before the deadline.
N2  All due leases of a shard are renewed in one script, up to ``AT_ONCE``.
N3  A lease is lost at its deadline, even if a renewal is in flight: before the server can grant
    the lock to another caller (A1 of ``lease``).
N4  A lease that is missing in a new era of the server is reclaimed for its remaining time.
N5  After a reconnect all leases are renewed at once.
N6  At level ``replicated`` a renewal counts only when replicas have it: an isolated primary
    extends no lease that the new primary lets expire.

One task serves the schedule and one the deadlines, for any number of leases.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NoReturn

import anyio
import structlog
from anyio.abc import TaskStatus

from ...schemas.errors import ForebayError
from ...schemas.errors_locks import LossReason
from ..clock import Clock
from ..instruments import Instruments
from ..log.replication import Confirms
from ..log_once import LogOnce
from ..stalls import Stalls
from .lease import Lease
from .store import Held, LockStore

__all__ = ["AT_ONCE", "Renewals"]

log = structlog.get_logger(__name__)

AT_ONCE = 100
_TOGETHER_S = 0.02  #: leases due within this time are renewed together


class _Alarm:
    """Sleeps until a time that may be moved forward."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at = math.inf
        self._nearer = anyio.Event()

    def by(self, at: float) -> None:
        if at < self._at:
            self._at = at
            self._nearer.set()

    async def next(self) -> float:
        """Wait, return the due time, and reset the alarm."""
        while (left_s := self._at - self._clock.monotonic()) > 0:
            self._nearer = anyio.Event()
            with anyio.move_on_after(left_s):
                await self._nearer.wait()
        due, self._at = self._at, math.inf
        return due


class Renewals:
    def __init__(
        self,
        records: LockStore,
        *,
        shard_of: Callable[[str], int],
        stalls: Stalls,
        clock: Clock,
        instruments: Instruments,
        abandoned: Callable[[Lease], None],
        replication: Callable[[], Confirms | None],
    ) -> None:
        """``abandoned`` hears of a lease that is lost here, but may still be there."""
        self.held: dict[str, Lease] = {}
        self._records = records
        self._shard_of = shard_of
        self._stalls = stalls
        self._clock = clock
        self._instruments = instruments
        self._abandoned = abandoned
        self._replication = replication
        self._failing, self._unreplicated = LogOnce(clock), LogOnce(clock)
        self._due = _Alarm(clock)
        self._end = _Alarm(clock)

    def __repr__(self) -> str:
        return f"<Renewals of {len(self.held)} leases>"

    def add(self, lease: Lease) -> None:
        self.held[lease.nonce] = lease
        self._due.by(lease.renew_at)
        self._end.by(lease.deadline)

    def drop(self, lease: Lease) -> None:
        self.held.pop(lease.nonce, None)

    def lose(self, nonce: str, reason: LossReason) -> None:
        """Mark a lease of this process as lost; ignore other nonces."""
        lease = self.held.pop(nonce, None)
        if lease is None:
            return
        self._instruments.counts["lock_losses", reason] += 1
        log.warning("lease.lost", lock=lease.name, token=lease.token, reason=reason)
        lease.lose(reason)
        if reason in ("expired", "stopped"):
            self._abandoned(lease)

    def connected(self) -> None:
        """Renew all leases: the server may be a different one, or may have lost them."""
        now = self._clock.monotonic()
        for lease in self.held.values():
            lease.renew_at = now
        self._due.by(now if self.held else math.inf)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_deadlines)
            tasks.start_soon(self._keep_renewing)
            task_status.started()

    async def _watch_deadlines(self) -> NoReturn:
        while True:
            due = await self._end.next()
            now = self._clock.monotonic()
            self._stalls.woke(due=due, now=now)
            self.expire(now)

    def expire(self, now: float) -> None:
        """End leases past their deadline, and set the alarm for the next one."""
        for lease in list(self.held.values()):
            if lease.deadline <= now:
                self.lose(lease.nonce, "expired")
            else:
                self._end.by(lease.deadline)

    async def _keep_renewing(self) -> NoReturn:
        while True:
            due = await self._due.next()
            now = self._clock.monotonic()
            self._stalls.woke(due=due, now=now)
            await self.renew(self._choose(now))

    def _choose(self, now: float) -> list[Lease]:
        """The due leases; each is due again after a whole number of steps."""
        chosen = []
        for lease in self.held.values():
            if lease.renew_at <= now + _TOGETHER_S:
                chosen.append(lease)
                step_s = lease.terms.lease_us / 3e6
                missed = max(0.0, now - lease.renew_at) // step_s
                lease.renew_at += (missed + 1) * step_s
            self._due.by(lease.renew_at)
        return chosen

    async def renew(self, leases: Sequence[Lease]) -> None:
        """Renew these leases, grouped by shard."""
        if not leases:
            return
        timeout_ms = min(each.terms.lease_us for each in leases) // 6_000
        async with anyio.create_task_group() as tasks:
            for batch in _batches(leases, self._shard_of):
                tasks.start_soon(self._renew, batch, timeout_ms)

    async def _renew(self, leases: list[Lease], timeout_ms: int) -> None:
        named = [Held(each.terms, each.nonce, each.token) for each in leases]
        replication = self._replication()
        since = replication.since if replication else 0
        sent_at = self._clock.monotonic()
        try:
            _, statuses = await self._records.renew(named, timeout_ms=timeout_ms)
        except ForebayError as error:
            self._failing.say(log, "lease.not_renewed", error, leases=len(leases))
            self._failed(leases)
            return
        self._failing.over()
        unconfirmed = []
        for lease, status in zip(leases, statuses, strict=True):
            if status == 1 and lease.terms.level == "replicated":
                unconfirmed.append(lease)
            elif status == 1:
                self._renewed(lease, sent_at)
            elif status == 2:
                await self._reclaim(lease)
            else:
                self._refused(lease)
        if unconfirmed and replication is not None:
            await self._confirm(unconfirmed, replication, since, sent_at, timeout_ms)

    def _renewed(self, lease: Lease, sent_at: float) -> None:
        self._instruments.counts["lock_renewals", "renewed"] += 1
        lease.renewed(sent_at)

    def _refused(self, lease: Lease) -> None:
        # After a stall the reply may be read before the deadline is noticed (N3).
        over = lease.deadline <= self._clock.monotonic()
        self.lose(lease.nonce, "expired" if over else "taken")

    def _failed(self, leases: Sequence[Lease]) -> None:
        self._instruments.counts["lock_renewals", "failed"] += len(leases)
        now = self._clock.monotonic()
        for lease in leases:
            lease.renew_at = min(lease.renew_at, now + lease.terms.lease_us / 12e6)
            self._due.by(lease.renew_at)

    async def _confirm(
        self,
        leases: Sequence[Lease],
        replication: Confirms,
        since: int,
        sent_at: float,
        timeout_ms: int,
    ) -> None:
        """N6: renewals of a request sent at ``sent_at`` count if replicas have them."""
        try:
            await replication.confirm(since=since, timeout_ms=timeout_ms)
        except ForebayError as error:
            self._unreplicated.say(log, "lease.not_replicated", error, leases=len(leases))
            self._failed(leases)
            return
        self._unreplicated.over()
        for lease in leases:
            self._renewed(lease, sent_at)

    async def _reclaim(self, lease: Lease) -> None:
        held = Held(lease.terms, lease.nonce, lease.token)
        left_s = lease.remaining_s()
        try:
            # The deadline stays; a renewal extends it afterwards.
            reclaimed = left_s > 0 and await self._records.reclaim(held, left_s)
        except ForebayError as error:
            self._failing.say(log, "lease.not_reclaimed", error, lock=lease.name)
            return
        if not reclaimed:
            self._refused(lease)
            return
        self._instruments.counts["lock_renewals", "reclaimed"] += 1
        log.info("lease.reclaimed", lock=lease.name, token=lease.token)


def _batches(leases: Sequence[Lease], shard_of: Callable[[str], int]) -> list[list[Lease]]:
    shards: dict[int, list[Lease]] = defaultdict(list)
    for lease in leases:
        shards[shard_of(lease.name)].append(lease)
    return [
        each[at : at + AT_ONCE] for each in shards.values() for at in range(0, len(each), AT_ONCE)
    ]

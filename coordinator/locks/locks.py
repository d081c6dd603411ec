"""Locks that a cluster shares: mutexes, semaphores, read-write locks, several at once.

    async with locks.lock("rebuild", lease=10) as lease:
        await store(rows, token=lease.token)

K1  The later of two leases of a lock has the larger token, even after a restart of the server, a
    failover, or the loss of the lock's record.
K2  ``fast``: a lock has at most one holder while the server keeps all accepted writes. After a
    failover or a restart no new lease is granted during a grace period, and holders reclaim
    their locks. ``replicated``: a grant or a renewal counts only when replicas have it. Neither
    level stops a suspended process from acting late; tokens and guards do.
K3  Waiters are served in FIFO order, by ticket. With ``fair=False`` a caller takes a free lock
    before the waiters.
K4  All locks share one connection, one subscription and one renewal schedule.

The parts: ``acquire`` (acquire and release), ``lease``, ``renewals``, ``queue``, ``reaper``,
``store`` (the scripts). Durations are in seconds.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NoReturn, Protocol, Unpack

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ...schemas.errors import ForebayError
from ...schemas.errors_locks import LockNotHeld
from ...schemas.keys import Names, check_key
from ...schemas.locks import LockView
from ..clock import Clock
from ..instruments import Instruments
from ..log.replication import Confirms
from ..stalls import Stalls
from ..valkey.dialer import read_info
from ..valkey.link import Commands
from ..valkey.scripting import Scripts
from .acquire import Acquisitions
from .guards import Guards
from .handles import LockHandle, LockOptions, LockSource, ReadWriteLock, Semaphore
from .lease import Lease
from .queue import LockQueue
from .reaper import Reaper
from .renewals import Renewals
from .store import LockStore

__all__ = ["Locks", "PubSubEvents"]

log = structlog.get_logger(__name__)

LISTED_MAX = 1_000
_STOP_S = 1.0


class Connects(Protocol):
    """The part of the link that reports its state."""

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]: ...


class PubSubEvents(Protocol):
    """The part of pub/sub that locks use."""

    def subscribe(self, *channels: bytes) -> None: ...

    def on_message(self, listener: Callable[[bytes, bytes], None]) -> Callable[[], None]: ...

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]: ...


class LockStatistics(Struct, frozen=True, kw_only=True):
    held: int
    waiting: int
    reaping: int  #: releases without a reply yet


class Locks:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        *,
        node_id: str,
        process: str,
        clock: Clock,
        rng: random.Random,
        instruments: Instruments,
    ) -> None:
        """``process`` identifies this start of the node, and contains no dot."""
        self.replication: Confirms | None = None
        self._commands = commands
        self._names = names
        process = names.process(process)
        self._channel = f"{names.wake}{process}".encode()
        self._queue = LockQueue(rng)
        self._records = records = LockStore(
            commands, names, scripts, clock=clock, handed=self._queue.handed
        )
        self._clock = clock
        self._connections = 0
        self._strange = anyio.Event()  # set for a connection to a possibly different server
        self._reaper = Reaper(records, clock=clock, instruments=instruments)
        self._renewals = Renewals(
            records,
            shard_of=names.shard,
            stalls=Stalls(instruments),
            clock=clock,
            instruments=instruments,
            abandoned=self._abandoned,
            replication=lambda: self.replication,
        )
        grants = Acquisitions(
            records,
            self._queue,
            self._renewals,
            self._reaper,
            process=process,
            clock=clock,
            instruments=instruments,
            replication=lambda: self.replication,
        )
        self.guards = Guards(commands, scripts)
        self._source = LockSource(grants, records, node_id)

    def __repr__(self) -> str:
        return f"<Locks: {len(self._renewals.held)} held, {len(self._queue)} wait>"

    def statistics(self) -> LockStatistics:
        return LockStatistics(
            held=len(self._renewals.held), waiting=len(self._queue), reaping=len(self._reaper)
        )

    def lock(self, name: str, **options: Unpack[LockOptions]) -> LockHandle:
        """A mutex for ``async with``.

        Raises:
            InvalidLock, InvalidKey: an option or the name is invalid. Entering the block raises the
                errors of ``Acquisitions.acquire``; leaving it raises LeaseLost.
        """
        return self._source.want(name, options)

    async def try_lock(self, name: str, **options: Unpack[LockOptions]) -> Lease | None:
        """A lease for ``async with``, or None if the lock is held or has waiters."""
        return await self._source.grants.try_acquire(self._source.want(name, options).terms)

    def semaphore(self, name: str, *, capacity: int) -> Semaphore:
        return Semaphore(self._source, name, capacity)

    def rwlock(self, name: str) -> ReadWriteLock:
        return ReadWriteLock(self._source, name)

    @asynccontextmanager
    async def lock_all(
        self, names: Sequence[str], **options: Unpack[LockOptions]
    ) -> AsyncGenerator[dict[str, Lease]]:
        """Acquire all of these locks, or none. All callers acquire them in the same order, so
        there is no deadlock. The timeout applies to each lock.
        """
        wanted = [self._source.want(name, options) for name in sorted(set(names))]
        async with AsyncExitStack() as stack:
            yield {each.terms.name: await stack.enter_async_context(each) for each in wanted}

    async def list(self, *, bound: int = LISTED_MAX) -> Sequence[LockView]:
        """The held locks, ordered by name."""
        return await self._records.held(bound)

    async def show(self, name: str) -> LockView:
        """The holders with their times and metadata, and the waiters."""
        (view,) = await self._records.show([check_key(name, name="lock")])
        return view

    async def force_release(self, name: str) -> int:
        """Release a lock without its holders, and return their number.

        The block of a holder is cancelled when the message arrives, which may be after the next
        holder has the lock. Until then guards refuse its writes by the token.
        """
        return await self._records.force(check_key(name, name="lock"))

    async def release(self, name: str, nonce: str) -> None:
        """Release a lease of any process by its nonce.

        Raises:
            LockNotHeld: this nonce does not hold the lock, or its lease has expired.
        """
        if not await self._records.release(check_key(name, name="lock"), nonce):
            raise LockNotHeld(name, nonce)

    async def begin(self, run_id: Callable[[], Awaitable[str]]) -> None:
        """Make sure that every shard has an era; called before the first lock."""
        run = (await run_id()).split(" ", maxsplit=1)[0]
        born = await self._records.first_run(run)
        left_s = await self._records.begin(fresh=born == run)
        if left_s:
            log.info("locks.grace", left_s=round(left_s, 3))

    def connection_changed(self, connected: bool) -> None:
        """Called before the first command on a new connection."""
        self._records.run = ""
        self._connections += 1
        if connected:
            self._strange.set()
            self._renewals.connected()
            self._queue.wake_all()

    async def run(
        self,
        pubsub: PubSubEvents,
        link: Connects,
        run_id: Callable[[], Awaitable[str]],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Begin, then renew, wake and reap until cancelled; finally release all leases."""
        await self.begin(run_id)
        forget = [
            link.on_state(self.connection_changed),
            pubsub.on_message(self._on_message),
            pubsub.on_state(self._on_pubsub_state),
        ]
        pubsub.subscribe(self._channel)
        try:
            async with anyio.create_task_group() as tasks:
                await tasks.start(self._renewals.run)
                await tasks.start(self._reaper.run)
                tasks.start_soon(self._ask_run)
                task_status.started()
        finally:
            for each in forget:
                each()
            with anyio.move_on_after(_STOP_S, shield=True):
                await self._stop()

    async def _ask_run(self) -> NoReturn:
        """Track the run id of the server, so that scripts need not read it."""
        while True:
            self._strange = anyio.Event()
            connections = self._connections
            try:
                info = read_info(await self._commands.call("INFO", "server"))
            except ForebayError as error:
                log.debug("locks.run_unknown", error=str(error))
            else:
                if connections == self._connections:
                    self._records.run = info.get("run_id", "")
            await self._strange.wait()

    async def _stop(self) -> None:
        for nonce in list(self._renewals.held):
            self._renewals.lose(nonce, "stopped")
        try:
            await self._reaper.round()
        except ForebayError as error:
            log.warning("locks.not_released", error=str(error))

    def _abandoned(self, lease: Lease) -> None:
        until = self._clock.monotonic() + lease.terms.lease_s
        self._reaper.add(lease.name, lease.nonce, until=until)

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        if channel != self._channel:
            return
        kind, _, nonce = payload.decode(errors="replace").partition(" ")
        if kind == "g":
            self._queue.wake(nonce)
        elif kind == "x":
            self._renewals.lose(nonce, "forced")

    def _on_pubsub_state(self, live: bool) -> None:
        if live:
            self._queue.wake_all()

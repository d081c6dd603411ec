"""Locks that a cluster shares: mutexes, semaphores, read-write locks, several at once.

    async with locks.lock("rebuild", lease=10) as lease:
        await store(rows, token=lease.token)

K1  Of two leases of a lock, the later one has the larger token: also after a restart of the server,
    a failover, or the loss of the lock's record.
K2  ``fast``: while the server keeps what it has accepted, no two hold a lock that takes one. After
    a failover or restart nothing new is granted for a grace; who held a lock reclaims it.
    ``replicated``: a grant or a renewal counts only when replicas have it. Neither stops a process
    that stands still from acting late: that is what tokens and guards are for.
K3  Who waits is served in order, by ticket; ``fair=False`` passes by those who wait if the lock is
    free at that moment.
K4  One connection, one subscription, one schedule of renewals, whatever the number of locks.

The parts: ``grants`` (how a lease is had), ``lease``, ``renewals``, ``queue``, ``reaper``,
``records`` (the scripts). Durations are in seconds.
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
from ..valkey.link import Commands
from ..valkey.scripting import Scripts
from ..valkey.server_info import read_info
from .acquire import Acquisitions
from .guards import Guards
from .handles import LockHandle, LockOptions, LockSource, ReadWriteLock, Semaphore
from .lease import Lease
from .queue import LockQueue
from .reaper import Reaper
from .renewals import Renewals
from .store import LockStore

__all__ = ["Locks", "Notification"]

log = structlog.get_logger(__name__)

LISTED_MAX = 1_000
_STOP_S = 1.0


class Connects(Protocol):
    """What is needed of the link beyond its commands."""

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]: ...


class Notification(Protocol):
    """What is needed of the pubsub."""

    def subscribe(self, *channels: bytes) -> None: ...

    def on_message(self, listener: Callable[[bytes, bytes], None]) -> Callable[[], None]: ...

    def on_state(self, listener: Callable[[bool], None]) -> Callable[[], None]: ...


class LockStatistics(Struct, frozen=True, kw_only=True):
    held: int
    waiting: int
    reaping: int  #: releases that are yet to be answered


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
        """``process`` is unique to this start of the node, and has no dot."""
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
        self._strange = anyio.Event()  # a connection whose server may be another
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
        """A lock for one at a time; ``async with`` it.

        Raises:
            InvalidLock, InvalidKey: what was given cannot be. Entering the block raises as
                ``Acquisitions.acquire``, leaving it LeaseLost.
        """
        return self._source.want(name, options)

    async def try_lock(self, name: str, **options: Unpack[LockOptions]) -> Lease | None:
        """A lease if the lock is free and nobody waits; to be used as ``async with``."""
        return await self._source.grants.try_acquire(self._source.want(name, options).terms)

    def semaphore(self, name: str, *, capacity: int) -> Semaphore:
        return Semaphore(self._source, name, capacity)

    def rwlock(self, name: str) -> ReadWriteLock:
        return ReadWriteLock(self._source, name)

    @asynccontextmanager
    async def lock_all(
        self, names: Sequence[str], **options: Unpack[LockOptions]
    ) -> AsyncGenerator[dict[str, Lease]]:
        """All of these locks, or none. They are taken in one order everywhere, so that two who
        want the same never wait for each other; the timeout is for each.
        """
        wanted = [self._source.want(name, options) for name in sorted(set(names))]
        async with AsyncExitStack() as stack:
            yield {each.terms.name: await stack.enter_async_context(each) for each in wanted}

    async def list(self, *, bound: int = LISTED_MAX) -> Sequence[LockView]:
        """The locks that are held, by name."""
        return await self._records.held(bound)

    async def show(self, name: str) -> LockView:
        """Who holds it, since when and what for; who waits."""
        (view,) = await self._records.show([check_key(name, name="lock")])
        return view

    async def force_release(self, name: str) -> int:
        """Take a lock from whoever holds it; returns how many these were.

        Their blocks are cancelled as soon as they hear of it, which may be after another has the
        lock: what they do meanwhile, guards refuse by the token.
        """
        return await self._records.force(check_key(name, name="lock"))

    async def release(self, name: str, nonce: str) -> None:
        """Release a lease of any process by its nonce.

        Raises:
            LockNotHeld: it does not hold the lock, and was not the last to do so.
        """
        if not await self._records.release(check_key(name, name="lock"), nonce):
            raise LockNotHeld(name, nonce)

    async def begin(self, run_id: Callable[[], Awaitable[str]]) -> None:
        """See to it that every shard has an era; before the first lock."""
        run = (await run_id()).split(" ", maxsplit=1)[0]
        born = await self._records.first_run(run)
        left_s = await self._records.begin(fresh=born == run)
        if left_s:
            log.info("locks.grace", left_s=round(left_s, 3))

    def connection_changed(self, connected: bool) -> None:
        """To be told before anything is sent in a new connection."""
        self._records.run = ""
        self._connections += 1
        if connected:
            self._strange.set()
            self._renewals.connected()
            self._queue.ring_all()

    async def run(
        self,
        bell: Notification,
        link: Connects,
        run_id: Callable[[], Awaitable[str]],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Begin; then renew, wake and reap until cancelled, and release what is left."""
        await self.begin(run_id)
        forget = [
            link.on_state(self.connection_changed),
            bell.on_message(self._heard),
            bell.on_state(self._bell_changed),
        ]
        bell.subscribe(self._channel)
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
        """Know which run of the server answers, so that scripts need not look."""
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
        self._reaper.take(lease.name, lease.nonce, until=until)

    def _heard(self, channel: bytes, payload: bytes) -> None:
        if channel != self._channel:
            return
        kind, _, nonce = payload.decode(errors="replace").partition(" ")
        if kind == "g":
            self._queue.ring(nonce)
        elif kind == "x":
            self._renewals.lose(nonce, "forced")

    def _bell_changed(self, live: bool) -> None:
        if live:
            self._queue.ring_all()

"""Whether replicas have what the primary accepted: WAIT, on a connection of its own.

    since = replication.since          # before the write
    ...                                # the write, on the link
    await replication.confirm(since=since, timeout_ms=5_000)

R1  ``confirm`` returns only if ``replicas_min`` replicas have acknowledged a marker that was
    written after it was called. The replication stream is ordered: they have all that the
    primary had accepted before the marker, so also the caller's write.
R2  A marker counts only on the connection it was written on (WAIT speaks of that client's writes
    alone), and only if the link reads it back: both speak to the same primary.
R3  A link that reconnected since the write does not confirm it, nor does one whose server was
    demoted and promoted in between: another primary, which never had the write, was in charge.
R4  All who came before a marker share it. Cancelling one costs the others nothing.
R5  Nothing is dialed before somebody asks.

Acknowledged is not safe from everything: a replica that has it not may be promoted, and what
replicas have is in their memory. WAIT blocks its connection, so it is sent in slices that are
shorter than what the connection takes for silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import anyio
import structlog
from anyio.abc import TaskStatus

from ...schemas.errors import ForebayError, Unavailable, Unconfirmed
from ...schemas.replies import integer
from ..clock import Clock
from ..log_once import LogOnce
from ..valkey.dialer import ASK_HISTORY
from ..valkey.link import Commands

__all__ = ["Confirms", "Connection", "Replication"]

log = structlog.get_logger(__name__)

_SLICE_MS_MAX = 500
_PAUSE_S = 0.05
_MARKER_MS = 60_000

_Asked = set[asyncio.Future[bool]]


class Connection(Commands, Protocol):
    """What is needed of a link beyond its commands."""

    @property
    def connects(self) -> int: ...

    async def ready(self) -> None: ...


class Link(Connection, Protocol):
    """The parts of the link that replication uses."""

    @property
    def generation(self) -> int: ...

    def check_primary(self, reply: bytes) -> None: ...

    def same_history(self, since: int) -> bool: ...


class Confirms(Protocol):
    """Tells whether replicas have what the primary accepted: ``Replication`` does."""

    @property
    def since(self) -> int: ...

    async def confirm(self, *, since: int, timeout_ms: int) -> None: ...


class Replication:
    """``dial`` gives the connection that WAIT may block; ``marker`` is a key of this node's own."""

    def __init__(
        self,
        link: Link,
        dial: Callable[[], AbstractAsyncContextManager[Connection]],
        marker: str,
        *,
        replicas_min: int,
        command_timeout_ms: int,
        clock: Clock,
        ids: Callable[[], str],
    ) -> None:
        self._link = link
        self._dial = dial
        self._marker = marker
        self._replicas_min = replicas_min
        self._slice_ms = min(_SLICE_MS_MAX, command_timeout_ms)
        self._timeout_ms = self._slice_ms + command_timeout_ms
        self._clock = clock
        self._ids = ids
        self._new: _Asked = set()
        self._marked: _Asked = set()  #: who came before the marker
        self._nonce = ""
        self._failing = LogOnce(clock)
        self._written_on = 0  #: the connection that the marker was written on; 0: none
        self._rung = anyio.Event()
        self._closed = False
        self.rounds = 0  #: markers written

    def __repr__(self) -> str:
        return f"<Replication {self.rounds} markers, {len(self._new | self._marked)} waiting>"

    @property
    def since(self) -> int:
        """What to give to ``confirm``; to be taken before the write."""
        return self._link.generation

    def kept(self, since: int) -> bool:
        """Whether no write accepted since then can have been lost with a primary."""
        return self._link.same_history(since)

    async def confirm(self, *, since: int, timeout_ms: int) -> None:
        """Wait until replicas have what was accepted on the link before now.

        Raises:
            Unconfirmed: not in time, or it cannot be known; the write may have been replicated.
        """
        began = self._clock.monotonic()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._new.add(future)
        self._rung.set()
        try:
            with anyio.move_on_after(0 if self._closed else timeout_ms / 1000):
                if await future and self._link.generation == since:
                    return
        finally:
            self._new.discard(future)
            self._marked.discard(future)
        waited_ms = int((self._clock.monotonic() - began) * 1000)
        raise Unconfirmed("replicated", "accepted", waited_ms)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve those who ask, until cancelled."""
        task_status.started()
        try:
            await self._somebody()
            async with self._dial() as own:
                while True:
                    await self._somebody()
                    await self._round(own)
        finally:
            self._closed = True
            self._tell(self._new | self._marked, confirmed=False)

    async def _somebody(self) -> None:
        while not (self._new or self._marked):
            self._rung = anyio.Event()
            await self._rung.wait()

    async def _round(self, own: Connection) -> None:
        """Write a marker if there is none that counts, and wait a while for it."""
        try:
            await own.ready()
            acknowledged = await self._slice(own)
            if acknowledged >= self._replicas_min:
                nonce = await self._link.call("GET", self._marker)
                self._link.check_primary(await self._link.call(*ASK_HISTORY))
                self._settle(confirmed=nonce == self._nonce.encode())
            self._failing.over()
        except Unavailable as error:
            log.debug("replication.interrupted", error=str(error))
            self._written_on = 0
            await anyio.sleep(_PAUSE_S)
        except ForebayError as error:
            self._failing.say(log, "replication.refused", error)
            self._marked |= self._new
            self._settle(confirmed=False)
            await anyio.sleep(_PAUSE_S)

    async def _slice(self, own: Connection) -> int:
        """How many replicas have the marker; 0 if that cannot be known."""
        wait = ("WAIT", self._replicas_min, self._slice_ms)
        before = own.connects
        if self._marked and self._written_on == before:
            reply = await own.call(*wait, timeout_ms=self._timeout_ms)
        else:
            self._marked |= self._new
            self._new = set()
            self._nonce = self._ids()
            self.rounds += 1
            write = ("SET", self._marker, self._nonce, "PX", _MARKER_MS)
            # Together: so they go out on one connection, or fail.
            replies = await own.call_many((write, wait), timeout_ms=self._timeout_ms)
            for each in replies:
                if isinstance(each, ForebayError):
                    raise each
            reply = replies[-1]
            self._written_on = before
        if own.connects != before:
            self._written_on = 0
            return 0
        return integer(reply, "WAIT")

    def _settle(self, *, confirmed: bool) -> None:
        """The marker has served those who came before it."""
        marked, self._marked = self._marked, set()
        self._written_on = 0
        self._tell(marked, confirmed=confirmed)

    @staticmethod
    def _tell(asked: _Asked, *, confirmed: bool) -> None:
        for future in asked:
            if not future.done():
                future.set_result(confirmed)

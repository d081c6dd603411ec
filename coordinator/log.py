"""Following the shard logs: what every node does to stay right.

I1  ``live_until`` is a promise on the node's own clock: up to then, every change that was
    acknowledged ``staleness_ms`` ago or earlier has been applied here. It is moved on only by
    a read of our own that came back, and counts from the moment that read was sent.
I2  Notices of a shard are applied in the order of their ids, each once. The next id is
    seq + 1, or 0 of a later epoch; anything else is a gap, and the shard is reset: its
    ``generation`` goes up, so that whatever was remembered of it is asked for again.
I3  The doorbell only makes it fast. A bell out of order makes its shard suspect at once
    (``live_until`` falls) and starts a read; a lost bell costs at most one sweep.
I4  After a reconnect nothing is believed until the server's run id was compared. Another run
    id may have lost the end of a log and given its ids again: every shard is reset.

A sweep is one XREAD over all shards, several times a second; it does not block, so it can
share the multiplexed link. Owning a position for longer than the log is kept is not needed:
what was trimmed is seen as a gap.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ..schemas.errors import ForebayError
from ..schemas.keys import Names
from ..schemas.notices import Notice, Position, read_bell, read_notice
from .clock import Clock
from .instruments import Instruments
from .link import Commands

__all__ = ["Follower", "FollowerStatistics", "ResetReason", "ShardView"]

log = structlog.get_logger(__name__)

ResetReason = Literal["trimmed", "epoch", "run_id", "newer"]
Apply = Callable[[int, int, Notice], None]
_PAGE = 1_000
_SWEEPS_PER_PROMISE = 2.5


class ShardView:
    """What this node knows of one shard's log."""

    __slots__ = ("epoch", "generation", "live_until", "number", "seq")

    def __init__(self, number: int) -> None:
        self.number = number
        self.epoch = 0
        self.seq = 0
        self.live_until = float("-inf")
        self.generation = 0

    def __repr__(self) -> str:
        return f"<ShardView {self.number} at {self.epoch}-{self.seq} generation {self.generation}>"

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.seq)


class FollowerStatistics(Struct, frozen=True, kw_only=True):
    shards: int
    suspect: int
    sweeps: int
    notices: int
    resets: int


class Follower:
    """Follows all logs of a namespace.

    ``apply(shard, version, notice)`` is called for every notice, in order, and must not
    suspend; ``reset(shard)`` when everything remembered of a shard became doubtful.
    """

    def __init__(
        self,
        commands: Commands,
        names: Names,
        *,
        clock: Clock,
        staleness_ms: int,
        instruments: Instruments,
        run_id: Callable[[], Awaitable[str]],
        apply: Apply,
        reset: Callable[[int], None],
    ) -> None:
        self.views = tuple(ShardView(number) for number in range(names.shards))
        self.live_until = float("-inf")  #: the earliest of all shards; read on every hit
        self._logs = tuple(names.part(number, "log") for number in range(names.shards))
        self._by_log = {
            name.encode(): view for name, view in zip(self._logs, self.views, strict=True)
        }
        self._commands = commands
        self._clock = clock
        self._staleness_s = staleness_ms / 1000
        self._instruments = instruments
        self._run_id = run_id
        self._known_run_id = ""
        self._apply = apply
        self._reset = reset
        self._wake = anyio.Event()
        self._connection = 0
        self._verified = -1
        self._doorbell_live = False
        self._sweeps = self._notices = self._resets = 0

    def statistics(self) -> FollowerStatistics:
        now = self._clock.monotonic()
        return FollowerStatistics(
            shards=len(self.views),
            suspect=sum(view.live_until <= now for view in self.views),
            sweeps=self._sweeps,
            notices=self._notices,
            resets=self._resets,
        )

    def staleness_s(self) -> float:
        """How far back the oldest proof of being current lies."""
        return max(0.0, self._clock.monotonic() - self.live_until + self._staleness_s)

    def connection_changed(self) -> None:
        """To be called whenever the connection was lost or made: see I4."""
        self._connection += 1
        self._suspect(self.views)

    def doorbell_changed(self, live: bool) -> None:
        """Without a doorbell the sweeps come closer together; bells may have been lost."""
        self._doorbell_live = live
        self._wake.set()

    def bell(self, payload: bytes) -> None:
        """A doorbell message: applied at once if it is the next one."""
        message = read_bell(payload)
        if message is None or not 0 <= message.shard < len(self.views):
            return
        view, position = self.views[message.shard], message.position
        if position <= view.position:
            return
        if self._connection == self._verified and _follows(view, position):
            self._take(view, position, message.version, message.notice)
        else:
            self._suspect((view,))

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled; reports itself started when it is current."""
        started = False
        while True:
            self._wake = anyio.Event()
            failed = False
            try:
                await self.sweep()
            except ForebayError as error:
                failed = True
                log.debug("sweep.failed", error=str(error))
            if not failed and not started:
                started = True
                task_status.started()
            wait_s = 0.05 if failed or not self._doorbell_live else self._interval_s
            with anyio.move_on_after(wait_s):
                await self._wake.wait()
            if failed:
                await anyio.sleep(0.02)

    async def sweep(self) -> None:
        """Read every log from our position; when it returns, all shards are live.

        Raises:
            Unavailable: the server did not answer; nothing was proved.
        """
        if self._connection != self._verified:
            await self._verify()
        pending: Sequence[ShardView] = self.views
        while pending:
            pending = await self._read(pending)
        self._sweeps += 1

    async def _read(self, views: Sequence[ShardView]) -> list[ShardView]:
        connection, sent_at = self._connection, self._clock.monotonic()
        streams = [self._logs[view.number] for view in views]
        positions = [f"{view.epoch}-{view.seq}" for view in views]
        reply = await self._commands.call("XREAD", "COUNT", _PAGE, "STREAMS", *streams, *positions)
        if connection != self._connection:
            return list(self.views)
        unfinished = []
        for name, entries in reply or ():
            view = self._by_log[bytes(name)]
            self._take_page(view, entries)
            if len(entries) == _PAGE:
                unfinished.append(view)
        self._prove(views, unfinished, sent_at)
        return unfinished

    def _prove(self, views: Sequence[ShardView], but: Sequence[ShardView], sent_at: float) -> None:
        until = sent_at + self._staleness_s
        for view in views:
            if view not in but:
                view.live_until = until
        self.live_until = min(view.live_until for view in self.views)

    def _take_page(self, view: ShardView, entries: Sequence[Any]) -> None:
        for raw_id, fields in entries:
            position = Position.parse(bytes(raw_id))
            if position <= view.position:
                continue  # a bell brought it while the read was under way
            if position.epoch == view.epoch and not _follows(view, position):
                self._forget(view, "trimmed")
            version, notice = _fields(fields)
            self._take(view, position, version, notice)

    def _take(self, view: ShardView, position: Position, version: int, raw: bytes) -> None:
        if position.epoch != view.epoch and (view.epoch or position.seq):
            self._forget(view, "epoch")
        view.epoch, view.seq = position.epoch, position.seq
        self._notices += 1
        notice = read_notice(raw)
        if notice is None:
            # A newer node wrote it: what it changed is not known, so everything is doubtful.
            self._forget(view, "newer")
            return
        self._instruments.counts["notices_applied", type(notice).__name__.lower()] += 1
        self._apply(view.number, version, notice)

    def _forget(self, view: ShardView, reason: ResetReason) -> None:
        view.generation += 1
        self._resets += 1
        self._instruments.counts["log_gaps", reason] += 1
        self._reset(view.number)

    def _suspect(self, views: Sequence[ShardView]) -> None:
        for view in views:
            view.live_until = float("-inf")
        self.live_until = float("-inf")
        self._wake.set()

    async def _verify(self) -> None:
        connection = self._connection
        run_id = await self._run_id()
        if run_id != self._known_run_id:
            await self._start_over(connection)
            if self._known_run_id:
                log.warning("log.restarted", reason="the server's run id changed")
        if connection == self._connection:
            self._known_run_id = run_id
            self._verified = connection

    async def _start_over(self, connection: int) -> None:
        replies = await self._commands.call_many(
            [("XREVRANGE", name, "+", "-", "COUNT", 1) for name in self._logs]
        )
        if connection != self._connection:
            return
        for view, reply in zip(self.views, replies, strict=True):
            if isinstance(reply, ForebayError):
                raise reply
            last = Position.parse(bytes(reply[0][0])) if reply else Position(0, 0)
            view.epoch, view.seq = last.epoch, last.seq
            if self._known_run_id:
                self._forget(view, "run_id")

    @property
    def _interval_s(self) -> float:
        return self._staleness_s / _SWEEPS_PER_PROMISE


def _follows(view: ShardView, position: Position) -> bool:
    if position.epoch == view.epoch:
        return position.seq == view.seq + 1
    return position.epoch > view.epoch and position.seq == 0


def _fields(fields: Sequence[Any]) -> tuple[int, bytes]:
    found = {
        bytes(name): bytes(value) for name, value in zip(fields[::2], fields[1::2], strict=True)
    }
    return int(found.get(b"v", b"0")), found.get(b"n", b"")

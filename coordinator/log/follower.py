"""Following the shard logs: what every node does to stay right.

I1  ``live_until`` is a promise on the node's own clock: up to then, every change that was
    acknowledged ``staleness_ms`` ago or earlier has been applied here. It is moved on only by
    a read of our own that came back, and counts from the moment that read was sent.
I2  Notices of a shard are applied in the order of their ids, each once. The next id is
    seq + 1 of the same epoch; after anything else, a later epoch too, the shard is reset:
    its ``generation`` goes up, so that whatever was remembered of it is asked for again.
    A notice that cannot be read, or whose application failed, has the same effect. ``log_begin``
    starts a log over if no epoch can exceed its ids.
I3  The pubsub only makes it fast. A bell out of order makes its shard suspect at once
    (``live_until`` falls), until a read that was sent after it; a lost bell costs at most
    one sweep. A bell that the next read does not confirm resets its shard.
I4  After a reconnect nothing is believed until the server's run id was compared. Another run
    id, or history, may have lost the end of a log and given its ids again: every shard is reset.
I5  A read counts as current only if the server reports after it that it is a primary: a replica
    that is cut off answers reads, too. It also reports its history, so that a demotion and a
    promotion between two reads, with the connection open all the time, is an I4.
I6  A log that the server refuses to read, since its key is of another type, costs its own shard
    only: the other shards stay live. Each sweep resets the refused shard, so its near copies are
    never older than the promise.

A sweep is one XREAD over all shards, several times a second; it does not block, so it can
share the multiplexed link. Owning a position for longer than the log is kept is not needed:
what was trimmed is seen as a gap, be it all; so is a log that is gone (FLUSHALL). An epoch is the
server's time when the log was begun: that a log was lost and begun anew between two sweeps
goes unseen only if the server's clock was set back before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ...schemas.errors import ForebayError, ServerRefused
from ...schemas.keys import Names
from ...schemas.notices import (
    Dropped,
    Notice,
    Position,
    read_notice,
    read_notification,
    write_notice,
)
from ...schemas.replies import WHOLE_MAX, digits, field_map
from ..clock import Clock
from ..instruments import Instruments
from ..log_once import LogOnce
from ..valkey.dialer import ASK_HISTORY, history_of
from ..valkey.link import Arg, Commands, Reply
from ..valkey.scripting import Call, Scripts, granted, load_scripts, run_many
from .shard_view import ShardView

__all__ = ["Follower", "FollowerStatistics", "ResetReason", "ShardView"]

log = structlog.get_logger(__name__)

ResetReason = Literal["trimmed", "epoch", "run_id", "false_bell", "newer", "failed", "refused"]
Apply = Callable[[int, int, Notice], None]
_TOGETHER = 4_096  # notices in one reply, over all shards: some 30 ms of the loop's time
_PAGE_MIN = 16
_SWEEPS_PER_PROMISE = 2.5
_BELLLESS_S = 0.05  # from sweep to sweep while there is no pubsub, or after a failure
_BEGIN = write_notice(Dropped(()))
_QUIET_S = 10.0
_UNKNOWN = Position(0, 0)  # whatever comes next is a gap


class FollowerStatistics(Struct, frozen=True, kw_only=True):
    shards: int
    suspect: int
    sweeps: int
    notices: int
    resets: int


class Follower:
    """Follows all logs of a namespace.

    ``apply(shard, version, notice)`` is called for every notice, in order, and must not
    suspend; ``reset(shard)`` when everything remembered of a shard became doubtful. Applying
    a notice twice must do no harm: after a failure it may have been applied in part.
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
        check: Callable[[bytes], None] | None = None,
        apply: Apply,
        reset: Callable[[int], None],
        scripts: Scripts | None = None,
    ) -> None:
        self.views = tuple(ShardView(number) for number in range(names.shards))
        self.live_until = float("-inf")  #: the earliest of all shards; read on every hit
        self._names = names
        self._logs = tuple(names.part(number, "log") for number in range(names.shards))
        self._by_log = {
            name.encode(): view for name, view in zip(self._logs, self.views, strict=True)
        }
        self._commands = commands
        self._begin = (scripts or load_scripts())["log_begin"]
        self._clock = clock
        self.promise_s = staleness_ms / 1000
        self._interval_s = self.promise_s / _SWEEPS_PER_PROMISE
        self._instruments = instruments
        self._run_id = run_id
        self._known_run_id = ""
        self._check = check or _check_primary
        self._apply = apply
        self._reset = reset
        self._wake = anyio.Event()
        self._sweeping = anyio.Lock()
        self._connection = 0
        self._verified = -1
        self._doorbell_live = False
        self._failing = LogOnce(clock)
        self._refused = LogOnce(clock)
        self._quiet_until = float("-inf")  # for warnings about unreadable notices
        self._reads = self._sweeps = self._notices = self._resets = 0

    def statistics(self) -> FollowerStatistics:
        now = self._clock.monotonic()
        return FollowerStatistics(
            shards=len(self.views),
            suspect=sum(view.live_until <= now for view in self.views),
            sweeps=self._sweeps,
            notices=self._notices,
            resets=self._resets,
        )

    @property
    def doubts(self) -> int:
        """Goes up whenever the server may have lost accepted writes."""
        return self._connection

    def staleness_s(self) -> float:
        """How far back the oldest proof of being current lies."""
        return self._clock.monotonic() - min(view.proved_at for view in self.views)

    def connection_changed(self) -> None:
        """To be called whenever the connection was lost or made: see I4."""
        self._connection += 1
        self._suspect(self.views)

    def doorbell_changed(self, live: bool) -> None:
        """Without a pubsub the sweeps come closer together; bells may have been lost."""
        self._doorbell_live = live
        self._wake.set()

    def bell(self, payload: bytes) -> None:
        """A pubsub message: applied at once if it is the next one."""
        message = read_notification(payload)
        if message is None or not 0 <= message.shard < len(self.views):
            return
        view, position = self.views[message.shard], message.position
        if position <= view.position:
            return
        if self._connection == self._verified and view.may_be_told(position):
            view.tell(position, message.version)
            self._take_in(view, message.version, message.notice)
        else:
            self._suspect((view,))

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled; reports itself started when it is current."""
        started = False
        while True:
            self._wake = anyio.Event()
            if await self._try_to_sweep():
                if not started:
                    started = True
                    task_status.started()
                wait_s = self._interval_s if self._doorbell_live else _BELLLESS_S
                with anyio.move_on_after(wait_s):
                    await self._wake.wait()
            else:
                await anyio.sleep(_BELLLESS_S)

    async def _try_to_sweep(self) -> bool:
        try:
            await self.sweep()
        except ForebayError as error:
            self._failing.say(log, "sweep.failed", error)
            return False
        self._failing.over()
        return True

    async def sweep(self) -> None:
        """Read every log from our position; when it returns, all shards are live.

        One at a time: the second of two sweeps would mistake the same notices for new ones.

        Raises:
            Unavailable, ServerRefused: nothing was proved.
        """
        async with self._sweeping:
            pending: Sequence[ShardView] = self.views
            while pending:
                if self._connection != self._verified:
                    await self._verify()
                    pending = self.views
                else:
                    pending = await self._read(pending)
            self._sweeps += 1

    async def _read(self, views: Sequence[ShardView]) -> Sequence[ShardView]:
        """One page of each; returns those of which there is more to read."""
        connection, sent_at = self._connection, self._clock.monotonic()
        self._reads += 1
        number, page = self._reads, max(_PAGE_MIN, _TOGETHER // len(views))
        streams = [self._logs[view.number] for view in views]
        positions = [view.ask() for view in views]
        read: list[Arg] = ["XREAD", "COUNT", page, "STREAMS", *streams, *positions]
        lengths_of = [("XLEN", name) for name in streams]
        replies = await self._commands.call_many([read, *lengths_of, ASK_HISTORY])
        if readable := self._without_refused(views, replies[1:-1]):
            return readable
        self._check(granted(replies)[-1])  # the last reply: it covers all reads before it
        if connection != self._connection:
            return views
        found, *lengths, _ = replies
        unfinished = set()
        for name, entries in found or ():
            view = self._by_log[bytes(name)]
            self._take_page(view, entries)
            if len(entries) == page:
                unfinished.add(view.number)
        strayed = [v for v in views if v.spoilt or (v.strayed and v.number not in unfinished)]
        empty = [view for view, length in zip(views, lengths, strict=True) if not length]
        if (strayed or empty) and await self._find_ends(strayed, empty):
            return views
        return self._prove(views, unfinished, number, sent_at)

    def _without_refused(
        self, views: Sequence[ShardView], lengths: Sequence[Reply]
    ) -> Sequence[ShardView]:
        """The views to read again, if the server refuses others; else none."""
        readable = []
        for view, length in zip(views, lengths, strict=True):
            if isinstance(length, ServerRefused) and length.code == "WRONGTYPE":
                refused = length.at(self._logs[view.number])
                view.doubt(self._reads)
                view.refused = str(refused)
                self._forget(view, "refused")
                self._refused.say(log, "log.refused", refused, shard=view.number)
            else:
                readable.append(view)
        return readable if len(readable) < len(views) else ()

    async def _find_ends(self, strayed: Sequence[ShardView], empty: Sequence[ShardView]) -> bool:
        """Where logs end that do not say so themselves; true if they are to be read again.

        From an empty one, or none, nothing follows: what was not read may be gone from it.
        It gets a notice, whose id tells.
        """
        connection, ends = self._connection, await self._ends()
        if connection != self._connection:
            return True
        for view in strayed:
            self._start_over(view, ends[view.number], "false_bell")
        for view in empty:
            if ends[view.number] == _UNKNOWN and view.position != _UNKNOWN:
                self._start_over(view, _UNKNOWN, "epoch")
        return bool(strayed) or any(ends[view.number] != _UNKNOWN for view in empty)

    def _prove(
        self, views: Sequence[ShardView], unfinished: set[int], number: int, sent_at: float
    ) -> list[ShardView]:
        """Move the promise on; returns those of which this read proved nothing."""
        until = sent_at + self.promise_s
        unproved = [
            view
            for view in views
            if view.number in unfinished or not view.prove(number, sent_at, until)
        ]
        self.live_until = min(view.live_until for view in self.views if not view.refused)
        return unproved

    def _take_page(self, view: ShardView, entries: Sequence[Any]) -> None:
        for raw_id, fields in entries:
            if view.confirms(raw_id, fields[1]):
                continue
            position = Position.parse(bytes(raw_id))
            if position.epoch > WHOLE_MAX:
                self._unread(view, f"the id {position}")
                view.spoilt = True
                return
            if view.contradicts(position):
                self._forget(view, "false_bell")
            elif not view.follows(position):
                self._forget(view, "trimmed" if position.epoch == view.epoch else "epoch")
            view.start_over(position)
            self._take_in(view, *_fields(fields))

    def _take_in(self, view: ShardView, version: int, raw: bytes) -> None:
        """Apply the notice at the position."""
        self._notices += 1
        notice = read_notice(raw)
        if notice is None:
            # A newer node wrote it, or none did: its effect is unknown, so the shard is suspect.
            self._unread(view, f"the notice {view.position} of {len(raw)} bytes")
            self._forget(view, "newer")
            return
        self._instruments.counts["notices_applied", type(notice).__name__.lower()] += 1
        try:
            self._apply(view.number, version, notice)
        except Exception:
            # To be raised into the pubsub, it would be logged and the notice lost for good.
            log.exception("notice.failed", shard=view.number, position=str(view.position))
            self._forget(view, "failed")

    def _unread(self, view: ShardView, what: str) -> None:
        """Name the unreadable notice, a few times a minute at most."""
        now = self._clock.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            log.warning("log.unreadable", stream=self._logs[view.number], found=what)

    def _forget(self, view: ShardView, reason: ResetReason) -> None:
        view.generation += 1
        self._resets += 1
        self._instruments.counts["log_gaps", reason] += 1
        self._reset(view.number)

    def _suspect(self, views: Sequence[ShardView]) -> None:
        for view in views:
            view.doubt(self._reads)
        self.live_until = float("-inf")
        self._wake.set()

    async def _verify(self) -> None:
        """Compare run ids; done if the connection is still the same afterwards."""
        connection = self._connection
        run_id = await self._run_id()
        ends = None if run_id == self._known_run_id else await self._ends()
        if connection != self._connection:
            return
        if ends is not None:
            if self._known_run_id:
                log.warning("log.restarted", reason="the server's run id changed")
            for view in self.views:
                self._start_over(view, ends[view.number], "run_id")
        self._known_run_id, self._verified = run_id, connection

    async def _ends(self) -> Sequence[Position]:
        """Where the logs end now; those that hold nothing are begun."""
        part, bell = self._names.part, self._names.bell
        calls = [
            Call(
                script=self._begin,
                keys=[part(view.number, "head"), part(view.number, "log")],
                args=[_BEGIN, bell, view.number],
            )
            for view in self.views
        ]
        return [_end(reply) for reply in await run_many(self._commands, calls)]

    def _start_over(self, view: ShardView, end: Position, reason: ResetReason) -> None:
        view.start_over(end)
        if self._known_run_id:  # otherwise nothing is remembered yet
            self._forget(view, reason)


def _check_primary(reply: bytes) -> None:
    history_of(reply)


def _end(reply: Reply) -> Position:
    if isinstance(reply, ServerRefused) and (
        reply.code == "OOM" or "WRONGTYPE" in f"{reply.code} {reply.message}"
    ):
        return _UNKNOWN
    if isinstance(reply, ForebayError):
        raise reply
    return Position.parse(bytes(reply))


def _fields(fields: Sequence[Any]) -> tuple[int, bytes]:
    """The version and the notice; what was not written by us has none that could be read."""
    found = field_map(fields)
    version = found.get(b"v", b"")
    number = digits(version)
    return (0, b"") if number is None or number > WHOLE_MAX else (number, found.get(b"n", b""))

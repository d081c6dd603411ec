"""External writers: what others do to entries in Valkey itself becomes notices.

Off by default (``cache.external_writers``), and at work on one node: whoever owns the ingress
stream. It follows CLIENT TRACKING, looks at what was changed (``foreign``), and tells the logs.

V1  After a SET by others every node reads what they stored, after a DEL none serves its copy
    as fresh, as soon as it has applied the notice. What was set is not kept in near caches.
V2  Changes of our own, and entries that end with their lifetime, make no notice.
V3  Where changes may have been missed, all shards are reset: when a node takes over, after a
    lost connection, a flush, and when more come than ``queue_max``. Near copies are then
    revalidated as they are read.
V4  At most ``told_per_s_max`` keys are told in a second, and one reset of every shard.
V5  Where the server does not let us track, there is one warning, and nothing else is lost.

Entries that are evicted look deleted, and so do those whose lifetime is not known when it
ends: stored before this node took over, or not among the last of ``lifetimes``. That costs a
notice each, and the load that is under way for such a key is not stored. Not seen is an older
entry of ours that others bring back, magic and all. A load that ends between the SET of others
and its notice overwrites what they set; one that began before a DEL which was missed (V3), too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import anyio
import structlog
from anyio.abc import TaskStatus

from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...coordinator.log.ownership import Claim
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.dialer import Dialer
from ...coordinator.valkey.tracking import Tracking
from ...schemas.errors import ForebayError
from ...schemas.keys import EVENTS, Names
from ...schemas.notices import Notice
from ...schemas.settings import Valkey
from .foreign import ForeignEntries

__all__ = ["ChangedEntries", "ExternalWriters"]

log = structlog.get_logger(__name__)

_TOGETHER = 1_000
_RESET_EVERY_S = 1.0
_RETRY_S = 0.2


class ChangedEntries:
    """What the tracking said and nobody has looked at: keys, or why all are in doubt."""

    def __init__(self, names: Names, instruments: Instruments, *, queue_max: int) -> None:
        self.doubt = ""
        self.doubtful: set[int] = set()  #: shards
        self._names = names
        self._counts = instruments.counts
        self._queue_max = queue_max
        self._head = len(names.prefixes[0])
        self._part = _entry_part(names)
        self._queue: dict[bytes, None] = {}
        self._rung = anyio.Event()
        self._begun = False

    def __len__(self) -> int:
        return len(self._queue)

    def clear(self) -> None:
        """As for a node that was just elected."""
        self._queue.clear()
        self.doubtful.clear()
        self._begun = False

    def changed(self, names: Sequence[bytes]) -> None:
        start, part = self._head, self._part
        end = start + len(part)
        self._queue.update((name, None) for name in names if name[start:end] == part)
        if len(self._queue) > self._queue_max:
            self._doubt_all("overflow")
        self._rung.set()

    def flushed(self) -> None:
        self._doubt_all("flushed")

    def lost(self) -> None:
        if self._begun:
            self._counts["backend_reconnects", "tracking"] += 1
        self._begun = True
        self._doubt_all("missed")

    def _doubt_all(self, why: str) -> None:
        self._counts["external_changes", why] += 1
        self._queue.clear()
        self.doubt, self.doubtful = why, set(range(self._names.shards))
        self._rung.set()

    async def some(self) -> None:
        """Wait until there is something to do."""
        while not self._queue and not self.doubtful:
            self._rung = anyio.Event()
            await self._rung.wait()

    def take(self) -> list[str]:
        """The keys that wait longest. What is no entry's name is left out."""
        names = list(islice(self._queue, _TOGETHER))
        for name in names:
            del self._queue[name]
        return [key for key in map(self._key, names) if key is not None]

    def put_back(self, keys: Sequence[str]) -> None:
        self.changed([self._names.entry(key).encode() for key in keys])

    def _key(self, name: bytes) -> str | None:
        try:
            key = name[self._head + len(self._part) :].decode()
        except UnicodeDecodeError:
            return None
        return key if self._names.entry(key).encode() == name else None


class ExternalWriters:
    """``dialer``: None where the server cannot track. ``noticed`` wants every notice."""

    def __init__(
        self,
        dialer: Dialer | None,
        options: Valkey,
        names: Names,
        foreign: ForeignEntries,
        *,
        clock: Clock,
        rng: random.Random,
        instruments: Instruments,
        queue_max: int = 50_000,
        told_per_s_max: int = 10_000,
    ) -> None:
        self._foreign = foreign
        self._clock = clock
        self._counts = instruments.counts
        self._told_per_s_max = told_per_s_max
        self._changes = ChangedEntries(names, instruments, queue_max=queue_max)
        self._tenure: Claim | None = None
        self._turn = anyio.Event()
        self._reset_from = float("-inf")
        self._failing = LogOnce(clock)
        prefix = f"{{{names.namespace}:".encode()
        self.tracking = (
            None
            if dialer is None
            else Tracking(dialer, options, prefix=prefix, told=self._changes, clock=clock, rng=rng)
        )

    def __repr__(self) -> str:
        state = "idle" if self._tenure is None else "at work"
        return f"<ExternalWriters {state}, {len(self._changes)} to look at>"

    def gained(self, tenure: Claim) -> None:
        if tenure.resource == EVENTS:
            self._elect(tenure)

    def lost(self, tenure: Claim) -> None:
        if tenure.resource == EVENTS:
            self._elect(None)

    async def yielding(self, tenures: Sequence[Claim]) -> None:
        """Nothing has to be finished: whoever takes over doubts everything (V3)."""

    def _elect(self, tenure: Claim | None) -> None:
        self._tenure = tenure
        self._turn.set()
        self._turn = anyio.Event()

    def noticed(self, version: int, notice: Notice) -> None:
        """To be called with every notice that this node applies."""
        if self._tenure is not None:
            self._foreign.noticed(version, notice)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow whenever this node is elected; returns if that cannot be done here (V5)."""
        task_status.started()
        reason = "fakeredis cannot track keys"
        if self.tracking is not None:
            while self.tracking.refused is None:
                if self._tenure is None:
                    await self._turn.wait()
                else:
                    await self._serve(self._tenure, self.tracking)
            reason = str(self.tracking.refused)
        log.warning("external_writers.off", reason=reason)

    async def _serve(self, tenure: Claim, tracking: Tracking) -> None:
        """Follow until another node is elected, or the server refuses."""
        self._changes.clear()
        self._foreign.lifetimes.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._work)
            tasks.start_soon(self._follow, tracking, tasks.cancel_scope)
            while self._tenure is tenure:
                await self._turn.wait()
            tasks.cancel_scope.cancel()

    async def _follow(self, tracking: Tracking, scope: anyio.CancelScope) -> None:
        await tracking.run()
        scope.cancel()

    async def _work(self) -> None:
        while True:
            await self._changes.some()
            try:
                if self._changes.doubtful:
                    fault = await self._reset()
                else:
                    fault = await self._tell()
            except ForebayError as error:
                fault = error
            if fault is not None:
                self._failing.say(log, "external_writers.interrupted", fault)
                await anyio.sleep(_RETRY_S)
            else:
                self._failing.over()

    async def _reset(self) -> ForebayError | None:
        """Reset the shards in doubt, though not more often than V4 says."""
        changes = self._changes
        await anyio.sleep(max(0.0, self._reset_from - self._clock.monotonic()))
        self._reset_from = self._clock.monotonic() + _RESET_EVERY_S
        shards, changes.doubtful = changes.doubtful, set()
        try:
            refused, fault = await self._foreign.reset(shards)
        except BaseException:
            changes.doubtful |= shards
            raise
        changes.doubtful.update(refused)
        log.info("external_writers.reset", why=changes.doubt, shards=len(shards) - len(refused))
        return fault

    async def _tell(self) -> ForebayError | None:
        """Deal with what has come so far, at most a batch of it, and no faster than V4 says."""
        keys = self._changes.take()
        if not keys:
            return None
        try:
            done = await self._foreign.tell(keys)
        except BaseException:
            self._changes.put_back(keys)
            raise
        self._changes.put_back(done.undone)
        self._counts["external_changes", "set"] += done.set
        self._counts["external_changes", "deleted"] += done.deleted
        if told := done.set + done.deleted:
            await anyio.sleep(told / self._told_per_s_max)
        return done.fault


def _entry_part(names: Names) -> bytes:
    """What entries have between the name of the shard and the key, with its colon."""
    shard = names.prefixes[names.shard("x")]
    return names.entry("x").removeprefix(shard).removesuffix("x").encode()

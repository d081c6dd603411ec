"""Refresh jobs: any node with the loader does them, each once.

H1  A job carries the fill lease; a job whose lease is over is worthless and dropped, since
    the next reader who finds the entry stale publishes another.
H2  A job is acknowledged when it was tried: a loader that fails is not tried again for it.
H3  At most ``running_max`` refreshes run at a time; what waits longer than its lease is shed,
    without a call of the loader.
H4  What stands in one shard's stream, or instead of it, does not stop the others.
    Nodes of a namespace have the same caches: a job for one that is unknown here is dropped.

Order plays no part here, so a consumer group shares the jobs out. All nodes are one consumer:
whose job it was does not matter, since only jobs that are over are ever claimed back, and
consumers, which the server never forgets, do not pile up.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import msgspec
import structlog
from anyio.abc import TaskStatus

from ...coordinator.instruments import Instruments
from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Commands
from ...schemas.errors import ForebayError, ServerRefused
from ...schemas.jobs import RefreshJob, read_refresh
from ...schemas.keys import Names
from ...schemas.replies import field_map
from ..cancellation import asked_to_stop
from .routes import Routes

__all__ = ["Refreshes"]

log = structlog.get_logger(__name__)

_GROUP = _CONSUMER = "refresh"
_PAGE = 32
_SWEEP_S = 1.0
_CLAIMED_MAX = 1_000
_FORGET_S = 1.0


class Taken(msgspec.Struct, frozen=True, eq=False):
    """A job delivered to this node; it stands for itself, whatever it says."""

    shard: int
    entry_id: bytes
    raw: bytes


class Refreshes:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        routes: Routes,
        *,
        node_id: str,
        lease_ms: int,
        running_max: int,
        instruments: Instruments,
    ) -> None:
        self._commands = commands
        self._names = names
        self._streams = [names.part(shard, "refreshes") for shard in range(names.shards)]
        self._routes = routes
        self._node_id = node_id
        self._lease_ms = lease_ms
        self._limiter = anyio.CapacityLimiter(running_max)
        self._counts = instruments.counts
        self._rung: set[int] = set()
        self.failing, self._loading = LogOnce(), LogOnce()
        self._wake = anyio.Event()

    def __repr__(self) -> str:
        running = self._limiter.borrowed_tokens
        return f"<Refreshes of {self._node_id}, {running} running, {len(self._rung)} rung>"

    def bell(self, shard: int) -> None:
        self._rung.add(shard)
        self._wake.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Do refreshes until cancelled."""
        task_status.started()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._reclaim_now_and_then)
            self._rung.update(range(len(self._streams)))
            while True:
                self._wake = anyio.Event()
                rung, self._rung = sorted(self._rung), set()
                try:
                    for job in await self._take(rung):
                        await self._limiter.acquire_on_behalf_of(job)
                        tasks.start_soon(self._do, job)
                except ForebayError as error:
                    self.failing.say(log, "refreshes.failed", error)
                with anyio.move_on_after(_SWEEP_S) as swept:
                    await self._wake.wait()
                if swept.cancelled_caught:
                    self._rung.update(range(len(self._streams)))

    async def _take(self, shards: Sequence[int]) -> list[Taken]:
        read = ("XREADGROUP", "GROUP", _GROUP, _CONSUMER, "COUNT", _PAGE, "STREAMS")
        replies = await self._commands.call_many(
            [(*read, self._streams[shard], ">") for shard in shards]
        )
        jobs: list[Taken] = []
        without_group = []
        refused: list[ServerRefused] = []
        for shard, reply in zip(shards, replies, strict=True):
            if isinstance(reply, ServerRefused):
                if reply.code == "NOGROUP":
                    without_group.append(shard)
                else:
                    refused.append(reply.at(self._streams[shard]))
            elif reply:
                entries = reply[0][1]
                jobs += [Taken(shard, bytes(raw_id), _job(fields)) for raw_id, fields in entries]
                if len(entries) == _PAGE:
                    self.bell(shard)
        refused += await self._make_groups(without_group)
        self._tell(refused)
        return jobs

    def _tell(self, refused: Sequence[ServerRefused]) -> None:
        """One line for all shards; nothing refused, nothing failing."""
        if refused:
            self.failing.say(log, "refreshes.refused", refused[0], shards=len(refused))
        else:
            self.failing.over()

    async def _make_groups(self, shards: Sequence[int]) -> list[ServerRefused]:
        """From the first entry on. Another node may be faster, which is as good."""
        create = [("XGROUP", "CREATE", self._streams[n], _GROUP, "0", "MKSTREAM") for n in shards]
        refused = []
        for shard, reply in zip(shards, await self._commands.call_many(create), strict=True):
            if isinstance(reply, ServerRefused) and reply.code != "BUSYGROUP":
                refused.append(reply.at(self._streams[shard]))
            else:
                self.bell(shard)
        return refused

    async def _do(self, job: Taken) -> None:
        result = "failed"
        try:
            result = await self._refresh(job.raw)
        except BaseException as error:
            # The loader's own; it was counted, and nobody waits for this one.
            if asked_to_stop(error):
                raise
            self._loading.say(log, "refresh.failed", error, kind=type(error).__name__)
        finally:
            self._limiter.release_on_behalf_of(job)
            self._counts["refreshes", result] += 1
            with anyio.move_on_after(_FORGET_S, shield=True):
                await self._forget(job.shard, [job.entry_id])

    async def _refresh(self, raw: bytes) -> str:
        try:
            job = read_refresh(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return "undecodable"
        cached = self._routes.caches.get(job.cache)
        if cached is None:
            return "unknown_cache"
        if not await self._holds_lease(job):
            return "expired"
        return "done" if await cached.refresh(job) else "refused"

    async def _holds_lease(self, job: RefreshJob) -> bool:
        holder = await self._commands.call("GET", self._names.lease(job.key))
        return holder is not None and bytes(holder) == job.token.encode()

    async def _forget(self, shard: int, entry_ids: Sequence[bytes]) -> None:
        """Acknowledge and delete: these were delivered, so no reader misses them."""
        stream = self._streams[shard]
        try:
            await self._commands.call_many(
                [("XACK", stream, _GROUP, *entry_ids), ("XDEL", stream, *entry_ids)]
            )
        except ForebayError as error:
            log.debug("refresh.kept", error=str(error))

    async def _reclaim_now_and_then(self) -> None:
        """Drop the jobs of nodes that died: their leases are over."""
        while True:
            await anyio.sleep(self._lease_ms / 1000)
            try:
                await self.reclaim()
            except ForebayError as error:
                log.debug("reclaim.failed", error=str(error))

    async def reclaim(self) -> None:
        claim = (_GROUP, _CONSUMER, self._lease_ms, "0", "COUNT", _CLAIMED_MAX, "JUSTID")
        replies = await self._commands.call_many(
            [("XAUTOCLAIM", stream, *claim) for stream in self._streams]
        )
        for shard, reply in enumerate(replies):
            if not isinstance(reply, ForebayError) and reply[1]:
                await self._forget(shard, [bytes(entry_id) for entry_id in reply[1]])
                self._counts["refreshes", "expired"] += len(reply[1])


def _job(fields: Sequence[bytes] | None) -> bytes:
    """The job of an entry; empty, which is none, if there is no such field."""
    return field_map(fields).get(b"j", b"")

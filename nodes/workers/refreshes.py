"""Refresh jobs: any node with the loader does them, each once.

H1  A job carries the fill lease; a job whose lease is over is worthless and dropped, since
    the next reader who finds the entry stale publishes another.
H2  A job is acknowledged when it was tried: a loader that fails is not tried again for it.
H3  At most ``loads_max`` refreshes run at a time; what waits longer than its lease is shed.

Order plays no part here, so a consumer group shares the jobs out.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import msgspec
import structlog
from anyio.abc import TaskStatus

from ...coordinator.instruments import Instruments
from ...coordinator.link import Commands, Reply
from ...schemas.errors import ForebayError, ServerRefused
from ...schemas.jobs import read_refresh
from ...schemas.keys import Names
from .routes import Routes

__all__ = ["Refreshes"]

log = structlog.get_logger(__name__)

_GROUP = "refresh"
_PAGE = 32
_SWEEP_S = 1.0


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
        self._streams = [names.part(shard, "refreshes") for shard in range(names.shards)]
        self._routes = routes
        self._node_id = node_id
        self._lease_ms = lease_ms
        self._limiter = anyio.CapacityLimiter(running_max)
        self._instruments = instruments
        self._rung: set[int] = set()
        self._wake = anyio.Event()

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
                    for shard, entry_id, raw in await self._take(rung):
                        await self._limiter.acquire_on_behalf_of(token := object())
                        tasks.start_soon(self._do, shard, entry_id, raw, token)
                except ForebayError as error:
                    log.debug("refreshes.failed", error=str(error))
                with anyio.move_on_after(_SWEEP_S) as swept:
                    await self._wake.wait()
                if swept.cancelled_caught:
                    self._rung.update(range(len(self._streams)))

    async def _take(self, shards: Sequence[int]) -> list[tuple[int, bytes, bytes]]:
        read = ("XREADGROUP", "GROUP", _GROUP, self._node_id, "COUNT", _PAGE, "STREAMS")
        replies = await self._commands.call_many(
            [(*read, self._streams[shard], ">") for shard in shards]
        )
        jobs: list[tuple[int, bytes, bytes]] = []
        for shard, reply in zip(shards, replies, strict=True):
            if isinstance(reply, ServerRefused):
                await self._found(shard, reply)
            elif reply:
                entries = reply[0][1]
                jobs += [(shard, bytes(raw_id), bytes(fields[1])) for raw_id, fields in entries]
                if len(entries) == _PAGE:
                    self.bell(shard)
        return jobs

    async def _found(self, shard: int, refused: ServerRefused) -> None:
        """The stream is there, the group is not: make it, from the first entry on."""
        if refused.code != "NOGROUP":
            raise refused
        stream = self._streams[shard]
        if not await self._commands.call("EXISTS", stream):
            return
        try:
            await self._commands.call("XGROUP", "CREATE", stream, _GROUP, "0")
        except ServerRefused as error:
            if error.code != "BUSYGROUP":
                raise
        self.bell(shard)

    async def _do(self, shard: int, entry_id: bytes, raw: bytes, token: object) -> None:
        result = "failed"
        try:
            result = await self._refresh(raw)
        except Exception as error:
            # The loader's own error: it was counted and the caller of nobody waits for it.
            log.warning("refresh.failed", error=f"{type(error).__name__}: {error}")
        finally:
            self._limiter.release_on_behalf_of(token)
            self._instruments.counts["refreshes", result] += 1
            with anyio.move_on_after(1, shield=True):
                await self._forget(shard, [entry_id])

    async def _refresh(self, raw: bytes) -> str:
        try:
            job = read_refresh(raw)
        except (msgspec.MsgspecError, ValueError):
            return "undecodable"
        cached = self._routes.caches.get(job.cache)
        if cached is None:
            return "unknown_cache"
        return "done" if await cached.do_refresh(job) else "refused"

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
                await self._reclaim()
            except ForebayError as error:
                log.debug("reclaim.failed", error=str(error))

    async def _reclaim(self) -> None:
        claim = (_GROUP, self._node_id, self._lease_ms, "0", "COUNT", 100, "JUSTID")
        replies: list[Reply] = await self._commands.call_many(
            [("XAUTOCLAIM", stream, *claim) for stream in self._streams]
        )
        for shard, reply in enumerate(replies):
            if not isinstance(reply, ForebayError) and reply[1]:
                await self._forget(shard, [bytes(entry_id) for entry_id in reply[1]])
                self._instruments.counts["refreshes", "expired"] += len(reply[1])

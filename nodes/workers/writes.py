"""Write-behind: the owner of a shard brings its writes to the sinks, in order.

W1  A shard's writes are read from its checkpoint on, and the checkpoint moves only past what
    every sink has stored, or the dead letters hold. A crash anywhere repeats work, and the
    version guard and progress rows of the sinks make the repetition harmless.
W2  Of a contiguous range only the newest write of each key goes to the sink.
W3  What a write invalidates is invalidated after the sinks have it, before the checkpoint.
W4  Work is handed out only while the tenure is in force; commits carry its epoch.

All shards of this node share one flush, so that a slow trickle over many shards makes
few transactions. A bell starts a round; a sweep finds what bells missed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ...coordinator.link import Commands
from ...coordinator.ownership import Ownership, Tenure
from ...coordinator.scripting import Call, Scripts, run_many
from ...schemas.errors import Fenced, ForebayError, InvalidEntry, InvalidEvent
from ...schemas.jobs import WriteJob, read_write
from ...schemas.keys import EVENTS, Names
from ...schemas.settings import Workers
from ..sinks.base import Progress, SinkBatch, Write
from .dead_letters import DeadLetters
from .delivery import Delivery
from .routes import Routes

__all__ = ["WriteBehind"]

log = structlog.get_logger(__name__)

Invalidate = Callable[[Sequence[str], Sequence[str]], Awaitable[None]]
_SWEEP_S = 0.25
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError, InvalidEntry)


class Queued(Struct, frozen=True):
    """One entry of a writes stream."""

    id: str
    version: int
    raw: bytes
    job: WriteJob | None


class Page(Struct, frozen=True):
    """A contiguous range of one shard's writes."""

    tenure: Tenure
    entries: Sequence[Queued]

    @property
    def last_id(self) -> str:
        return self.entries[-1].id


class _Queue:
    __slots__ = ("busy", "position", "rung", "tenure", "yielding")

    def __init__(self, tenure: Tenure) -> None:
        self.tenure = tenure
        self.position = ""
        self.rung = True
        self.busy = False
        self.yielding = False


class WriteBehind:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        ownership: Ownership,
        routes: Routes,
        deliveries: Mapping[str, Delivery],
        dead_letters: DeadLetters,
        *,
        node_id: str,
        options: Workers,
        invalidate: Invalidate,
    ) -> None:
        self._commands = commands
        self._names = names
        self._scripts = scripts
        self._ownership = ownership
        self._routes = routes
        self._deliveries = deliveries
        self._dead_letters = dead_letters
        self._node_id = node_id
        self._options = options
        self._invalidate = invalidate
        self._queues: dict[int, _Queue] = {}
        self._wake = anyio.Event()
        self._idle = anyio.Event()
        self._found_nothing = False
        self.backlog = 0  #: entries read in the last round; 0: nothing is known to wait

    def gained(self, tenure: Tenure) -> None:
        if tenure.resource != EVENTS:
            self._queues[tenure.resource] = _Queue(tenure)
            self._wake.set()

    def lost(self, tenure: Tenure) -> None:
        self._queues.pop(tenure.resource, None)

    async def yielding(self, tenures: Sequence[Tenure]) -> None:
        """Hand out no more work of these shards, and wait for what is under way."""
        queues = [queue for t in tenures if (queue := self._queues.get(t.resource)) is not None]
        for queue in queues:
            queue.yielding = True
        with anyio.move_on_after(self._options.ownership_ttl_ms / 2000):
            while any(queue.busy for queue in queues):
                await self._idle.wait()

    def bell(self, shard: int) -> None:
        queue = self._queues.get(shard)
        if queue is not None:
            queue.rung = True
            self._wake.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Flush until cancelled."""
        task_status.started()
        while True:
            self._wake = anyio.Event()
            try:
                while await self.round():
                    pass
            except Fenced:
                await anyio.sleep(_SWEEP_S)
            except ForebayError as error:
                log.warning("round.failed", error=str(error))
                await anyio.sleep(_SWEEP_S)
            with anyio.move_on_after(_SWEEP_S):
                await self._wake.wait()
                await anyio.sleep(self._options.flush_delay_ms / 1000)
            for queue in self._queues.values():
                queue.rung = True

    async def empty(self) -> None:
        """Wait until a round of all queues has found nothing."""
        self._found_nothing = False
        while self._queues and not self._found_nothing:
            for queue in self._queues.values():
                queue.rung = True
            self._wake.set()
            await self._idle.wait()

    async def round(self) -> bool:
        """Read what waits, flush and commit it; false when nothing waited."""
        queues = [
            queue
            for queue in self._queues.values()
            if queue.rung and not queue.yielding and self._in_force(queue.tenure)
        ]
        if not queues:
            return False
        for queue in queues:
            queue.busy = True
        try:
            await self._locate([queue for queue in queues if not queue.position])
            pages = await self._read(queues)
            self._found_nothing = not pages and len(queues) == len(self._queues)
            if pages:
                await self._flush(pages)
        finally:
            for queue in queues:
                queue.busy = False
            self._idle.set()
            self._idle = anyio.Event()
        return bool(pages)

    async def _locate(self, queues: Sequence[_Queue]) -> None:
        """Where to begin: the checkpoint."""
        if not queues:
            return
        shards = [queue.tenure.resource for queue in queues]
        done = await self._commands.call_many(
            [("HGET", self._names.part(shard, "done"), "writes") for shard in shards]
        )
        for queue, reply in zip(queues, done, strict=True):
            if isinstance(reply, ForebayError):
                raise reply
            queue.position = "0-0" if reply is None else bytes(reply).decode()

    async def _read(self, queues: Sequence[_Queue]) -> list[Page]:
        count = max(50, self._options.flush_rows_max // len(queues))
        replies = await self._commands.call_many(
            [
                ("XREAD", "COUNT", count, "STREAMS", self._stream(queue.tenure), queue.position)
                for queue in queues
            ]
        )
        pages = []
        for queue, reply in zip(queues, replies, strict=True):
            if isinstance(reply, ForebayError):
                raise reply
            queue.rung = bool(reply) and len(reply[0][1]) >= count
            if reply:
                pages.append(Page(queue.tenure, [_queued(*entry) for entry in reply[0][1]]))
        self.backlog = sum(len(page.entries) for page in pages)
        return pages

    async def _flush(self, pages: Sequence[Page]) -> None:
        progress = [
            Progress(shard=p.tenure.resource, epoch=p.tenure.epoch, position=p.last_id)
            for p in pages
        ]
        newest = _newest(pages)
        for page in pages:
            for queued in page.entries:
                if queued.job is None:
                    await self._bury(page, queued, InvalidEvent("undecodable", "no write job"))
        batches: dict[str, list[Write[Any]]] = {name: [] for name in self._deliveries}
        for queued, page in newest.values():
            await self._route(queued, page, batches)
        for name, delivery in self._deliveries.items():
            batch = SinkBatch(writes=batches[name], progress=progress)
            refused = await delivery.deliver(batch, ours=lambda: self._ours(pages))
            for each in refused:
                queued, page = newest[each.write.key]
                await self._bury(page, queued, InvalidEvent("sink_refused", each.problem))
        await self._invalidate_after(pages)
        await self._commit(pages, newest)

    async def _route(
        self, queued: Queued, page: Page, batches: dict[str, list[Write[Any]]]
    ) -> None:
        job = queued.job
        assert job is not None
        found, fault = self._routes.sink_of(job.key), None
        if found is None:
            fault = InvalidEvent("no_sink", f"no sink takes {job.key!r}")
        else:
            sink, params = found
            try:
                value = self._routes.value_of(job.key, job.value)
                batches[sink.name].append(
                    Write(key=job.key, params=params, value=value, version=queued.version)
                )
            except _UNDECODABLE as error:
                fault = InvalidEvent("undecodable", f"the job's value: {error}")
        if fault is not None:
            await self._bury(page, queued, fault)

    async def _bury(self, page: Page, queued: Queued, error: InvalidEvent) -> None:
        await self._dead_letters.bury(page.tenure.resource, queued.id, queued.raw, error)

    async def _invalidate_after(self, pages: Sequence[Page]) -> None:
        jobs = [queued.job for page in pages for queued in page.entries if queued.job]
        keys = list(dict.fromkeys(key for job in jobs for key in job.invalidates.keys))
        tags = list(dict.fromkeys(tag for job in jobs for tag in job.invalidates.tags))
        if keys or tags:
            await self._invalidate(keys, tags)

    async def _commit(
        self, pages: Sequence[Page], newest: Mapping[str, tuple[Queued, Page]]
    ) -> None:
        replies = await run_many(self._commands, [self._commit_call(p, newest) for p in pages])
        for page, reply in zip(pages, replies, strict=True):
            if isinstance(reply, ForebayError):
                raise reply
            queue = self._queues.get(page.tenure.resource)
            if not reply[0]:
                self._ownership.fenced(page.tenure)
            elif queue is not None and queue.tenure is page.tenure:
                queue.position = page.last_id

    def _commit_call(self, page: Page, newest: Mapping[str, tuple[Queued, Page]]) -> Call:
        shard, names = page.tenure.resource, self._names
        sunk = [queued for queued, of in newest.values() if of is page and queued.job]
        ms, _, seq = page.last_id.partition("-")
        return Call(
            script=self._scripts["checkpoint_commit"],
            keys=[
                names.part(shard, "own"),
                names.part(shard, "done"),
                names.part(shard, "writes"),
                *(names.entry(queued.job.key) for queued in sunk if queued.job),
            ],
            args=[
                self._node_id,
                page.tenure.epoch,
                "writes",
                page.last_id,
                f"{ms}-{int(seq) + 1}",
                *(queued.version for queued in sunk),
            ],
        )

    def _ours(self, pages: Sequence[Page]) -> bool:
        return all(self._in_force(page.tenure) for page in pages)

    def _in_force(self, tenure: Tenure) -> bool:
        return self._ownership.in_force(tenure.resource) is tenure

    def _stream(self, tenure: Tenure) -> str:
        return self._names.part(tenure.resource, "writes")


def _newest(pages: Sequence[Page]) -> dict[str, tuple[Queued, Page]]:
    """The last write of each key."""
    newest: dict[str, tuple[Queued, Page]] = {}
    for page in pages:
        for queued in page.entries:
            if queued.job is not None:
                newest[queued.job.key] = queued, page
    return newest


def _queued(raw_id: bytes, fields: Sequence[bytes]) -> Queued:
    found = {
        bytes(name): bytes(value) for name, value in zip(fields[::2], fields[1::2], strict=True)
    }
    raw, job = found.get(b"j", b""), None
    try:
        job = read_write(raw)
    except _UNDECODABLE:
        log.error("job.undecodable", entry=bytes(raw_id).decode())
    return Queued(bytes(raw_id).decode(), int(found.get(b"v", b"0")), raw, job)

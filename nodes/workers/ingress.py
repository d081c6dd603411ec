"""Ingress: one owner at a time applies what services publish, in the order published.

G1  The checkpoint moves past an event when it was applied, is a dead letter, or is held.
G2  After a crash a batch is applied again; marks make the repetition harmless (plan P2).
G3  No event stops the ones behind it: what can never be applied goes to the dead letters,
    what a newer node can read is held and published again when one takes over.
G4  A write is refused by a full stream only as long as it is full: ingress waits, and so,
    by the bound of its own stream, do the publishers.

Reading blocks, so it has a connection of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import msgspec
import structlog
from anyio.abc import TaskStatus

from ...coordinator.link import Commands, Reply
from ...coordinator.ownership import Ownership, Tenure
from ...coordinator.scripting import Call, Scripts, run
from ...schemas.errors import (
    Backpressure,
    Fenced,
    ForebayError,
    InvalidEntry,
    InvalidEvent,
    ServerRefused,
)
from ...schemas.events import NewerSchema, Refresh, Write, read_event
from ...schemas.jobs import RefreshJob, WriteJob
from ...schemas.keys import EVENTS, Names
from ...schemas.settings import Durable
from ..cache.loads import Core
from .dead_letters import DeadLetters
from .plan import Invalidation, Step, Taken, WriteStep, plan
from .routes import Routes

__all__ = ["Ingress"]

log = structlog.get_logger(__name__)

_BATCH = 500
_BLOCK_MS = 500
_ANY = 1 << 62
_NO_FIELD = InvalidEvent(
    "wrong_field",
    "the entry has no field 'event'",
    field="event",
    fix="XADD ... * event '<json>'",
)


class Ingress:
    def __init__(
        self,
        commands: Commands,
        blocking: Commands,
        names: Names,
        scripts: Scripts,
        ownership: Ownership,
        routes: Routes,
        dead_letters: DeadLetters,
        core: Core,
        *,
        durable: Durable,
    ) -> None:
        self._commands = commands
        self._blocking = blocking
        self._names = names
        self._scripts = scripts
        self._ownership = ownership
        self._routes = routes
        self._dead_letters = dead_letters
        self._core = core
        self._durable = durable
        self._clock = core.clock
        self._server_clock = core.server_clock
        self._instruments = core.instruments
        self._owner = anyio.Event()
        self._idle = anyio.Event()
        self._busy = False
        self._yielding = False

    def gained(self, tenure: Tenure) -> None:
        if tenure.resource == EVENTS:
            self._yielding = False
            self._owner.set()

    def lost(self, tenure: Tenure) -> None:
        """Seen by itself: the tenure is looked at before every batch."""

    async def yielding(self, tenures: Sequence[Tenure]) -> None:
        """Take no further batch, and wait for the one under way."""
        if any(tenure.resource == EVENTS for tenure in tenures):
            self._yielding = True
            with anyio.move_on_after(2):
                while self._busy:
                    await self._idle.wait()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Apply events, whenever this node is the owner, until cancelled."""
        task_status.started()
        while True:
            tenure = self._ownership.in_force(EVENTS)
            if tenure is None or self._yielding:
                self._owner = anyio.Event()
                with anyio.move_on_after(0.25):
                    await self._owner.wait()
                continue
            try:
                await self._serve(tenure)
            except (ForebayError, Fenced) as error:
                log.warning("ingress.interrupted", error=str(error))
                await anyio.sleep(0.2)

    async def _serve(self, tenure: Tenure) -> None:
        """Apply batch after batch as long as the tenure is in force."""
        await self._publish_held()
        done = self._names.part(EVENTS, "done")
        reply = await self._commands.call("HGET", done, "events")
        position = "0-0" if reply is None else bytes(reply).decode()
        while self._ownership.in_force(EVENTS) is tenure and not self._yielding:
            reply = await self._blocking.call(
                "XREAD", "COUNT", _BATCH, "BLOCK", _BLOCK_MS,
                "STREAMS", self._names.events, position,
                timeout_ms=_BLOCK_MS + 2_000,
            )  # fmt: skip
            if not reply or self._yielding:
                continue
            self._busy = True
            try:
                position = await self._apply(tenure, reply[0][1])
            finally:
                self._busy = False
                self._idle.set()
                self._idle = anyio.Event()

    async def _apply(self, tenure: Tenure, entries: Sequence[Sequence[Reply]]) -> str:
        started = self._clock.monotonic()
        batch = []
        for raw_id, fields in entries:
            taken = await self._take(bytes(raw_id).decode(), fields)
            if taken is not None:
                batch.append(taken)
        await self._carry_out(plan(batch, self._names), tenure)
        await self._refresh(batch)
        last_id = bytes(entries[-1][0]).decode()
        await self._commit(tenure, last_id)
        self._measure(batch, started)
        return last_id

    async def _take(self, entry_id: str, fields: Sequence[bytes] | None) -> Taken | None:
        """The event of an entry; None if it was put aside."""
        found = dict(zip(map(bytes, (fields or ())[::2]), (fields or ())[1::2], strict=True))
        raw = bytes(found.get(b"event", b""))
        try:
            if b"event" not in found:
                raise _NO_FIELD
            event = read_event(raw, bytes_max=self._durable.event_bytes_max)
            if isinstance(event.body, Write):
                self._check_route(event.body)
            return Taken(entry_id, event)
        except NewerSchema as error:
            await self._hold(entry_id, raw, error)
        except InvalidEvent as error:
            original = raw or b" ".join(bytes(part) for part in fields or ())
            await self._dead_letters.bury(EVENTS, entry_id, original, error)
            self._instruments.counts["events_processed", "unknown", "dead"] += 1
        return None

    def _check_route(self, body: Write) -> None:
        if self._routes.sink_of(body.key) is None:
            raise InvalidEvent(
                "no_sink",
                f"no sink takes {body.key!r}",
                field="key",
                fix="declare one with @node.sink, or invalidate instead",
            )

    async def _hold(self, entry_id: str, raw: bytes, error: NewerSchema) -> None:
        held = self._names.part(EVENTS, "held")
        await self._commands.call("XADD", held, "*", "event", raw, "from", entry_id)
        self._instruments.counts["events_processed", "unknown", "held"] += 1
        log.error("event.held", entry=entry_id, error=str(error))

    async def _publish_held(self) -> None:
        """Give events that this node can read, and an older one could not, another try."""
        held = self._names.part(EVENTS, "held")
        for raw_id, fields in await self._commands.call("XRANGE", held, "-", "+", "COUNT", 1_000):
            raw = bytes(fields[1])
            try:
                read_event(raw, bytes_max=self._durable.event_bytes_max)
            except NewerSchema:
                continue
            except InvalidEvent:
                log.warning("event.unheld", entry=bytes(raw_id).decode())
            await self._commands.call("XADD", self._names.events, "*", "event", raw)
            await self._commands.call("XDEL", held, raw_id)

    async def _carry_out(self, steps: Sequence[Step], tenure: Tenure) -> None:
        calls = [(step, call) for step in steps if (call := await self._call_of(step)) is not None]
        replies = await self._send([call for _, call in calls])
        for (step, call), reply in zip(calls, replies, strict=True):
            if isinstance(step, WriteStep):
                await self._settle(step, call, reply, tenure)
            elif isinstance(reply, ServerRefused):
                raise reply

    async def _call_of(self, step: Step) -> Call | None:
        shared = self._core.shared
        if isinstance(step, Invalidation):
            if step.kind == "tags":
                (calls,) = shared.bump_calls(step.names, mark=step.mark).values()
            else:
                (calls,) = shared.invalidate_calls(
                    step.names, soft=step.soft, mark=step.mark
                ).values()
            return calls[0]
        try:
            return await self._write_call(step)
        except (msgspec.MsgspecError, InvalidEntry) as error:
            fault = InvalidEvent("wrong_field", str(error), field="value")
            raw = bytes(step.body.value)
            await self._dead_letters.bury(EVENTS, step.taken.id, raw, fault)
            self._instruments.counts["events_processed", "write", "dead"] += 1
            return None

    async def _write_call(self, step: WriteStep) -> Call:
        event, body = step.taken.event, step.body
        ttl_ms = int(body.ttl * 1000) if body.ttl else None
        packer = self._routes.packer_of(body.key)
        packed = await packer.pack_published(body.key, bytes(body.value), ttl_ms)
        job = WriteJob(
            key=body.key,
            value=packed.payload,
            invalidates=body.invalidates,
            event_id=event.id,
            traceparent=event.traceparent,
        )
        return self._core.shared.write_call(
            job,
            soft_ms=packed.soft_ms,
            hard_ms=packed.hard_ms,
            tail=packed.tail,
            mark=step.mark,
        )

    async def _send(self, calls: Sequence[Call]) -> list[Reply]:
        """Run the scripts in order. Those that the server did not know run once more.

        Among these, a later mark may have got in before: then it is run without its mark,
        since it is no repetition.
        """
        replies = await self._commands.call_many([call.by_sha() for call in calls])
        for at, reply in enumerate(replies):
            if isinstance(reply, ServerRefused) and reply.code == "NOSCRIPT":
                call = calls[at]
                replies[at] = await run(self._commands, call.script, call.keys, call.args)
                if replies[at][0] == 2:
                    replies[at] = await self._unmarked(call)
        return replies

    async def _unmarked(self, call: Call) -> Reply:
        args = list(call.args)
        args[9 if call.script.name == "entry_write" else 3] = ""
        return await run(self._commands, call.script, call.keys, args)

    async def _settle(self, step: WriteStep, call: Call, reply: Reply, tenure: Tenure) -> None:
        """See a write through: wait while its stream is full."""
        key, counts = step.body.key, self._instruments.counts
        while True:
            if isinstance(reply, ServerRefused):
                raise reply
            try:
                receipt = self._core.shared.receipt(key, reply)
            except Backpressure as full:
                counts["limit_reached", "writes"] += 1
                log.warning("ingress.held_back", error=str(full))
                await anyio.sleep(0.1)
                if self._ownership.in_force(EVENTS) is not tenure:
                    raise
                reply = await self._unmarked(call)
            else:
                counts[
                    "events_processed", "write", "applied" if receipt.stamp else "duplicate"
                ] += 1
                return

    async def _refresh(self, batch: Sequence[Taken]) -> None:
        for taken in batch:
            if not isinstance(taken.event.body, Refresh):
                continue
            for key in taken.event.body.keys:
                cached = self._routes.cache_of(key)
                if cached is not None:
                    job = RefreshJob(cache=cached.name, key=key, token=self._core.ids())
                    lease_ms = cached.path.policy.lease_ms
                    await self._core.shared.refresh(job, lease_ms=lease_ms, seen=_ANY)
            self._instruments.counts["events_processed", "refresh", "applied"] += 1

    async def _commit(self, tenure: Tenure, last_id: str) -> None:
        ms, _, seq = last_id.partition("-")
        part = self._names.part
        reply = await run(
            self._commands,
            self._scripts["checkpoint_commit"],
            [part(EVENTS, "own"), part(EVENTS, "done"), self._names.events],
            [self._core.node_id, tenure.epoch, "events", last_id, f"{ms}-{int(seq) + 1}"],
        )
        if not reply[0]:
            self._ownership.fenced(tenure)
            raise Fenced("the ingress stream", tenure.epoch, int(reply[1]))

    def _measure(self, batch: Sequence[Taken], started: float) -> None:
        now_ms, instruments = self._server_clock.now_ms(), self._instruments
        took_s = (self._clock.monotonic() - started) / max(1, len(batch))
        for taken in batch:
            name = taken.event.name
            if name == "invalidate":
                instruments.counts["events_processed", name, "applied"] += 1
            delay_ms = now_ms - int(taken.id.partition("-")[0])
            instruments.observe("event_delay_seconds", max(0, delay_ms) / 1000, name)
            instruments.observe("event_processing_seconds", took_s, name)

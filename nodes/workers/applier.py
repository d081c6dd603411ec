"""Applying the steps of a batch, shard by shard.

A1  Of each shard one step is under way at a time, and the next follows when it was applied:
    nothing can overtake a write that a full stream, or a server that forgot its scripts, put
    off. Shards go side by side.
A2  A step is repeated with its mark, never without, so it takes effect once.
A3  A write that its stream has no room for is tried again as long as ``check`` lets us; the
    shards that have room are done first.
A4  What can never be applied (a value of the wrong type, a shard whose names hold something
    else) comes back as a dead letter, and the steps behind it go on. Faults of the server as
    a whole are raised.
A5  When the server's memory is full, writes are applied beyond its limit, since their events are
    deleted only then; at most ``_BYTES_AT_FULL`` of events at a time, and only while the
    server is beyond the limit by less than ``allowance``. The sinks' commits free
    the added memory again. Otherwise writes wait, as by A3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import anyio
import structlog

from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.dialer import read_info
from ...coordinator.valkey.link import Commands, Reply
from ...coordinator.valkey.scripting import Call, run_many
from ...schemas.errors import (
    Backpressure,
    ForebayError,
    InvalidEvent,
    ServerRefused,
)
from ...schemas.jobs import WriteJob
from ..cache.core import Core
from .dead_letters import DeadLetter
from .plan import Invalidation, Step, WriteStep
from .routes import Routes, refused_value

__all__ = ["Applier", "allowance"]

log = structlog.get_logger(__name__)

_TOGETHER = 64
_FULL_S = 0.1
_BYTES_AT_FULL = 262_144
_TELL_S = 60.0
_FOR_GOOD = frozenset({"WRONGTYPE", "ERR"})  #: other codes concern the server as a whole

Queues = dict[int, deque[Step]]


class _MemoryFull(ServerRefused):
    """Raised when a step was refused since the server's memory is full."""


def allowance(maxmemory: int) -> int:
    """The bytes that the server may use beyond its limit while its streams are emptied."""
    return max(4 * 1_048_576, min(maxmemory // 16, 64 * 1_048_576))


def _first(queues: Sequence[deque[Step]], bytes_max: int) -> Sequence[deque[Step]]:
    """The first queues, at least one, whose next steps have at most this many bytes of events."""
    total = 0
    for count, queue in enumerate(queues):
        total += sum(len(taken.raw) for taken in queue[0].events())
        if count and total > bytes_max:
            return queues[:count]
    return queues


class Applier:
    def __init__(self, commands: Commands, routes: Routes, core: Core) -> None:
        self._commands = commands
        self._routes = routes
        self._shared = core.shared
        self._counts = core.instruments.counts
        self._full = LogOnce(core.clock)
        self._clock = core.clock
        self._is_full = False  #: the server's memory, as far as is known
        self._told_at = float("-inf")

    async def apply(self, steps: Sequence[Step], check: Callable[[bool], None]) -> list[DeadLetter]:
        """Apply all of them; returns those that can never be applied.

        ``check(waiting)`` raises when the work is not ours any more, or not worth waiting for.

        Raises:
            Unavailable, ServerRefused: some may not have been applied; repeat them all.
        """
        queues: Queues = {}
        for step in steps:
            queues.setdefault(step.shard, deque()).append(step)
        letters: list[DeadLetter] = []
        waited = False
        while queues:
            check(waited)
            held: list[ForebayError] = []
            shards = list(queues)
            for start in range(0, len(shards), _TOGETHER):
                heads = [queues[shard] for shard in shards[start : start + _TOGETHER]]
                held += await self._advance(heads, letters)
            queues = {shard: queue for shard, queue in queues.items() if queue}
            if queues and len(held) == len(queues):
                waited = True
                self._full.say(log, "ingress.held_back", held[0], streams=len(held))
                await anyio.sleep(_FULL_S)
        return letters

    async def _advance(
        self, queues: Sequence[deque[Step]], letters: list[DeadLetter]
    ) -> list[ForebayError]:
        """One step further in each; returns why some had no room."""
        was_full, at_full = self._is_full, self._is_full and await self._may_exceed()
        sent: list[tuple[deque[Step], Call]] = []
        for queue in _first(queues, _BYTES_AT_FULL) if at_full else queues:
            call = await self._call_of(queue[0], letters, at_full)
            if call is None:
                queue.popleft()
            else:
                sent.append((queue, call))
        replies = await run_many(self._commands, [call for _, call in sent])
        held: list[ForebayError] = []
        for (queue, _), reply in zip(sent, replies, strict=True):
            try:
                self._settle(queue, reply, letters)
            except Backpressure as error:
                self._counts["limit_reached", "writes"] += 1
                held.append(error)
            except _MemoryFull as error:
                self._counts["limit_reached", "memory"] += 1
                held += (
                    [error] if was_full else []
                )  # else it is sent again at once, beyond the limit
        return held

    async def _may_exceed(self) -> bool:
        """Whether the server may take a little more, and whether its memory is full still."""
        info = read_info(await self._commands.call("INFO", "memory"))
        limit = int(info.get("maxmemory", 0))
        not_counted = int(info.get("mem_not_counted_for_evict", 0))
        over = int(info.get("used_memory", 0)) - not_counted - limit
        self._is_full = limit > 0 and over >= 0
        if self._is_full and self._clock.monotonic() - self._told_at >= _TELL_S:
            self._told_at = self._clock.monotonic()
            fix = "raise maxmemory; until then events are applied as fast as sinks free memory"
            log.warning("ingress.memory_full", maxmemory=limit, over=over, fix=fix)
        return over < allowance(limit)

    def _settle(self, queue: deque[Step], reply: Reply, letters: list[DeadLetter]) -> None:
        step = queue[0]
        if isinstance(reply, ServerRefused):
            self._refused(queue, reply, letters)
        elif isinstance(step, WriteStep):
            receipt = self._shared.receipt(step.body.key, reply)
            queue.popleft()
            result = "duplicate" if receipt.stamp is None else "applied"
            self._counts["events_processed", "write", result] += 1
            self._counts["limit_reached", "seen"] += receipt.forgotten
        else:
            queue.popleft()

    def _refused(self, queue: deque[Step], error: ServerRefused, letters: list[DeadLetter]) -> None:
        if error.code == "OOM":
            self._is_full = True
            raise _MemoryFull(error.code, error.message, error.command)
        if error.code not in _FOR_GOOD:
            raise error
        fix = "see what is stored under the names of this shard"
        fault = InvalidEvent("server_refused", str(error), field="event", fix=fix)
        self._bury(queue.popleft(), fault, letters)

    async def _call_of(self, step: Step, letters: list[DeadLetter], at_full: bool) -> Call | None:
        """The script of a step; None if there can be none."""
        if isinstance(step, Invalidation):
            calls_of = {"tags": self._shared.bump_calls, "keys": self._shared.invalidate_calls}
            calls = calls_of[step.kind](
                step.names, soft=step.soft, mark=step.mark, published_ms=step.published_ms
            )
            return calls[step.shard][0]
        try:
            return await self._write_call(step, at_full)
        except Exception as error:
            fault = refused_value(error)
        self._bury(step, fault, letters)
        return None

    async def _write_call(self, step: WriteStep, at_full: bool) -> Call:
        event, body = step.taken.event, step.body
        ttl_ms = None if body.ttl is None else max(1, int(body.ttl * 1000))
        packer = self._routes.packer_of(body.key)
        packed = await packer.pack_published(body.key, bytes(body.value), ttl_ms)
        job = WriteJob(
            key=body.key,
            value=packed.payload,
            invalidates=body.invalidates,
            event_id=event.id,
            traceparent=event.traceparent,
        )
        return self._shared.write_call(
            job,
            soft_ms=packed.soft_ms,
            hard_ms=packed.hard_ms,
            tail=packed.tail,
            mark=step.mark,
            published_ms=step.taken.published_ms,
            at_full=at_full,
        )

    def _bury(self, step: Step, fault: InvalidEvent, letters: list[DeadLetter]) -> None:
        letters += [DeadLetter(taken.id, taken.raw, fault) for taken in step.events()]

"""The parts that the writes of all caches of a node share: sinks, scripts, confirmations.

G1  Each sink is serialized once per process: sink workers and write-throughs take turns on it. It
    is opened at its first use, with or without workers on this node, and closed after them.
P1  The level ``sink`` is reached when the checkpoint of the sink has passed the job and the job is
    neither dead-lettered nor held. A job counts as stored if a newer job of its key was stored.
P2  A caller that waits for a sink is woken by the commit, and polls at least every 250 ms.
P3  If a level is not confirmed in time, the error is Unconfirmed, also while Valkey is unavailable.
P4  A server that may have lost the job (another replication history) confirms nothing: a checkpoint
    also passes a job that no longer exists.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

import anyio
import structlog
from msgspec.structs import replace

from ...coordinator.log.replication import Replication
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.link import Reply
from ...coordinator.valkey.scripting import Scripts, run
from ...schemas.errors import DeadLettered, ForebayError, Level, Unconfirmed
from ...schemas.keys import Names, dependents_of
from ...schemas.replies import field_map, order
from ...schemas.settings import Valkey
from ..sinks.base import Sink
from ..sinks.serialized import Outlet
from ..values.packing import Packed
from .core import Core
from .shared import TAG_KEEP_MS, Receipt, Stamp
from .waits import KeyWaits

log = structlog.get_logger(__name__)

SinkOf = Callable[[str], tuple[Sink, Mapping[str, str]] | None]

_CLOSE_S = 10.0
_POLL_MS = 250
_PAGE = 50


class NodeWrites:
    """``sink_of(key)`` gives the sink and the fields of the key, or None."""

    def __init__(
        self,
        backend: Backend,
        names: Names,
        scripts: Scripts,
        core: Core,
        options: Valkey,
        *,
        sinks: Mapping[str, Outlet],
        sink_of: SinkOf,
    ) -> None:
        self.sinks = sinks
        self.checkpoints = KeyWaits()
        self.replication = Replication(
            backend.link,
            lambda: backend.blocking_link("replication"),
            names.marker(core.node_id),
            replicas_min=options.replicas_min,
            command_timeout_ms=options.command_timeout_ms,
            clock=core.clock,
            ids=lambda: secrets.token_hex(8),
        )
        self._backend = backend
        self._names = names
        self._scripts = scripts
        self._shared = core.shared
        self._clock = core.clock
        self._declared_sink_of = sink_of

    def sink_of(self, key: str) -> tuple[Outlet, Mapping[str, str]] | None:
        """The serialized sink of this key, and the key's fields."""
        found = self._declared_sink_of(key)
        return None if found is None else (self.sinks[found[0].name], found[1])

    def watch_checkpoint(self, key: str) -> AbstractContextManager[anyio.Event]:
        """An event that is set when a sink of the key's shard has stored writes."""
        return self.checkpoints.watch(self._names.part(self._names.shard(key), "done"))

    def checkpoint_moved(self, shard: int) -> None:
        """A pub/sub message announced a commit of this shard."""
        self.checkpoints.wake(self._names.part(shard, "done"))

    async def begin_write(self, key: str, token: str, lease_ms: int) -> Reply:
        """Run write_begin.lua: request the key's lease and a version for its row."""
        keys = self._shared.entry_keys(key)
        return await run(self._backend.link, self._scripts["write_begin"], keys, [token, lease_ms])

    async def fill(self, key: str, token: str, packed: Packed) -> Stamp | None:
        """Fill the entry of a written row; None if the lease is no longer held."""
        stored, *stamp = await run(
            self._backend.link,
            self._scripts["write_fill"],
            [*self._shared.entry_keys(key), self._names.tag(dependents_of(key))],
            [
                token,
                packed.soft_ms,
                packed.hard_ms,
                packed.tail,
                *self._shared.written(key),
                TAG_KEEP_MS,
            ],
        )
        return Stamp(*map(int, stamp)) if stored else None

    @property
    def history(self) -> int:
        """The server's replication history; read it before the write that is to be confirmed."""
        return self.replication.since

    async def confirm(
        self, key: str, receipt: Receipt, until: Level, *, history: int, sink: str, timeout_ms: int
    ) -> Receipt:
        """The receipt, when the write has reached the level ``until``.

        Raises:
            Unconfirmed: not within ``timeout_ms``. DeadLettered: the sink will never store it.
        """
        match until:
            case "accepted":
                return receipt
            case "replicated":
                await self.replication.confirm(since=history, timeout_ms=timeout_ms)
            case "sink":
                await self._confirm_sink(key, receipt, sink, timeout_ms, history)
        return replace(receipt, reached=until)

    async def _confirm_sink(
        self, key: str, receipt: Receipt, sink: str, timeout_ms: int, history: int
    ) -> None:
        done, began = self._names.part(receipt.shard, "done"), self._clock.monotonic()
        while True:
            with self.checkpoints.watch(done) as moved:
                stored = await self._is_stored(key, receipt, done, sink)
                kept = self.replication.kept(history)
                if stored and kept:
                    return
                waited_ms = int((self._clock.monotonic() - began) * 1000)
                if waited_ms >= timeout_ms or not kept:
                    raise Unconfirmed("sink", "accepted", waited_ms)
                with anyio.move_on_after(min(_POLL_MS, timeout_ms - waited_ms) / 1000):
                    await moved.wait()

    async def _is_stored(self, key: str, receipt: Receipt, done: str, sink: str) -> bool:
        try:
            position = await self._backend.link.call("HGET", done, f"writes:{sink}")
            if position is None or order(position) < order(receipt.job_id):
                return False
            # A job is dead-lettered or held after it was accepted and before the checkpoint passes.
            await self._check_dead_letters(key, receipt)
            return await self._find("held", b"f", receipt) is None
        except DeadLettered:
            raise
        except ForebayError:
            return False

    async def _check_dead_letters(self, key: str, receipt: Receipt) -> None:
        if letter := await self._find("dead", b"from", receipt):
            reason, problem = (
                letter.get(name, b"").decode(errors="replace") for name in (b"reason", b"problem")
            )
            raise DeadLettered(key, receipt.job_id, reason, problem)

    async def _find(
        self, part: Literal["dead", "held"], field: bytes, receipt: Receipt
    ) -> Mapping[bytes, bytes] | None:
        """The entry of a shard's stream whose field holds the id of the job."""
        stream, job_id = self._names.part(receipt.shard, part), receipt.job_id
        start = job_id.partition("-")[0]
        while page := await self._backend.link.call("XRANGE", stream, start, "+", "COUNT", _PAGE):
            for _, fields in page:
                if (found := field_map(fields)).get(field) == job_id.encode():
                    return found
            start = f"({bytes(page[-1][0]).decode()}"
        return None

    async def aclose(self) -> None:
        """Close the sinks that were opened."""
        for sink in self.sinks.values():
            try:
                with anyio.move_on_after(_CLOSE_S, shield=True):
                    await sink.aclose()
            except Exception as error:  # the application's own; the node is stopping
                log.warning("sink.not_closed", sink=sink.name, error=repr(error))

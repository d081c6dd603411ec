"""The workers of a node, one by one, on a real server, to be stopped at any await.

async with workshop(server, namespace) as shop:
    owner = await shop.ownership("one")
    ids = await shop.publish(write("flight:1", 1))
    async with at_work(shop.ingress(owner)):
        await shop.applied(ids[-1])
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio
from anyio.abc import TaskStatus

import forebay
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.log.ownership import Ownership
from forebay.coordinator.valkey.link import Arg, Commands, Reply
from forebay.nodes.runtime import Running
from forebay.nodes.sinks.base import SinkBatch, Write
from forebay.nodes.workers.dead_letters import DeadLetters
from forebay.nodes.workers.delivery import Delivery
from forebay.nodes.workers.ingress import Ingress
from forebay.nodes.workers.write_behind import WriteBehind
from forebay.schemas.errors import BusySinkError, Fenced, PoisonSinkError
from forebay.schemas.jobs import read_write
from forebay.schemas.keys import EVENTS
from forebay.schemas.settings import Durable, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer

PATIENCE_S = 40.0
SHARDS = 4


def write(key: str, value: object, **more: object) -> bytes:
    return json.dumps({"type": "write", "key": key, "value": value, **more}).encode()


def invalidate(*keys: str, **more: object) -> bytes:
    return json.dumps({"type": "invalidate", "keys": keys, **more}).encode()


class Runs(Protocol):
    async def run(self, *, task_status: TaskStatus[None]) -> None: ...


@asynccontextmanager
async def at_work(*workers: Runs) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for worker in workers:
            await tasks.start(worker.run)
        yield
        tasks.cancel_scope.cancel()


class Cut:
    """Commands that pass until the ``at``-th call; there whoever calls hangs, and ``reached``
    is set: before the server got it, or after (``answered``) but without a reply.
    """

    def __init__(self, commands: Commands, *, at: int = 0, answered: bool = False) -> None:
        self.calls: list[list[Sequence[Arg]]] = []
        self.reached = anyio.Event()
        self._commands = commands
        self._at = at
        self._answered = answered

    async def call(self, *args: Arg, timeout_ms: int | None = None) -> Reply:
        return await self._pass([args], lambda: self._commands.call(*args, timeout_ms=timeout_ms))

    async def call_many(
        self, commands: Sequence[Sequence[Arg]], *, timeout_ms: int | None = None
    ) -> list[Reply]:
        calls = list(commands)
        replies: list[Reply] = await self._pass(
            calls, lambda: self._commands.call_many(calls, timeout_ms=timeout_ms)
        )
        return replies

    async def _pass(
        self, calls: list[Sequence[Arg]], send: Callable[[], Awaitable[Reply]]
    ) -> Reply:
        self.calls.append(calls)
        here = len(self.calls) == self._at
        if not here:
            return await send()
        if self._answered:
            await send()
        self.reached.set()
        return await anyio.sleep_forever()


class Hasty:
    """A clock on which a second takes a millisecond."""

    def monotonic(self) -> float:
        return anyio.current_time() * 1_000


class Table:
    """A sink in memory that keeps the promises of one: whole batches, versions, epochs."""

    def __init__(self, name: str = "table") -> None:
        self.name = name
        self.rows: dict[str, tuple[int, Any]] = {}
        self.batches: list[SinkBatch] = []  #: all that it was asked to store
        self.stored: list[Write[Any]] = []  #: all that changed a row
        self.faults: list[Exception | None] = []  #: raised by the next calls, one each
        self.poison: set[Any] = set()  #: values that it will never take
        self.locked: set[str] = set()  #: keys whose rows another transaction holds
        self.epochs: dict[int, int] = {}
        self.hang_at = 0  #: the call that hangs until ``go_on``
        self.hang_stored = False  #: whether it has stored the batch by then
        self.hanging = anyio.Event()
        self.go_on = anyio.Event()
        self.fences = True
        self.closed = 0

    async def open(self, namespace: str = "") -> None:
        await anyio.lowlevel.checkpoint()

    async def write(self, batch: SinkBatch) -> None:
        await anyio.lowlevel.checkpoint()
        self.batches.append(batch)
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault
        hang = len(self.batches) == self.hang_at
        if hang and not self.hang_stored:
            await self._hang()
        self._store(batch)
        if hang and self.hang_stored:
            await self._hang()

    async def _hang(self) -> None:
        self.hanging.set()
        await self.go_on.wait()

    def _store(self, batch: SinkBatch) -> None:
        for each in batch.progress if self.fences else ():
            if self.epochs.get(each.shard, 0) > each.epoch:
                raise Fenced(self.name, each.epoch, self.epochs[each.shard])
        locked = [each.key for each in batch.writes if each.key in self.locked]
        if locked:
            raise BusySinkError(f"{locked[0]} is locked", table=self.name)
        wrong = [each.key for each in batch.writes if each.value in list(self.poison)]
        if wrong:
            raise PoisonSinkError(f"will not take {wrong[0]}")
        self.epochs.update({each.shard: each.epoch for each in batch.progress})
        for each in batch.writes:
            if self.rows.get(each.key, (0, None))[0] < each.version:
                self.rows[each.key] = each.version, each.value
                self.stored.append(each)

    async def progress(self, shards: Sequence[int]) -> dict[int, str]:
        return {}

    async def aclose(self) -> None:
        self.closed += 1

    def values(self) -> dict[str, Any]:
        return {key: value for key, (_, value) in self.rows.items()}


class Workshop:
    def __init__(self, node: forebay.Node, blocking: Commands) -> None:
        self.node = node
        self.parts: Running = node._parts
        self.link = node._parts.backend.link
        self.names = node._parts.names
        self.counts = node._instruments.counts
        self._blocking = blocking

    async def ownership(self, node_id: str = "one", **options: int) -> Ownership:
        """A member of the cluster that owns all that is free."""
        limits: dict[str, Any] = {"ownership_ttl_ms": 60_000, "beat_ms": 20_000}
        made = Ownership(
            self.link,
            self.names,
            self.parts.scripts,
            node_id=node_id,
            options=Workers(**limits | options),
            clock=SystemClock(),
            rng=random.Random(node_id),
            instruments=self.node._instruments,
        )
        await made.beat()
        return made

    async def forget_owners(self) -> None:
        """Have all leases end, as those of nodes that died; the nodes do not know."""
        for resource in range(EVENTS, self.names.shards):
            await self.link.call("HSET", self.names.part(resource, "own"), "u", 0)
        await self.link.call("DEL", self.names.nodes, self.names.members)

    def ingress(self, owner: Ownership, commands: Commands | None = None) -> Ingress:
        chosen, parts = commands or self.link, self.parts
        made = Ingress(
            chosen,
            self._blocking,
            self.names,
            parts.scripts,
            owner,
            parts.routes,
            self.dead_letters(chosen),
            parts.core,
            durable=parts.settings.durable,
            block_ms=50,
        )
        made._node_id = owner._node_id
        _tell(owner, made)
        return made

    def dead_letters(self, commands: Commands) -> DeadLetters:
        durable = self.parts.settings.durable
        return DeadLetters(
            commands,
            self.names,
            self.parts.scripts,
            self.node._instruments,
            entries_max=durable.dead_letters_max,
        )

    def write_behind(
        self, owner: Ownership, commands: Commands | None = None, **options: int
    ) -> WriteBehind:
        chosen, parts = commands or self.link, self.parts
        workers = Workers(**{"flush_delay_ms": 0, "attempts_max": 2} | options)
        deliveries = {
            sink.name: Delivery(
                sink,
                attempts_max=workers.attempts_max,
                clock=Hasty(),
                rng=random.Random(1),
                instruments=self.node._instruments,
                sleep=lambda _: anyio.sleep(0.001),
            )
            for sink in parts.routes.all_sinks()
        }

        async def invalidate(keys: Sequence[str], tags: Sequence[str]) -> None:
            # By way of the commands that can be cut, so that this await can be, too.
            await chosen.call("PING")
            await parts.core.invalidate(keys, tags)

        made = WriteBehind(
            chosen,
            self.names,
            parts.scripts,
            owner,
            parts.routes,
            deliveries,
            self.dead_letters(chosen),
            node_id=owner._node_id,
            options=workers,
            held_max=parts.settings.durable.dead_letters_max,
            server_clock=parts.core.server_clock,
            instruments=self.node._instruments,
            invalidate=invalidate,
        )

        def ring(channel: bytes, payload: bytes) -> None:
            kind, _, shard = payload.partition(b" ")
            if channel == self.names.work.encode() and kind == b"w":
                made.bell(int(shard))

        parts.backend.pubsub.on_message(ring)
        _tell(owner, made)
        return made

    async def publish(self, *events: bytes) -> list[str]:
        replies = await self.link.call_many(
            [("XADD", self.names.events, "*", "event", raw) for raw in events]
        )
        return [bytes(each).decode() for each in replies]

    async def applied(self, entry_id: str) -> None:
        """Wait until the checkpoint of ingress has reached this."""

        async def reached() -> bool:
            done = await self.link.call("HGET", self.names.part(EVENTS, "done"), "events")
            return done is not None and _order(done.decode()) >= _order(entry_id)

        await until(reached)

    async def sunk(self) -> None:
        """Wait until no write waits any more."""

        async def empty() -> bool:
            streams = [self.names.part(shard, "writes") for shard in range(self.names.shards)]
            return not any(await self.link.call_many([("XLEN", name) for name in streams]))

        await until(empty)

    async def entries(self, shard: int, name: str) -> list[dict[str, bytes]]:
        return await self.stream(self.names.part(shard, name))

    async def stream(self, name: str) -> list[dict[str, bytes]]:
        """The entries, each with its fields and its own id as ``id``."""
        return [
            {"id": entry_id}
            | {k.decode(): v for k, v in zip(fields[::2], fields[1::2], strict=True)}
            for entry_id, fields in await self.link.call("XRANGE", name, "-", "+")
        ]

    async def dead(self, shard: int = EVENTS) -> list[dict[str, bytes]]:
        return await self.entries(shard, "dead")

    async def jobs(self) -> list[tuple[str, Any]]:
        """Keys and values of all writes that wait, shard by shard in order."""
        found = []
        for shard in range(self.names.shards):
            for entry in await self.entries(shard, "writes"):
                job = read_write(entry["j"])
                found.append((job.key, self.parts.routes.value_of(job.key, job.value)))
        return found

    def key(self, shard: int, prefix: str = "flight:", number: int = 0) -> str:
        """The ``number``-th key of a shard."""
        found = (f"{prefix}{n}" for n in range(100_000))
        of_shard = (key for key in found if self.names.shard(key) == shard)
        for _ in range(number):
            next(of_shard)
        return next(of_shard)


def _tell(owner: Ownership, made: Any) -> None:
    owner.add(made)
    for tenure in owner.tenures.values():
        made.gained(tenure)


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq)


@asynccontextmanager
async def workshop(
    server: ValkeyServer,
    namespace: str,
    *,
    sinks: dict[str, Any] | None = None,
    declare: Callable[[forebay.Node], None] | None = None,
    durable: Durable | None = None,
) -> AsyncIterator[Workshop]:
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=SHARDS),
        valkey=Valkey(url=server.socket_url, command_timeout_ms=5_000),
        workers=Workers(enabled=False),
        durable=durable or Durable(),
    )
    node = forebay.Node(settings=settings)
    for template, sink in (sinks or {}).items():
        node.sink(template, sink)
    if declare is not None:
        declare(node)
    async with node, node._parts.backend.blocking_link("ingress") as blocking:
        yield Workshop(node, blocking)

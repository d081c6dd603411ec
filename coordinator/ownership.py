"""Who does the ordered work of a shard: one owner at a time, by a lease with an epoch.

O1  An owner hands out no work later than two thirds of the lease after it *sent* its last
    successful renewal, on its own monotonic clock; the server gives the shard away only after
    the whole lease.
O2  Every commit carries the epoch; once another owner is in force it is refused (Fenced).
O3  Free resources are taken, those of a dead owner when its lease is over; nobody keeps more
    than its fair share of what there is among the nodes alive, so newcomers get some.
O4  What is given up is drained first (``yielding``), and free for others at once.

Which nodes are alive is the roster's word, on the server's clock. Resources are the shards
and the ingress stream (``EVENTS``). Assignment is by chance, not by plan.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ..schemas.errors import ForebayError
from ..schemas.keys import EVENTS, Names
from ..schemas.settings import Workers
from .clock import Clock
from .instruments import Instruments
from .link import Commands
from .scripting import Call, Scripts, run, run_many

__all__ = ["Ownership", "Tenure"]

log = structlog.get_logger(__name__)


class Tenure:
    """One stretch of owning a resource. ``valid_until`` is monotonic seconds."""

    __slots__ = ("epoch", "resource", "valid_until")

    def __init__(self, resource: int, epoch: int, valid_until: float) -> None:
        self.resource = resource
        self.epoch = epoch
        self.valid_until = valid_until

    def __repr__(self) -> str:
        return f"<Tenure {self.resource} epoch {self.epoch}>"


class OwnershipStatistics(Struct, frozen=True, kw_only=True):
    owned: int
    shards: int
    events: bool
    nodes: tuple[str, ...]


class Successor(Protocol):
    """What wants to know of changes: gaining is told after, losing and yielding before."""

    def gained(self, tenure: Tenure) -> None: ...

    def lost(self, tenure: Tenure) -> None: ...

    async def yielding(self, tenures: Sequence[Tenure]) -> None: ...


class Ownership:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        *,
        node_id: str,
        options: Workers,
        clock: Clock,
        rng: random.Random,
        instruments: Instruments,
    ) -> None:
        self.tenures: dict[int, Tenure] = {}
        self.nodes: tuple[str, ...] = ()
        self._commands = commands
        self._names = names
        self._scripts = scripts
        self._node_id = node_id
        self._ttl_ms = options.ownership_ttl_ms
        self._beat_s = options.beat_ms / 1000
        self._clock = clock
        self._rng = rng
        self._instruments = instruments
        self._successors: list[Successor] = []
        self._rested: dict[int, float] = {}  # given up lately: for others to take
        self._surplus_seen = False
        self._woken = anyio.Event()

    def add(self, successor: Successor) -> None:
        self._successors.append(successor)

    def statistics(self) -> OwnershipStatistics:
        return OwnershipStatistics(
            owned=len(self.tenures),
            shards=sum(resource != EVENTS for resource in self.tenures),
            events=EVENTS in self.tenures,
            nodes=self.nodes,
        )

    def in_force(self, resource: int) -> Tenure | None:
        """The tenure, if work of this resource may be handed out right now (O1)."""
        tenure = self.tenures.get(resource)
        if tenure is None or self._clock.monotonic() >= tenure.valid_until:
            return None
        return tenure

    def fenced(self, tenure: Tenure) -> None:
        """A commit was refused: another owner is in force."""
        self._instruments.counts["fenced",] += 1
        if self.tenures.get(tenure.resource) is tenure:
            self._lose(tenure, "fenced")

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Beat until cancelled."""
        task_status.started()
        while True:
            try:
                await self.beat()
            except ForebayError as error:
                log.debug("beat.failed", error=str(error))
            self._woken = anyio.Event()
            with anyio.move_on_after(self._beat_s * self._rng.uniform(0.8, 1.1)):
                await self._woken.wait()

    async def beat(self) -> None:
        """Renew what is owned, give up the surplus, take what is free."""
        await self._enrol(self._ttl_ms)
        await self._claim(sorted(self.tenures))
        target = self._fair_share()
        if len(self.tenures) > target:
            # Twice in a row, so that a node that was late for one beat takes nothing away.
            if self._surplus_seen:
                await self.give_up(self._surplus(len(self.tenures) - target))
            self._surplus_seen = not self._surplus_seen
            return
        self._surplus_seen = False
        await self._claim(await self._candidates(target - len(self.tenures)))

    async def give_up(self, tenures: Sequence[Tenure]) -> None:
        """Drain and release these."""
        for successor in self._successors:
            await successor.yielding(tenures)
        for tenure in tenures:
            if self.tenures.get(tenure.resource) is tenure:
                self._lose(tenure, "released")
                self._rested[tenure.resource] = self._clock.monotonic() + self._beat_s * 2
        await run_many(
            self._commands,
            [
                Call(
                    script=self._scripts["owner_release"],
                    keys=[self._names.part(tenure.resource, "own")],
                    args=[self._node_id, tenure.epoch],
                )
                for tenure in tenures
            ],
        )

    async def leave(self) -> None:
        """Release everything and sign off."""
        await self.give_up(list(self.tenures.values()))
        await self._enrol(0)

    async def _enrol(self, ttl_ms: int) -> None:
        script = self._scripts["roster_beat"]
        nodes = await run(self._commands, script, [self._names.nodes], [self._node_id, ttl_ms])
        self.nodes = tuple(bytes(node).decode() for node in nodes)

    def _fair_share(self) -> int:
        return math.ceil((self._names.shards + 1) / max(1, len(self.nodes)))

    def _surplus(self, count: int) -> list[Tenure]:
        shards = [tenure for tenure in self.tenures.values() if tenure.resource != EVENTS]
        return self._rng.sample(shards, min(count, len(shards)))

    async def _candidates(self, count: int) -> list[int]:
        """As many of the resources that nobody owns now, by chance."""
        if count <= 0:
            return []
        others = [r for r in range(EVENTS, self._names.shards) if r not in self.tenures]
        time, *until = await self._commands.call_many(
            [("TIME",), *(("HGET", self._names.part(r, "own"), "u") for r in others)]
        )
        if isinstance(time, ForebayError):
            raise time
        now_us = int(time[0]) * 1_000_000 + int(time[1])
        free = [
            resource
            for resource, till in zip(others, until, strict=True)
            if (till is None or (isinstance(till, bytes) and int(till) <= now_us))
            and self._rested.get(resource, 0.0) <= self._clock.monotonic()
        ]
        return self._rng.sample(free, min(count, len(free)))

    async def _claim(self, resources: Sequence[int]) -> None:
        if not resources:
            return
        sent_at, script = self._clock.monotonic(), self._scripts["owner_claim"]
        replies = await run_many(
            self._commands,
            [
                Call(
                    script=script,
                    keys=[self._names.part(resource, "own")],
                    args=[self._node_id, self._ttl_ms],
                )
                for resource in resources
            ],
        )
        for resource, reply in zip(resources, replies, strict=True):
            if not isinstance(reply, ForebayError):
                self._take_in(resource, reply, sent_at)

    def _take_in(self, resource: int, reply: Sequence[int | bytes], sent_at: float) -> None:
        tenure, epoch = self.tenures.get(resource), int(reply[1])
        if not reply[0]:
            if tenure is not None:
                self._lose(tenure, "taken")
            return
        valid_until = sent_at + self._ttl_ms * 2 / 3 / 1000
        if tenure is not None and tenure.epoch == epoch:
            tenure.valid_until = valid_until
            return
        if tenure is not None:
            self._lose(tenure, "forgotten")  # by the server; it is ours again, anew
        tenure = self.tenures[resource] = Tenure(resource, epoch, valid_until)
        self._instruments.counts["ownership_changes", "gained"] += 1
        for successor in self._successors:
            successor.gained(tenure)

    def _lose(self, tenure: Tenure, why: str) -> None:
        del self.tenures[tenure.resource]
        self._instruments.counts["ownership_changes", "lost"] += 1
        if why != "released":
            log.warning("ownership.lost", resource=tenure.resource, epoch=tenure.epoch, why=why)
        for successor in self._successors:
            successor.lost(tenure)

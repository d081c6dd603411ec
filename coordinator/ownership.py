"""Who does the ordered work of a shard: one owner at a time, by a lease with an epoch.

O1  An owner hands out no work later than two thirds of the lease after it *sent* its last
    successful renewal, on its own monotonic clock; the server gives the shard away only after
    the whole lease.
O2  Every commit carries the epoch; once another owner is in force it is refused (Fenced).
    Two processes that share a node id are two owners.
O3  Free resources are taken, those of a dead owner when its lease is over; nobody keeps more
    than its fair share of what there is among the nodes alive, so newcomers get some.
O4  What is given up is drained first (``yielding``), and free for others at once. Leases are
    renewed meanwhile, however long the drain takes.
O5  What was given up by ``give_up`` or ``leave`` is not taken again by this node.

Which nodes are alive is the roster's word, on the server's clock. Resources are the shards
and the ingress stream (``EVENTS``). Assignment is by chance, not by plan. Should the server's
clock jump ahead, leases end early there: only O2 holds then.
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
from .link import Arg, Commands, Reply
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
        self._token = f"{rng.getrandbits(64):016x}"
        self._rested: dict[int, float] = {}  # surplus given up lately: for others to take
        self._declined: set[int] = set()  # given up for good
        self._surplus_seen = False
        self._surplus: list[Tenure] = []  # being handed over
        self._surplus_chosen = anyio.Event()
        self._beating = anyio.Lock()
        self._leaving = self._left = False

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
        """Beat until cancelled; started after the first beat."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hand_over)
            await self._beat_or_tell()
            task_status.started()
            while True:
                await anyio.sleep(self._beat_s * self._rng.uniform(0.8, 1.1))
                await self._beat_or_tell()

    async def _beat_or_tell(self) -> None:
        try:
            await self.beat()
        except ForebayError as error:
            log.warning("beat.failed", error=str(error))

    async def beat(self) -> None:
        """Renew what is owned; then choose what to hand over, or take what is free."""
        async with self._beating:
            if self._left:
                return
            await self._enrol(self._ttl_ms)
            await self._renew()
            if self._leaving or self._surplus:
                return
            surplus = len(self.tenures) - self._fair_share()
            if surplus <= 0:
                self._surplus_seen = False
                await self._take(-surplus)
            elif self._surplus_seen:
                # Twice in a row, so that a node late for one beat takes nothing away.
                self._surplus_seen = False
                self._surplus = self._choose(surplus)
                self._surplus_chosen.set()
            else:
                self._surplus_seen = True

    async def _hand_over(self) -> None:
        """Beside the beats, since a drain may take longer than a lease."""
        while True:
            await self._surplus_chosen.wait()
            self._surplus_chosen = anyio.Event()
            rested = self._clock.monotonic() + self._beat_s * 2
            self._rested = {tenure.resource: rested for tenure in self._surplus}
            try:
                await self._release(self._surplus)
            except ForebayError as error:
                log.warning("handover.failed", error=str(error))
            self._surplus = []

    async def give_up(self, tenures: Sequence[Tenure]) -> None:
        """Drain and release these, for good.

        Raises:
            Unavailable: others may have to wait for the end of the leases.
        """
        self._declined.update(tenure.resource for tenure in tenures)
        await self._release(tenures)

    async def leave(self, *, patient: bool = True) -> None:
        """Release everything and sign off; beats do nothing after that.

        Without patience work under way is not waited for: what it commits late is fenced off.

        Raises:
            Unavailable: as ``give_up``.
        """
        self._leaving = True
        await self._give_up_all(patient)
        async with self._beating:  # the one under way might take something, or sign on again
            self._left = True
            await self._give_up_all(patient)
            await self._enrol(0)

    async def _give_up_all(self, patient: bool) -> None:
        if patient:
            await self.give_up(list(self.tenures.values()))
        else:
            await self._let_go(list(self.tenures.values()))

    async def _release(self, tenures: Sequence[Tenure]) -> None:
        for successor in self._successors:
            await successor.yielding(tenures)
        await self._let_go(tenures)

    async def _let_go(self, tenures: Sequence[Tenure]) -> None:
        for tenure in tenures:
            if self.tenures.get(tenure.resource) is tenure:
                self._lose(tenure, "released")
        script = self._scripts["owner_release"]
        await run_many(
            self._commands,
            [
                Call(script=script, keys=[self._own(t.resource)], args=[self._node_id, t.epoch])
                for t in tenures
            ],
        )

    async def _enrol(self, ttl_ms: int) -> None:
        script = self._scripts["roster_beat"]
        nodes = await run(self._commands, script, [self._names.nodes], [self._node_id, ttl_ms])
        self.nodes = tuple(bytes(node).decode() for node in nodes)

    def _fair_share(self) -> int:
        return math.ceil((self._names.shards + 1) / max(1, len(self.nodes)))

    def _choose(self, count: int) -> list[Tenure]:
        shards = [tenure for tenure in self.tenures.values() if tenure.resource != EVENTS]
        return self._rng.sample(shards, min(count, len(shards)))

    async def _renew(self) -> None:
        held, sent_at = list(self.tenures.values()), self._clock.monotonic()
        replies = await self._claim([tenure.resource for tenure in held])
        for tenure, reply in zip(held, replies, strict=True):
            if self.tenures.get(tenure.resource) is not tenure or isinstance(reply, ForebayError):
                continue  # given up meanwhile; or not renewed, and so over soon
            granted, epoch = reply[0], int(reply[1])
            if not granted:
                self._lose(tenure, "taken")
            elif epoch == tenure.epoch:
                tenure.valid_until = self._valid_until(sent_at)
            else:
                self._lose(tenure, "forgotten")  # by the server; it is ours again, anew
                self._gain(Tenure(tenure.resource, epoch, self._valid_until(sent_at)))

    async def _take(self, count: int) -> None:
        """As many of the resources that nobody owns now, by chance."""
        free = await self._free() if count else []
        chosen, sent_at = self._rng.sample(free, min(count, len(free))), self._clock.monotonic()
        for resource, reply in zip(chosen, await self._claim(chosen), strict=True):
            if not isinstance(reply, ForebayError) and reply[0]:
                self._gain(Tenure(resource, int(reply[1]), self._valid_until(sent_at)))

    async def _free(self) -> list[int]:
        others = [r for r in range(EVENTS, self._names.shards) if self._may_take(r)]
        time, *owners = await self._commands.call_many(
            [("TIME",), *(("HMGET", self._own(r), "u", "t") for r in others)]
        )
        if isinstance(time, ForebayError):
            raise time
        now_us, ours = int(time[0]) * 1_000_000 + int(time[1]), self._token.encode()
        # A lease with our token, of which we do not know: the reply to a claim was lost.
        return [
            resource
            for resource, reply in zip(others, owners, strict=True)
            if not isinstance(reply, ForebayError)
            and (reply[0] is None or int(reply[0]) <= now_us or reply[1] == ours)
        ]

    def _may_take(self, resource: int) -> bool:
        return (
            resource not in self.tenures
            and resource not in self._declined
            and self._rested.get(resource, 0.0) <= self._clock.monotonic()
        )

    async def _claim(self, resources: Sequence[int]) -> list[Reply]:
        if not resources:
            return []
        script = self._scripts["owner_claim"]
        args: list[Arg] = [self._node_id, self._ttl_ms, self._token]
        replies = await run_many(
            self._commands,
            [Call(script=script, keys=[self._own(each)], args=args) for each in resources],
        )
        refused = [reply for reply in replies if isinstance(reply, ForebayError)]
        if refused:
            log.warning("claim.refused", resources=len(refused), error=str(refused[0]))
        return replies

    def _own(self, resource: int) -> str:
        return self._names.part(resource, "own")

    def _valid_until(self, sent_at: float) -> float:
        return sent_at + self._ttl_ms * 2 / 3 / 1000

    def _gain(self, tenure: Tenure) -> None:
        self.tenures[tenure.resource] = tenure
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

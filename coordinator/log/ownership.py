"""Who does the ordered work of a shard: one owner at a time, by a lease with an epoch.

O1  An owner hands out no work later than two thirds of the lease after it *sent* its last
    successful renewal, on its own monotonic clock; the server gives the shard away only after
    the whole lease.
O2  Every commit carries the epoch; once another owner is in force it is refused (Fenced).
O3  Every node computes the same assignment (``roster.wanted``), and claims what it gives to
    itself. What is free is taken at once; what a dead owner had, when its lease is over.
O4  What another should have is handed over: that one's claim is a wish; the owner drains
    (``yielding``) while its leases are renewed, and releases it to the one who wished. After
    ``handover_ms`` renewals are refused, and it goes over by force, under the next epoch.
O5  What was given up by ``give_up`` or ``leave`` is not taken again by this node.
O6  A node with a label (``node.id``) that goes away keeps its shards for ``rejoin_grace_ms``, be it
    planned (``leave(rejoin=True)``) or a crash: the one that comes back with the label takes
    them, and nothing moves. The ingress stream is not kept: a dead owner's is taken as others'.
O7  A shard that is deferred goes to any other member that can have it, for ``_DEFER_S``.
O8  While the server refuses the roster, since one of its keys is of another type, owners keep their
    shards, whatever is free is taken by any member, and nothing is handed over (S8).

Resources are the shards and the ingress stream (``EVENTS``). The decisions are in
``succession``, ``roster`` and ``assignment``; this sends and tells. Node ids must differ between
processes. Should the server's clock jump ahead, leases end early there: only O2 holds then.
So it is for a node that starts in the same second in which a server forgets its owners.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Protocol, assert_never

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct
from msgspec.structs import replace

from ...schemas.errors import ForebayError, ServerRefused
from ...schemas.keys import EVENTS, Names
from ...schemas.settings import Workers
from ..clock import Clock
from ..instruments import Instruments
from ..log_once import LogOnce
from ..valkey.link import Arg, Commands, Reply
from ..valkey.scripting import Call, Scripts, run, run_many
from .claims import Change, Claim, ClaimState, Gained, Lost
from .roster import STATES, Profile, State

__all__ = ["Claim", "Ownership"]

log = structlog.get_logger(__name__)

_WISH_BEATS = 3  # a wish that is not repeated for so long is forgotten
_HASTE = 4  # so many times as often while something is on its way
_DEFER_S = 30.0  # long enough for a hand-over, after which the shares are even again


class OwnershipStatistics(Struct, frozen=True, kw_only=True):
    owned: int
    shards: int
    events: bool
    nodes: tuple[str, ...]


class Successor(Protocol):
    """What wants to know of changes: gaining is told after, losing and yielding before."""

    def gained(self, tenure: Claim) -> None: ...

    def lost(self, tenure: Claim) -> None: ...

    async def yielding(self, tenures: Sequence[Claim]) -> None: ...


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
        profile: Profile | None = None,
    ) -> None:
        """``profile`` tells label, address, version, sinks; the owned shards are filled in."""
        self.token = token = f"{rng.getrandbits(64):016x}"
        profile = profile or Profile()
        self.publishes_sinks = profile.sinks is not None
        self._grace_ms = options.rejoin_grace_ms if profile.label else 0
        self._succession = ClaimState(
            node_id,
            names.shards,
            ttl_ms=options.ownership_ttl_ms,
            profile=replace(profile, incarnation=token, weight=options.weight),
        )
        self.tenures = self._succession.tenures
        self._commands = commands
        self._names = names
        self._scripts = scripts
        self._node_id = node_id
        self._beat_ms = options.beat_ms
        self._claim_args: list[Arg] = [
            node_id,
            options.ownership_ttl_ms,
            token,
            options.handover_ms,
            _WISH_BEATS * options.beat_ms,
        ]
        self._clock = clock
        self._rng = rng
        self._instruments = instruments
        self.beats, self.claims, self.handovers, self.roster = (LogOnce(clock) for _ in range(4))
        self._successors: list[Successor] = []
        self._deferred: dict[int, float] = {}  # until when
        self._surplus: list[Claim] = []  # to be handed over
        self._surplus_chosen = anyio.Event()
        self._hurry = anyio.Event()
        self._beating = anyio.Lock()
        self._left = False
        self._fenced: list[Claim] = []  # to be released with the next beat

    def add(self, successor: Successor) -> None:
        self._successors.append(successor)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Who shares the work, this node included, leaving or not."""
        members = self._succession.roster.members.values()
        return tuple(
            each.id
            for each in members
            if each.profile.weight
            and (each.state in ("active", "suspect") or each.id == self._node_id)
        )

    @property
    def sinking(self) -> tuple[str, ...]:
        """Those of ``nodes`` that bring writes to sinks."""
        members = self._succession.roster.members
        return tuple(each for each in self.nodes if members[each].profile.has_sinks)

    def takers(self, key: str) -> frozenset[str]:
        """Incarnations of the other live members that may have a sink for this key."""
        members = self._succession.roster.members.values()
        return frozenset(
            each.profile.incarnation
            for each in members
            if each.id != self._node_id
            and each.profile.weight
            and each.state in ("active", "suspect")
            and each.profile.may_take(key)
        )

    def kept_up(self) -> list[int]:
        """The shards that this node maintains: its own, and, for the owner of the ingress stream,
        those without an owner, since no live member has a sink.
        """
        owned = [each for each in self.tenures if each != EVENTS]
        if EVENTS in self.tenures:
            plan = self._succession.wanted()
            owned += [each for each in range(self._names.shards) if each not in plan]
        return owned

    def defer(self, resources: Collection[int]) -> None:
        """Have another member own these for a while, if any can."""
        until = self._clock.monotonic() + _DEFER_S
        if fresh := [each for each in resources if each not in self._succession.deferred]:
            log.info("ownership.deferred", resources=sorted(fresh))
            self._hurry.set()
        self._deferred |= dict.fromkeys(resources, until)
        self._succession.deferred = frozenset(self._deferred)

    def members(self) -> dict[State, int]:
        """How many there are, by state."""
        roster = self._succession.roster
        return {state: roster.count(state) for state in STATES}

    def statistics(self) -> OwnershipStatistics:
        return OwnershipStatistics(
            owned=len(self.tenures),
            shards=sum(resource != EVENTS for resource in self.tenures),
            events=EVENTS in self.tenures,
            nodes=self.nodes,
        )

    def in_force(self, resource: int) -> Claim | None:
        """The tenure, if work of this resource may be handed out right now (O1)."""
        return self._succession.in_force(resource, self._clock.monotonic())

    def fenced(self, tenure: Claim) -> None:
        """A commit was refused, or a batch: another owner is in force, or was (S7)."""
        self._instruments.counts["fenced",] += 1
        if self.tenures.get(tenure.resource) is tenure:
            self._tell(self._succession.fenced(tenure, self._clock.monotonic()))
            self._fenced.append(tenure)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Beat until cancelled; started after the first beat."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hand_over)
            await self._beat_or_tell()
            task_status.started()
            while True:
                await self._pause()
                await self._beat_or_tell()

    async def _pause(self) -> None:
        """Until the next beat is due. While something is on its way, a beat is short."""
        beat_s = self._beat_ms / 1000 / (_HASTE if self._succession.unsettled else 1)
        with anyio.move_on_after(beat_s * self._rng.uniform(0.8, 1.1)):
            await self._hurry.wait()
        self._hurry = anyio.Event()

    async def _beat_or_tell(self) -> None:
        try:
            await self.beat()
        except ForebayError as error:
            self.beats.say(log, "beat.failed", error)
        else:
            self.beats.over()

    async def beat(self) -> None:
        """Be seen, renew what is owned, claim what should be, choose what to hand over."""
        async with self._beating:
            if self._left:
                return
            await self._enrol()
            if self._fenced:
                fenced, self._fenced = self._fenced, []
                await self._let_go(fenced)
            await self._claim()
            self._surplus += self._succession.to_yield()
            if self._surplus:
                self._surplus_chosen.set()

    async def _enrol(self) -> None:
        now = self._clock.monotonic()
        self._deferred = {each: until for each, until in self._deferred.items() if until > now}
        self._succession.deferred = frozenset(self._deferred)
        args = self._succession.beat(beat_ms=self._beat_ms, grace_ms=self._grace_ms)
        keys = [self._names.nodes, self._names.members]
        try:
            reply = await run(self._commands, self._scripts["roster_beat"], keys, args)
        except ServerRefused as error:
            if not error.of_keys:
                raise
            self._succession.is_blind = True
            self.roster.say(log, "roster.refused", error)
        else:
            self._succession.learn(reply, self._clock.monotonic())
            self.roster.over()

    async def _claim(self) -> None:
        sent_at = self._clock.monotonic()
        claims = [(each, self.tenures.get(each)) for each in self._succession.claims(sent_at)]
        script, refused = self._scripts["owner_claim"], list[ForebayError]()
        args = self._claim_args
        if self._succession.is_blind:
            args = [*args[:-1], 0]  # a wish of no duration is none
        calls = [Call(script=script, keys=[self._own(each)], args=args) for each, _ in claims]
        replies: list[Reply] = await run_many(self._commands, calls) if calls else []
        now = self._clock.monotonic()
        for (resource, claimed), reply in zip(claims, replies, strict=True):
            if isinstance(reply, ServerRefused):
                refused.append(reply.at(self._own(resource)))
            elif isinstance(reply, ForebayError):
                refused.append(reply)
            for change in self._succession.answer(
                resource, claimed, reply, sent_at=sent_at, now=now
            ):
                self._tell(change)
        if refused:
            self.claims.say(log, "claim.refused", refused[0], resources=len(refused))
        else:
            self.claims.over()

    async def _hand_over(self) -> None:
        """Beside the beats, since a drain may take longer than a lease."""
        async with anyio.create_task_group() as tasks:
            while True:
                await self._surplus_chosen.wait()
                self._surplus_chosen = anyio.Event()
                surplus, self._surplus = self._surplus, []
                tasks.start_soon(self._release_or_tell, surplus)

    async def _release_or_tell(self, tenures: Sequence[Claim]) -> None:
        try:
            await self._release(tenures)
        except ForebayError as error:
            self.handovers.say(log, "handover.failed", error, resources=len(tenures))
        else:
            self.handovers.over()

    async def give_up(self, tenures: Sequence[Claim]) -> None:
        """Drain and release these, for good.

        Raises:
            Unavailable: others may have to wait for the end of the leases.
        """
        self._succession.decline(tenure.resource for tenure in tenures)
        await self._release(tenures)
        self._hurry.set()  # so that others learn of it

    async def leave(self, *, patient: bool = True, rejoin: bool = False) -> None:
        """Release everything and sign off; beats do nothing after that.

        Without patience work under way is not waited for: what it commits late is fenced off.
        With ``rejoin`` the shards are kept for the one that comes with the same label (O6).

        Raises:
            Unavailable: as ``give_up``.
        """
        succession = self._succession
        succession.depart(rejoin=rejoin and self._grace_ms > 0)
        self._hurry.set()
        await self._give_up_all(patient)
        async with self._beating:  # the one under way might take something, or sign on again
            self._left = True
            await self._give_up_all(patient)
            if succession.state == "leaving":
                succession.state = "gone"
            await self._enrol()

    async def _give_up_all(self, patient: bool) -> None:
        tenures = list(self.tenures.values())
        await (self._release(tenures) if patient else self._let_go(tenures))

    async def _release(self, tenures: Sequence[Claim]) -> None:
        for successor in self._successors:
            await successor.yielding(tenures)
        await self._let_go(tenures)

    async def _let_go(self, tenures: Sequence[Claim]) -> None:
        for tenure in tenures:
            if self.tenures.get(tenure.resource) is tenure:
                self._tell(self._succession.release(tenure, self._clock.monotonic()))
        script = self._scripts["owner_release"]
        calls = [
            Call(script=script, keys=[self._own(t.resource)], args=[self._node_id, t.epoch])
            for t in tenures
        ]
        await run_many(self._commands, calls)
        self._succession.released(tenure.resource for tenure in tenures)

    def _own(self, resource: int) -> str:
        return self._names.part(resource, "own")

    def _tell(self, change: Change) -> None:
        counts, tenure = self._instruments.counts, change.tenure
        match change:
            case Gained(_, kind):
                counts["ownership_changes", "gained"] += 1
                counts["handovers", kind] += 1
                for successor in self._successors:
                    successor.gained(tenure)
            case Lost(_, why):
                counts["ownership_changes", "lost"] += 1
                if why != "released":
                    log.warning(
                        "ownership.lost", resource=tenure.resource, epoch=tenure.epoch, why=why
                    )
                for successor in self._successors:
                    successor.lost(tenure)
            case _:
                assert_never(change)

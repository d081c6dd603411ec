"""What one member claims, keeps and hands over: decisions only, without I/O and without a clock.

Feed it replies, and ask it what is next: ``learn`` (of roster_beat.lua), ``claims``, ``answer``
(of owner_claim.lua), ``to_yield``. Times are seconds on the member's own monotonic clock.

S1  A tenure is in force no later than two thirds of what the server granted, since sending.
S2  Only what the assignment gives to this member is claimed. Where another owns it, the claim
    is a wish.
S3  What another should have is yielded to it when it has wished for it, not before; what is
    yielded is drained before it is released.
S4  Who finds that the roster was lost only renews for one lease, and only what is in force:
    other owners are not in the new roster yet.
S5  What was released is not claimed before the server has answered, or for one lease: a claim
    that overtook the release would renew what is then given away.
S6  A shard that was declined, or is left, is not claimed again. A deferred shard is claimed only if
    the assignment finds nobody else for it.
S7  A shard that was fenced off is released before it is claimed, so that the next epoch is larger:
    a server that lost its last accepted writes may hold an epoch that a sink has seen the end of.
S8  A member that is blind (the server refuses the roster) renews what it owns and takes whatever
    is free and not declined; it wishes for nothing, and yields nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.errors import ForebayError
from ...schemas.keys import EVENTS
from ...schemas.replies import integer, raw_bytes, text
from ..valkey.link import Arg, Reply
from .roster import Member, Profile, Roster, State, pack, wanted

__all__ = ["Change", "Claim", "ClaimState", "Gained", "Kind", "Lost", "Why"]

Kind = Literal["free", "wished", "forced", "dead"]
Why = Literal["taken", "forgotten", "fenced", "released", "expired"]

_IN_FORCE = 2 / 3  # of a lease


class Claim:
    """One stretch of owning a resource. ``valid_until`` is monotonic seconds."""

    __slots__ = ("epoch", "resource", "valid_until")

    def __init__(self, resource: int, epoch: int, valid_until: float) -> None:
        self.resource = resource
        self.epoch = epoch
        self.valid_until = valid_until

    def __repr__(self) -> str:
        return f"<Claim {self.resource} epoch {self.epoch}>"


class Gained(Struct, frozen=True):
    tenure: Claim
    kind: Kind


class Lost(Struct, frozen=True):
    tenure: Claim
    why: Why


Change = Gained | Lost


class ClaimState:
    def __init__(self, id: str, shards: int, *, ttl_ms: int, profile: Profile) -> None:
        self.id = id
        self.state: State = "active"
        self.roster = Roster()
        self.tenures: dict[int, Claim] = {}
        self.declined: set[int] = set()
        self.deferred: frozenset[int] = frozenset()
        self.yielding: set[int] = set()
        self.kept: frozenset[int] = frozenset()  #: for the one who comes back with our label
        self._shards = shards
        self._ttl_ms = ttl_ms
        self._profile = profile
        if not profile.has_sinks:
            self.declined.update(range(shards))
        self._resting: dict[int, float] = {}  # release sent, and not answered
        self._wishes: dict[int, str] = {}  # owned here, and another waits for it
        self._asked: frozenset[int] = frozenset()  # claimed at last
        self._held_told: frozenset[int] = frozenset()
        self._held_back_until = float("-inf")
        self.is_blind = False  #: until the roster is learned again
        self._wanted: dict[int, str] = {}
        self._wanted_of: tuple[object, ...] = ()

    def beat(self, *, beat_ms: int, grace_ms: int) -> list[Arg]:
        """The arguments of roster_beat.lua."""
        profile = self._told()
        return self.roster.arguments(
            self.id, self.state, profile, beat_ms=beat_ms, grace_ms=grace_ms
        )

    def learn(self, reply: Sequence[Reply], now: float) -> None:
        self.is_blind = False
        if self.roster.learn(reply):
            self._held_back_until = now + self._ttl_ms / 1000

    def claims(self, now: float) -> list[int]:
        """What to claim now: what is owned, so that it stays; what should be."""
        self._asked = frozenset()
        if now < self._held_back_until:
            return [each for each in self.tenures if self.in_force(each, now)]
        owned = list(self.tenures)
        if self.state != "active":
            return owned
        mine = [
            each
            for each in (self._eligible() if self.is_blind else self._mine())
            if each not in self.tenures and self._resting.get(each, now) <= now
        ]
        if not self.is_blind:
            self._asked = frozenset(mine)
        return owned + mine

    def _mine(self) -> list[int]:
        return [each for each, owner in self.wanted().items() if owner == self.id]

    def _eligible(self) -> list[int]:
        """All that this member may own, whoever else is there."""
        if not self._profile.weight:
            return []
        excluded = self.declined | self.deferred
        return [each for each in range(EVENTS, self._shards) if each not in excluded]

    def answer(
        self, resource: int, claimed: Claim | None, reply: Reply, *, sent_at: float, now: float
    ) -> Iterator[Change]:
        """What the reply to a claim changes; ``claimed`` is the tenure as of sending."""
        tenure = self.tenures.get(resource)
        if tenure is not claimed:
            return  # given up or fenced off meanwhile
        if isinstance(reply, ForebayError):
            if tenure is not None and now >= tenure.valid_until:
                yield self.lose(tenure, "expired")
            return
        granted, epoch = bool(reply[0]), integer(reply[1], "the epoch of an owner")
        if not granted:
            if tenure is not None:
                yield self.lose(tenure, "taken")
            return
        self._wish(resource, raw_bytes(reply[3], "a wish").decode(errors="replace"))
        valid_until = sent_at + integer(reply[2], "the lease of an owner") / 1000 * _IN_FORCE
        if tenure is not None and tenure.epoch == epoch:
            tenure.valid_until = valid_until
            return
        if tenure is not None:
            yield self.lose(tenure, "forgotten")  # by the server; it is ours again, anew
        self.tenures[resource] = gained = Claim(resource, epoch, valid_until)
        kind = text(reply[4], "the kind of a lease")
        yield Gained(gained, "free" if kind == "kept" else kind)  # type: ignore[arg-type]

    def _wish(self, resource: int, wisher: str) -> None:
        if wisher:
            self._wishes[resource] = wisher
        else:
            self._wishes.pop(resource, None)

    def lose(self, tenure: Claim, why: Why) -> Lost:
        del self.tenures[tenure.resource]
        self._wishes.pop(tenure.resource, None)
        self.yielding.discard(tenure.resource)
        return Lost(tenure, why)

    def release(self, tenure: Claim, now: float) -> Lost:
        """Give it up; ``released`` is to be called when the server has done so."""
        self._resting[tenure.resource] = now + self._ttl_ms / 1000
        return self.lose(tenure, "released")

    def fenced(self, tenure: Claim, now: float) -> Lost:
        """Work under its epoch was refused; not claimed again before it was released (S7)."""
        self._resting[tenure.resource] = now + self._ttl_ms / 1000
        return self.lose(tenure, "fenced")

    def released(self, resources: Iterable[int]) -> None:
        for resource in resources:
            self._resting.pop(resource, None)

    def to_yield(self) -> list[Claim]:
        """What is to be drained and released now; each is told once."""
        if self.state != "active" or self.is_blind or not self._wishes:
            return []
        plan = self.wanted()
        found = [
            self.tenures[resource]
            for resource, wisher in self._wishes.items()
            if wisher == plan.get(resource) != self.id and resource not in self.yielding
        ]
        self.yielding.update(each.resource for each in found)
        return found

    def depart(self, *, rejoin: bool) -> None:
        """Claim nothing more, and say so; ``kept`` is what was owned then."""
        if self.state == "active":
            self.state = "away" if rejoin else "leaving"
            self.kept = frozenset(self.tenures)

    def decline(self, resources: Iterable[int]) -> None:
        self.declined.update(resources)

    @property
    def unsettled(self) -> bool:
        """Whether something is on its way, so that the next beat should be soon."""
        if self.state != "active":
            return False
        waiting = self._asked - self.tenures.keys()
        untold = self._held_told != self.tenures.keys()
        return bool(waiting or untold or self.yielding or self.roster.count("suspect"))

    def in_force(self, resource: int, now: float) -> Claim | None:
        tenure = self.tenures.get(resource)
        return None if tenure is None or now >= tenure.valid_until else tenure

    def wanted(self) -> dict[int, str]:
        """The assignment by what is known, with what is owned here as it is now."""
        tenures, declined = frozenset(self.tenures), len(self.declined)
        of = (self.roster.version, self.state, tenures, declined, self.deferred)
        if of != self._wanted_of:
            me = Member(
                id=self.id,
                state=self.state,
                profile=self._profile,
                held=tenures,
                declines=frozenset(self.declined),
                defers=self.deferred,
            )
            self._wanted = wanted({**self.roster.members, self.id: me}, self._shards)
            self._wanted_of = of
        return self._wanted

    def _told(self) -> Profile:
        base, self._held_told = self._profile, frozenset(self.tenures)
        return replace(
            base,
            held=pack(self.kept if self.state == "away" else self.tenures),
            declines=pack(self.declined),
            defers=pack(self.deferred),
        )

"""A cluster in one thread: real decisions, on a simulated server, network and clock.

``Server`` does what roster_beat.lua, owner_claim.lua and owner_release.lua do (a test compares
them with the scripts); ``Cluster`` is members that beat, claim, drain and fail, all by the seed.

The rules, looked at whenever something changes:
Z1  Of one epoch of a resource there is one owner, and epochs grow.
Z2  No two members hand out work of one resource at the same time, on real time.
Z3  What is released was drained before.
Z4  When the faults are over, every resource is owned soon, by a member that is alive.
Z5  Then a change moves what the dead had, and what is above the share; nothing else.
Z6  Then a shard is owned by a member with most sinks, unless one of an old release is there; where
    no member has sinks, nobody owns any.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from typing import Any

from forebay.coordinator.log.claims import Claim, ClaimState, Gained, Lost
from forebay.coordinator.log.roster import Profile
from forebay.schemas.keys import EVENTS

TIMEOUT_S, LATE_S = 1.0, 2.0
BEAT_MS, TTL_MS, FORCED_MS, GRACE_MS = 1_000, 4_000, 8_000, 10_000
FRESH_MS = 3 * BEAT_MS
KEEP_GONE_MS = 60_000
SETTLES_S = 45.0  #: the longest of: drain by force, grace, dead; and some beats


Sinks = tuple[str, ...] | None


class Broken(AssertionError):
    """A rule is broken."""


class Server:
    """What the scripts do. Times are microseconds."""

    epochs = True  #: negative control: False

    def __init__(self) -> None:
        self.beats: dict[bytes, int] = {}
        self.members: dict[bytes, list[Any]] = {}  # version, state, beat_ms, grace_ms, profile
        self.head: tuple[int, int, int] | None = None
        self.own: dict[int, dict[str, Any]] = {}

    def beat(self, us: int, args: list[Any]) -> list[Any]:
        member, state, beat_ms, grace_ms, profile, known = args
        now = us // 1000
        member, state = member.encode(), state.encode()
        version, floor, last = self.head or (us, us, now)
        quiet = 3 * beat_ms
        if now < last or now - last >= quiet:
            for each, heard in self.beats.items():
                record = self.members.get(each)
                if record and record[1] != b"gone":
                    self.beats[each] = min(now, max(heard, now - 3 * record[2]))
        overdue = [each for each, heard in self.beats.items() if heard <= now - quiet]
        for each in sorted(overdue, key=lambda each: (self.beats[each], each)):
            record, for_ms = self.members.get(each), now - self.beats[each]
            judged = None if record is None else _judged(record, for_ms)
            if judged is None:
                del self.beats[each]
                floor = max(floor, self.members.pop(each, [0])[0])
            elif record is not None and judged != record[1]:
                version = max(version + 1, us)
                self.members[each] = [version, judged, *record[2:]]
        told = [state, beat_ms, grace_ms, profile]
        record = self.members.get(member)
        if record is None or record[1:] != told:
            version = max(version + 1, us)
            self.members[member] = [version, *told]
        self.beats[member] = now
        self.head = version, floor, now
        whole = known < floor or known > version
        reply: list[Any] = [b"%d" % version, int(whole)]
        if known != version:
            for each, record in self.members.items():
                if whole or record[0] > known:
                    reply += [each, b"%d %s %d %d %s" % tuple(record)]
        return reply

    def claim(self, us: int, resource: int, owner: str, token: str) -> list[Any]:
        known = self.own.setdefault(resource, {})
        epoch, till = known.get("e", 0), known.get("u", 0)
        fresh = known.get("f", 0) > us
        wisher, since = (known["w"], known["s"]) if fresh else ("", us)
        forced, ends = since + FORCED_MS * 1000, us + TTL_MS * 1000
        ours = known.get("o") == owner and known.get("t") == token
        wished = wisher not in ("", owner)
        if wished and ours:
            ends = min(ends, max(forced, till))
        if wished and ((ours and ends <= us) or (not ours and till <= us)):
            return [0, b"%d" % epoch, (known["f"] - us) // 1000, wisher.encode()]
        if not ours and till > us:
            if not wished:
                known.update(w=owner, s=since, f=us + FRESH_MS * 1000)
            return [0, b"%d" % epoch, (till - us) // 1000, known["o"].encode()]
        kind = b"kept"
        if not ours:
            had = "o" in known
            kind = b"dead" if had else b"free"
            if wisher == owner:
                kind = b"wished" if not had else b"forced" if forced <= us else b"dead"
            epoch = max(epoch + 1, us) if self.epochs else epoch
            for field in ("w", "s", "f"):
                known.pop(field, None)
        known.update(o=owner, t=token, e=epoch, u=ends)
        return [1, b"%d" % epoch, (ends - us) // 1000, wisher.encode() if wished else b"", kind]

    def release(self, resource: int, owner: str, epoch: int) -> int:
        known = self.own.get(resource, {})
        if known.get("o") != owner or known.get("e") != epoch:
            return 0
        for field in ("o", "t", "u"):
            known.pop(field, None)
        return 1


def _judged(record: list[Any], for_ms: int) -> bytes | None:
    _, state, beat_ms, grace_ms, _ = record
    if state == b"gone":
        return None if for_ms >= KEEP_GONE_MS else state
    if state == b"away":
        return state if for_ms < grace_ms else b"gone"
    if for_ms >= 5 * beat_ms:
        return b"away" if state != b"leaving" and for_ms < grace_ms else b"gone"
    return b"suspect" if for_ms >= 3 * beat_ms and state == b"active" else state


class Node:
    """One process: its clock runs a little fast or slow, and it does what Ownership does."""

    def __init__(
        self, id: str, label: str, shards: int, rng: random.Random, sinks: Sinks = None
    ) -> None:
        self.id, self.label, self.sinks = id, label, sinks
        self.rate = rng.uniform(0.99, 1.01)
        self.core = ClaimState(
            id, shards, ttl_ms=TTL_MS, profile=Profile(incarnation=id, label=label, sinks=sinks)
        )
        self.grace_ms = GRACE_MS if label else 0
        self.crashed = self.left = False
        self.paused_until = 0.0
        self.beats = 0  #: the beat under way; answers to earlier ones are dropped
        self.busy: dict[int, float] = {}  #: a drain takes until then

    def clock(self, now: float) -> float:
        return now * self.rate


class Cluster:
    drains = True  #: negative control: False
    margin = True  #: negative control: False
    releases: tuple[Sinks, ...] = (None,)  #: sinks that the members declare; None: an old release

    def __init__(self, seed: int, *, server: type[Server] = Server) -> None:
        self.rng = random.Random(seed)
        self.now, self.steps, self.moves = 0.0, 0, 0
        self.shards = self.rng.randint(1, 5)
        self.resources = range(EVENTS, self.shards)
        self.server = server()
        self.nodes: list[Node] = []
        self.faulty = True
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._owners: dict[tuple[int, int], str] = {}  # of a resource in an epoch
        self._newest: dict[int, int] = {}
        self._born = self._expected = 0
        self._connection = 0  # a server that starts again has cut the old one
        self._lost_at = self._left_at = -math.inf

    def __repr__(self) -> str:
        return f"<Cluster at {self.now:.2f} s of {len(self.nodes)} nodes>"

    # Life

    def at(self, delay: float, what: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + delay, self._number, what, args))

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Whether ``until`` came true."""
        end, look_at = self.now + seconds, self.now
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what, args = heapq.heappop(self._queue)
            what(*args)
            if until is not None and self.now >= look_at:
                if until():
                    return True
                look_at = self.now + 0.25
        self.now = end
        return False

    def join(self, label: str = "") -> Node:
        sinks = self.rng.choice(self.releases) if len(self.releases) > 1 else self.releases[0]
        node = Node(f"n{self._born}", label, self.shards, self.rng, sinks)
        self._born += 1
        self.nodes.append(node)
        delay = max(0.0, self._remembered() - self.now)
        self.at(delay + self.rng.uniform(0, 0.5), self._beat, node)
        return node

    def _remembered(self) -> float:
        """When those who own have told it again to a server that forgot."""
        return self._lost_at + TTL_MS / 1000 + 2 * TIMEOUT_S

    def come_back(self, label: str, delay: float) -> None:
        self._expected += 1
        self.at(delay, self._come, label)

    def _come(self, label: str) -> None:
        self._expected -= 1
        self.join(label)

    def leave(self, node: Node, *, rejoin: bool) -> None:
        node.core.depart(rejoin=rejoin)
        self._drain(node, list(node.core.tenures.values()), last=True)

    def lose_everything(self) -> None:
        """The server starts again with empty hands. Who has just started does not survive it."""
        self._connection += 1
        for node in self.nodes:
            node.crashed |= node.core.roster.version == 0
        self.server.members, self.server.beats, self.server.head = {}, {}, None
        self.server.own = {}
        self._lost_at = self.now

    @property
    def alive(self) -> list[Node]:
        return [each for each in self.nodes if not each.crashed and not each.left]

    # The network

    def _delay(self) -> float:
        if self.faulty and self.rng.random() < 0.1:
            return self.rng.uniform(0, LATE_S)
        return self.rng.uniform(0.0005, 0.01)

    def _lost(self) -> bool:
        return self.faulty and self.rng.random() < 0.05

    def _send(self, node: Node, act: Callable[[int], Any], then: Callable[..., None]) -> None:
        """Done by the server once, twice or never; the answer may be lost, be late, overtake."""
        if self._lost():
            return
        times = 2 if self.faulty and self.rng.random() < 0.03 else 1
        about = node, node.beats, self._connection, then
        for time in range(times):
            self.at(self._delay(), self._serve, about, act, time == 0)

    def _serve(self, about: Any, act: Callable[[int], Any], first: bool) -> None:
        if about[2] != self._connection:
            return
        reply = act(int(1e15 + self.now * 1e6))
        if first and not self._lost():
            self.at(self._delay(), self._hear, about, reply)

    def _hear(self, about: Any, reply: Any) -> None:
        node, beats, connection, then = about
        if node.paused_until > self.now:
            self.at(node.paused_until - self.now, self._hear, about, reply)
        elif not node.crashed and (beats, connection) == (node.beats, self._connection):
            then(reply)  # otherwise nobody waits for it any more

    # A node

    def _beat(self, node: Node) -> None:
        if node.crashed or node.left:
            return
        if node.paused_until > self.now:
            self.at(node.paused_until - self.now, self._beat, node)
            return
        node.beats += 1
        args = node.core.beat(beat_ms=BEAT_MS, grace_ms=node.grace_ms)
        self._send(
            node, lambda us: self.server.beat(us, args), lambda reply: self._learn(node, reply)
        )
        self.at(TIMEOUT_S, self._again, node, node.beats)

    def _again(self, node: Node, beats: int) -> None:
        if beats == node.beats:
            self._beat(node)

    def _pause(self, node: Node) -> None:
        """A beat is over; the next comes sooner while something is on its way."""
        haste = 4 if node.core.unsettled else 1
        delay = BEAT_MS / 1000 / haste * self.rng.uniform(0.8, 1.1)
        self.at(delay, self._again, node, node.beats)

    def _learn(self, node: Node, reply: list[Any]) -> None:
        if node.left:
            return
        core, sent_at = node.core, node.clock(self.now)
        core.learn(reply, sent_at)
        claims = [(each, core.tenures.get(each)) for each in core.claims(sent_at)]
        if not claims:
            self._pause(node)
            return
        token = node.id

        def act(us: int) -> list[Any]:
            return [self.server.claim(us, each, node.id, token) for each, _ in claims]

        def then(replies: list[Any]) -> None:
            self._claimed(node, claims, replies, sent_at)

        self._send(node, act, then)

    def _claimed(
        self,
        node: Node,
        claims: list[tuple[int, Claim | None]],
        replies: list[Any],
        sent_at: float,
    ) -> None:
        now = node.clock(self.now)
        if not self.margin:
            sent_at = now + TTL_MS / 2_000
        for (resource, claimed), reply in zip(claims, replies, strict=True):
            for change in node.core.answer(resource, claimed, reply, sent_at=sent_at, now=now):
                match change:
                    case Gained(tenure):
                        self._gained(node, tenure)
                    case Lost(tenure):
                        node.busy.pop(tenure.resource, None)
            self._look(node, resource)
        if surplus := node.core.to_yield():
            self._drain(node, surplus)
        self._pause(node)

    def _gained(self, node: Node, tenure: Claim) -> None:
        self.moves += 1
        resource, epoch = tenure.resource, tenure.epoch
        if self._owners.setdefault((resource, epoch), node.id) != node.id:
            raise Broken(f"Z1: {node.id} and another have {tenure}")
        newest = max(epoch, self._newest.get(resource, 0))
        if newest > epoch and node.core.in_force(resource, node.clock(self.now)):
            raise Broken(f"Z1: {node.id} has {tenure} after epoch {newest}")
        self._newest[resource] = newest

    def _look(self, node: Node, resource: int) -> None:
        if node.core.in_force(resource, node.clock(self.now)) is None:
            return
        active = [
            each.id
            for each in self.nodes
            if not each.crashed and each.core.in_force(resource, each.clock(self.now))
        ]
        if len(active) > 1:
            raise Broken(f"Z2: {active} hand out work of {resource}")

    def _drain(self, node: Node, tenures: list[Claim], *, last: bool = False) -> None:
        slow = self.faulty and self.rng.random() < 0.1
        takes = self.rng.uniform(0, 2 * FORCED_MS / 1000 if slow else 1.0) if self.drains else 0.0
        under_way = [node.busy.get(tenure.resource, 0.0) - self.now for tenure in tenures]
        takes = max([takes, *under_way])
        for tenure in tenures:
            if node.busy.get(tenure.resource, 0.0) <= self.now:
                node.busy[tenure.resource] = self.now + takes
        if not self.drains:
            self._handed(node, tenures, last)
            for tenure in tenures:  # it is told too late to those who work
                node.core.tenures.setdefault(tenure.resource, tenure)
            return
        self.at(takes, self._drained, node, tenures, last)

    def _drained(self, node: Node, tenures: list[Claim], last: bool) -> None:
        if node.crashed:
            return
        if node.paused_until > self.now:
            self.at(node.paused_until - self.now, self._drained, node, tenures, last)
            return
        self._handed(node, tenures, last)

    def _handed(self, node: Node, tenures: list[Claim], last: bool) -> None:
        for tenure in tenures:
            if node.core.tenures.get(tenure.resource) is not tenure:
                continue
            if node.busy.get(tenure.resource, 0.0) > self.now and self.drains:
                raise Broken(f"Z3: {node.id} releases {tenure.resource} before it is drained")
            node.core.release(tenure, node.clock(self.now))
        rest = list(node.core.tenures.values()) if last else []
        for tenure in rest:
            node.core.release(tenure, node.clock(self.now))
        gone = [*tenures, *rest]

        def act(us: int) -> list[Any]:
            return [self.server.release(each.resource, node.id, each.epoch) for each in gone]

        if gone:
            self._send(node, act, lambda reply: node.core.released(each.resource for each in gone))
        if last:
            self._sign_off(node)

    def _sign_off(self, node: Node) -> None:
        node.left, self._left_at = True, self.now
        if node.core.state == "leaving":
            node.core.state = "gone"
        args = node.core.beat(beat_ms=BEAT_MS, grace_ms=node.grace_ms)
        self._send(node, lambda us: self.server.beat(us, args), lambda reply: None)

    # What is expected when it is quiet

    def settled(self) -> bool:
        """All is owned, by who should own it, and all know each other."""
        nodes = self.alive
        asleep = any(node.paused_until > self.now for node in self.nodes if not node.crashed)
        late = self.now < max(self._remembered(), self._left_at + LATE_S)
        if asleep or late or self._expected:
            return False
        owned = [resource for node in nodes for resource in node.core.tenures]
        nobody = all(node.sinks == () for node in nodes)
        if sorted(owned) != ([EVENTS] if nobody else list(self.resources)):
            return False
        return all(self._content(node, len(nodes)) for node in nodes)

    def _content(self, node: Node, count: int) -> bool:
        core, now = node.core, node.clock(self.now)
        plan = core.wanted()
        return (
            core.state == "active"
            and core.roster.count("active") == len(core.roster.members) == count
            and not core.unsettled
            and all(core.in_force(each, now) and plan[each] == node.id for each in core.tenures)
        )

    def settle(self) -> None:
        self.faulty = False
        if not any(node.core.state == "active" for node in self.alive):
            self.join()
        self.run(LATE_S)  # what is on its way still arrives
        if not self.run(SETTLES_S, self.settled):
            held = {node.id: sorted(node.core.tenures) for node in self.alive}
            raise Broken(f"Z4: not settled by {self.now:.1f} s: {held}")
        self._look_at_sinks()

    def _look_at_sinks(self) -> None:
        if any(node.sinks is None for node in self.alive):
            return
        most = max(len(node.sinks or ()) for node in self.alive)
        for node in self.alive:
            if len(node.sinks or ()) < most and node.core.tenures.keys() - {EVENTS}:
                raise Broken(f"Z6: {node.id} has {node.sinks} and owns {node.core.tenures}")


def chaos(cluster: Cluster, seconds: float) -> None:
    """Members come, go, stop and die, and the server forgets everything."""
    rng = cluster.rng
    for number in range(rng.randint(1, 4)):
        cluster.join(rng.choice(["", f"label-{number}"]))
    end = cluster.now + seconds
    while cluster.now < end:
        cluster.run(rng.uniform(0.2, 3.0))
        _mishap(cluster, rng.choice(cluster.alive or [cluster.join()]), rng.random())


def _mishap(cluster: Cluster, node: Node, chance: float) -> None:
    rng = cluster.rng
    if chance < 0.2:
        node.paused_until = cluster.now + rng.uniform(0.1, 12.0)
    elif chance < 0.4:
        node.crashed = True
        if node.label and rng.random() < 0.5:
            cluster.come_back(node.label, rng.uniform(0.1, 8.0))
    elif chance < 0.6 and node.core.state == "active" and node.paused_until < cluster.now:
        cluster.leave(node, rejoin=bool(node.label))
    elif chance < 0.65:
        cluster.lose_everything()
    elif len(cluster.alive) < 5:
        cluster.join(rng.choice(["", f"label-{rng.randint(0, 3)}"]))


def change(cluster: Cluster) -> None:
    """One change in a quiet cluster, and Z5."""
    loads = {node.id: set(node.core.tenures) for node in cluster.alive}
    victim = cluster.rng.choice(cluster.alive)
    had, before, label = loads[victim.id], cluster.moves, victim.label
    alone = not label or [node.label for node in cluster.alive].count(label) == 1
    match cluster.rng.randrange(4) if len(loads) > 1 else 3:
        case 0:
            victim.crashed = True
            bound = len(had) if alone else 2 * len(had)  # what its twin took is too much for it
        case 1:
            cluster.leave(victim, rejoin=False)
            bound = len(had)
        case 2 if label and alone:
            cluster.leave(victim, rejoin=True)
            cluster.run(cluster.rng.uniform(1.0, 4.0))
            cluster.join(label)
            bound = len(had | {EVENTS} if EVENTS in had else had)
        case _:
            cluster.join()
            share = math.ceil(cluster.shards / (len(loads) + 1))
            bound = sum(max(0, len(held - {EVENTS}) - share) for held in loads.values())
    cluster.run(6 * BEAT_MS / 1000)
    cluster.settle()
    moved = cluster.moves - before
    if moved > bound:
        raise Broken(f"Z5: {moved} moves, where {bound} are enough")


def live(seed: int, cluster: type[Cluster] = Cluster, *, server: type[Server] = Server) -> None:
    """A cluster's life by one seed; raises Broken."""
    made = cluster(seed, server=server)
    chaos(made, 12.0)
    made.settle()
    if len(made.releases) == 1:  # a change of another release moves more
        change(made)

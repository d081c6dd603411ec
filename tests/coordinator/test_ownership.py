"""Who owns what, on a real server with several owners: coordinator/log/ownership.py."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from conftest import MakeServer
from forebay.coordinator.clock import Clock, SystemClock
from forebay.coordinator.log.ownership import Claim, Ownership
from forebay.coordinator.log.roster import Profile
from forebay.coordinator.valkey.link import Arg, Commands, Link, Reply
from forebay.coordinator.valkey.scripting import run
from forebay.schemas.errors import ServerRefused
from forebay.schemas.keys import EVENTS, Names
from forebay.schemas.settings import Workers
from support.clock import ManualClock
from support.eventually import until
from support.links import link_to, running
from support.shard_logs import SCRIPTS, Between, instruments
from support.valkey_server import ValkeyServer

ALL = set(range(EVENTS, 64))
TTL_S = 1.0


class Diary:
    """A successor that writes down what it is told, and can take its time to yield."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int, int]] = []
        self.yielded: list[Sequence[Claim]] = []
        self.may_yield = anyio.Event()
        self.may_yield.set()
        self.at_gain: Callable[[Claim], None] = lambda tenure: None

    def gained(self, tenure: Claim) -> None:
        self.said.append(("gained", tenure.resource, tenure.epoch))
        self.at_gain(tenure)

    def lost(self, tenure: Claim) -> None:
        self.said.append(("lost", tenure.resource, tenure.epoch))

    async def yielding(self, tenures: Sequence[Claim]) -> None:
        self.yielded.append(tenures)
        self.said += [("yielding", tenure.resource, tenure.epoch) for tenure in tenures]
        await self.may_yield.wait()

    def of(self, resource: int) -> list[str]:
        return [what for what, which, _ in self.said if which == resource]


class House:
    """The owners of one namespace."""

    def __init__(self, link: Link, namespace: str) -> None:
        self.link = link
        self.names = Names(namespace, 64)
        self.diaries: dict[Ownership, Diary] = {}

    def owner(
        self,
        node_id: str,
        *,
        commands: Commands | None = None,
        clock: Clock | None = None,
        label: str = "",
        options: Mapping[str, int] | None = None,
    ) -> Ownership:
        owner = Ownership(
            commands or self.link,
            self.names,
            SCRIPTS,
            node_id=node_id,
            options=Workers(
                **{"ownership_ttl_ms": int(TTL_S * 1000), "beat_ms": 100, **(options or {})}
            ),
            clock=clock or SystemClock(),
            rng=random.Random(len(self.diaries)),
            instruments=instruments(),
            profile=Profile(label=label),
        )
        self.diaries[owner] = diary = Diary()
        owner.add(diary)
        return owner

    async def own(self, resource: int, *fields: str) -> list[Reply]:
        replies: list[Reply] = await self.link.call(
            "HMGET", self.names.part(resource, "own"), *fields
        )
        return replies

    async def end_lease(self, *resources: int) -> None:
        """As if its time were over."""
        for resource in resources:
            await self.link.call("HSET", self.names.part(resource, "own"), "u", 1)

    async def forget(self, owner: Ownership) -> None:
        """As if it had not been heard of for long; its leases stay."""
        await self.link.call("ZREM", self.names.nodes, owner._node_id)
        await self.link.call("HDEL", self.names.members, owner._node_id)

    async def commit(self, node_id: str, tenure: Claim, position: str = "5-0") -> Reply:
        part = self.names.part
        keys = [part(tenure.resource, name) for name in ("own", "done", "writes", "head")]
        ms, _, seq = position.partition("-")
        args: list[Arg] = [
            node_id, tenure.epoch, "writes", position, f"{ms}-{int(seq) + 1}",
            "", tenure.resource, "", "",
        ]  # fmt: skip
        return await run(self.link, SCRIPTS["checkpoint_commit"], keys, args)


@pytest.fixture
async def house(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[House]:
    link = link_to(valkey_server.socket_url)
    async with running(link):
        yield House(link, namespace)


@asynccontextmanager
async def at_work(*owners: Ownership) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for owner in owners:
            await tasks.start(owner.run)
        yield
        tasks.cancel_scope.cancel()


def held(*owners: Ownership) -> list[int]:
    return [len(owner.tenures) for owner in owners]


def disjoint(*owners: Ownership) -> bool:
    return len(set().union(*(owner.tenures for owner in owners))) == sum(held(*owners))


# O3: who gets what


async def test_everything_is_owned_by_one_each_within_a_few_beats(house: House) -> None:
    """O3: 64 shards and the ingress stream, in fair shares, with a plan but without a leader."""
    owners = [house.owner(name) for name in ("a", "b", "c")]
    for _ in range(2):
        for owner in owners:
            await owner._enrol()
    for _ in range(2):
        async with anyio.create_task_group() as beats:
            for owner in owners:
                beats.start_soon(owner.beat)
    assert set().union(*(owner.tenures for owner in owners)) == ALL
    assert disjoint(*owners)
    assert {tuple(sorted(owner.nodes)) for owner in owners} == {("a", "b", "c")}
    assert sum(owner.statistics().events for owner in owners) == 1
    assert sum(owner.statistics().shards for owner in owners) == 64
    assert max(owner.statistics().shards for owner in owners) == 22
    assert sum(owner._instruments.counts["handovers", "free"] for owner in owners) == 65


async def test_a_newcomer_gets_its_share(house: House) -> None:
    """O3, O4: the other drains what it has too much of, and releases it to the newcomer."""
    old, new = house.owner("old"), house.owner("new")
    await old.beat()
    assert held(old) == [65]
    async with at_work(old, new):
        await until(lambda: held(old, new) == [33, 32])
        assert disjoint(old, new)
        said = {resource: house.diaries[old].of(resource) for resource in new.tenures}
        assert EVENTS in old.tenures
    assert set(map(tuple, said.values())) == {("gained", "yielding", "lost")}
    assert new._instruments.counts["handovers", "wished"] == 32
    for resource, tenure in new.tenures.items():
        assert tenure.epoch > next(e for _, r, e in house.diaries[old].said if r == resource)


async def test_nothing_is_given_away_before_somebody_wishes_for_it(house: House) -> None:
    """O4: seeing a newcomer in the roster is not enough."""
    old, new = house.owner("old"), house.owner("new")
    await old.beat()
    await new._enrol()
    for _ in range(2):
        await old.beat()
        assert not old._surplus
    await new.beat()
    assert held(new) == [0]
    await old.beat()
    assert len(old._surplus) == 32


async def test_an_owner_that_does_not_finish_is_succeeded_by_force(house: House) -> None:
    """O4: after its deadline it is in force no more, and then another is."""
    old, new = house.owner("old"), house.owner("new", options={"handover_ms": 1_000})
    old._claim_args[3] = 1_000
    house.diaries[old].may_yield = anyio.Event()
    in_force = []
    house.diaries[new].at_gain = lambda tenure: in_force.append(old.in_force(tenure.resource))
    await old.beat()
    async with at_work(old, new):
        await until(lambda: held(new) == [32])
    assert in_force == [None] * 32
    assert new._instruments.counts["handovers", "forced"] == 32


async def test_a_restart_with_a_label_moves_nothing(house: House) -> None:
    """O6: what it had is kept for it; the ingress stream is not."""
    first, other = house.owner("first", label="web-1"), house.owner("other", label="web-2")
    async with at_work(first, other):
        await until(lambda: first.statistics().shards == other.statistics().shards == 32)
    had = set(first.tenures) - {EVENTS}
    rest = set(other.tenures)
    await first.leave(rejoin=True)
    for _ in range(3):
        await other.beat()
    assert set(other.tenures) == rest | {EVENTS}
    again = house.owner("again", label="web-1")
    async with at_work(again, other):
        await until(lambda: set(again.tenures) == had)
        await again.beat()
        await other.beat()
    assert set(again.tenures) == had
    assert set(other.tenures) == rest | {EVENTS}


async def test_a_crash_with_a_label_keeps_the_shards_for_the_grace(house: House) -> None:
    """O6: others take the ingress stream when the lease is over, and the rest after the grace."""
    crashed = house.owner("crashed", label="web-1", options={"rejoin_grace_ms": 3_000})
    other = house.owner("other")
    for _ in range(2):
        await crashed.beat()  # the second tells what the first has got
    async with at_work(other):
        await until(lambda: held(other) == [1])
        assert EVENTS in other.tenures
        assert other.members()["away"] == 1
        await until(lambda: held(other) == [65])
    assert other.nodes == ("other",)


async def test_a_newcomer_waits_when_the_roster_was_lost(house: House) -> None:
    """ClaimState S4: owners in force that are not in it yet keep what they own."""
    one, two = house.owner("one"), house.owner("two")
    async with at_work(one, two):
        await until(lambda: held(one, two) == [33, 32] or held(one, two) == [32, 33])
    had = set(one.tenures)
    await house.link.call("DEL", house.names.nodes, house.names.members)
    for resource in ALL:
        await house.link.call("DEL", house.names.part(resource, "own"))
    await two.beat()
    assert disjoint(one, two)
    await one.beat()
    assert set(one.tenures) == had


async def test_a_crashed_owner_is_succeeded_after_the_ttl_and_not_before(house: House) -> None:
    """O1, O3: when a successor begins, the one before has stopped by its own clock."""
    crashed, other = house.owner("crashed"), house.owner("other")
    await crashed.beat()
    still_in_force = []
    house.diaries[other].at_gain = lambda tenure: still_in_force.append(
        crashed.in_force(tenure.resource)
    )
    async with at_work(other):
        await until(lambda: held(other) == [65])
    assert still_in_force == [None] * 65
    assert other.nodes == ("other",)
    for resource, tenure in other.tenures.items():
        assert tenure.epoch > crashed.tenures[resource].epoch


async def test_what_is_released_is_taken_at_the_next_beat(house: House) -> None:
    """O4: nobody waits for the end of a lease that was given up."""
    leaving, other = house.owner("leaving"), house.owner("other")
    await leaving.beat()
    await other.beat()
    assert held(leaving, other) == [65, 0]
    await leaving.leave()
    await other.beat()
    assert held(leaving, other) == [0, 65]
    assert other.nodes == ("other",)


async def test_the_ingress_stream_has_no_place_in_the_shares(valkey_server: ValkeyServer) -> None:
    """O3: who has it has as many shards as others, and keeps it when others come."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        house = House(link, "tiny-namespace")
        house.names = Names("tiny-namespace", 2)
        old, new = house.owner("old"), house.owner("new")
        await old.beat()
        async with at_work(old, new):
            await until(lambda: held(old, new) == [2, 1])
            assert EVENTS in old.tenures
        for owner in (old, new):
            await owner.leave()


# O1: how long a tenure lasts


async def test_a_tenure_is_in_force_for_two_thirds_of_its_lease_since_sending(
    house: House,
) -> None:
    """O1: on the owner's own clock; the time that the reply took is taken off."""
    clock, between = ManualClock(), Between(house.link)

    async def take_long(_: Sequence[Sequence[Arg]]) -> None:
        clock.now_s += 0.1

    owner = house.owner("a", commands=between, clock=clock)
    between.then = take_long
    await owner.beat()
    between.then = None
    # The roster and the claim took a tenth of a second each.
    clock.now_s = 100.1 + TTL_S * 2 / 3 - 0.001
    assert owner.in_force(7) is owner.tenures[7]
    clock.now_s += 0.002
    assert owner.in_force(7) is None
    assert owner.in_force(64) is None

    await owner.beat()
    assert owner.in_force(7) is owner.tenures[7]
    assert owner.tenures[7].valid_until == pytest.approx(clock.now_s + TTL_S * 2 / 3)


async def test_the_same_owner_keeps_its_epochs(house: House) -> None:
    """O2: renewing is no change of owner; nobody is told of anything."""
    owner = house.owner("a")
    await owner.beat()
    tenures, said = dict(owner.tenures), list(house.diaries[owner].said)
    epochs = {resource: tenure.epoch for resource, tenure in tenures.items()}
    for _ in range(3):
        await owner.beat()
    assert owner.tenures == tenures
    assert {resource: tenure.epoch for resource, tenure in tenures.items()} == epochs
    assert house.diaries[owner].said == said


async def test_a_slow_drain_costs_no_other_lease(house: House) -> None:
    """O4: leases are renewed while a surplus is drained, longer than a lease lasts."""
    old, new = house.owner("old"), house.owner("new")
    await old.beat()
    house.diaries[old].may_yield = anyio.Event()
    async with at_work(old, new):
        await until(lambda: bool(house.diaries[old].yielded))
        started = SystemClock.monotonic()
        while SystemClock.monotonic() < started + 1.5 * TTL_S:
            assert all(old.in_force(resource) for resource in ALL)
            await anyio.sleep(0.02)
        assert held(old, new) == [65, 0]
        assert len(house.diaries[old].yielded) == 1
        house.diaries[old].may_yield.set()
        await until(lambda: held(old, new) == [33, 32])


# O2: fencing


async def test_the_commit_of_a_zombie_is_refused(house: House) -> None:
    """O2: nothing is written for it; it learns of it, and its tenure is over."""
    zombie, other = house.owner("zombie"), house.owner("other")
    await zombie.beat()
    tenure = zombie.tenures[3]
    await house.link.call("XADD", house.names.part(3, "writes"), "5-0", "j", "x")
    await house.end_lease(3)
    await house.forget(zombie)  # so that the other may have everything
    await other.beat()
    assert list(other.tenures) == [3]

    assert await house.commit("zombie", tenure) == [0, str(other.tenures[3].epoch).encode()]
    assert await house.link.call("EXISTS", house.names.part(3, "done")) == 0
    assert await house.link.call("XLEN", house.names.part(3, "writes")) == 1
    zombie.fenced(tenure)
    zombie.fenced(tenure)
    assert zombie.in_force(3) is None
    assert 3 not in zombie.tenures
    assert house.diaries[zombie].of(3) == ["gained", "lost"]
    assert zombie._instruments.counts["fenced",] == 2

    assert await house.commit("other", other.tenures[3]) == [1]
    assert await house.link.call("XLEN", house.names.part(3, "writes")) == 0


async def test_a_zombie_s_next_beat_tells_it_what_it_lost(house: House) -> None:
    """O2: also without a commit."""
    zombie, other = house.owner("zombie"), house.owner("other")
    await zombie.beat()
    await house.end_lease(3, EVENTS)
    await house.forget(zombie)
    await other.beat()
    await zombie.beat()
    assert set(zombie.tenures) == ALL - {3, EVENTS}
    assert set(other.tenures) == {3, EVENTS}
    assert house.diaries[zombie].of(EVENTS) == ["gained", "lost"]


async def test_epochs_grow_though_the_record_is_deleted(house: House) -> None:
    """O2: the owner who had it has it anew, with a new epoch, and was told."""
    owner = house.owner("a")
    await owner.beat()
    epochs = [owner.tenures[0].epoch]
    for _ in range(2):
        await house.link.call("DEL", house.names.part(0, "own"))
        await owner.beat()
        epochs.append(owner.tenures[0].epoch)
        assert owner.in_force(0) is owner.tenures[0]
    assert house.diaries[owner].of(0) == ["gained", "lost", "gained", "lost", "gained"]
    for name in ("b", "c"):
        await house.link.call("DEL", house.names.part(0, "own"))
        await house.link.call("DEL", house.names.nodes, house.names.members)
        successor = house.owner(name)
        await successor.beat()
        epochs.append(successor.tenures[0].epoch)
    assert epochs == sorted(set(epochs))


async def test_two_processes_with_one_node_id_are_two_owners(house: House) -> None:
    """O2: a copied setting, or one that was restarted before it was dead, is no way round."""
    first, second = house.owner("same"), house.owner("same")
    await first.beat()
    await second.beat()
    assert held(first, second) == [65, 0]
    await house.end_lease(3)
    await second.beat()
    assert list(second.tenures) == [3]
    assert await house.commit("same", first.tenures[3]) == [
        0, str(second.tenures[3].epoch).encode(),
    ]  # fmt: skip
    await first.beat()
    assert 3 not in first.tenures


# Cancelled, interrupted, out of order


@pytest.mark.parametrize("step", ["roster_beat", "owner_claim"])
async def test_a_beat_that_was_cancelled_is_made_up_for_by_the_next(
    house: House, step: str
) -> None:
    """What was granted to nobody's knowledge is no tenure; the next beat has it at once."""
    between = Between(house.link)
    owner = house.owner("a", commands=between)
    sha, reached = SCRIPTS[step].sha if step in SCRIPTS else step, anyio.Event()

    async def hang(commands: Sequence[Sequence[Arg]]) -> None:
        if any(sha in command for command in commands):
            reached.set()
            await anyio.sleep_forever()

    await know_scripts(house)
    between.then = hang
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(owner.beat)
        await reached.wait()
        tasks.cancel_scope.cancel()
    between.then = None
    assert owner.tenures == {}
    assert house.diaries[owner].said == []
    with anyio.fail_after(TTL_S / 2):
        await owner.beat()
    assert set(owner.tenures) == ALL


async def test_a_hand_over_that_was_cancelled_leaves_its_leases_to_end(house: House) -> None:
    """O4: the owner was stopped while it drained; the others wait for the end of its leases."""
    old, new = house.owner("old"), house.owner("new")
    house.diaries[old].may_yield = anyio.Event()
    await old.beat()
    in_force = []
    house.diaries[new].at_gain = lambda tenure: in_force.append(old.in_force(tenure.resource))
    async with at_work(new):
        async with at_work(old):
            await until(lambda: bool(house.diaries[old].yielded))
        assert held(old) == [65]
        await until(lambda: held(new) == [65])
    assert in_force == [None] * 65


async def test_a_release_that_is_not_answered_is_not_claimed_over(house: House) -> None:
    """ClaimState S5: a claim that overtook it would renew what is then given away."""
    between = Between(house.link)
    owner = house.owner("a", commands=between)
    await know_scripts(house)
    await owner.beat()
    tenure, reached = owner.tenures[5], anyio.Event()

    async def hang(commands: Sequence[Sequence[Arg]]) -> None:
        if SCRIPTS["owner_release"].sha in commands[0]:
            reached.set()
            await anyio.sleep_forever()

    between.then = hang
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(owner._release, [tenure])
        await reached.wait()
        await owner.beat()
        assert 5 not in owner.tenures
        tasks.cancel_scope.cancel()
    await owner.beat()
    assert 5 not in owner.tenures
    async with at_work(owner):
        await until(lambda: 5 in owner.tenures)
    assert owner.tenures[5].epoch > tenure.epoch


async def know_scripts(house: House) -> None:
    for script in SCRIPTS.values():
        await house.link.call("SCRIPT", "LOAD", script.source)


async def held_up(
    house: House, owner: Ownership, between: Between, meanwhile: Callable[[], Awaitable[None]]
) -> None:
    """A beat; ``meanwhile`` happens between the server's answer to a claim and our hearing."""
    await know_scripts(house)
    claim = SCRIPTS["owner_claim"].sha

    async def interrupt(commands: Sequence[Sequence[Arg]]) -> None:
        if claim in commands[0]:
            between.then = None
            await meanwhile()

    between.then = interrupt
    await owner.beat()


async def test_a_renewal_does_not_bring_back_what_was_given_up_meanwhile(house: House) -> None:
    """O1: the server gives it to others now, so it must not be in force here."""
    between = Between(house.link)
    owner, other = house.owner("a", commands=between), house.owner("b")
    await owner.beat()

    async def give_up() -> None:
        await owner.give_up([owner.tenures[5]])

    await held_up(house, owner, between, give_up)
    assert owner.in_force(5) is None
    assert len(owner.tenures) == 64
    await house.forget(owner)
    await other.beat()
    assert list(other.tenures) == [5]


async def test_a_loss_learned_of_during_a_renewal_is_told_once(house: House) -> None:
    """O2: a refused commit and a refused renewal say the same of one tenure."""
    between = Between(house.link)
    owner = house.owner("a", commands=between)
    await owner.beat()
    tenure = owner.tenures[5]
    await house.end_lease(5)
    await house.link.call("HSET", house.names.part(5, "own"), "o", "b", "u", 1 << 52)

    async def learn() -> None:
        owner.fenced(tenure)

    await held_up(house, owner, between, learn)
    assert house.diaries[owner].of(5) == ["gained", "lost"]
    assert len(owner.tenures) == 64


async def test_leaving_while_a_beat_is_under_way_leaves_nothing_behind(house: House) -> None:
    """O5: neither a lease nor a place in the roster; later beats do nothing."""
    between = Between(house.link)
    owner = house.owner("a", commands=between)
    async with anyio.create_task_group() as tasks:

        async def leave() -> None:
            tasks.start_soon(owner.leave)
            await anyio.sleep(0.02)

        await held_up(house, owner, between, leave)
    assert owner.tenures == {}
    for resource in ALL:
        assert await house.own(resource, "o", "u", "t") == [None, None, None]
    await owner.beat()
    assert owner.tenures == {}
    assert owner.nodes == ()


async def test_what_was_given_up_is_not_taken_again(house: House) -> None:
    """O5: a node that drains takes no new work, while it goes on with the rest."""
    owner, other = house.owner("a"), house.owner("b")
    await owner.beat()
    await owner.give_up([owner.tenures[EVENTS]])
    assert await house.own(EVENTS, "o") == [None]
    for _ in range(3):
        await owner.beat()
    assert EVENTS not in owner.tenures
    assert len(owner.tenures) == 64
    await other.beat()
    assert list(other.tenures) == [EVENTS]
    await owner.give_up([])
    assert len(owner.tenures) == 64


async def test_a_full_memory_stops_neither_renewals_nor_commits(
    make_server: MakeServer, namespace: str
) -> None:
    """The owners are those who empty the streams: they need no free memory for it."""
    link = link_to(make_server(config={"maxmemory-policy": "noeviction"}).socket_url)
    async with running(link):
        house = House(link, namespace)
        owner, other = house.owner("a"), house.owner("b")
        await owner.beat()
        await link.call("XADD", house.names.part(3, "writes"), "5-0", "j", "x")
        await link.call("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(ServerRefused):
            await link.call("XADD", house.names.part(3, "writes"), "*", "j", "x")
        valid_until = owner.tenures[3].valid_until
        await owner.beat()
        assert owner.tenures[3].valid_until > valid_until
        assert await house.commit("a", owner.tenures[3]) == [1]
        assert await link.call("XLEN", house.names.part(3, "writes")) == 0
        assert await link.call("HGET", house.names.part(3, "done"), "writes") == b"5-0"
        await owner.leave()
        await other.beat()
        assert held(owner, other) == [0, 65]


async def test_a_claim_that_is_refused_costs_that_resource_only(house: House) -> None:
    """A record that is no hash is somebody else's; the beat goes on."""
    await house.link.call("SET", house.names.part(9, "own"), "what is this")
    owner = house.owner("a")
    await owner.beat()
    assert set(owner.tenures) == ALL - {9}
    await house.link.call("DEL", house.names.part(9, "own"))
    await owner.beat()
    await house.link.call("SET", house.names.part(9, "own"), "what is this")
    valid_until = {r: tenure.valid_until for r, tenure in owner.tenures.items()}
    await owner.beat()
    renewed = {r for r, tenure in owner.tenures.items() if tenure.valid_until > valid_until[r]}
    assert renewed == ALL - {9}

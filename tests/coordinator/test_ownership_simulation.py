"""Ownership under faults, by seed: see ``simulation`` for the rules Z1 to Z5.

A seed that fails is a test of its own: ``simulation.live(seed)``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from uuid import uuid4

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from forebay.coordinator.log import claims
from forebay.coordinator.log.roster import Member, wanted
from forebay.schemas.keys import EVENTS
from support.links import link_to, running
from support.scripts import Desk
from support.simulation import BEAT_MS, FORCED_MS, FRESH_MS, TTL_MS, Broken, Cluster, Server, live
from support.valkey_server import ValkeyServer

SEEDS = int(os.environ.get("FOREBAY_TEST_SEEDS", "10000"))
PARTS = 10  #: of the seeds, each a test: short enough for the time limit on a busy machine
_run, _numbers = uuid4().hex[:8], count(1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_fault_makes_two_owners_or_leaves_a_resource_alone(part: int) -> None:
    """Z1 to Z5, for each seed; a life is a quarter of a minute with faults, and what follows."""
    for seed in range(part, SEEDS, PARTS):
        try:
            live(seed)
        except Broken as broken:
            pytest.fail(f"seed {seed}: {broken}")


class Rollout(Cluster):
    releases = ((), ("a",), ("a", "b"), ("b", "c"))


class Upgrade(Cluster):
    releases = (None, ("a",), ("a", "b"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS // 2))
@pytest.mark.parametrize("kind", [Rollout, Upgrade])
def test_members_with_other_sinks_agree_on_who_owns_what(kind: type[Cluster], part: int) -> None:
    """Z1 to Z4 and Z6: in a rolling deploy, also with members of a release that publishes none."""
    for seed in range(part, max(200, SEEDS // 5), PARTS // 2):
        try:
            live(seed, kind)
        except Broken as broken:
            pytest.fail(f"seed {seed}: {broken}")


def test_a_cluster_that_gives_shards_to_whoever_has_fewer_sinks_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control, Z6: sinks do not count."""

    def blind(members: dict[str, Member], shards: int) -> dict[int, str]:
        alike = {
            each.id: replace(each, profile=replace(each.profile, sinks=None))
            for each in members.values()
        }
        return wanted(alike, shards)

    monkeypatch.setattr(claims, "wanted", blind)
    with pytest.raises(Broken, match="Z6"):
        for seed in range(300):
            live(seed, Rollout)


class NoEpochs(Server):
    epochs = False


class NoDrain(Cluster):
    drains = False


class NoMargin(Cluster):
    margin = False


class Forgetful(Server):
    """Gives to anybody who asks what is owned."""

    def claim(self, us: int, resource: int, owner: str, token: str) -> list[object]:
        self.own.get(resource, {}).pop("u", None)
        return super().claim(us, resource, owner, token)


@pytest.mark.parametrize(
    "rule, cluster, server",
    [
        ("Z1", Cluster, NoEpochs),
        ("Z2", NoDrain, Server),
        ("Z2", NoMargin, Server),
        ("Z2", Cluster, Forgetful),
    ],
)
def test_a_cluster_that_breaks_a_rule_is_found(
    rule: str, cluster: type[Cluster], server: type[Server]
) -> None:
    """Negative control: without epochs, without draining, without the margin of a lease."""
    with pytest.raises(Broken, match=rule):
        for seed in range(300):
            live(seed, cluster, server=server)


def test_an_assignment_that_is_not_sticky_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, Z5: each change deals everything anew."""

    def dealt(members: dict[str, Member], shards: int) -> dict[int, str]:
        active = sorted(each.id for each in members.values() if each.state == "active")
        return {each: active[(each + 1) % len(active)] for each in range(EVENTS, shards)}

    monkeypatch.setattr(claims, "wanted", dealt)
    with pytest.raises(Broken, match="Z5"):
        for seed in range(300):
            live(seed)


def test_a_cluster_that_never_claims_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, Z4: nobody takes what is free."""
    monkeypatch.setattr(claims, "wanted", lambda members, shards: {})
    with pytest.raises(Broken, match="Z4"):
        live(1)


def test_a_release_before_the_drain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, Z3: handed over at once, while work is under way."""
    drain = Cluster._drain

    def hasty(cluster: Cluster, node: object, tenures: object, *, last: bool = False) -> None:
        drain(cluster, node, tenures, last=last)  # type: ignore[arg-type]
        cluster._handed(node, tenures, last)  # type: ignore[arg-type]

    monkeypatch.setattr(Cluster, "_drain", hasty)
    with pytest.raises(Broken, match="Z3"):
        for seed in range(300):
            live(seed)


# The simulated server does what the scripts do

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "claim", "release", "beat", "beat", "pass", "silent"]),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=40,
)
STATES = ("active", "leaving", "away", "gone")
PASS_MS = (1, 1_500, TTL_MS, FORCED_MS)


class Both:
    """Each step on the server and on the model, at the server's time; the answers compared.

    Time passes by making everything that was written older.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.model = Server()
        self.epochs = [0, 0, 0]
        self.versions = [0, 0, 0]

    async def step(self, what: str, who: int, how: int) -> None:
        match what:
            case "claim":
                await self.claim(who)
            case "release":
                await self.release(who)
            case "beat":
                await self.beat(who, STATES[how], grace_ms=(0, 10_000)[who % 2])
            case "silent":
                await self.older(PASS_MS[how] * 3)
            case _:
                await self.older(PASS_MS[how])

    async def claim(self, who: int) -> None:
        us = await self.desk.now_us()
        reply = await self.desk.claim(
            f"m{who}", token=f"t{who}", ttl_ms=TTL_MS, forced_ms=FORCED_MS, fresh_ms=FRESH_MS
        )
        model = self.model.claim(us, 0, f"m{who}", f"t{who}")
        assert [model[0], *model[3:]] == [reply[0], *reply[3:]]
        assert abs(int(model[2]) - int(reply[2])) < 1_000
        self.model.own[0]["e"] = int(reply[1])
        if reply[0]:
            self.epochs[who] = int(reply[1])

    async def release(self, who: int) -> None:
        done = await self.desk.give_up(f"m{who}", self.epochs[who])
        assert self.model.release(0, f"m{who}", self.epochs[who]) == done

    async def beat(self, who: int, state: str, *, grace_ms: int) -> None:
        us = await self.desk.now_us()
        known = self.versions[who]
        version, whole, told = await self.desk.beat(
            f"m{who}", state, beat_ms=BEAT_MS, grace_ms=grace_ms, known=known
        )
        model = self.model.beat(us, [f"m{who}", state, BEAT_MS, grace_ms, b"{}", known])
        names = {bytes(k).decode(): bytes(v).split(b" ")[1].decode() for k, v in
                 zip(model[2::2], model[3::2], strict=True)}  # fmt: skip
        assert (bool(model[1]), names) == (whole, told)
        await self.copy_versions()
        self.versions[who] = version

    async def copy_versions(self) -> None:
        """The model's clock reads a little earlier: what it stamps is made the same."""
        stored = await self.desk.commands.call("HGETALL", self.desk.names.members)
        for member, record in zip(stored[::2], stored[1::2], strict=True):
            if member:
                self.model.members[member][0] = int(record.split(b" ")[0])
            else:
                version, floor, last = map(int, record.split(b" "))
                self.model.head = version, floor, last

    async def older(self, by_ms: int) -> None:
        names, own = self.desk.names, self.desk.part("own")
        for member in self.model.beats:
            await self.desk.commands.call("ZINCRBY", names.nodes, -by_ms, member)
            self.model.beats[member] -= by_ms
        for field in ("u", "s", "f"):
            if await self.desk.commands.call("HEXISTS", own, field):
                await self.desk.commands.call("HINCRBY", own, field, -by_ms * 1_000)
                self.model.own[0][field] -= by_ms * 1_000


@settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_the_simulated_server_does_what_the_scripts_do(
    valkey_server: ValkeyServer, steps: Sequence[tuple[str, int, int]]
) -> None:
    """Whatever is asked in whatever order: same grants, same wishes, same roster."""

    taken = []

    async def compare() -> None:
        link = link_to(valkey_server.socket_url)
        async with running(link):
            desk = Desk(link, f"sim-{_run}-{next(_numbers)}")
            both = Both(desk)
            for step in steps:
                await both.step(*step)
                taken.append(step)
            await link.call("UNLINK", desk.part("own"), "none")
            await link.call("UNLINK", desk.names.nodes, desk.names.members)

    anyio.run(compare)
    assert taken == list(steps)


def test_a_seed_tells_the_whole_story() -> None:
    """The same seed is the same life, so that a failure can be looked at."""
    lives = []
    for _ in range(2):
        cluster = Cluster(11)
        cluster.join()
        cluster.join()
        cluster.run(10.0)
        lives.append((cluster.moves, cluster._number))
    assert lives[0] == lives[1]

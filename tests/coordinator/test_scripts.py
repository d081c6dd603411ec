"""The scripts on a real server under everything at once: concurrency, strangers, random lives.

What each returns, and its invariants one by one, is the contract: tests/contract.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import count
from uuid import uuid4

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay.coordinator.limits.slots import Slots
from forebay.coordinator.limits.store import LimitStore
from forebay.coordinator.locks.guards import Guards
from forebay.coordinator.locks.store import LockStore
from forebay.coordinator.rights import RightsCheck
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.schemas.errors import ServerRefused
from support.links import link_to, running
from support.scripts import Desk
from support.valkey_server import ValkeyServer

_numbers = count(1)
_run = uuid4().hex[:8]


@pytest.fixture
async def desk(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[Desk]:
    link = link_to(valkey_server.socket_url)
    async with running(link):
        yield Desk(link, namespace)


# Many at once


async def test_changes_of_many_callers_leave_one_order(desk: Desk) -> None:
    """C1, C2: dense ids, every version once, and each entry is that of its last change."""
    keys = desk.keys_of(desk.shard, 5)
    rng = random.Random(1)

    async def change() -> None:
        for _ in range(40):
            key = rng.choice(keys)
            match rng.randrange(4):
                case 0:
                    await desk.put(key=key)
                case 1:
                    await desk.write(key=key, bound=10_000)
                case 2:
                    await desk.invalidate(key)
                case _:
                    token = f"{rng.random()}"
                    if (await desk.begin(token, key=key, seen=1 << 62))[0]:
                        await desk.fill(token, key=key)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(change)
    logged = await desk.log()
    assert len(logged) > 400
    assert [each.position.seq for each in logged] == list(range(len(logged)))
    versions = [each.version for each in logged]
    assert versions == sorted(set(versions))
    newest = int(await desk.commands.call("HGET", desk.part("head"), "v"))
    assert newest == versions[-1]
    jobs = await desk.commands.call("XRANGE", desk.part("writes"), "-", "+")
    assert {int(fields[1]) for _, fields in jobs} <= set(versions)


async def test_one_of_many_gets_the_lease(desk: Desk) -> None:
    """However they race, and again after each fill."""
    granted: list[str] = []

    async def ask(token: str) -> None:
        if (await desk.begin(token, seen=1 << 62))[0]:
            granted.append(token)

    for turn in range(5):
        async with anyio.create_task_group() as tasks:
            for caller in range(50):
                tasks.start_soon(ask, f"{turn}-{caller}")
        assert len(granted) == turn + 1
        assert (await desk.fill(granted[-1]))[0] == 1


async def test_one_of_many_becomes_the_owner(desk: Desk) -> None:
    """Each change of owner has a larger epoch, whoever wins the race."""
    epochs: list[int] = []

    async def claim(owner: str) -> None:
        done, epoch, *_ = await desk.claim(owner, token=owner)
        if done:
            epochs.append(int(epoch))

    for turn in range(5):
        async with anyio.create_task_group() as tasks:
            for owner in range(20):
                tasks.start_soon(claim, f"{turn}-{owner}")
        assert len(epochs) == turn + 1
        await desk.commands.call("HDEL", desk.part("own"), "w")
        await desk.end_lease()
    assert epochs == sorted(set(epochs))


# Strangers

Act = Callable[[Desk], Awaitable[object]]
MISPLACED: dict[str, tuple[str, Act]] = {
    "entry_put": ("log", lambda desk: desk.put()),
    "entry_write": ("log", lambda desk: desk.write()),
    "entry_write with jobs": ("writes", lambda desk: desk.write()),
    "entry_fill": ("log", lambda desk: desk.fill("mine", key="k")),
    "write_fill": ("log", lambda desk: desk.fill_write("mine")),
    "write_begin": ("head", lambda desk: desk.begin_write("mine")),
    "tags_capture": ("head", lambda desk: desk.capture("k")),
    "refresh_publish": ("refreshes", lambda desk: desk.refresh("mine", key="k", seen=1 << 62)),
    "log_begin": ("log", lambda desk: desk.log_begin()),
    "owner_claim": ("own", lambda desk: desk.claim("a")),
    "checkpoint_commit": ("done", lambda desk: desk.commit("a", 7, "99-0")),
    "checkpoint_commit with jobs": ("writes", lambda desk: desk.commit("a", 7, "99-0", last="5-0")),
    "writes_trim": ("writes", lambda desk: desk.trim("99-0")),
    "writes_hold": ("held", lambda desk: desk.hold("a", 7, "5-0")),
    "writes_hold tried": ("tried", lambda desk: desk.hold("a", 7, "5-0", token="t")),
}


@pytest.mark.parametrize("what", MISPLACED)
async def test_what_others_put_in_the_way_refuses_the_whole_change(desk: Desk, what: str) -> None:
    """Decide first, write last: nothing is half done where a key is of another type."""
    part, act = MISPLACED[what]
    await desk.commands.call("SET", desk.names.entry("k"), "old")
    if what in ("entry_fill", "write_fill"):
        await desk.commands.call("SET", desk.names.lease("k"), "mine")
    if part != "own":
        await desk.commands.call("HSET", desk.part("own"), "o", "a", "e", 7)
    if part != "writes":
        await desk.commands.call("XADD", desk.part("writes"), "5-0", "j", "waiting")
    await desk.commands.call("SET", desk.part(part), "not ours")
    before = await desk.everything()
    with pytest.raises(ServerRefused) as caught:
        await act(desk)
    assert caught.value.code == "WRONGTYPE"
    assert await desk.everything() == before


@pytest.mark.parametrize("part", ["head", "log"])
@pytest.mark.parametrize("soft", [False, True])
async def test_an_invalidation_takes_effect_whatever_is_in_its_way(
    desk: Desk, part: str, soft: bool
) -> None:
    """C9: what is outdated is not read again, also where it cannot be announced or counted."""
    await desk.put()
    await desk.begin("mine")
    (before,) = await desk.capture("k")
    await desk.commands.call("DEL", desk.part(part))
    await desk.commands.call("SET", desk.part(part), "not ours")
    await desk.invalidate(soft=soft)
    await desk.bump("k", soft=soft)
    entry = await desk.commands.call("GET", desk.names.entry("k"))
    assert entry is None or (soft and entry[20:33] == b"0" * 13)
    assert await desk.commands.call("EXISTS", desk.names.lease("k")) == 0
    version = (await desk.commands.call("GET", desk.names.tag("k"))).split()[0]
    assert int(version) > int(before)
    assert await desk.commands.call("GET", desk.part(part)) == b"not ours"


async def test_a_tag_of_another_type_gets_a_version_by_a_bump(desk: Desk) -> None:
    """I5: also softly, as one that was lost."""
    await desk.commands.call("HSET", desk.names.tag("k"), "x", "y")
    await desk.bump("k", soft=True)
    assert (await desk.commands.call("GET", desk.names.tag("k"))).isdigit()


async def test_no_script_writes_a_key_that_never_goes(desk: Desk) -> None:
    """What is one per key or per tag expires, or is there for as long as a write is pending."""
    await desk.begin("mine")
    await desk.fill("mine")
    await desk.refresh("token", key="other")
    await desk.capture("tag")
    await desk.bump("tag")
    await desk.write(event_id="e1", key="written")
    per_key = ("e0:", "l:", "t:")
    keys = [
        key
        for key in await desk.everything()
        if key.decode().split("}:", 1)[-1].startswith(per_key)
    ]
    assert len(keys) == 4
    for key in keys:
        ttl_ms = await desk.commands.call("PTTL", key)
        assert (ttl_ms > 0) == (key != desk.names.entry("written").encode())


def test_every_script_is_looked_at_here_or_in_the_contract() -> None:
    """A new script comes with its tests: the desk, or the class whose contract it is, names it."""
    methods = {
        name
        for kind in (Desk, LockStore, Guards, LimitStore, RightsCheck, Slots)
        for method in vars(kind).values()
        if hasattr(method, "__code__")
        for name in method.__code__.co_consts
        if isinstance(name, str)
    }
    assert set(load_scripts()) - methods == set()


# Random lives of an entry, against a model

Step = tuple[str, int]
STEPS = [
    "begin", "begin anew", "fill", "release", "put", "write", "commit", "commit late",
    "invalidate", "soften", "refresh", "vanish",
]  # fmt: skip
LIVES = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2)), max_size=30)


class Model:
    """What one key should be, after each step. Values are numbers in the order made."""

    def __init__(self, desk: Desk, epoch: int) -> None:
        self.desk = desk
        self.epoch = epoch
        self.made = 0
        self.value = ""  # none
        self.version = -1
        self.pending = 0
        self.doomed = self.stale = False
        self.lease = ""
        self.jobs: list[tuple[str, int]] = []

    async def take(self, step: str, number: int) -> None:
        await getattr(self, "_" + step.replace(" ", "_"))(f"token-{number}")
        await self.compare()

    async def compare(self) -> None:
        lease = await self.desk.lease()
        assert (lease or b"").decode() == self.lease
        if not self.value:
            assert await self.desk.raw() is None
            return
        entry = await self.desk.entry()
        assert (entry.payload.decode(), entry.version) == (self.value, self.version)
        assert (entry.pending, entry.doomed) == (self.pending, self.doomed)
        assert (entry.soft_at_ms == 0) == self.stale
        assert (await self.desk.ttl_ms() == -1) == bool(self.pending)

    def _next(self) -> str:
        self.made += 1
        return f"value {self.made}"

    def _store(self, value: str, version: int, pending: int) -> None:
        self.value, self.version, self.pending = value, version, pending
        self.doomed = self.stale = False
        self.lease = ""

    def _drop(self) -> None:
        self.value, self.version, self.pending = "", -1, 0
        self.doomed = self.stale = False

    async def _begin(self, token: str, *, seen: int | None = None) -> None:
        seen = self.version if seen is None else seen
        reply = await self.desk.begin(token, seen=seen)
        if self.pending or self.version > seen:
            assert reply == [0, await self.desk.raw(), 0]
        elif self.lease not in ("", token):
            assert reply[:2] == [0, None]
        else:
            assert reply == [1, await self.desk.raw()]
            self.lease = token

    async def _begin_anew(self, token: str) -> None:
        await self._begin(token, seen=-1)

    async def _fill(self, token: str) -> None:
        value = self._next()
        reply = await self.desk.fill(token, value)
        assert bool(reply[0]) == (self.lease == token)
        if reply[0]:
            assert not self.pending
            self._store(value, int(reply[1]), 0)

    async def _release(self, token: str) -> None:
        assert bool(await self.desk.release(token)) == (self.lease == token)
        self.lease = "" if self.lease == token else self.lease

    async def _put(self, _: str) -> None:
        value = self._next()
        self._store(value, await self.desk.put(value), self.pending)

    async def _write(self, _: str) -> None:
        value = self._next()
        _, version, _, _, job_id, _ = await self.desk.write(value)
        self.jobs.append((bytes(job_id).decode(), int(version)))
        self._store(value, int(version), int(version))

    async def _commit(self, _: str, *, newest: bool = True) -> None:
        if not self.jobs:
            return
        job_id, version = self.jobs[-1 if newest else 0]
        assert await self.desk.commit("a", self.epoch, job_id, [("k", version)]) == [1]
        self.jobs = [job for job in self.jobs if job[1] > version]
        assert await self.desk.length("writes") == len(self.jobs)
        self.lease = ""  # a load that began before the write was sunk may have seen the older row
        if version == self.pending:
            self.pending = 0
            if self.doomed:
                self._drop()

    async def _commit_late(self, token: str) -> None:
        await self._commit(token, newest=False)

    async def _invalidate(self, _: str, *, soft: bool = False) -> None:
        assert (await self.desk.invalidate(soft=soft))[0] == 1
        self.lease = ""
        if self.pending:
            self.doomed = True
        elif soft and self.value:
            self.stale = True
        else:
            self._drop()

    async def _soften(self, token: str) -> None:
        await self._invalidate(token, soft=True)

    async def _refresh(self, token: str) -> None:
        wanted = not self.pending and not self.lease
        assert await self.desk.refresh(token, seen=self.version) == int(wanted)
        self.lease = token if wanted else self.lease

    async def _vanish(self, _: str) -> None:
        """Evicted or expired; a pending write's job is still there."""
        await self.desk.commands.call("DEL", self.desk.names.entry("k"))
        self._drop()


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(life=LIVES)
def test_an_entry_is_what_the_model_says_after_every_step(
    valkey_server: ValkeyServer, life: Sequence[Step]
) -> None:
    """Loads, puts, writes, commits, invalidations and refreshes, in any order."""
    steps_taken = []

    async def live() -> None:
        link = link_to(valkey_server.socket_url)
        async with running(link):
            desk = Desk(link, f"life-{_run}-{next(_numbers)}")
            _, epoch, *_ = await desk.claim("a")
            model = Model(desk, int(epoch))
            for step, number in life:
                await model.take(step, number)
                steps_taken.append(step)
            await link.call("UNLINK", *(await desk.everything()))

    anyio.run(live)
    assert steps_taken == [step for step, _ in life]

"""The scripts of locks and guards, on every kind of backend: what each returns, its invariants."""

from __future__ import annotations

import random
from typing import Any

import pytest

from forebay.coordinator.clock import SystemClock
from forebay.coordinator.locks.store import Grant, Held, LockStore, Refusal
from forebay.schemas.errors import ServerRefused
from forebay.schemas.errors_locks import InvalidLock, LockNotAcquired
from forebay.schemas.locks import PERMITS_MAX, Terms
from support.scripts import SCRIPTS, Desk

pytestmark = pytest.mark.usefixtures("begun")
MUTEX = Terms(name="k", about=b'{"by":"me"}')
READ = Terms(name="k", kind="r", capacity=PERMITS_MAX)
WRITE = Terms(name="k", kind="r", capacity=PERMITS_MAX, weight=PERMITS_MAX)


def semaphore(weight: int, capacity: int = 3) -> Terms:
    return Terms(name="k", kind="s", capacity=capacity, weight=weight)


class Records(LockStore):
    def __init__(self, desk: Desk) -> None:
        self.told: list[tuple[str, int]] = []
        super().__init__(
            desk.commands,
            desk.names,
            SCRIPTS,
            clock=SystemClock(),
            handed=lambda nonce, token, _: self.told.append((nonce, token)),
        )
        self.desk = desk

    async def granted(self, nonce: str, terms: Terms = MUTEX, mode: Any = "wait") -> int:
        answer = await self.acquire(terms, nonce, mode)
        assert isinstance(answer, Grant), answer
        return answer.token

    async def refused(self, nonce: str, terms: Terms = MUTEX, mode: Any = "wait") -> Refusal:
        answer = await self.acquire(terms, nonce, mode)
        assert isinstance(answer, Refusal), answer
        return answer

    async def holders(self) -> list[str]:
        (view,) = await self.show(["k"])
        return sorted(each.nonce for each in view.holders)

    async def queue(self) -> list[str]:
        (view,) = await self.show(["k"])
        return [each.nonce for each in view.queue]

    async def silence(self, nonce: str) -> None:
        """Have a waiter not heard of for long."""
        waiters = self.desk.names.lock("k")[2]
        await self.desk.commands.call("HSET", waiters, nonce, "1 1 1000000 {}")

    async def end(self, nonce: str) -> None:
        """Have a lease end."""
        record = self.desk.names.lock("k")[0]
        line = await self.desk.commands.call("HGET", record, f"h:{nonce}")
        weight, token, _, rest = line.split(b" ", 3)
        await self.desk.commands.call(
            "HSET", record, f"h:{nonce}", b" ".join([weight, token, b"1", rest])
        )

    async def grace(self, left_us: int) -> None:
        era = self.desk.names.lock("k")[4]
        until_us = await self.desk.now_us() + left_us
        await self.desk.commands.call("HSET", era, "grace", until_us)


@pytest.fixture
def records(desk: Desk) -> Records:
    return Records(desk)


@pytest.fixture(params=["run unknown", "run known"])
async def begun(records: Records, request: pytest.FixtureRequest) -> None:
    """What is asked for most takes a shorter way if the caller knows the run of the server."""
    assert await records.begin(fresh=True) == 0
    if request.param == "run known":
        era = records.desk.names.lock("k")[4]
        records.run = (await records.desk.commands.call("HGET", era, "rid")).decode()


async def test_asked_again_the_same_token_is_returned(records: Records) -> None:
    """lock_acquire I1: a lost reply costs nothing."""
    token = await records.granted("p.1")
    assert await records.granted("p.1") == token
    assert await records.granted("p.1", mode="try") == token
    await records.release("k", "p.1")
    assert await records.granted("p.2") > token


async def test_a_refused_try_leaves_nothing(records: Records) -> None:
    """lock_acquire I3: and tells who holds it, and how long yet."""
    await records.granted("p.1")
    before = await records.desk.everything()
    refusal = await records.refused("q.1", mode="try")
    assert (refusal.holder, refusal.first) == ("me", False)
    assert 9 < refusal.left_s <= 10
    assert await records.desk.everything() == before


async def test_tokens_are_larger_than_the_caller_has_seen(records: Records) -> None:
    """L1: also if the server's clock is behind, and the record lost."""
    future = await records.desk.now_us() + 3_600_000_000
    records.highest = future
    assert await records.granted("p.1") == future + 1


async def test_a_lost_record_gives_no_token_twice(records: Records) -> None:
    """L1: the clock is ahead of every token."""
    token = await records.granted("p.1")
    await records.desk.commands.call("DEL", records.desk.names.lock("k")[0])
    assert await records.granted("p.2") > token


async def test_released_it_goes_to_the_first_in_this_step(records: Records) -> None:
    """lock_release I4: to one of the same process with its token, for the whole lease."""
    first = await records.granted("p.1")
    assert (await records.refused("p.2")).first
    assert not (await records.refused("p.3")).first
    assert await records.release("k", "p.1")
    ((nonce, token),) = records.told
    assert (nonce, token > first) == ("p.2", True)
    assert await records.holders() == ["p.2"]
    assert await records.queue() == ["p.3"]
    (view,) = await records.show(["k"])
    assert view.holders[0].left_ms > 9_000


async def test_another_process_has_a_second_to_confirm(records: Records) -> None:
    """L4: if it does not, the lock is passed on; if it does, it has its whole lease."""
    await records.granted("p.1")
    await records.refused("q.1")
    await records.release("k", "p.1")
    (view,) = await records.show(["k"])
    assert view.holders[0].left_ms <= 1_000
    await records.granted("q.1")
    (view,) = await records.show(["k"])
    assert view.holders[0].left_ms > 9_000
    assert records.told == []


async def test_releasing_twice_or_as_a_stranger_changes_nothing(records: Records) -> None:
    """lock_release I1, I2."""
    await records.granted("p.1")
    assert await records.release("k", "p.1")
    await records.granted("p.2")
    before = await records.desk.everything()
    assert await records.release("k", "p.1")
    assert not await records.release("k", "q.9")
    assert await records.desk.everything() == before


async def test_who_leaves_the_queue_makes_room_for_those_behind(records: Records) -> None:
    """A writer that gives up lets the readers through that it held back."""
    await records.granted("p.1", READ)
    await records.refused("p.2", WRITE)
    await records.refused("p.3", READ)
    assert await records.release("k", "p.2")
    assert await records.holders() == ["p.1", "p.3"]


async def test_nobody_passes_by_those_who_wait_but_by_barging(records: Records) -> None:
    """lock_acquire I2: even if there is room."""
    await records.granted("p.1", semaphore(2))
    await records.refused("p.2", semaphore(3))
    await records.refused("p.3", semaphore(1), mode="try")
    await records.granted("p.4", semaphore(1), mode="barge")
    await records.refused("p.5", semaphore(1), mode="barge")
    assert await records.queue() == ["p.2", "p.5"]


async def test_who_is_silent_is_passed_over(records: Records) -> None:
    """L3: a dead process at the head holds up nobody."""
    await records.granted("p.1")
    await records.refused("q.1")
    await records.refused("p.2")
    await records.silence("q.1")
    await records.release("k", "p.1")
    assert await records.holders() == ["p.2"]
    assert await records.queue() == []


async def test_what_has_ended_is_free(records: Records) -> None:
    """L2: for whoever asks, and for the queue first."""
    await records.granted("p.1")
    await records.refused("q.1")
    await records.end("p.1")
    assert (await records.refused("p.2")).first
    assert await records.holders() == ["q.1"]


async def test_a_lease_that_ended_is_not_renewed(records: Records) -> None:
    """lock_renew I1: nor one with another token."""
    token = await records.granted("p.1")
    held = Held(MUTEX, "p.1", token)
    stranger = Held(MUTEX, "p.1", token - 1)
    now_us, statuses = await records.renew([held, stranger], timeout_ms=1_000)
    assert statuses == [1, 0]
    assert abs(now_us - await records.desk.now_us()) < 10_000_000
    await records.end("p.1")
    assert (await records.renew([held], timeout_ms=1_000))[1] == [0]
    assert await records.holders() == []


async def test_nothing_new_is_granted_in_a_grace(records: Records) -> None:
    """L5: it is told how long; who waits is served afterwards, and in order."""
    await records.grace(2_000_000)
    assert 0 < (await records.refused("p.1", mode="try")).left_s <= 2
    await records.refused("p.1")
    await records.refused("p.2", mode="barge")
    await records.grace(-1)
    await records.refused("p.2")
    assert await records.holders() == ["p.1"]


async def test_in_a_grace_what_was_held_is_reclaimed(records: Records) -> None:
    """lock_reclaim I1, I2: with its token, for the rest of its time; the younger wins."""
    old, new = Held(MUTEX, "p.1", 100), Held(MUTEX, "q.1", 200)
    assert not await records.reclaim(old, 5.0)
    await records.grace(2_000_000)
    assert (await records.renew([old], timeout_ms=1_000))[1] == [2]
    assert await records.reclaim(old, 5.0)
    assert await records.reclaim(old, 9.0)
    (view,) = await records.show(["k"])
    assert (view.token, view.holders[0].left_ms <= 5_000) == (100, True)
    assert await records.reclaim(new, 5.0)
    assert not await records.reclaim(old, 5.0)
    assert await records.holders() == ["q.1"]


async def test_shares_are_reclaimed_while_they_fit(records: Records) -> None:
    """Those of a semaphore, in whatever order they come."""
    await records.grace(2_000_000)
    assert await records.reclaim(Held(semaphore(1), "p.2", 200), 5.0)
    assert await records.reclaim(Held(semaphore(2), "p.1", 100), 5.0)
    assert not await records.reclaim(Held(semaphore(1), "p.3", 300), 5.0)
    assert await records.holders() == ["p.1", "p.2"]


async def test_forced_the_queue_has_it_and_tokens_rise(records: Records) -> None:
    """lock_force I1, I2."""
    assert await records.force("k") == 0
    token = await records.granted("p.1")
    await records.refused("q.1")
    assert await records.force("k") == 1
    assert await records.holders() == ["q.1"]
    assert await records.granted("q.1") > token + 1
    assert not await records.release("k", "p.1")


async def test_capacity_set_live_counts_until_it_is_unset(records: Records) -> None:
    """lock_resize I1, I2."""
    await records.granted("p.1", semaphore(3))
    await records.refused("p.2", semaphore(2))
    await records.resize("k", 5, declared=3)
    assert await records.holders() == ["p.1", "p.2"]
    await records.resize("k", 1, declared=3)
    assert await records.holders() == ["p.1", "p.2"]
    await records.release("k", "p.1")
    await records.refused("p.3", semaphore(1), mode="try")
    await records.release("k", "p.2")
    await records.granted("p.3", semaphore(3))
    await records.release("k", "p.3")
    with pytest.raises(InvalidLock):
        await records.acquire(MUTEX, "p.4", "try")
    await records.resize("k", None, declared=3)
    assert await records.desk.commands.call("PTTL", records.desk.names.lock("k")[0]) > 0


async def test_the_queue_and_the_holders_have_bounds(records: Records) -> None:
    """A typed error, and nobody is added."""
    record, queue, *_ = records.desk.names.lock("k")
    await records.granted("p.1")
    places = [each for n in range(10_000) for each in (n, f"q.{n}")]
    await records.desk.commands.call("ZADD", queue, *places)
    for at in range(10_000):
        if at % 2_500 == 0:
            lines = [f"q.{n}" for n in range(at, at + 2_500)]
            beats = [w for n in lines for w in (n, f"{2**52} 1 1000000 {{}}")]
            await records.desk.commands.call("HSET", records.desk.names.lock("k")[2], *beats)
    with pytest.raises(LockNotAcquired) as caught:
        await records.acquire(MUTEX, "p.2", "wait")
    assert caught.value.reason == "queue_full"
    await records.desk.commands.call("DEL", queue)
    now_us = await records.desk.now_us()
    lines = [w for n in range(1_000) for w in (f"h:r.{n}", f"1 {n} {now_us + 10**8} 1")]
    await records.desk.commands.call("HSET", record, *lines)
    with pytest.raises(LockNotAcquired) as caught:
        await records.acquire(MUTEX, "p.2", "wait")
    assert caught.value.reason == "too_many_holders"


async def test_an_era_that_is_unknown_begins_with_a_grace(records: Records) -> None:
    """lock_begin I1: unless the namespace is new; and it is begun once."""
    await records.desk.commands.call("DEL", records.desk.names.lock("k")[4])
    assert 29 < await records.begin(fresh=False) <= 30
    assert 0 < await records.begin(fresh=True) <= 30
    await records.refused("p.1", mode="try")


async def test_another_run_of_the_server_begins_an_era(records: Records, not_on_fake: Any) -> None:
    """L5: with a grace as long as the longest lease that was given."""
    not_on_fake("has no INFO in scripts")
    era = records.desk.names.lock("k")[4]
    await records.granted("p.1", Terms(name="k", lease_us=20_000_000))
    await records.desk.commands.call("HSET", era, "rid", "another")
    assert 15 < (await records.refused("p.2", mode="try")).left_s <= 20
    token = (await records.show(["k"]))[0].holders[0].token
    held = Held(Terms(name="k", lease_us=20_000_000), "p.1", token)
    assert (await records.renew([held], timeout_ms=1_000))[1] == [1]


async def test_with_full_memory_leases_are_kept_and_given_back(
    records: Records, not_on_fake: Any
) -> None:
    """lock_renew I2, lock_release I3; what is new is refused, and changes nothing."""
    not_on_fake("has no maxmemory")
    commands = records.desk.commands
    token = await records.granted("p.1")
    await records.refused("p.2")
    await commands.call("CONFIG", "SET", "maxmemory", 1)
    try:
        await records.refused("p.3", mode="try")
        with pytest.raises(ServerRefused):
            await records.acquire(MUTEX, "p.3", "wait")
        assert (await records.renew([Held(MUTEX, "p.1", token)], timeout_ms=1_000))[1] == [1]
        assert await records.release("k", "p.1")
        assert await records.holders() == ["p.2"]
    finally:
        await commands.call("CONFIG", "SET", "maxmemory", 0)
    assert await records.queue() == []


async def test_a_record_in_use_does_not_expire(records: Records) -> None:
    """Its time is put off once in half an hour at least, and by every renewal."""
    record = records.desk.names.lock("k")[0]
    await records.granted("p.1")
    assert await records.desk.commands.call("PTTL", record) > 3_000_000
    await records.release("k", "p.1")
    await records.desk.commands.call("PEXPIRE", record, 600_000)
    await records.desk.commands.call("HINCRBY", record, "t", -1_800_000_000)
    token = await records.granted("p.2")
    assert await records.desk.commands.call("PTTL", record) > 3_000_000
    await records.desk.commands.call("PEXPIRE", record, 600_000)
    await records.renew([Held(MUTEX, "p.2", token)], timeout_ms=1_000)
    assert await records.desk.commands.call("PTTL", record) > 3_000_000


async def test_the_longest_lease_is_known_before_it_is_granted(records: Records) -> None:
    """L5: also that of one who waits yet."""
    era = records.desk.names.lock("k")[4]
    assert await records.desk.commands.call("HGET", era, "max") == b"10000000"
    await records.granted("p.1")
    await records.refused("p.2", Terms(name="k", lease_us=25_000_000))
    assert await records.desk.commands.call("HGET", era, "max") == b"25000000"


async def test_guards_keep_the_highest_token(desk: Desk) -> None:
    """guard_set I1, I2 and guard_delete I1."""
    keys = [desk.part("x"), desk.part("x:fence")]
    assert await desk.run("guard_set", keys, 7, "a", 0) == [1, b"7"]
    assert await desk.run("guard_set", keys, 7, "b", 50_000) == [1, b"7"]
    assert await desk.run("guard_set", keys, 6, "c", 0) == [0, b"7"]
    assert await desk.run("guard_delete", keys, 6) == [0, b"7"]
    assert await desk.commands.call("GET", keys[0]) == b"b"
    assert await desk.run("guard_delete", keys, 8) == [1, 1]
    assert await desk.run("guard_delete", keys, 8) == [1, 0]
    assert await desk.run("guard_set", keys, 7, "d", 0) == [0, b"8"]


@pytest.mark.parametrize("seed", range(8))
async def test_what_a_record_says_in_short_is_so(records: Records, seed: int) -> None:
    """L6, L7: after whatever was done to it, and whoever holds it is in the index."""
    rng = random.Random(seed)
    record, queue, _, index, _ = records.desk.names.lock("k")
    call = records.desk.commands.call
    for step in range(60):
        match rng.randrange(8):
            case 0 | 1 | 2:
                terms = semaphore(rng.choice([1, 1, 2]), rng.choice([2, 3]))
                await records.acquire(terms, f"p{step % 2}.{step}", rng.choice(["try", "wait"]))
            case 3 | 4 | 5 if nonces := [*await records.holders(), *await records.queue()]:
                await records.release("k", rng.choice(nonces))
            case 6 if nonces := await records.holders():
                await records.end(rng.choice(nonces))
            case 7:
                await (records.force("k") if step % 3 else records.resize("k", None, declared=2))
        short, told, stored = await call("HMGET", record, "f", "k", "v")
        stored_holders = [name for name in await call("HKEYS", record) if name[:2] == b"h:"]
        if told and short != b"":
            assert stored is None
            assert not await call("EXISTS", queue)
            assert len(stored_holders) == (1 if short == b"=" else 0)
        if await records.holders():
            assert float(await call("ZSCORE", index, "k")) > await records.desk.now_us()


async def test_names_that_nobody_uses_leave_the_index(records: Records) -> None:
    """L6: with each that is noted anew, on the average, goes more than one."""
    record, _, _, index, _ = records.desk.names.lock("k")
    call = records.desk.commands.call
    await call("ZADD", index, *[x for n in range(50) for x in (n, f"old{n}")])
    for n in range(400):
        if await call("ZCARD", index) == 1:
            break
        await records.granted(f"p.{n}")
        await records.release("k", f"p.{n}")
        await call("DEL", record)
    assert await call("ZRANGE", index, 0, -1) == [b"k"]

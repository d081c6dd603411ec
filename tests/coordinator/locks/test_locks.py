"""Locks of several processes on a real server: coordinator/locks.py and its parts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from forebay.schemas.errors import InvalidKey
from forebay.schemas.errors_locks import InvalidLock, LeaseLost, LockNotAcquired, LockNotHeld
from support.eventually import until
from support.lock_processes import Forge, MakeForge, smithy
from support.valkey_server import ValkeyServer


@pytest.fixture
async def make(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[MakeForge]:
    async with smithy(valkey_server, namespace) as make:
        yield make


async def test_one_at_a_time_has_the_lock(make: MakeForge) -> None:
    """K2: between processes and within one; tokens grow with each grant (K1)."""
    forges = [await make("one"), await make("two"), await make("three")]
    inside, tokens = 0, []

    async def work(number: int) -> None:
        nonlocal inside
        for _ in range(10):
            async with forges[number % 3].lock("l") as lease:
                inside += 1
                assert inside == 1
                tokens.append(lease.token)
                await anyio.sleep(0)
                inside -= 1

    async with anyio.create_task_group() as tasks:
        for number in range(9):
            tasks.start_soon(work, number)
    assert len(tokens) == 90
    assert tokens == sorted(set(tokens))
    assert await forges[0].list() == []


async def test_try_lock_takes_what_is_free_and_waits_for_nothing(make: MakeForge) -> None:
    """It gives a lease, or None; what it refused leaves nothing behind."""
    one, two = await make("one"), await make("two")
    lease = await one.try_lock("l")
    assert lease is not None
    async with lease:
        assert lease.held
        assert await two.try_lock("l") is None
        assert await one.try_lock("l") is None
        assert (await two.show("l")).waiting == 0
    assert not lease.held
    async with two.lock("l"):
        assert await two.holders("l") == ["two"]


async def test_who_waits_in_vain_is_told_who_has_it(make: MakeForge) -> None:
    """LockNotAcquired after the timeout, with the holder; no place is left in the queue."""
    one, two = await make("one"), await make("two")
    async with one.lock("l"):
        with pytest.raises(LockNotAcquired) as caught:
            async with two.lock("l", timeout=0.05):
                pytest.fail("it was held")
        assert (caught.value.name, caught.value.holder) == ("l", "one")
        assert (caught.value.reason, caught.value.waited_ms >= 50) == ("timed_out", True)
        with pytest.raises(LockNotAcquired):
            await two.lock("l", timeout=0).acquire()
        assert await one.queue("l") == []


async def test_those_who_wait_are_served_in_order(make: MakeForge) -> None:
    """K3: across processes, whoever came first is first."""
    forges = [await make(name) for name in ("one", "two", "three")]
    served: list[int] = []

    async def wait(number: int) -> None:
        async with forges[number % 3].lock("l"):
            served.append(number)

    async with anyio.create_task_group() as tasks, forges[0].lock("l"):
        for number in range(9):
            tasks.start_soon(wait, number)
            await until(lambda n=number: _waiting(forges[0], n + 1))  # type: ignore[misc]
    assert served == list(range(9))


async def _waiting(forge: Forge, count: int, name: str = "l") -> bool:
    return (await forge.show(name)).waiting == count


async def test_released_to_another_process_it_need_not_be_polled_for(make: MakeForge) -> None:
    """One message wakes the head of the queue alone."""
    one, two = await make("one"), await make("two")
    two._queue.patience_s = lambda refusal: 1_000.0  # type: ignore[method-assign]
    async with anyio.create_task_group() as tasks, one.lock("l"):

        async def wait() -> None:
            async with two.lock("l"):
                pass

        tasks.start_soon(wait)
        await until(lambda: _waiting(one, 1))
    assert two.counts["lock_acquires", "waited"] == 1


async def test_a_message_that_was_lost_is_made_good_by_asking(make: MakeForge) -> None:
    """Q2: without the subscription a waiter still gets the lock."""
    one, two = await make("one"), await make("two")
    two._channel = b"elsewhere"
    async with anyio.create_task_group() as tasks, one.lock("l"):

        async def wait() -> None:
            async with two.lock("l"):
                pass

        tasks.start_soon(wait)
        await until(lambda: _waiting(one, 1))
    assert two.counts["lock_acquires", "waited"] == 1


async def test_releasing_twice_does_nothing(make: MakeForge) -> None:
    """A4: also if another has the lock by then."""
    one, two = await make("one"), await make("two")
    lease = await one.lock("l").acquire()
    await lease.release()
    async with two.lock("l"):
        await lease.release()
        assert await one.holders("l") == ["two"]


async def test_a_stranger_cannot_release(make: MakeForge) -> None:
    """A typed error, and nothing is changed."""
    one, two = await make("one"), await make("two")
    async with one.lock("l"):
        before = await one.show("l")
        with pytest.raises(LockNotHeld):
            await two.release("l", "two.1")
        after = await one.show("l")
        assert (after.holders[0].nonce, after.token) == (before.holders[0].nonce, before.token)


@pytest.mark.parametrize(
    "name,options,field",
    [
        ("", {}, ""),
        ("a{b}", {}, ""),
        ("a\x00b", {}, ""),
        ("x" * 513, {}, ""),
        ("l", {"lease": 1.9}, "lease"),
        ("l", {"lease": 31}, "lease"),
        ("l", {"lease": float("nan")}, "lease"),
        ("l", {"lease": True}, "lease"),
        ("l", {"timeout": -1}, "timeout"),
        ("l", {"timeout": float("nan")}, "timeout"),
        ("l", {"level": "quorum"}, "level"),
        ("l", {"on_loss": "ignore"}, "on_loss"),
        ("l", {"meta": {"x": "y" * 2_000}}, "meta"),
        ("l", {"meta": {"x": object()}}, "meta"),
        ("l", {"meta": {"x": [1.0, float("nan")]}}, "meta"),
    ],
)
async def test_terms_that_cannot_be_are_refused_before_anything_is_sent(
    make: MakeForge, name: str, options: dict[str, object], field: str
) -> None:
    """T1: a typed error that names the field."""
    one = await make("one")
    calls = one.link.statistics().calls
    with pytest.raises((InvalidLock, InvalidKey)) as caught:
        one.lock(name, **options)  # type: ignore[arg-type]
    assert not field or getattr(caught.value, "field", None) == field
    assert one.link.statistics().calls == calls


# Renewal and loss


async def test_leases_are_renewed_together(make: MakeForge) -> None:
    """N1, N2: one script a shard in each round, and the deadline moves on."""
    one = await make("one")
    leases = [await one.lock(f"l{n}", lease=2).acquire() for n in range(20)]
    deadlines = [each.deadline for each in leases]
    calls = one.link.statistics().calls
    await until(lambda: one.counts["lock_renewals", "renewed"] >= 20)
    assert all(b > a for a, b in zip(deadlines, [e.deadline for e in leases], strict=True))
    rounds = one.counts["lock_renewals", "renewed"] // 20 + 1  # the next one may be under way
    assert one.link.statistics().calls - calls <= 8 * rounds  # one for each lease is 20
    for each in leases:
        each.check()
        await each.release()


async def test_who_loses_the_lease_is_cancelled_and_told(make: MakeForge) -> None:
    """A2: the body ends at its next await, and LeaseLost comes out with reason and token."""
    one, two = await make("one"), await make("two")
    reached = False
    with pytest.raises(LeaseLost) as caught:
        async with one.lock("l", lease=2) as lease:
            await one.expire("l")
            async with two.lock("l"):
                await anyio.sleep_forever()
            reached = True
    assert not reached
    assert (caught.value.reason, caught.value.token) == ("taken", lease.token)
    assert one.counts["lock_losses", "taken"] == 1


async def test_with_event_the_body_goes_on(make: MakeForge) -> None:
    """A2: only ``lost`` is set; check() raises."""
    one = await make("one")
    async with one.lock("l", lease=2, on_loss="event") as lease:
        await one.expire("l")
        await lease.lost.wait()
        assert lease.remaining_s() == 0
        with pytest.raises(LeaseLost):
            lease.check()


async def test_forced_out_the_holder_is_cancelled_at_once(make: MakeForge) -> None:
    """force_release takes it, tells the holder, and the next token is higher."""
    one, two = await make("one"), await make("two")
    with pytest.raises(LeaseLost) as caught:
        async with one.lock("l") as lease:
            assert await two.force_release("l") == 1
            assert (await two.show("l")).token > lease.token
            await anyio.sleep_forever()
    assert caught.value.reason == "forced"
    assert await two.force_release("l") == 0
    next_lease = await two.try_lock("l")
    assert next_lease is not None
    assert next_lease.token > lease.token
    await next_lease.release()


async def test_a_body_that_noticed_nothing_is_told_at_its_end(make: MakeForge) -> None:
    """LeaseLost also where the release found the lease gone."""
    one = await make("one")
    with pytest.raises(LeaseLost):
        async with one.lock("l"):
            await one.expire("l")


async def test_what_the_body_raised_is_not_hidden(make: MakeForge) -> None:
    """A3: its own error comes out, lost or not, and the lock is released."""
    one = await make("one")
    with pytest.raises(ZeroDivisionError):
        async with one.lock("l"):
            await one.expire("l")
            _ = 1 / 0
    with pytest.raises(ZeroDivisionError):
        async with one.lock("l"):
            _ = 1 / 0
    assert await one.list() == []


async def test_cancellation_from_outside_passes(make: MakeForge) -> None:
    """A3: it is not made a LeaseLost, and the lock is released."""
    one = await make("one")
    with anyio.CancelScope() as scope:
        async with one.lock("l"):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert await one.list() == []


# Semaphores, read-write locks, several


async def test_a_semaphore_admits_as_much_as_fits(make: MakeForge) -> None:
    """Weights never exceed the capacity; one that does not fit waits, and those after it."""
    one, two = await make("one"), await make("two")
    gpus = one.semaphore("gpu", capacity=4)
    async with gpus.acquire(3):
        assert await two.semaphore("gpu", capacity=4).try_acquire(2) is None
        small = await gpus.try_acquire(1)
        assert small is not None
        await small.release()
    with pytest.raises(InvalidLock):
        gpus.acquire(5)
    with pytest.raises(InvalidLock):
        one.semaphore("gpu", capacity=0)


async def test_capacity_is_changed_while_in_use(make: MakeForge) -> None:
    """Raised, it admits who waits; lowered, nobody loses anything; None: as declared again."""
    one, two = await make("one"), await make("two")
    gpus, same = one.semaphore("gpu", capacity=1), two.semaphore("gpu", capacity=1)
    entered = anyio.Event()
    async with anyio.create_task_group() as tasks, gpus.acquire():

        async def enter() -> None:
            async with same.acquire():
                entered.set()
                await anyio.sleep_forever()

        tasks.start_soon(enter)
        await until(lambda: _waiting(one, 1, "gpu"))
        await gpus.resize(2)
        await entered.wait()
        await gpus.resize(1)
        assert len((await one.show("gpu")).holders) == 2
        assert await same.try_acquire() is None
        await gpus.resize(None)
        tasks.cancel_scope.cancel()
    assert not (await one.show("gpu")).live


async def test_readers_share_and_a_writer_does_not(make: MakeForge) -> None:
    """A writer that waits holds back the readers that come later."""
    one, two = await make("one"), await make("two")
    order: list[str] = []

    async def write() -> None:
        async with one.rwlock("cfg").writing():
            order.append("writer")

    async def read() -> None:
        async with two.rwlock("cfg").reading():
            order.append("reader")

    async with (
        anyio.create_task_group() as tasks,
        one.rwlock("cfg").reading(),
        two.rwlock("cfg").reading(),
    ):
        tasks.start_soon(write)
        await until(lambda: _waiting(one, 1, "cfg"))
        tasks.start_soon(read)
        await until(lambda: _waiting(one, 2, "cfg"))
        assert order == []
    assert order == ["writer", "reader"]


async def test_a_name_is_of_one_kind_at_a_time(make: MakeForge) -> None:
    """In use as one thing it is refused as another, and free it may be either."""
    one = await make("one")
    async with one.lock("l"):
        with pytest.raises(InvalidLock):
            await one.semaphore("l", capacity=2).try_acquire()
    lease = await one.semaphore("l", capacity=2).try_acquire()
    assert lease is not None
    await lease.release()


async def test_several_are_had_together_or_not_at_all(make: MakeForge) -> None:
    """Named in any order they never wait for each other in a circle; a failure releases all."""
    one, two = await make("one"), await make("two")

    async def work(forge: Forge, names: list[str]) -> None:
        for _ in range(10):
            async with forge.lock_all(names) as leases:
                assert set(leases) == set(names)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, one, ["a", "b", "c"])
        tasks.start_soon(work, two, ["c", "b", "a"])
    async with one.lock("c"):
        with pytest.raises(LockNotAcquired):
            async with two.lock_all(["a", "b", "c"], timeout=0):
                pytest.fail("c was held")
        assert [view.name for view in await two.list()] == ["c"]


async def test_who_looks_sees_who_holds_and_who_waits(make: MakeForge) -> None:
    """list and show: holder, since when, with what meta, and the queue."""
    one, two = await make("one"), await make("two")
    async with anyio.create_task_group() as tasks, one.lock("l", meta={"job": 7}) as lease:

        async def wait() -> None:
            async with two.lock("l", meta={"job": 8}):
                pass

        tasks.start_soon(wait)
        await until(lambda: _waiting(one, 1))
        (view,) = await two.list()
        (holder,), (waiting,) = view.holders, view.queue
        assert (view.name, view.kind, view.token) == ("l", "a lock", lease.token)
        assert (holder.by, holder.meta, holder.token) == ("one", {"job": 7}, lease.token)
        assert (waiting.by, waiting.meta) == ("two", {"job": 8})
        assert 0 < holder.left_ms <= 10_000

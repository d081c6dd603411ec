"""Slots that are renewed: coordinator/limits/slots.py."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from forebay.coordinator.limits.slots import Slots
from forebay.coordinator.valkey.link import Commands
from forebay.schemas.errors import Unavailable
from forebay.schemas.errors_limits import InvalidLimit, RateLimited, SlotLost
from forebay.schemas.limits import Limit
from support.eventually import until
from support.limiters import House
from support.workers import Cut

JOBS = Limit(name="jobs", rate=1, concurrency=3)


def slots_of(house: House, **options: Any) -> Slots:
    return house.limiter(JOBS, **options).slots


async def in_use(house: House) -> int:
    return int(await house.link.call("ZCARD", house.names.limit("rs", "jobs", "x")))


async def test_no_more_than_there_are(house: House) -> None:
    """P1: across processes; the refused one learns when the first may be free."""
    one, other = slots_of(house), slots_of(house)
    async with one.hold(JOBS, "x"), other.hold(JOBS, "x"), other.hold(JOBS, "x") as third:
        assert third.in_use == 3
        with pytest.raises(RateLimited) as caught:
            async with one.hold(JOBS, "x"):
                pass
        assert 0 < caught.value.retry_after_ms <= 10_000
        async with one.hold(JOBS, "y"):
            assert await in_use(house) == 3
    assert await in_use(house) == 0


async def test_a_slot_outlives_its_lease_while_it_is_held(house: House) -> None:
    """P4: renewed in time, and free at the end."""
    slots = slots_of(house)
    async with slots.hold(JOBS, "x", lease_s=2.0) as slot:
        first = slot.until
        await until(lambda: slot.until > first + 1.0)
        assert await in_use(house) == 1
    assert await in_use(house) == 0


async def test_a_lost_slot_ends_its_body(house: House) -> None:
    """P2: the server no longer knows it; the body is cancelled, and SlotLost comes out."""
    slots = slots_of(house)
    with pytest.raises(SlotLost) as caught:
        async with slots.hold(JOBS, "x", lease_s=2.0) as slot:
            await house.link.call("DEL", slot.key)
            await anyio.sleep_forever()
    assert "no longer knows" in caught.value.reason


async def test_a_slot_that_cannot_be_renewed_ends_before_its_lease(house: House) -> None:
    """P2: cancelled while the server still keeps the slot for it."""
    slots = slots_of(house, commands=Cut(house.link, at=3))
    await house.limiter(JOBS).of("jobs").peek("x")
    still_held: list[int] = []
    with pytest.raises(SlotLost) as caught:
        async with slots.hold(JOBS, "x", lease_s=2.0):
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    still_held.append(await in_use(house))
    assert still_held == [1]
    assert "in time" in caught.value.reason


async def test_what_the_body_raises_comes_out_as_it_is(house: House) -> None:
    """And the slot is free."""
    with pytest.raises(KeyError):
        async with slots_of(house).hold(JOBS, "x"):
            raise KeyError("mine")
    assert await in_use(house) == 0


@pytest.mark.parametrize("answered", [False, True])
async def test_cancelled_while_asking_it_holds_nothing(house: House, answered: bool) -> None:
    """P3: before the server got it, or after."""
    await house.link.call("SCRIPT", "LOAD", slots_of(house)._script.source)
    cut = Cut(house.link, at=1, answered=answered)
    slots = slots_of(house, commands=cut)

    async def hold() -> None:
        async with slots.hold(JOBS, "x"):
            pytest.fail("it was never granted")

    task = asyncio.create_task(hold())
    await cut.reached.wait()
    assert await in_use(house) == int(answered)
    task.cancel()
    await until(task.done)
    assert task.cancelled()
    assert await in_use(house) == 0


@pytest.mark.parametrize("policy, held", [("open", 5), ("closed", 0), ("local", 1)])
async def test_without_the_server_the_policy_decides(house: House, policy: Any, held: int) -> None:
    """P5: all, nothing, or this process's share; three slots for two members are one."""

    class Away:
        async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
            raise Unavailable("away")

        call_many = call

    jobs = Limit(name="jobs", rate=1, concurrency=3, store_down=policy)
    slots = house.limiter(jobs, commands=Away(), members=lambda: 2).slots
    got = 0
    async with anyio.create_task_group() as tasks:

        async def hold() -> None:
            nonlocal got
            try:
                async with slots.hold(jobs, "x"):
                    got += 1
                    await anyio.sleep_forever()
            except RateLimited:
                pass

        for _ in range(5):
            tasks.start_soon(hold)
        await anyio.wait_all_tasks_blocked() if held < 5 else await until(lambda: got == 5)
        assert got == held
        tasks.cancel_scope.cancel()
    assert slots._local.total() == 0


async def test_bad_leases_and_limits_without_slots(house: House) -> None:
    """Each is told what to change."""
    slots = slots_of(house)
    for lease_s in (1.9, 31, float("nan")):
        with pytest.raises(InvalidLimit, match="lease"):
            async with slots.hold(JOBS, "x", lease_s=lease_s):
                pass
    with pytest.raises(InvalidLimit, match="concurrency"):
        async with slots.hold(Limit(name="jobs", rate=1), "x"):
            pass


class Late:
    """The server does what it is asked, and the reply is late, while ``late``."""

    def __init__(self, commands: Commands) -> None:
        self.inner = commands
        self.late = True

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        reply = await self.inner.call(*args, timeout_ms=timeout_ms)
        if self.late:
            self.late = False
            await anyio.sleep_forever()
        return reply

    async def call_many(self, *args: Any, **options: Any) -> Any:
        return await self.inner.call_many(*args, **options)


async def test_a_reply_that_was_late_keeps_no_slot(house: House) -> None:
    """P5: decided here, so that what the server granted in the end goes back at once."""
    await house.link.call("SCRIPT", "LOAD", slots_of(house)._script.source)
    slots = slots_of(house, commands=Late(house.link), budget_ms=100)
    async with slots.hold(JOBS, "x") as slot:
        assert slot.nonce == ""
        with anyio.fail_after(5):
            while await in_use(house):
                await anyio.sleep(0.01)
    assert slots._local.total() == 0


@pytest.mark.parametrize("policy", ["closed", "local"])
async def test_a_shadow_lets_in_more_than_it_has(house: House, policy: Any) -> None:
    """Refused by nobody, and counted; with the server and without."""
    dark = Limit(name="jobs", rate=1, concurrency=1, shadow=True, store_down=policy)
    limiter = house.limiter(dark)
    async with limiter.slots.hold(dark, "x"), limiter.slots.hold(dark, "x") as second:
        assert (second.nonce, await in_use(house)) == ("", 1)
    assert limiter.state._counts["limiter_shadow_refused", "jobs"] == 1
    assert limiter.slots._local.total() == 0
    limiter.state.outage.failed()
    limiter.state.outage._next_try_at = float("inf")
    async with limiter.slots.hold(dark, "x"), limiter.slots.hold(dark, "x"):
        assert await in_use(house) == 0


class Stalled:
    """A clock that goes on while the loop stands still, for as long as one says."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def monotonic(self) -> float:
        return anyio.current_time() + self.by_s


async def test_a_body_that_outran_its_lease_in_a_stall_is_told(house: House) -> None:
    """P2: nobody could cancel it; others may have had the slot meanwhile."""
    clock = Stalled()
    slots = slots_of(house, clock=clock)
    with pytest.raises(SlotLost, match="before the body"):
        async with slots.hold(JOBS, "x", lease_s=2.0):
            clock.by_s = 2.0

"""Asks that share a script, and callers that leave: coordinator/limits/subject_queue.py."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.coordinator.limits import subject_queue
from forebay.coordinator.limits.subject_queue import runs_of
from forebay.schemas.errors import Unavailable
from forebay.schemas.limits import Limit, Verdict
from support.eventually import until
from support.limiters import House, ServerTime
from support.shard_logs import Between
from support.workers import Cut

API = Limit(name="api", rate=10, burst=10)


class Held(Between):
    """The server has answered, and nobody here has heard it until ``go_on``."""

    def __init__(self, house: House) -> None:
        super().__init__(house.link)
        self.answered = anyio.Event()
        self.go_on = anyio.Event()
        self.then = self._hold

    async def _hold(self, _: object) -> None:
        self.answered.set()
        await self.go_on.wait()


@given(st.lists(st.tuples(st.sampled_from("tpr"), st.integers(1, 3), st.integers(1, 2))))
def test_runs_are_the_asks_in_order(drawn: list[tuple[str, int, int]]) -> None:
    """C1: neighbours that are equal make one run, and nothing changes places."""
    asks = [(None, mode, count, (cost,)) for mode, count, cost in drawn]
    runs = runs_of(asks)
    assert [ask for run in runs for ask in run.asks()] == asks
    for one, other in pairwise(runs):
        alike = one.whole and other.whole and one.mode == other.mode and one.costs == other.costs
        assert not alike


async def test_many_asks_share_few_scripts(house: House) -> None:
    """C1: a hundred tasks cost two scripts a round at most, and get exactly the burst."""
    time = ServerTime()
    cut = Cut(house.link)
    api = house.limiter(API, commands=cut, time=time).of("api")
    verdicts = await asyncio.gather(*[api.take("x") for _ in range(100)])
    assert [verdict.allowed for verdict in verdicts] == [True] * 10 + [False] * 90
    assert len(cut.calls) <= 3  # one may be NOSCRIPT
    assert {verdict.limit for verdict in verdicts} == {"api"}
    assert verdicts[-1].retry_after_ms == 100


async def test_asks_of_unequal_cost_are_served_in_their_order(house: House) -> None:
    """C1: as if each had been sent alone: what does not fit lets smaller ones pass."""
    time = ServerTime()
    api = house.limiter(API, time=time).of("api")
    verdicts = await asyncio.gather(*[api.take("x", cost) for cost in (4, 4, 4, 1, 1, 1)])
    assert [verdict.granted for verdict in verdicts] == [4, 4, 0, 1, 1, 0]


async def test_partial_takes_what_there_is(house: House) -> None:
    """All of it, some of it, nothing."""
    api = house.limiter(API, time=ServerTime()).of("api")
    verdicts = [await api.take("x", 6, partial=True) for _ in range(3)]
    assert [(v.allowed, v.granted) for v in verdicts] == [(True, 6), (True, 4), (False, 0)]


async def test_whoever_leaves_the_queue_is_not_charged(house: House) -> None:
    """C2: cancelled while an earlier script is under way."""
    held = Held(house)
    api = house.limiter(API, commands=held, time=ServerTime()).of("api")
    first = asyncio.create_task(api.take("x"))
    await held.answered.wait()
    second = asyncio.create_task(api.take("x", 5))
    await anyio.lowlevel.checkpoint()
    second.cancel()
    held.go_on.set()
    assert (await first).allowed
    assert (await api.peek("x")).remaining == 9
    assert second.cancelled()


async def test_a_refund_is_carried_out_though_its_caller_left(house: House) -> None:
    """C2: in the queue behind a script that is under way."""
    held = Held(house)
    api = house.limiter(API, commands=held, time=ServerTime()).of("api")
    first = asyncio.create_task(api.take("x", 8))
    await held.answered.wait()
    refund = asyncio.create_task(api.refund("x", 8))
    await anyio.lowlevel.checkpoint()
    refund.cancel()
    held.go_on.set()
    assert (await first).allowed
    assert (await api.peek("x")).remaining == 10
    assert refund.cancelled()


async def test_a_grant_whose_caller_left_goes_to_the_next(house: House) -> None:
    """C2: the ten that are left of thirteen get the ten."""
    held = Held(house)
    api = house.limiter(API, commands=held, time=ServerTime()).of("api")
    asks = [asyncio.create_task(api.take("x")) for _ in range(13)]
    await held.answered.wait()
    for ask in asks[:3]:
        ask.cancel()
    await anyio.lowlevel.checkpoint()
    held.go_on.set()
    verdicts = await asyncio.gather(*asks[3:])
    assert all(verdict.allowed for verdict in verdicts)
    assert (await api.peek("x")).remaining == 0


@pytest.mark.parametrize("amount, partial", [(4, False), (1, False), (4, True), (13, True)])
@pytest.mark.parametrize("answered_first", [False, True])
async def test_a_grant_that_nobody_wants_goes_back(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    amount: int,
    partial: bool,
    answered_first: bool,
) -> None:
    """C2, S3: cancelled before the answer is here, or in the moment between it and the caller."""
    held = Held(house)
    big = Limit(name="big", rate=1, burst=20)
    api = house.limiter(big, commands=held, time=ServerTime()).of("big")
    ask = asyncio.create_task(api.take("x", amount, partial=partial))
    await held.answered.wait()
    if answered_first:
        share = subject_queue.SubjectQueue._share

        def share_and_cancel(queue: subject_queue.SubjectQueue, *args: Any) -> None:
            share(queue, *args)
            ask.cancel()

        monkeypatch.setattr(subject_queue.SubjectQueue, "_share", share_and_cancel)
    else:
        ask.cancel()
        await anyio.lowlevel.checkpoint()
    held.go_on.set()
    await until(lambda: ask.done() and api.queue("x").idle)
    assert ask.cancelled()
    assert (await api.peek("x")).remaining == 20


@pytest.mark.parametrize("seed", range(4))
async def test_random_cancellations_lose_nothing(house: House, seed: int) -> None:
    """C2: after hundreds of callers came and left, what was charged is what was granted."""
    rng = random.Random(seed)
    api = house.limiter(Limit(name="api", rate=1, burst=1_000), time=ServerTime()).of("api")
    granted: list[Verdict] = []

    async def caller() -> None:
        await anyio.sleep(rng.random() * 0.01)
        granted.append(await api.take("x", rng.randint(1, 3), partial=rng.random() < 0.3))

    callers = [asyncio.create_task(caller()) for _ in range(400)]
    while not all(each.done() for each in callers):
        await anyio.sleep(rng.random() * 0.001)
        rng.choice(callers).cancel()
    await until(lambda: api.queue("x").idle)
    assert (await api.peek("x")).remaining == 1_000 - sum(each.granted for each in granted)
    assert any(each.cancelled() for each in callers)


async def test_a_full_queue_refuses_the_next(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4: the others are answered all the same."""
    monkeypatch.setattr(subject_queue, "ASKS_MAX", 3)
    api = house.limiter(API, time=ServerTime()).of("api")
    results = await asyncio.gather(*[api.take("x") for _ in range(4)], return_exceptions=True)
    assert isinstance(results[3], Unavailable)
    assert all(isinstance(each, Verdict) for each in results[:3])


async def test_who_waits_is_answered_when_the_limiter_closes(house: House) -> None:
    """C3: with Unavailable, and whoever comes later, too."""
    cut = Cut(house.link, at=1)
    limiter = house.limiter(API, commands=cut)
    api = limiter.of("api")
    async with anyio.create_task_group() as tasks:
        limiter.state._tasks = tasks
        asks = [asyncio.create_task(api.take("x"))]
        await cut.reached.wait()
        asks.append(asyncio.create_task(api.take("x")))
        await anyio.lowlevel.checkpoint()
        await limiter.aclose()
        tasks.cancel_scope.cancel()
    results = await asyncio.gather(*asks, return_exceptions=True)
    assert all(isinstance(each, Unavailable) for each in results)
    for subject in ("x", "y"):
        with pytest.raises(Unavailable):
            await api.take(subject)


async def test_peeks_that_share_a_script_do_not_count_each_other(house: House) -> None:
    """C1: a peek charges nothing, so each is told what it would be told alone."""
    api = house.limiter(API, time=ServerTime()).of("api")
    await api.take("x", 9)
    verdicts = await asyncio.gather(*[api.peek("x") for _ in range(5)])
    assert [verdict.allowed for verdict in verdicts] == [True] * 5
    assert not (await api.peek("x", 2)).allowed

"""Tokens fetched ahead: coordinator/limits/local_tokens.py."""

from __future__ import annotations

import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.coordinator.limits import limit_set
from forebay.coordinator.limits.limiter import Limiter
from forebay.coordinator.limits.local_tokens import LocalTokens
from forebay.schemas.limits import Limit
from support.eventually import until
from support.limiters import House, ServerTime
from support.shard_logs import Between

API = Limit(name="api", rate=1_000, burst=1_000, lease=True)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0, 2), st.booleans()), max_size=60),
    st.integers(0, 50),
)
def test_a_stock_never_holds_more_than_it_may(
    steps: list[tuple[int, float, bool]], most: int
) -> None:
    """T2: whatever the demand was, and whether or not all that was wanted came."""
    local_tokens, at = LocalTokens(1.0, 0.0), 0.0
    for cost, wait_s, all_of_it in steps:
        at += wait_s
        before = local_tokens.tokens
        assert local_tokens.spend(cost) == (cost <= before)
        wanted = local_tokens.wanted(at, most)
        local_tokens.put(wanted if all_of_it else wanted // 2, wanted, at + 1)
        assert 0 <= local_tokens.tokens <= max(most, before)
    assert local_tokens.take_all() >= 0
    assert local_tokens.tokens == 0


async def test_most_asks_need_no_round_trip(house: House) -> None:
    """T3: the demand is learned, and what is spent was charged before."""
    time = ServerTime()
    limiter = house.limiter(API, time=time)
    api = limiter.of("api")
    sources = []
    for _ in range(300):
        time.wait(0.001)
        sources.append((await api.take("x")).source)
        await anyio.lowlevel.checkpoint()
    assert sources.count("lease") > 200
    assert limiter.of("api").outstanding <= 500
    gauges = {name: value for name, _, value in limiter.gauges()}
    assert gauges == {"limiter_leased_tokens": api.outstanding}


async def test_members_share_the_bound(house: House) -> None:
    """T2: burst / (2 * members)."""
    time = ServerTime()
    api = house.limiter(API, time=time, members=lambda: 50).of("api")
    for _ in range(100):
        await api.take("x")
        await anyio.lowlevel.checkpoint()
        assert api.outstanding <= 10


async def test_what_is_not_spent_goes_back(house: House) -> None:
    """T3: after its time, and when the limiter closes."""
    time = ServerTime()
    limiter = house.limiter(Limit(name="api", rate=0.001, burst=1_000, lease=True), time=time)
    api = limiter.of("api")
    spent = 0
    for close in (False, True):
        await api.take("x", 9)
        spent += 9
        await until(lambda: api.queue("x")._busy is False)
        assert api.outstanding
        if close:
            await limiter.aclose()
            limiter.state.closed = False
        else:
            time.wait(1.001)
            assert api.return_tokens(time.monotonic())
            await until(lambda: api.queue("x").idle)
        assert not api.outstanding
        looker = house.limiter(Limit(name="api", rate=0.001, burst=1_000), time=time)
        assert (await looker.of("api").peek("x")).remaining == 1_000 - spent


async def test_only_a_limit_alone_is_leased(house: House) -> None:
    """Sets of limits and partial asks go to the server."""
    limiter = house.limiter(API, Limit(name="b", rate=5), time=ServerTime())
    assert [(await limiter.of("api", "b").take("x")).source for _ in range(3)] == ["server"] * 3
    await limiter.of("api").take("x")
    assert (await limiter.of("api").take("x", 2, partial=True)).source == "server"


@pytest.mark.parametrize("seed", range(6))
async def test_with_random_crashes_the_bound_holds(house: House, seed: int) -> None:
    """T1: members die with tokens in hand; no window admits more than what was exported."""
    rng, time = random.Random(seed), ServerTime()
    limit = Limit(name="api", rate=200, burst=100, lease=True)
    members: list[Limiter] = []
    grants: list[tuple[int, int]] = []
    held: list[int] = []

    def born() -> Limiter:
        return house.limiter(limit, time=time, members=lambda: 4)

    members = [born() for _ in range(4)]
    for _ in range(1_500):
        time.us += rng.randint(0, 4_000)
        at = rng.randrange(4)
        if rng.random() < 0.01:
            dead, members[at] = members[at], born()
            house.made.remove(dead)
        held.append(sum(member.of("api").outstanding for member in members))
        verdict = await members[at].of("api").take("x", rng.randint(1, 4))
        grants.append((time.us, verdict.granted))
        await anyio.lowlevel.checkpoint()
        assert held[-1] <= 50
    for first in range(0, len(grants), 7):
        total = 0
        for now_us, amount in grants[first:]:
            total += amount
            assert total <= 100 + 200 * (now_us - grants[first][0]) / 1e6 + held[first]
    assert sum(amount for _, amount in grants) > 300


async def test_tokens_that_come_when_leasing_is_over_go_back(house: House) -> None:
    """T3: fetched before the limit was changed, answered after it."""
    time, between = ServerTime(), Between(house.link)
    limiter = house.limiter(API, time=time, commands=between)
    api = limiter.of("api")

    async def change(_: object) -> None:
        between.then = None
        limiter.define([Limit(name="api", rate=1_000, burst=1_000)])

    between.then = change
    await api.take("x")
    await until(lambda: api.queue("x").idle)
    assert (await api.peek("x")).remaining == 999


async def test_subjects_with_tokens_in_hand_keep_nobody_out(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4, T3: the oldest gives its tokens back and is forgotten."""
    monkeypatch.setattr(limit_set, "SUBJECTS_MAX", 20)
    time = ServerTime()
    api = house.limiter(API, time=time).of("api")
    for n in range(60):
        assert (await api.take(f"s{n}")).allowed
    assert len(api._queues) == 20
    await until(lambda: all(queue.idle or queue.local_tokens for queue in api._queues.values()))
    looker = house.limiter(Limit(name="api", rate=1_000, burst=1_000), time=time).of("api")
    assert (await looker.peek("s0")).remaining == 999

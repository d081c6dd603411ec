"""Refusals from memory: coordinator/limits/denials.py, on a real server."""

from __future__ import annotations

import random

import anyio
import pytest

from forebay.schemas.limits import Limit, Verdict
from support.limiters import House, ServerTime
from support.shard_logs import Between

API = Limit(name="api", rate=10, burst=5)


async def test_a_refusal_is_repeated_without_the_server(house: House) -> None:
    """D1: until the wait is over, for no less; then the server is asked again."""
    time = ServerTime()
    api = house.limiter(API, time=time).of("api")
    await api.take("x", 5)
    refused = await api.take("x", 3)
    assert (refused.source, refused.retry_after_ms) == ("server", 300)
    time.wait(0.1)
    repeated = await api.take("x", 4)
    assert (repeated.allowed, repeated.source) == (False, "deny_cache")
    assert repeated.retry_after_ms == 200
    assert (await api.take("x", 1)).source == "server"
    time.wait(0.3)
    assert (await api.take("x", 3)).allowed


async def test_it_never_refuses_what_the_server_would_grant(house: House) -> None:
    """D1: thousands of asks, with refunds and changes: each is asked of a twin without memory."""
    time, rng = ServerTime(), random.Random(7)
    asked = house.limiter(API, time=time)
    server = house.limiter(API, time=time)
    server.doorbell_changed(live=False)
    api, twin = asked.of("api"), server.of("api")
    remembered = 0
    for step in range(3_000):
        time.us += rng.randint(0, 200_000)
        cost, partial = rng.randint(1, 5), rng.random() < 0.2
        would = await twin.peek("x", 1 if partial else cost)
        verdict = await api.take("x", cost, partial=partial)
        remembered += verdict.source == "deny_cache"
        assert verdict.allowed == would.allowed
        if rng.random() < 0.05:
            await api.refund("x", rng.randint(1, 5))
        if step % 500 == 499:
            changed = Limit(name="api", rate=rng.randint(5, 15), burst=rng.randint(5, 8))
            asked.define([changed])
            server.define([changed])
    assert remembered > 100


async def test_the_wall_clock_of_a_real_server_agrees(house: House) -> None:
    """D1: what is refused from memory, the server refuses if asked at once."""
    fast = Limit(name="api", rate=2_000, burst=3)
    asked, server = house.limiter(fast), house.limiter(fast)
    server.doorbell_changed(live=False)
    api, twin = asked.of("api"), server.of("api")
    remembered: list[Verdict] = []
    with anyio.fail_after(20):
        while len(remembered) < 50:
            verdict = await api.take("x", 3)
            if verdict.source == "deny_cache":
                assert verdict.retry_after_ms >= 1
                remembered.append(verdict)
                until = api.queue("x").denial.until
                would = await twin.peek("x", 3)
                assert not would.allowed or house.made[0].state.clock.monotonic() >= until


async def test_a_refund_elsewhere_is_heard(house: House) -> None:
    """D2: the word that the script publishes is what makes another process forget."""
    time = ServerTime()
    here, there = house.limiter(API, time=time), house.limiter(API, time=time)
    await here.of("api").take("x", 5)
    assert not (await here.of("api").take("x")).allowed
    await there.of("api").refund("x", 2)
    assert (await here.of("api").take("x")).source == "deny_cache"
    here.heard(house.names.bell.encode(), b"x")
    here.heard(house.names.limits.encode(), b"y")
    assert (await here.of("api").take("x")).source == "deny_cache"
    here.heard(house.names.limits.encode(), b"x")
    assert (await here.of("api").take("x")).allowed


async def test_a_refund_heard_while_a_refusal_is_under_way(house: House) -> None:
    """D2: the refusal is delivered, and not remembered."""
    time, between = ServerTime(), Between(house.link)
    here = house.limiter(API, time=time, commands=between)
    there = house.limiter(API, time=time)
    api = here.of("api")
    await api.take("x", 5)

    async def refund(_: object) -> None:
        between.then = None
        await there.of("api").refund("x", 2)
        here.heard(house.names.limits.encode(), b"x")

    between.then = refund
    assert not (await api.take("x")).allowed
    assert (await api.take("x")).allowed


async def test_deaf_it_remembers_nothing(house: House) -> None:
    """D2: while pub/sub is down every ask goes to the server."""
    limiter = house.limiter(API, time=ServerTime())
    api = limiter.of("api")
    await api.take("x", 5)
    await api.take("x")
    limiter.doorbell_changed(live=False)
    assert [(await api.take("x")).source for _ in range(2)] == ["server", "server"]


@pytest.mark.parametrize("more", [{}, {"rate": 20}])
async def test_a_changed_limit_forgets(house: House, more: dict[str, int]) -> None:
    """S1: only if it did change; and the arrival time is kept."""
    limiter = house.limiter(API, time=ServerTime())
    api = limiter.of("api")
    await api.take("x", 5)
    await api.take("x")
    assert limiter.define([Limit(**{"name": "api", "rate": 10, "burst": 5} | more)]) == (
        ["api"] if more else []
    )
    verdict = await api.take("x")
    assert verdict.source == ("server" if more else "deny_cache")
    assert verdict.retry_after_ms == (300 if more else 100)  # of 500 ms, 250 would fit now


async def test_a_refusal_from_before_it_could_hear_is_not_remembered(house: House) -> None:
    """D2: sent while deaf, a refund missed, and only then answered."""
    time, between = ServerTime(), Between(house.link)
    here = house.limiter(API, time=time, commands=between)
    there = house.limiter(API, time=time)
    api = here.of("api")
    await api.take("x", 5)
    here.doorbell_changed(live=False)

    async def refund(_: object) -> None:
        between.then = None
        await there.of("api").refund("x", 2)
        here.doorbell_changed(live=True)

    between.then = refund
    assert not (await api.take("x")).allowed
    assert (await api.take("x")).allowed

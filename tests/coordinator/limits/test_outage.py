"""Limits without their server: coordinator/limits/outage.py."""

from __future__ import annotations

import asyncio
import time as machine
from typing import Any

import pytest

from conftest import MakeServer
from forebay.coordinator.limits.limiter import Limiter
from forebay.coordinator.limits.outage import Outage, share_of
from forebay.schemas.errors import ServerRefused, Unavailable
from forebay.schemas.limits import Limit, terms_of
from support.limiters import House, ServerTime, house_of


class Away:
    """A server that refuses, or does not answer, while ``error`` says so."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.error: Exception | None = Unavailable("away")
        self.calls = 0

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return await self._house.link.call(*args)

    async def call_many(self, commands: Any, *, timeout_ms: int | None = None) -> Any:
        return await self._house.link.call_many(commands)


def limit(policy: Any, **more: Any) -> Limit:
    return Limit(**{"name": policy, "rate": 10, "burst": 10, "store_down": policy} | more)


def limiter_of(house: House, *limits: Limit, members: int = 1) -> tuple[Limiter, Away, ServerTime]:
    away, time = Away(house), ServerTime()
    made = house.limiter(*limits, commands=away, time=time, members=lambda: members)
    return made, away, time


@pytest.mark.parametrize("error", [Unavailable("away"), ServerRefused("OOM", "no memory")])
@pytest.mark.parametrize("policy, allowed", [("open", 20), ("closed", 0), ("local", 3)])
async def test_each_policy(house: House, policy: str, allowed: int, error: Exception) -> None:
    """O1: ten tokens for three members are three here."""
    made, away, _ = limiter_of(house, limit(policy), members=3)
    away.error = error
    verdicts = [await made.of(policy).take("x") for _ in range(20)]
    assert sum(verdict.allowed for verdict in verdicts) == allowed
    assert {verdict.source for verdict in verdicts} == {"local"}
    assert (verdicts[-1].retry_after_ms > 0) == (allowed < 20)


async def test_the_local_share_has_the_shares_rate(house: House) -> None:
    """O1: after the burst a third of the rate; a subject of its own has its own share."""
    made, _, time = limiter_of(house, limit("local"), members=3)
    api = made.of("local")
    assert (await api.take("x", 3)).allowed
    refused = await api.take("x")
    assert (refused.allowed, refused.retry_after_ms) == (False, 300)
    assert (await api.take("y")).allowed
    time.wait(0.3)
    assert (await api.take("x")).allowed
    assert share_of(made.limit("local"), 0) == terms_of(made.limit("local"))


async def test_one_that_is_closed_closes_the_set(house: House) -> None:
    """O3; and a shadow does not."""
    made, _, _ = limiter_of(house, limit("open"), limit("closed"), limit("local"))
    assert not (await made.of("open", "closed", "local").take("x")).allowed
    assert (await made.of("open", "local").take("x")).allowed
    shadow, _, _ = limiter_of(house, limit("open"), limit("closed", shadow=True))
    assert (await shadow.of("open", "closed").take("x")).allowed


async def test_all_modes_have_an_answer(house: House) -> None:
    """Nothing raises: peek looks, force charges, refund gives back, here."""
    made, _, _ = limiter_of(house, limit("local"))
    api = made.of("local")
    assert (await api.force("x", 10)).granted == 10
    assert not (await api.peek("x")).allowed
    await api.refund("x", 4)
    assert (await api.take("x", 9, partial=True)).granted == 4
    assert not (await api.take("x", 9, partial=True)).allowed


async def test_the_server_is_left_alone_for_a_while(house: House) -> None:
    """O2: one try in a quarter of a second; and the first success ends it."""
    made, away, time = limiter_of(house, limit("local"))
    api = made.of("local")
    for _ in range(10):
        await api.take("x", 1)
    assert away.calls == 1
    time.wait(0.3)
    await asyncio.gather(*[api.take("x") for _ in range(10)])
    assert away.calls == 2
    away.error = None
    time.wait(0.3)
    assert (await api.take("x")).source == "server"
    assert (await api.take("x")).source == "server"
    assert "none" in repr(made.state.outage)


def test_an_outage_lets_one_try_at_a_time() -> None:
    """O2."""
    time = ServerTime()
    outage = Outage(time, retry_s=1.0)
    assert not outage.blocks()
    outage.failed()
    assert outage.blocks()
    time.wait(1.0)
    assert [outage.blocks() for _ in range(3)] == [False, True, True]
    outage.over()
    assert not outage.blocks()


async def test_a_server_that_hangs_costs_the_budget_once(
    make_server: MakeServer, namespace: str
) -> None:
    """O2, on a real server that is stopped: decisions come in time, and it comes back."""
    server = make_server("valkey")
    async with house_of(server, namespace) as house:
        made = house.limiter(limit("local", rate=1_000, burst=1_000), budget_ms=50)
        api = made.of("local")
        assert (await api.take("x")).source == "server"
        server.sigstop()
        try:
            taken: list[float] = []
            for _ in range(40):
                started = machine.perf_counter()
                verdict = await api.take("x")
                taken.append(machine.perf_counter() - started)
                assert verdict.source == "local"
        finally:
            server.sigcont()
        assert sorted(taken)[30] < 0.025
        assert max(taken) < 2.0
        assert house.link.breaker.closed
        while (await api.take("x")).source != "server":
            await asyncio.sleep(0.02)


async def test_peeks_at_the_same_time_do_not_count_each_other(house: House) -> None:
    """O1, C1: one token is left here, and five look at it."""
    limiter, _, _ = limiter_of(house, limit("local"))
    api = limiter.of("local")
    await api.take("x", 9)
    verdicts = await asyncio.gather(*[api.peek("x") for _ in range(5)])
    assert [verdict.allowed for verdict in verdicts] == [True] * 5


@pytest.mark.parametrize(
    "spoil, source",
    [
        (("RPUSH", "x"), "local"),
        (("SET", "what is this"), "server"),
        (("SET", "9" * 5_000), "server"),
    ],
)
async def test_one_spoilt_state_is_no_outage(
    house: House, spoil: tuple[str, str], source: str
) -> None:
    """O2: the server has answered; only that subject is decided here. Text counts as no state."""
    api = house.limiter(limit("local")).of("local")
    await api.peek("other")
    command, value = spoil
    await house.link.call(command, house.names.limit("r", "local", "bad"), value)
    sources = [(await api.take(subject)).source for subject in ("bad", "good") * 3]
    assert sources == [source, "server"] * 3


async def test_an_open_limit_tells_nobody_that_nothing_is_left(house: House) -> None:
    """O1: of the limit that lets in, and no shadow beside it, all is left: nobody counts."""
    limiter, _, _ = limiter_of(house, limit("local", shadow=True), limit("open"))
    verdict = await limiter.of("local", "open").take("x", 10)
    assert (verdict.limit, verdict.remaining, verdict.allowed) == ("open", 10, True)

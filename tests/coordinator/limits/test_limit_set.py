"""Several limits as one, and many subjects: coordinator/limits/limit_set.py and limiter.py."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.coordinator.limits import limit_set
from forebay.coordinator.limits.denials import MEMORY_S
from forebay.schemas.errors import InvalidKey
from forebay.schemas.errors_limits import InvalidLimit
from forebay.schemas.limits import Limit
from support.limiters import House, ServerTime

A = Limit(name="a", rate=10, burst=10)
B = Limit(name="b", rate=1, burst=3)
DARK = Limit(name="dark", rate=1, burst=2, shadow=True)


async def test_all_of_them_grant_or_none_is_charged(house: House) -> None:
    """I1: the one that binds is named, and the others are as they were."""
    limiter = house.limiter(A, B, time=ServerTime())
    both = limiter.of("a", "b")
    for _ in range(3):
        assert (await both.take("x")).allowed
    before = [await house.state(name, "x") for name in "ab"]
    refused = await both.take("x")
    assert (refused.allowed, refused.limit, refused.retry_after_ms) == (False, "b", 1_000)
    assert [await house.state(name, "x") for name in "ab"] == before
    assert (await limiter.of("a").take("x")).remaining == 6


async def test_each_limit_may_have_its_own_cost(house: House) -> None:
    """By name, for all of them."""
    limiter = house.limiter(A, B, time=ServerTime())
    both = limiter.of("a", "b")
    assert (await both.take("x", {"a": 8, "b": 1})).granted == 8
    refused = await both.take("x", {"a": 3, "b": 1})
    assert (refused.limit, refused.retry_after_ms) == ("a", 100)
    for cost in ({"a": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 11, "b": 1}, {"a": 1, "b": 0}):
        with pytest.raises(InvalidLimit):
            await both.take("x", cost)
    with pytest.raises(InvalidLimit):
        await both.take("x", {"a": 1, "b": 1}, partial=True)


async def test_a_shadow_refuses_nothing(house: House) -> None:
    """I3: not even what costs more than it could ever grant; it counts what it would refuse."""
    limiter = house.limiter(A, DARK, time=ServerTime())
    both, dark = limiter.of("a", "dark"), limiter.of("dark")
    verdicts = [await both.take("x", cost) for cost in (1, 1, 1, 5)]
    assert all(verdict.allowed and verdict.limit == "a" for verdict in verdicts)
    assert all([(await dark.take("x", 7)).allowed for _ in range(3)])
    assert limiter._counts["limiter_shadow_refused", "dark"] == 2 + 3
    assert not limiter.of("a", "dark").denied_locally


@pytest.mark.parametrize("cost", [0, -1, 4, 1.0, True, "1", None])
async def test_a_cost_that_makes_no_sense_changes_nothing(house: House, cost: Any) -> None:
    """Typed, and before anything is sent."""
    api = house.limiter(B, time=ServerTime()).of("b")
    for ask in (api.take, api.peek, api.force, api.refund):
        with pytest.raises(InvalidLimit):
            await ask("x", cost)
    assert await house.state("b", "x") is None


async def test_subjects_within_another_share_its_shard(house: House) -> None:
    """And are not the subject of the same name elsewhere."""
    api = house.limiter(B, time=ServerTime()).of("b")
    names = house.names
    inside = next(f"s{n}" for n in range(100) if names.shard(f"s{n}") != names.shard("team"))
    await api.take(inside, 3, within="team")
    assert not (await api.take(inside, within="team")).allowed
    assert (await api.take(inside)).allowed
    key = names.limit("r", "b", inside, "team")
    assert key.startswith(names.prefixes[names.shard("team")])
    assert await house.link.call("EXISTS", key) == 1
    await api.refund(inside, 1, within="team")
    assert (await api.take(inside, within="team")).allowed


async def test_idle_subjects_are_forgotten_first(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4: the state is the server's, so nobody gets a token by being forgotten."""
    monkeypatch.setattr(limit_set, "SUBJECTS_MAX", 5)
    api = house.limiter(B, time=ServerTime()).of("b")
    await api.take("first", 3)
    for n in range(20):
        await api.take(f"s{n}")
        assert len(api._queues) <= 5
    assert (await api.take("first")).source == "server"
    assert not (await api.take("first")).allowed


async def test_bad_subjects_make_no_queue(house: House) -> None:
    """InvalidKey, whatever is wrong with it."""
    api = house.limiter(B).of("b")
    for subject in ("", "{x}", "a\x00", "a" * 513, "a b"):
        with pytest.raises(InvalidKey):
            await api.take(subject)
    assert not api._queues


async def test_a_long_refusal_is_looked_at_again(house: House) -> None:
    """Whatever the server forgot meanwhile: a minute later it is asked."""
    time = ServerTime()
    api = house.limiter(Limit(name="b", rate=1, per=86_400, burst=1), time=time).of("b")
    await api.take("x")
    assert (await api.take("x")).retry_after_ms == 86_400_000
    await house.link.call("DEL", house.names.limit("r", "b", "x"))
    time.wait(MEMORY_S / 2)
    remembered = await api.take("x")
    assert (remembered.source, remembered.retry_after_ms) == ("deny_cache", 86_370_000)
    time.wait(MEMORY_S / 2)
    assert (await api.take("x")).allowed


async def test_a_limit_that_is_leased_no_longer_gives_back(house: House) -> None:
    """S1: what was fetched is not lost, and the server decides again."""
    time = ServerTime()
    leased = Limit(name="b", rate=0.001, burst=100, lease=True)
    limiter = house.limiter(leased, time=time)
    api = limiter.of("b")
    await api.take("x")
    await api.peek("x")
    assert api.outstanding
    limiter.define([Limit(name="b", rate=0.001, burst=100)])
    assert (await api.take("x")).source == "server"
    assert (await api.peek("x")).remaining == 98
    assert not api.outstanding


async def test_sets_are_of_known_limits_each_once(house: House) -> None:
    """F2; and the error says which are known."""
    limiter = house.limiter(A, B)
    assert limiter.of("a", "b") is limiter.of("a", "b")
    for names in ((), ("a", "a"), ("c",)):
        with pytest.raises(InvalidLimit):
            limiter.of(*names)
    with pytest.raises(InvalidLimit, match="known are: a, b"):
        limiter.limit("c")


async def test_refusals_from_memory_are_counted_of_the_limit_that_refused(house: House) -> None:
    """However many sets it is in."""
    limiter = house.limiter(A, B, time=ServerTime())
    alone, both = limiter.of("a"), limiter.of("a", "b")
    await alone.take("x", 10)
    await both.take("y", 3)
    for _ in range(3):
        await alone.take("x")
        await both.take("y")
    list(limiter.gauges())
    counts = limiter._counts
    assert counts["limiter_decisions", "a", "deny_cache", "refused"] == 2
    assert counts["limiter_decisions", "b", "deny_cache", "refused"] == 2

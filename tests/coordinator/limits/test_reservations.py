"""Estimates that are settled later: coordinator/limits/reservations.py."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from forebay.schemas.errors import InvalidKey, Unavailable
from forebay.schemas.errors_limits import InvalidLimit, RateLimited, UnknownReservation
from forebay.schemas.limits import Limit
from support.eventually import until
from support.limiters import House, ServerTime
from support.workers import Cut

REQUESTS = Limit(name="requests", rate=1, burst=10)
TOKENS = Limit(name="tokens", rate=1, burst=1_000)


@pytest.mark.parametrize("actual, left", [(0, 1_000), (50, 950), (100, 900), (400, 600)])
async def test_the_difference_is_charged_or_given_back(
    house: House, actual: int, left: int
) -> None:
    """R1, on each limit of a set, once."""
    limiter = house.limiter(REQUESTS, TOKENS, time=ServerTime())
    both, book = limiter.of("requests", "tokens"), limiter.reservations
    made = await book.reserve(both, "x", {"requests": 1, "tokens": 100}, ttl_s=10)
    for again in (False, True):
        cost = {"requests": 1, "tokens": actual}
        if again:
            with pytest.raises(UnknownReservation) as caught:
                await book.settle(both, "x", made.id, cost)
            assert caught.value.reservation == made.id
        else:
            await book.settle(both, "x", made.id, cost)
        assert (await limiter.of("tokens").peek("x")).remaining == left
        assert (await limiter.of("requests").peek("x")).remaining == 9


async def test_more_than_there_is_makes_a_debt(house: House) -> None:
    """R1: the next one waits for it."""
    limiter = house.limiter(REQUESTS, time=ServerTime())
    one, book = limiter.of("requests"), limiter.reservations
    made = await book.reserve(one, "x", 1, ttl_s=10)
    await book.settle(one, "x", made.id, 15)
    assert (await one.peek("x")).retry_after_ms == 6_000


async def test_one_that_is_forgotten_costs_its_estimate(house: House) -> None:
    """R2: after its time there is nothing to settle, and nothing is changed."""
    limiter = house.limiter(REQUESTS, time=ServerTime())
    one, book = limiter.of("requests"), limiter.reservations
    made = await book.reserve(one, "x", 4, ttl_s=1)
    (key,) = await house.link.call("KEYS", f"*:rr:*{made.id}")
    assert 0 < await house.link.call("PTTL", key) <= 1_000
    await house.link.call("DEL", key)
    with pytest.raises(UnknownReservation):
        await book.settle(one, "x", made.id, 0)
    assert (await one.peek("x")).remaining == 6


async def test_what_is_refused_reserves_nothing(house: House) -> None:
    """RateLimited tells when to come back."""
    limiter = house.limiter(REQUESTS, time=ServerTime())
    one = limiter.of("requests")
    await one.take("x", 8)
    with pytest.raises(RateLimited) as caught:
        await limiter.reservations.reserve(one, "x", 4, ttl_s=10)
    assert (caught.value.limit, caught.value.retry_after_ms) == ("requests", 2_000)
    assert await house.link.call("KEYS", "*:rr:*requests:x*" + house.names.namespace) == []
    assert (await one.peek("x")).remaining == 2


@pytest.mark.parametrize("at", [1, 2, 3])
async def test_cancelled_while_reserving_charges_nothing(house: House, at: int) -> None:
    """At the take or at the note of it: in the end the bucket is full."""
    await house.limiter(REQUESTS).of("requests").peek("x")  # the script is known now
    cut = Cut(house.link, at=at, answered=True)
    limiter = house.limiter(REQUESTS, commands=cut, time=ServerTime(), budget_ms=200)
    one = limiter.of("requests")
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def reserve() -> None:
                await limiter.reservations.reserve(one, "x", 4, ttl_s=10)

            tasks.start_soon(reserve)
            with anyio.move_on_after(0.1):
                await cut.reached.wait()
            scope.cancel()
    await until(lambda: one.queue("x").idle)
    looker = house.limiter(REQUESTS, time=ServerTime()).of("requests")
    # A reply that was lost is a charge that stays, as for every ask.
    assert (await looker.peek("x")).remaining == {1: 6, 2: 10, 3: 6}[at]


@pytest.mark.parametrize(
    "cost, ttl_s, actual, error",
    [
        (0, 10, 0, InvalidLimit),
        (11, 10, 0, InvalidLimit),
        (1, 0.5, 0, InvalidLimit),
        (1, float("nan"), 0, InvalidLimit),
        (1, 10, -1, InvalidLimit),
        (1, 10, 1.5, InvalidLimit),
        (1, 10, {"other": 1}, InvalidLimit),
    ],
)
async def test_bad_numbers_change_nothing(
    house: House, cost: int, ttl_s: float, actual: Any, error: type[Exception]
) -> None:
    """Typed errors that name the field."""
    limiter = house.limiter(REQUESTS, time=ServerTime())
    one, book = limiter.of("requests"), limiter.reservations
    with pytest.raises(error):
        made = await book.reserve(one, "x", cost, ttl_s=ttl_s)
        await book.settle(one, "x", made.id, actual)
    assert (await one.peek("x")).remaining in (9, 10)


@pytest.mark.parametrize("id", ["z" * 32, "a" * 31, "}{" * 16, "a" * 32])
async def test_an_id_from_a_stranger_is_unknown(house: House, id: str) -> None:
    """Whatever it looks like, and no name is made of it that the grammar forbids."""
    limiter = house.limiter(REQUESTS, time=ServerTime())
    with pytest.raises(UnknownReservation):
        await limiter.reservations.settle(limiter.of("requests"), "x", id, 1)


async def test_bad_subjects_are_refused(house: House) -> None:
    """Empty, too long, with braces or control bytes."""
    limiter = house.limiter(REQUESTS)
    for subject in ("", "a" * 513, "{x}", "a\nb", "a b"):
        with pytest.raises(InvalidKey):
            await limiter.of("requests").take(subject)
        with pytest.raises(InvalidKey):
            await limiter.of("requests").take("x", within=subject or "{")


async def test_without_the_server_there_is_nothing_to_settle(house: House) -> None:
    """R3: the policy decided, and settling is no error."""

    class Away:
        async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
            raise Unavailable("away")

        call_many = call

    limiter = house.limiter(REQUESTS, commands=Away())
    made = await limiter.reservations.reserve(limiter.of("requests"), "x", 1, ttl_s=10)
    assert (made.id, made.verdict.source) == ("", "local")
    await limiter.reservations.settle(limiter.of("requests"), "x", made.id, 1)

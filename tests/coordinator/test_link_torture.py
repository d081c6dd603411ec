"""Random cancellation on one link, and the proof that the checker would see a fault."""

from __future__ import annotations

import random
from dataclasses import dataclass

import anyio
import pytest
from anyio.lowlevel import checkpoint

from forebay.coordinator.valkey.dialer import Dialed
from forebay.coordinator.valkey.link import Link
from forebay.coordinator.valkey.wire import CommandWire
from forebay.schemas.errors import Unavailable
from support.links import link_to, running
from support.valkey_server import ValkeyServer

KEYS = 500


@pytest.fixture(params=[False, True], ids=["plain", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both loops: their transports differ in when they report what."""
    return "asyncio", {"use_uvloop": request.param}


@dataclass
class Outcome:
    right: int = 0
    wrong: int = 0
    cancelled: int = 0
    failed: int = 0


def expected(namespace: str, index: int) -> bytes:
    """A value that tells its key, of any length up to some packets."""
    return f"{namespace}:{index}|".encode() * (1 + index % 7 * 40)


async def one_call(link: Link, namespace: str, rng: random.Random, outcome: Outcome) -> None:
    index = rng.randrange(KEYS)
    key = f"{namespace}:{index}"
    if rng.random() < 0.1:
        others = [rng.randrange(KEYS) for _ in range(3)]
        got = await link.call_many([("GET", f"{namespace}:{other}") for other in others])
        right = got == [expected(namespace, other) for other in others]
    else:
        right = await link.call("GET", key) == expected(namespace, index)
    outcome.right += right
    outcome.wrong += not right


async def worker(link: Link, namespace: str, calls: int, seed: int, outcome: Outcome) -> None:
    rng = random.Random(seed)
    for _ in range(calls):
        with anyio.CancelScope() as scope:
            match rng.randrange(4):
                case 0:
                    scope.deadline = anyio.current_time() + rng.uniform(0, 0.002)
                case 1 if rng.random() < 0.2:
                    scope.cancel()
            try:
                await one_call(link, namespace, rng, outcome)
            except Unavailable:
                outcome.failed += 1
        outcome.cancelled += scope.cancelled_caught
        if rng.random() < 0.01:
            await checkpoint()


async def torture(link: Link, namespace: str, *, tasks: int, calls: int) -> Outcome:
    outcome = Outcome()
    await link.call_many(
        [("SET", f"{namespace}:{index}", expected(namespace, index)) for index in range(KEYS)]
    )
    async with anyio.create_task_group() as group:
        for seed in range(tasks):
            group.start_soon(worker, link, namespace, calls // tasks, seed, outcome)
    return outcome


async def test_random_cancellation_mixes_up_nothing(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """I1: 50 tasks, 30,000 calls, a quarter of them with a deadline of 0 to 2 ms:
    no wrong reply, no reconnect, no waiter left over."""
    link = link_to(valkey_server.url, command_timeout_ms=20_000)
    async with running(link):
        outcome = await torture(link, namespace, tasks=50, calls=30_000)
        assert await link.call("PING") == b"PONG"
        statistics = link.statistics()
    assert outcome.wrong == 0
    assert outcome.failed == 0
    assert outcome.right + outcome.cancelled == 30_000
    assert outcome.cancelled > 500
    assert statistics.dropped_replies > 500
    assert (statistics.connects, statistics.in_flight) == (1, 0)
    assert statistics.calls == statistics.replies


class Forgetful(CommandWire):
    """The fault: whoever gave up leaves the queue, and its reply goes to the next in line."""

    def take_replies(self) -> None:
        while self.waiting and self.waiting[0][0].done():
            self.waiting.popleft()
        super().take_replies()


class BrokenLink(Link):
    def _attached(self, dialed: Dialed) -> CommandWire:
        return Forgetful(
            dialed,
            clock=self._clock,
            tally=self._tally,
            on_replies=self._answered,
            on_change=self._route,
        )


async def test_the_checker_sees_a_link_that_mixes_up_replies(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """Negative control: a link that forgets those who gave up is caught."""
    link = link_to(
        valkey_server.url, kind=BrokenLink, command_timeout_ms=300, breaker_failures=1_000
    )
    async with running(link):
        outcome = await torture(link, namespace, tasks=20, calls=2_000)
    assert outcome.wrong > 0

"""Answering those who ask, and not being made to flood anybody."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from forebay.coordinator.background import BackgroundTasks, background_tasks
from forebay.coordinator.instruments import Instruments
from forebay.nodes.explain.answers import ANSWERS_MAX, PER_SECOND_MAX, Answers, request_of
from forebay.nodes.explain.document import NearState
from forebay.schemas.errors import Disconnected
from forebay.schemas.keys import Names

NAMES = Names("shop", 4)
CHANNEL = NAMES.reply("0123456789abcdef")


class Hand:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at


class Published:
    """Commands that keep what is published, and hold it back while told so."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, NearState]] = []
        self.error: Exception | None = None
        self.gate = anyio.Event()
        self.gate.set()

    async def call(self, *args: Any, timeout_ms: int | None = None) -> int:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        _, channel, answer = args
        self.messages.append((channel, msgspec.json.decode(answer, type=NearState)))
        return 1


class Desk:
    def __init__(self, tasks: BackgroundTasks) -> None:
        self.clock, self.published = Hand(), Published()
        self.instruments = Instruments(CollectorRegistry())
        self.answers = Answers(
            self.published,  # type: ignore[arg-type]
            NAMES,
            lambda key: NearState(node="a", state="absent", cache=key),
            tasks=tasks,
            clock=self.clock,
            instruments=self.instruments,
        )

    async def ask(self, text: bytes | str, times: int = 1) -> int:
        """How many answers came."""
        before = len(self.published.messages)
        for _ in range(times):
            raw = text if isinstance(text, bytes) else text.encode()
            self.answers.asked(raw.removeprefix(b"x "))
        await anyio.wait_all_tasks_blocked()
        return len(self.published.messages) - before


async def test_a_request_is_answered_where_it_says() -> None:
    """W1: what the node knows of that key goes to the reply channel."""
    async with background_tasks() as tasks:
        desk = Desk(tasks)
        assert await desk.ask(request_of(CHANNEL, "product:42")) == 1

    assert desk.published.messages == [
        (CHANNEL.encode(), NearState(node="a", state="absent", cache="product:42"))
    ]


@pytest.mark.parametrize(
    "request_text",
    [
        b"x",
        b"x forebay:shop:bell product:42",
        b"x forebay:shop:reply: product:42",
        b"x forebay:shop:reply:0123 product:42",
        b"x forebay:shop:reply:0123456789ABCDEF product:42",
        b"x forebay:other:reply:0123456789abcdef product:42",
        b"x forebay:shop:reply:0123456789abcdef\nx product:42",
        f"x {CHANNEL}".encode(),
        f"x {CHANNEL} two words".encode(),
        f"x {CHANNEL} ".encode() + b"\xff",
        f"x {CHANNEL} ".encode() + b"k" * 513,
    ],
)
async def test_odd_requests_are_left_alone(request_text: bytes) -> None:
    """W2: only a reply channel of this namespace, and a key, get an answer."""
    async with background_tasks() as tasks:
        assert await Desk(tasks).ask(request_text) == 0


async def test_answers_under_way_are_bounded() -> None:
    """W3: while the server is slow, further requests are counted and left out."""
    async with background_tasks() as tasks:
        desk = Desk(tasks)
        desk.published.gate = anyio.Event()
        await desk.ask(request_of(CHANNEL, "a"), times=ANSWERS_MAX + 3)
        desk.published.gate.set()
        await anyio.wait_all_tasks_blocked()
        assert len(desk.published.messages) == ANSWERS_MAX
        assert desk.instruments.counts["limit_reached", "explain_answers"] == 3
        assert await desk.ask(request_of(CHANNEL, "a")) == 1


async def test_answers_in_a_second_are_bounded() -> None:
    """W3: a flood of requests makes no flood of answers, and the next second begins anew."""
    async with background_tasks() as tasks:
        desk = Desk(tasks)
        answered = [await desk.ask(request_of(CHANNEL, "a")) for _ in range(PER_SECOND_MAX + 5)]
        assert sum(answered) == PER_SECOND_MAX
        desk.clock.at += 1.0
        assert await desk.ask(request_of(CHANNEL, "a")) == 1


async def test_a_server_that_is_away_costs_the_answer_only() -> None:
    """The node goes on, and the place of the answer is free again."""
    async with background_tasks() as tasks:
        desk = Desk(tasks)
        desk.published.error = Disconnected("gone")
        assert await desk.ask(request_of(CHANNEL, "a"), times=ANSWERS_MAX) == 0
        desk.published.error = None
        assert await desk.ask(request_of(CHANNEL, "a")) == 1

"""Answering those who ask all nodes what they know of a key.

    x <reply channel> <key>      on the channel for new jobs

W1  The answer is one JSON document, published on the reply channel; it holds no value.
W2  A request is answered only if its channel is a reply channel of this namespace with a random
    part, and its key one that the grammar allows: nothing else can be made to be told.
W3  At most ``ANSWERS_MAX`` answers are under way, and ``PER_SECOND_MAX`` begin within a second;
    further ones are counted and left out.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog

from ...coordinator.background import BackgroundTasks
from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...coordinator.valkey.link import Commands
from ...schemas.errors import ForebayError, InvalidKey, Unavailable
from ...schemas.keys import Names, check_key
from .document import NearState

__all__ = ["ANSWERS_MAX", "PER_SECOND_MAX", "Answers", "request_of"]

log = structlog.get_logger(__name__)

ANSWERS_MAX = 8
PER_SECOND_MAX = 50


def request_of(channel: str, key: str) -> str:
    """What is published to ask."""
    return f"x {channel} {key}"


class Answers:
    """``look(key)`` reads what this node knows."""

    def __init__(
        self,
        commands: Commands,
        names: Names,
        look: Callable[[str], NearState],
        *,
        tasks: BackgroundTasks,
        clock: Clock,
        instruments: Instruments,
    ) -> None:
        self._commands = commands
        self._names = names
        self._look = look
        self._tasks = tasks
        self._monotonic = clock.monotonic
        self._counts = instruments.counts
        self._under_way = 0
        self._second_began = float("-inf")
        self._begun = 0

    def __repr__(self) -> str:
        return f"<Answers: {self._under_way} under way>"

    def asked(self, request: bytes) -> None:
        """A request came, less the ``x``; it is answered soon, or not at all."""
        channel, _, raw_key = request.partition(b" ")
        try:
            key = check_key(raw_key.decode())
        except (InvalidKey, UnicodeDecodeError):
            return
        if not self._names.is_reply(channel):
            return
        if not self._may_begin():
            self._counts["limit_reached", "explain_answers"] += 1
            return
        try:
            self._tasks.start_soon(self._answer, channel, key)
        except Unavailable:  # the node is stopped
            return
        self._under_way += 1

    def _may_begin(self) -> bool:
        now = self._monotonic()
        if now - self._second_began >= 1.0:
            self._second_began, self._begun = now, 0
        if self._under_way >= ANSWERS_MAX or self._begun >= PER_SECOND_MAX:
            return False
        self._begun += 1
        return True

    async def _answer(self, channel: bytes, key: str) -> None:
        try:
            answer = msgspec.json.encode(self._look(key))
            await self._commands.call("PUBLISH", channel, answer)
        except ForebayError as error:
            log.debug("answer.failed", error=str(error))
        finally:
            self._under_way -= 1

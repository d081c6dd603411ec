"""Asking all nodes that run what they know of a key.

K1  We listen before we ask; PUBLISH says how many heard it, and so many answers are waited for,
    at most ``WAIT_S``.
K2  An answer that is too large, or no answer at all, is left out, and counts as silence; there
    are never more answers than nodes that were asked.
K3  However it ends, also by cancellation, the channel is given up.
"""

from __future__ import annotations

from contextlib import ExitStack

import anyio
import msgspec

from ...coordinator.valkey.backend import AnyPubSub
from ...coordinator.valkey.link import Commands
from ...schemas.errors import ForebayError
from ...schemas.keys import Names
from .answers import request_of
from .document import NearState, NodesState

__all__ = ["ANSWER_BYTES_MAX", "WAIT_S", "ask"]

WAIT_S = 1.0
ANSWER_BYTES_MAX = 65_536
_ANSWERS_MAX = 1_000
_decoder = msgspec.json.Decoder(NearState)


class _Answers:
    def __init__(self, channel: bytes) -> None:
        self._channel = channel
        self._event = anyio.Event()
        self._expected: int | None = None
        self.found: dict[str, NearState] = {}

    def take(self, channel: bytes, payload: bytes) -> None:
        if channel != self._channel or len(payload) > ANSWER_BYTES_MAX:
            return
        try:
            answer = _decoder.decode(payload)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return
        if len(self.found) < _ANSWERS_MAX:
            self.found[answer.node] = answer
        self._look()

    async def all_of(self, expected: int) -> None:
        self._expected = min(expected, _ANSWERS_MAX)
        self._look()
        await self._event.wait()

    def _look(self) -> None:
        if self._expected is not None and len(self.found) >= self._expected:
            self._event.set()


async def ask(
    commands: Commands,
    pubsub: AnyPubSub,
    names: Names,
    key: str,
    *,
    nonce: str,
    wait_s: float = WAIT_S,
) -> NodesState:
    """What the nodes say; ``nonce`` is random, in hexadecimal digits.

    Raises:
        Unavailable: Valkey did not answer.
    """
    channel = names.reply(nonce)
    answers = _Answers(channel.encode())
    with ExitStack() as stack:
        stack.callback(pubsub.on_message(answers.take))
        stack.callback(pubsub.unsubscribe, channel.encode())
        pubsub.subscribe(channel.encode())
        if why := await _deaf(pubsub, wait_s):
            return NodesState(unasked=why)
        asked = int(await commands.call("PUBLISH", names.work, request_of(channel, key)))
        with anyio.move_on_after(wait_s):
            await answers.all_of(asked)
    found = sorted(answers.found.values(), key=lambda each: each.node)[:asked]
    return NodesState(answers=tuple(found), silent=asked - len(found))


async def _deaf(pubsub: AnyPubSub, wait_s: float) -> str:
    """Why no answer would be heard, or nothing."""
    with anyio.move_on_after(wait_s):
        try:
            await pubsub.ready()
        except ForebayError as error:
            return str(error)
        return ""
    return f"the subscription was not confirmed within {wait_s:g} s"

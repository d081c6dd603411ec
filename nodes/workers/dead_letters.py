"""Dead letters: what can never be applied, kept with the reason and the original bytes.

They stand in a stream beside the one they came from, with the fields ``reason``,
``problem``, ``field``, ``fix``, ``from`` (the id it had), ``event`` (the bytes as they came).

D1  ``bury`` returns when the server has all of them; else it raises, and nothing may be
    taken as done.
D2  A crash between burying and the checkpoint buries again: of several with the same
    ``from`` one is meant.
D3  About the newest ``entries_max`` are kept in each stream; what is dropped is counted.
D4  They are kept also when the server's memory is full: the original entry is deleted after.
D5  A stream that has given its last id is set aside as ``<name>:before``, and an error is logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from msgspec import Struct

from ...coordinator.instruments import Instruments
from ...coordinator.valkey.link import Arg, Commands
from ...coordinator.valkey.scripting import Call, Scripts, run_many
from ...schemas.errors import ForebayError, InvalidEvent, ServerRefused
from ...schemas.keys import Names
from ...schemas.replies import integer

__all__ = ["DeadLetter", "DeadLetters"]

log = structlog.get_logger(__name__)

_TOGETHER = 64
_LOGGED_MAX = 10
_TEXT_MAX = 1_000


class DeadLetter(Struct, frozen=True):
    entry_id: str
    raw: bytes
    error: InvalidEvent


class DeadLetters:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        instruments: Instruments,
        *,
        entries_max: int,
    ) -> None:
        self._commands = commands
        self._names = names
        self._append = scripts["stream_append"]
        self._instruments = instruments
        self._entries_max = entries_max
        self.buried = 0

    async def bury(self, shard: int, letters: Sequence[DeadLetter]) -> None:
        """Keep these; EVENTS for those of the ingress stream.

        Raises:
            Unavailable, ServerRefused: some are not kept, or it is unknown.
        """
        name = self._names.part(shard, "dead")
        for start in range(0, len(letters), _TOGETHER):
            await self._keep(name, letters[start : start + _TOGETHER])
        for letter in letters[:_LOGGED_MAX]:
            log.warning(
                "event.dead_lettered",
                reason=letter.error.fault,
                problem=letter.error.problem[:300],
                field=letter.error.field,
                entry=letter.entry_id,
                stream=name,
            )
        if len(letters) > _LOGGED_MAX:
            log.warning("event.dead_lettered", more=len(letters) - _LOGGED_MAX, stream=name)

    async def _keep(self, name: str, letters: Sequence[DeadLetter]) -> None:
        bound = self._entries_max
        calls = [
            Call(script=self._append, keys=[name], args=["*", bound, *_fields(each)])
            for each in letters
        ]
        dropped = 0
        for letter, reply in zip(letters, await run_many(self._commands, calls), strict=True):
            if isinstance(reply, ServerRefused) and "exhausted" in str(reply):
                await self._set_aside(name)
            if isinstance(reply, ForebayError):
                raise reply
            self.buried += 1
            self._instruments.counts["dead_letters", letter.error.fault] += 1
            dropped += integer(reply[1], "the dead letters dropped")
        if dropped:
            self._instruments.counts["limit_reached", "dead_letters"] += dropped
            log.error("dead_letters.dropped", count=dropped, stream=name)

    async def _set_aside(self, name: str) -> None:
        """Start the stream over: it has the largest possible id, and takes no further entry."""
        log.error("dead_letters.set_aside", stream=name, kept_in=f"{name}:before")
        await self._commands.call("RENAME", name, f"{name}:before")


def _fields(letter: DeadLetter) -> list[Arg]:
    error = letter.error
    return [
        "reason", error.fault, "problem", error.problem[:_TEXT_MAX],
        "field", error.field[:_TEXT_MAX], "fix", error.fix,
        "from", letter.entry_id, "event", letter.raw,
    ]  # fmt: skip

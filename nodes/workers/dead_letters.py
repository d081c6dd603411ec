"""Dead letters: what can never be applied, kept with the reason and the original bytes.

They stand in a stream beside the one they came from, with the fields ``reason``,
``problem``, ``field``, ``from`` (the id it had), ``event`` (the bytes as they came). The
newest ``entries_max`` are kept; what is dropped for that is counted.
"""

from __future__ import annotations

import structlog

from ...coordinator.instruments import Instruments
from ...coordinator.link import Commands
from ...schemas.errors import InvalidEvent
from ...schemas.keys import Names

__all__ = ["DeadLetters"]

log = structlog.get_logger(__name__)


class DeadLetters:
    def __init__(
        self, commands: Commands, names: Names, instruments: Instruments, *, entries_max: int
    ) -> None:
        self._commands = commands
        self._names = names
        self._instruments = instruments
        self._entries_max = entries_max
        self.buried = 0

    async def bury(self, shard: int, entry_id: str, raw: bytes, error: InvalidEvent) -> None:
        """Keep one; returns when the server has it."""
        name = self._names.part(shard, "dead")
        await self._commands.call(
            "XADD", name, "MAXLEN", "~", self._entries_max, "*",
            "reason", error.fault, "problem", error.problem, "field", error.field,
            "fix", error.fix, "from", entry_id, "event", raw,
        )  # fmt: skip
        self.buried += 1
        self._instruments.counts["dead_letters", error.fault] += 1
        log.warning(
            "event.dead_lettered",
            reason=error.fault,
            problem=error.problem[:300],
            field=error.field,
            entry=entry_id,
            stream=name,
        )

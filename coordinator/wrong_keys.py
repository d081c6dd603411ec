"""Keys of an unexpected type, found when the server refuses a script.

K1  A refusal for a wrong type names no key: the types of the script's keys, at most ``_ASKED_MAX``,
    are queried, and the error names the keys of another type.
K2  The last ``_KEPT_MAX`` of them are kept for health, checked every ``_EVERY_S``, and removed when
    they have the right type or no longer exist.
K3  Each is logged when it is found, every minute while it stays, and when it is repaired.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import structlog

from ..schemas.errors import ForebayError, ServerRefused
from ..schemas.keys import type_of
from .clock import Clock, SystemClock
from .log_once import LogOnce
from .valkey.link import Commands

__all__ = ["WrongKeys", "wrong_types"]

log = structlog.get_logger(__name__)

_ASKED_MAX = 1_000
_KEPT_MAX = 100
_EVERY_S = 0.5
_GONE = "none"


class WrongKeys(dict[str, LogOnce]):
    """Those that are known, by name."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self._clock = clock or SystemClock()

    async def name(
        self, commands: Commands, refused: ServerRefused, keys: Sequence[str | bytes]
    ) -> ServerRefused:
        """The refusal of a script with these keys, with those of another type named."""
        if not refused.of_type or refused.key:
            return refused
        try:
            found = await wrong_types(commands, [_text(key) for key in keys[:_ASKED_MAX]])
        except ForebayError:
            return refused
        for key, problem in found.items():
            self._note(key, problem)
        return refused.at(", ".join(f"{key} ({problem})" for key, problem in found.items()))

    def _note(self, key: str, problem: str) -> None:
        if key not in self and len(self) >= _KEPT_MAX:
            del self[next(iter(self))]
        once = self.setdefault(key, LogOnce(self._clock))
        once.say(log, "key.wrong_type", ForebayError(problem), key=key, fix="rename or delete it")

    def problems(self) -> list[str]:
        """One line for each."""
        found = [(key, once.failing) for key, once in self.items()]
        return [f"{key} is {failing.error}" for key, failing in found if failing]

    async def run(self, commands: Commands) -> None:
        """Look at the known ones until cancelled."""
        while True:
            await anyio.sleep(_EVERY_S)
            if self:
                await self.look(commands)

    async def look(self, commands: Commands) -> None:
        """Forget those that are well again."""
        known = list(self)
        try:
            found = await wrong_types(commands, known)
        except ForebayError:
            return
        for key in known:
            if key in found:
                self._note(key, found[key])
            elif self.pop(key, None) is not None:
                log.info("key.mended", key=key)


async def wrong_types(commands: Commands, keys: Sequence[str]) -> dict[str, str]:
    """Those of the keys that hold another type than they should, with what they are.

    Raises:
        Unavailable, ServerRefused: it is not known.
    """
    meant = {key: type_ for key in keys if (type_ := type_of(key)) is not None}
    found = {}
    for key, reply in zip(
        meant, await commands.call_many([("TYPE", key) for key in meant]), strict=True
    ):
        if isinstance(reply, ForebayError):
            raise reply
        actual = _text(reply)
        if actual not in (meant[key], _GONE):
            found[key] = f"a {actual}, and should be a {meant[key]}"
    return found


def _text(raw: object) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)

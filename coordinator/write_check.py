"""Checks once a second whether the server accepts writes, without writing.

C1  The check is a ``SET`` that may only replace a key, with a name that never exists: the server
    refuses it in the same way as all writes (``MISCONF``, ``OOM``, ``READONLY``, ``NOREPLICAS``),
    and otherwise does nothing.
C2  The check runs once in ``every_s``, regardless of the number of health requests; these read
    ``refusal``.
C3  A server that does not answer does not change the result: the link reports it.
"""

from __future__ import annotations

import anyio
import structlog
from anyio.abc import TaskStatus

from ..schemas.errors import ForebayError, ServerRefused
from .clock import Clock
from .log_once import Failing, LogOnce
from .valkey.link import Commands

__all__ = ["WriteCheck"]

log = structlog.get_logger(__name__)

_EVERY_S = 1.0
_OF_ALL_WRITES = frozenset({"MISCONF", "OOM", "READONLY", "NOREPLICAS"})


class WriteCheck:
    def __init__(
        self, commands: Commands, name: str, *, clock: Clock, every_s: float = _EVERY_S
    ) -> None:
        self._commands = commands
        self._name = name
        self._every_s = every_s
        self._refused = LogOnce(clock)

    def __repr__(self) -> str:
        return f"<WriteCheck {self.refusal or 'ok'}>"

    @property
    def refusal(self) -> Failing | None:
        """The reason and start of a refusal of writes; None if no refusal is known."""
        return self._refused.failing

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Ask until cancelled; started after the first answer."""
        await self.ask()
        task_status.started()
        while True:
            await anyio.sleep(self._every_s)
            await self.ask()

    async def ask(self) -> None:
        try:
            await self._commands.call("SET", self._name, "", "XX")
        except ServerRefused as error:
            if error.code in _OF_ALL_WRITES:
                self._refused.say(log, "valkey.refuses_writes", error)
        except ForebayError:
            return
        else:
            if self.refusal is not None:
                log.info("valkey.accepts_writes")
            self._refused.over()

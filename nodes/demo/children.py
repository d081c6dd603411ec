"""Processes that the demo starts, none of which outlives it.

I1  Each has a process group of its own: a Ctrl-C in the terminal reaches the demo only, which
    ends them in its own order.
I2  ``stop`` is bounded and shielded: SIGTERM, a wait, SIGKILL to the whole group.
I3  If the demo itself is killed, the kernel ends them too, where it can (Linux).
I4  ``exits`` keeps every exit code; ``groups_alive`` tells whether anything was left.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import structlog
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from ...coordinator.valkey.embedded import bound_to_owner

__all__ = ["Child", "tail_of"]

_KILL_LIMIT_S = 5.0
_LINE_BYTES_MAX = 65_536
_TAIL_BYTES_MAX = 4_096

log = structlog.get_logger(__name__)


class Child:
    """A program that can be started, stopped, killed, and started again."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        log_path: Path,
        reports: bool = False,
        first_line: str = "",
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.exits: list[int] = []
        self._command = command
        self._environ = environ
        self._reports = reports
        self._first_line = first_line
        self._process: Process | None = None
        self._pids: list[int] = []

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.pid} exits={self.exits}>"

    @property
    def pid(self) -> int:
        """0 while it is not running."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    async def start(self) -> None:
        # Shielded: a process that was begun is a process that ``stop`` knows.
        with anyio.CancelScope(shield=True), self.log_path.open("ab") as output:
            self._process = process = await anyio.open_process(
                bound_to_owner(self._command, signal.SIGKILL),
                stdin=subprocess.PIPE if self._first_line else subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._reports else output,
                stderr=output,
                env=self._environ,
                start_new_session=True,
            )
            self._pids.append(process.pid)
        if process.stdin is not None:
            with suppress(anyio.BrokenResourceError):
                await process.stdin.send(self._first_line.encode() + b"\n")
            await process.stdin.aclose()

    async def lines(self) -> AsyncIterator[bytes]:
        """What it reports on stdout, until it ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream = BufferedByteReceiveStream(self._process.stdout)
        with suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.ClosedResourceError):
            while True:
                yield await stream.receive_until(b"\n", _LINE_BYTES_MAX)

    async def wait(self) -> int:
        """Its exit code; negative if a signal ended it."""
        assert self._process is not None
        code = await self._process.wait()
        if len(self.exits) < len(self._pids):
            self.exits.append(code)
        return code

    async def stop(self, limit_s: float) -> None:
        if self._process is None:
            return
        with anyio.CancelScope(shield=True):
            for number, wait_s in ((signal.SIGTERM, limit_s), (signal.SIGKILL, _KILL_LIMIT_S)):
                if self.pid:
                    self._process.send_signal(number)
                with anyio.move_on_after(wait_s):
                    await self.wait()
                    break
                log.error("child.hangs", name=self.name, pid=self.pid, signal=number.name)
            self.kill()
            await self._close_pipes()

    def kill(self) -> None:
        """At once, with whatever it has started; its exit is seen by ``wait``."""
        for pid in self.groups_alive():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def groups_alive(self) -> list[int]:
        """The process groups of all its starts in which somebody is still there."""
        return [pid for pid in self._pids if _group_alive(pid)]

    async def _close_pipes(self) -> None:
        """The process has ended; only our ends of the pipes are left."""
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                await pipe.aclose()


def tail_of(path: Path) -> str:
    """The end of a log."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES_MAX))
        return file.read().decode(errors="replace").strip()
    return ""


def _group_alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number belongs to somebody else by now
        return False
    return True

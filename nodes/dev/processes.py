"""Child processes of ``forebay dev``: programs, and the nodes of a cluster.

I1  Each child has its own process group, so Ctrl-C in the terminal reaches only ``forebay dev``,
    which stops the children in its own order.
I2  ``stop`` is bounded and shielded: SIGTERM, a wait, then SIGKILL to the process group.
I3  If ``forebay dev`` itself is killed, the kernel kills the children (on Linux).
I4  ``exits`` records every exit code; ``groups_alive`` lists process groups that still exist.
I5  Inside ``async with Cluster(...)`` every node has answered 200 to /readyz.
I6  A node that exits, or is not ready in time, raises ProcessFailed with the end of its log.
I7  On exit all nodes get SIGTERM at the same time, then time to drain, then SIGKILL.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import aiohttp
import anyio
import msgspec
import structlog
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from msgspec import Struct

from ...coordinator.valkey.embedded import bound_to_owner
from ...schemas.errors import ProcessFailed
from .scene import Backlog, NodeScene

HOST = "127.0.0.1"
READY_LIMIT_S = 30.0
DRAIN_LIMIT_S = 25.0  #: slightly longer than the drain limit of a node
_KILL_LIMIT_S = 5.0
_LINE_BYTES_MAX = 65_536
_TAIL_BYTES_MAX = 4_096
_POLL_S = 0.05
_RESPONSE_LIMIT = aiohttp.ClientTimeout(total=5.0)
_NO_RESPONSE = (aiohttp.ClientError, OSError, TimeoutError)
_STARTUP_EXITS = (2, 3)  #: exit codes of `forebay run` that `forebay dev` passes on

log = structlog.get_logger(__name__)


class Child:
    """A program that can be started, stopped, killed and started again."""

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
        return f"<Child {self.name} {self.pid or self.exits}>"

    @property
    def pid(self) -> int:
        """The process id, or 0 while the child does not run."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    async def start(self) -> None:
        # Shielded, so that ``stop`` knows every process that was started.
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
        """The lines of its stdout, until it exits."""
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
                log.error("child.not_stopped", name=self.name, pid=self.pid, signal=number.name)
            self.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    await pipe.aclose()

    def kill(self) -> None:
        """Send SIGKILL to its process groups; ``wait`` returns the exit code."""
        for pid in self.groups_alive():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def groups_alive(self) -> list[int]:
        """The process groups, of all starts, that still contain a process."""
        return [pid for pid in self._pids if _group_alive(pid)]


class HttpResponse(Struct, frozen=True, kw_only=True):
    status: int
    body: bytes
    stale: bool


class NodeProcess(Struct, frozen=True, kw_only=True):
    child: Child
    scene: NodeScene

    @property
    def url(self) -> str:
        return self.scene.url


class _Stats(Struct, frozen=True):
    backlog: Backlog | None = None


class Cluster(anyio.AsyncContextManagerMixin):
    """Node processes on this machine. ``command`` starts one; its port is appended.

    Raises, on entry:
        ProcessFailed: a node exited or was not ready within ``ready_limit_s``.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        ports: Sequence[int],
        environ: Mapping[str, str],
        directory: Path,
        ready_limit_s: float = READY_LIMIT_S,
        drain_limit_s: float = DRAIN_LIMIT_S,
    ) -> None:
        self.nodes = [
            _node(f"node-{number}", command, port, environ, directory)
            for number, port in enumerate(ports, 1)
        ]
        self._ready_limit_s = ready_limit_s
        self._drain_limit_s = drain_limit_s
        self._http: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with aiohttp.ClientSession(timeout=_RESPONSE_LIMIT) as self._http:
            try:
                for node in self.nodes:
                    await node.child.start()
                for node in self.nodes:
                    await self.until_ready(node)
                yield self
            finally:
                with anyio.CancelScope(shield=True):
                    async with anyio.create_task_group() as tasks:
                        for node in self.nodes:
                            tasks.start_soon(node.child.stop, self._drain_limit_s)

    async def until_ready(self, node: NodeProcess) -> None:
        with anyio.move_on_after(self._ready_limit_s):
            while node.child.pid:
                response = await self.get(node, "/readyz")
                if response is not None and response.status == 200:
                    node.scene.up = True
                    return
                await anyio.sleep(_POLL_S)
        raise await self._failure(node)

    async def get(self, node: NodeProcess, path: str) -> HttpResponse | None:
        """The response, or None if the node does not respond."""
        assert self._http is not None
        try:
            async with self._http.get(node.url + path) as response:
                body = await response.read()
                stale = response.headers.get("X-Forebay-Stale", "") == "true"
                return HttpResponse(status=response.status, body=body, stale=stale)
        except _NO_RESPONSE:
            return None

    async def observe(self) -> None:
        """Update the state and the backlog of every node in the scene."""
        for node in self.nodes:
            response = await self.get(node, "/stats") if node.child.pid else None
            node.scene.up = response is not None
            node.scene.backlog = _backlog(response)

    async def kill_and_restart(self, node: NodeProcess, *, after_s: float) -> None:
        """Send SIGKILL, wait ``after_s``, and start a new process in its place."""
        node.child.kill()
        await node.child.wait()
        node.scene.up, node.scene.backlog = False, None
        await anyio.sleep(after_s)
        await node.child.start()
        await self.until_ready(node)

    async def _failure(self, node: NodeProcess) -> ProcessFailed:
        problem, exit_code = f"was not ready within {self._ready_limit_s:g} s", 1
        if not node.child.pid:
            code = await node.child.wait()
            problem = f"exited with {code} before it was ready"
            exit_code = code if code in _STARTUP_EXITS else 1
        said = tail_of(node.child.log_path)
        return ProcessFailed(node.child.name, problem, said=said, exit_code=exit_code)


def free_ports(first: int, count: int) -> list[int]:
    """``first`` and the ports after it; a port in use is replaced by any free one."""
    ports = []
    with ExitStack() as probes:
        for wanted in range(first, first + count):
            probe = probes.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, wanted if first else 0))
            except OSError:
                probe.bind((HOST, 0))
            ports.append(probe.getsockname()[1])
    return ports


def tail_of(path: Path) -> str:
    """The last bytes of a log file."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES_MAX))
        return file.read().decode(errors="replace").strip()
    return ""


def _node(
    name: str, command: Sequence[str], port: int, environ: Mapping[str, str], directory: Path
) -> NodeProcess:
    command = [*command, "--port", str(port)]
    child = Child(name, command, environ=environ, log_path=directory / f"{name}.log")
    return NodeProcess(child=child, scene=NodeScene(name=name, url=f"http://{HOST}:{port}"))


def _backlog(response: HttpResponse | None) -> Backlog | None:
    if response is None:
        return None
    try:
        return msgspec.json.decode(response.body, type=_Stats).backlog
    except msgspec.DecodeError:
        return None


def _group_alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):  # no permission: the id was reused
        return False
    return True

"""Several node processes on this machine: started, asked, killed, stopped.

I1  Inside ``async with`` all nodes have said on /readyz that they are ready.
I2  A node that ends, or is not ready in time, is ProcessFailed with the end of its log.
I3  Leaving, all nodes get SIGTERM at once, time to drain, and then SIGKILL.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import anyio
import msgspec
from msgspec import Struct

from ...schemas.errors import ProcessFailed
from .children import Child, tail_of
from .scene import Backlog, NodeScene

__all__ = ["Cluster", "NodeProcess", "Reading", "free_ports"]

HOST = "127.0.0.1"
READY_LIMIT_S = 30.0
DRAIN_LIMIT_S = 25.0  #: a little over the node's own
_POLL_S = 0.05
_ANSWER_LIMIT = aiohttp.ClientTimeout(total=5.0)
_NO_ANSWER = (aiohttp.ClientError, OSError, TimeoutError)
_STARTUP_EXITS = (2, 3)  #: of `forebay run`, passed on as our own


class Reading(Struct, frozen=True, kw_only=True):
    """What a node answered."""

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
    """``command`` starts a node; its port is added."""

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
        async with aiohttp.ClientSession(timeout=_ANSWER_LIMIT) as self._http:
            try:
                for node in self.nodes:
                    await node.child.start()
                for node in self.nodes:
                    await self.until_ready(node)
                yield self
            finally:
                await self._stop()

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    async def until_ready(self, node: NodeProcess) -> None:
        with anyio.move_on_after(self._ready_limit_s):
            while node.child.pid:
                reading = await self.get(node, "/readyz")
                if reading is not None and reading.status == 200:
                    node.scene.up = True
                    return
                await anyio.sleep(_POLL_S)
        raise await self._failure(node)

    async def get(self, node: NodeProcess, path: str) -> Reading | None:
        """None: it does not answer."""
        assert self._http is not None
        try:
            async with self._http.get(node.url + path) as response:
                body = await response.read()
                stale = response.headers.get("X-Forebay-Stale", "") == "true"
                return Reading(status=response.status, body=body, stale=stale)
        except _NO_ANSWER:
            return None

    async def observe(self) -> None:
        """Bring every node's part of the scene up to date."""
        for node in self.nodes:
            reading = await self.get(node, "/stats") if node.child.pid else None
            node.scene.up = reading is not None
            node.scene.backlog = _backlog(reading)

    async def kill_and_restart(self, node: NodeProcess, *, after_s: float) -> None:
        """Kill -9, a while without it, and a new process in its place."""
        node.child.kill()
        await node.child.wait()
        node.scene.up, node.scene.backlog = False, None
        await anyio.sleep(after_s)
        await node.child.start()
        await self.until_ready(node)

    async def _stop(self) -> None:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for node in self.nodes:
                    tasks.start_soon(node.child.stop, self._drain_limit_s)

    async def _failure(self, node: NodeProcess) -> ProcessFailed:
        problem, exit_code = f"was not ready within {self._ready_limit_s:g} s", 1
        if not node.child.pid:
            code = await node.child.wait()
            problem = f"ended with {code} before it was ready"
            exit_code = code if code in _STARTUP_EXITS else 1
        said = tail_of(node.child.log_path)
        return ProcessFailed(node.child.name, problem, said=said, exit_code=exit_code)


def free_ports(first: int, count: int) -> list[int]:
    """``first`` and those after it; another free one in the place of each that is taken."""
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


def _node(
    name: str, command: Sequence[str], port: int, environ: Mapping[str, str], directory: Path
) -> NodeProcess:
    child = Child(
        name,
        [*command, "--port", str(port)],
        environ=environ,
        log_path=directory / f"{name}.log",
    )
    return NodeProcess(child=child, scene=NodeScene(name=name, url=f"http://{HOST}:{port}"))


def _backlog(reading: Reading | None) -> Backlog | None:
    if reading is None:
        return None
    try:
        stats: Any = msgspec.json.decode(reading.body, type=_Stats)
    except msgspec.DecodeError:
        return None
    backlog: Backlog | None = stats.backlog
    return backlog

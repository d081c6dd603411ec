"""Reads the files that settings name: configuration, passwords, tokens, certificates.

F1  Nothing blocks: a path that is not a regular file (a FIFO, a device, a socket, a directory) or
    is invalid is refused before it is opened. A symbolic link is followed.
F2  At most ``bytes_max`` + 1 bytes of a file are read.
F3  Every failure is an OSError with a readable ``strerror``, or a ValueError for a size that is not
    allowed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["check_readable", "open_to_others", "read_file"]

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_file(path: str | Path, bytes_max: int) -> bytes:
    """The content. Raises OSError, ValueError."""
    with os.fdopen(_opened(path), "rb") as opened:
        content = opened.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise ValueError(f"it has more than {bytes_max} bytes")
    return content


def check_readable(path: str | Path) -> None:
    """Raises OSError if ``read_file`` could not read it."""
    os.close(_opened(path))


def open_to_others(path: str | Path) -> str:
    """The access of users outside the owner and the group: ``read``, ``write``, or empty.

    Empty: they have none, or the file cannot be inspected.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return ""
    if mode & stat.S_IWOTH:
        return "write"
    return "read" if mode & stat.S_IROTH else ""


def _opened(path: str | Path) -> int:
    try:
        _refuse_others(Path(path).stat().st_mode)
        # The file may have been replaced meanwhile: the open file is checked again.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError:
        raise OSError(errno.EINVAL, "the path holds a NUL") from None
    try:
        _refuse_others(os.fstat(opened).st_mode)
    except OSError:
        os.close(opened)
        raise
    return opened


def _refuse_others(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "of another kind")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")

"""Files that settings name: coordinator/files.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.coordinator.files import check_readable, open_to_others, read_file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    "make,said",
    [
        (fifo, "it is a FIFO, not a regular file"),
        (listening, "it is a socket, not a regular file"),
        (device, "it is a device, not a regular file"),
        (terminal, "it is a device, not a regular file"),
        (directory, "Is a directory"),
        (circle, "Too many levels of symbolic links"),
    ],
    ids=lambda made: getattr(made, "__name__", ""),
)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], said: str
) -> None:
    """F1: reading a FIFO would wait for a writer, and a device has no end."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make(Path("secret"))
    for look in (check_readable, lambda path: read_file(path, 10)):
        with pytest.raises(OSError) as caught:
            look("secret")
        assert caught.value.strerror == said


def test_a_path_that_can_be_none_is_refused() -> None:
    """F1, F3: also one that only a TOML file can hold."""
    for path in ("a\0b", "x" * 5_000, "/etc/passwd/x", ""):
        with pytest.raises(OSError):
            read_file(path, 10)


def test_the_size_is_bounded_and_a_link_is_followed(tmp_path: Path) -> None:
    """F2: at most one byte more than allowed is read, whatever the size."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"0123456789")
    link.symlink_to(file)
    assert read_file(link, 10) == b"0123456789"
    os.truncate(file, 1_000_000_000_000)  # takes no room
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_file(str(link), 10)


def test_who_else_may_read_or_write_a_file(tmp_path: Path) -> None:
    """The bits for others decide; the group is one that the operator has chosen."""
    file = tmp_path / "file"
    file.touch()
    found = {}
    for mode in (0o600, 0o640, 0o644, 0o444, 0o666, 0o602):
        file.chmod(mode)
        found[mode] = open_to_others(file)
    assert found == {
        0o600: "",
        0o640: "",
        0o644: "read",
        0o444: "read",
        0o666: "write",
        0o602: "write",
    }
    assert open_to_others(tmp_path / "none") == open_to_others("\0") == ""

"""What the processes of a run of locks wrote down: one file of JSON lines for each start of one.

L1  Times are CLOCK_MONOTONIC in seconds: one clock for all processes of this machine.
L2  Each line is written at once, so a killed process has written what it knew. A grant without
    an end was believed until its process died.
L3  A holder believes no longer than its lease says that it may, however late it wakes up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from faults.lock_checker import Granted, Written

_SUFFIX = ".locks.jsonl"


class Began(msgspec.Struct, frozen=True, kw_only=True, tag="began"):
    name: str
    token: int
    asked_at: float
    granted_at: float


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Of the grant with this token; ``lost`` says why, if it was."""

    name: str
    token: int
    believed_until: float
    lost: str = ""


class Wrote(msgspec.Struct, frozen=True, kw_only=True, tag="wrote"):
    """A guard let it through, or not. ``late``: by a holder that had lost its lease."""

    key: str
    token: int
    sent_at: float
    done_at: float
    refused: bool = False
    late: bool = False


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """A lock was not had."""

    name: str
    why: str
    at: float


Line = Began | Ended | Wrote | Refused


class LockHistory:
    """The file of one process."""

    def __init__(self, directory: Path, process: str) -> None:
        self._file = (directory / f"{process}{_SUFFIX}").open("ab", buffering=0)
        self._encode = msgspec.json.Encoder().encode

    def write(self, line: Line) -> None:
        self._file.write(self._encode(line) + b"\n")

    def close(self) -> None:
        self._file.close()


def read(directory: Path) -> Mapping[str, Sequence[Line]]:
    """The lines of each process."""
    decode = msgspec.json.Decoder(Line).decode
    return {
        path.name.removesuffix(_SUFFIX): [decode(line) for line in _whole_lines(path)]
        for path in sorted(directory.glob(f"*{_SUFFIX}"))
    }


def grants_of(lines: Mapping[str, Sequence[Line]], died: Mapping[str, float]) -> list[Granted]:
    """The critical sections. ``died``: when processes were killed."""
    found = []
    for process, history in lines.items():
        ends = {(line.name, line.token): line for line in history if isinstance(line, Ended)}
        for line in history:
            if isinstance(line, Began):
                end = ends.get((line.name, line.token))
                found.append(
                    Granted(
                        name=line.name,
                        token=line.token,
                        by=process,
                        asked_at=line.asked_at,
                        granted_at=line.granted_at,
                        believed_until=end.believed_until if end else died[process],
                        lost=end.lost if end else "",
                    )
                )
    return found


def writes_of(lines: Mapping[str, Sequence[Line]]) -> list[Written]:
    """What guards let through."""
    return [
        Written(key=line.key, token=line.token, sent_at=line.sent_at, done_at=line.done_at)
        for history in lines.values()
        for line in history
        if isinstance(line, Wrote) and not line.refused
    ]


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield line

"""What happened in a run, as every process saw it: one file of JSON lines for each process.

H1  Times are CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share: the
    order of records of different processes is exact. (So a real cluster's skew is not seen.)
H2  An operation has an ``invoke``, where it matters that it may never end, and one of ``ok``,
    ``fail`` (it had no effect) and ``unknown``; the latter three hold when it began, too.
H3  A process that is killed loses the records of its last second, but those that it was told
    to write at once. Its last line may be cut short; any other damage is an error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

Op = Literal["bump", "probe", "load", "read"]
Phase = Literal["invoke", "ok", "fail", "unknown"]
_SUFFIX = ".history.jsonl"
_BUFFER_BYTES = 65_536
_FLUSH_NS = 1_000_000_000


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. ``t_ns`` is when the phase was reached: for an ack, when it had arrived."""

    t_ns: int
    process: str
    op: Op
    phase: Phase
    subject: str = ""
    version: int = 0
    began_ns: int = 0
    aim_ms: int = 0  #: of a probe: how long after an ack it was to begin
    stale: bool = False  #: the answer said of itself that it may be old
    tier: str = ""
    note: str = ""


class History:
    """The file of one process."""

    def __init__(self, directory: Path, process: str) -> None:
        self.process = process
        self._file = (directory / f"{process}{_SUFFIX}").open("ab", buffering=_BUFFER_BYTES)
        self._flush_at = 0
        self._encode = msgspec.json.Encoder().encode

    def write(
        self,
        op: Op,
        phase: Phase,
        *,
        subject: str = "",
        version: int = 0,
        began_ns: int = 0,
        aim_ms: int = 0,
        stale: bool = False,
        tier: str = "",
        note: str = "",
        at_once: bool = False,
    ) -> int:
        """Write down what was reached just now; returns the time."""
        t_ns = time.monotonic_ns()
        record = Record(
            t_ns=t_ns,
            process=self.process,
            op=op,
            phase=phase,
            subject=subject,
            version=version,
            began_ns=began_ns,
            aim_ms=aim_ms,
            stale=stale,
            tier=tier,
            note=note,
        )
        self._file.write(self._encode(record) + b"\n")
        if at_once or t_ns >= self._flush_at:
            self._file.flush()
            self._flush_at = t_ns + _FLUSH_NS
        return t_ns

    def close(self) -> None:
        self._file.close()


def read_history(directory: Path) -> list[Record]:
    """The records of all processes, in the order in which things happened."""
    decode = msgspec.json.Decoder(Record).decode
    records = [
        decode(line) for path in directory.glob(f"*{_SUFFIX}") for line in _whole_lines(path)
    ]
    records.sort(key=lambda record: record.t_ns)
    return records


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield line

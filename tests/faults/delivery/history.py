"""The history of a run, as publishers, nemesis and database saw it: files of JSON lines.

H1  Times are CLOCK_MONOTONIC in nanoseconds, one clock for all processes of this machine.
H2  ``sent`` is written before an attempt is made, ``answered`` after it: an attempt without an
    answer has an unknown outcome.
H3  ``effect`` and ``mark`` have places in one order, that in which the database made them: a mark
    lies between the rows stored before a server lost the tail of its AOF, and the later ones.
H4  A last line may be cut short; any other damage is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

SUFFIX = ".delivery.jsonl"


class Sent(msgspec.Struct, frozen=True, kw_only=True, tag="sent", omit_defaults=True):
    """An attempt to publish an event."""

    t_ns: int
    event: str
    key: str
    seq: int
    poison: str = ""


class Answered(msgspec.Struct, frozen=True, kw_only=True, tag="answered", omit_defaults=True):
    """``unknown``: it may have been accepted."""

    t_ns: int
    event: str
    outcome: Literal["accepted", "refused", "unknown"]
    why: str = ""


class Acted(msgspec.Struct, frozen=True, kw_only=True, tag="acted"):
    """A fault."""

    t_ns: int
    kind: str
    note: str = ""


class Cut(msgspec.Struct, frozen=True, kw_only=True, tag="cut"):
    """The server died at ``t_ns``, and lost these records of its AOF."""

    t_ns: int
    number: int
    bytes: int
    accepted: Sequence[str]  #: events whose acceptance was lost
    dead: Sequence[str]  #: events whose dead letter was lost
    keys: Sequence[str]  #: keys that lost a record


class Recovered(msgspec.Struct, frozen=True, kw_only=True, tag="recovered"):
    """After a fault one event for each shard was published; ``missing`` never reached the sink."""

    kind: str
    seconds: float
    missing: int


class Effect(msgspec.Struct, frozen=True, kw_only=True, tag="effect"):
    """A row was inserted or changed."""

    place: int
    key: str
    event: str
    seq: int
    version: int


class Mark(msgspec.Struct, frozen=True, kw_only=True, tag="mark"):
    place: int
    number: int  #: of the cut


class Row(msgspec.Struct, frozen=True, kw_only=True, tag="row"):
    """A row at the end."""

    key: str
    event: str
    seq: int


class Dead(msgspec.Struct, frozen=True, kw_only=True, tag="dead"):
    event: str
    reason: str


class Read(msgspec.Struct, frozen=True, kw_only=True, tag="read"):
    """An answer of a node at the end; without an event: the value does not exist."""

    node: str
    key: str
    event: str
    stale: bool


class Left(msgspec.Struct, frozen=True, kw_only=True, tag="left"):
    """The work that still waits at the end, when nothing moved any more."""

    events: int
    writes: int
    held: int


Line = (
    Sent | Answered | Acted | Cut | Recovered | Effect | Mark | Row | Dead | Read | Left
)  # fmt: skip


class History:
    """The file of one process. Each line is written at once."""

    def __init__(self, directory: Path, process: str) -> None:
        self._file = (directory / f"{process}{SUFFIX}").open("ab", buffering=0)
        self._encode = msgspec.json.Encoder().encode

    def write(self, *lines: Line) -> None:
        self._file.write(b"".join(self._encode(line) + b"\n" for line in lines))

    def close(self) -> None:
        self._file.close()


def read_history(directory: Path) -> list[Line]:
    """The lines of all processes; those of one process are in order."""
    decode = msgspec.json.Decoder(Line).decode
    paths = sorted(directory.glob(f"*{SUFFIX}"))
    return [decode(line) for path in paths for line in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterable[bytes]:
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield line

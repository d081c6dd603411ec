"""Stretches of the writes streams: what a lane reads, and what it makes of it.

T1  Whatever stands in an entry, reading it gives a ``Queued``; one without a job is a dead
    letter.
T2  Of a stretch the newest write of a key comes first; one that is refused for good gives way
    to the one before it, so that no write is lost for another's fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ...coordinator.ownership import Tenure
from ...schemas.errors import InvalidEntry, InvalidEvent, UnreadableRecord
from ...schemas.jobs import WriteJob, read_write
from ...schemas.replies import WHOLE_MAX, field_map, integer
from ..sinks.base import Progress, Write
from .dead_letters import DeadLetter
from .delivery import Refused
from .routes import Routes

__all__ = ["Queued", "Stretch", "Versions", "queued"]

_UNDECODABLE = (
    msgspec.MsgspecError,
    ValueError,
    RecursionError,
    OverflowError,
    InvalidEntry,
    UnreadableRecord,
)


class Queued(Struct, frozen=True):
    """One entry of a writes stream."""

    id: str
    version: int
    raw: bytes
    job: WriteJob | None


def queued(raw_id: bytes, fields: Sequence[bytes] | None) -> Queued:
    found = field_map(fields)
    raw, entry_id = found.get(b"j"), bytes(raw_id).decode()
    if raw is None:
        return Queued(entry_id, 0, b" ".join(fields or ()), None)
    try:
        return Queued(
            entry_id,
            integer(found.get(b"v"), "the version of a write", high=WHOLE_MAX),
            raw,
            read_write(raw),
        )
    except _UNDECODABLE:
        return Queued(entry_id, 0, raw, None)


class Stretch(Struct, frozen=True):
    """A contiguous range of one shard's writes."""

    tenure: Tenure
    entries: Sequence[Queued]
    follows: str = ""  #: the checkpoint from which it was read

    @property
    def shard(self) -> int:
        return self.tenure.resource

    @property
    def last_id(self) -> str:
        return self.entries[-1].id

    @property
    def progress(self) -> Progress:
        return Progress(shard=self.shard, epoch=self.tenure.epoch, position=self.last_id)

    @property
    def size(self) -> int:
        return sum(len(entry.raw) for entry in self.entries)


class Versions:
    """The writes of one lane in one round: by key, the newest that is not ruled out."""

    def __init__(self, routes: Routes, sink: str | None, *, strays: bool) -> None:
        """``strays``: also take what belongs to no sink."""
        self.letters: dict[int, list[DeadLetter]] = {}
        self.newest: dict[int, dict[str, Queued]] = {}  #: by shard and key, whatever became of it
        self.doubtful: set[str] = set()  #: keys whose newest write will never reach the source
        self._routes = routes
        self._sink = sink
        self._strays = strays
        self._waiting: dict[str, list[tuple[int, Queued]]] = {}

    def take(self, stretches: Sequence[Stretch]) -> None:
        for stretch in stretches:
            for entry in stretch.entries:
                self._take(stretch.shard, entry)

    def _take(self, shard: int, entry: Queued) -> None:
        if entry.job is None:
            if self._strays:
                fix = "entries are made by forebay alone"
                fault = InvalidEvent("undecodable", "this is no write job", field="j", fix=fix)
                self._rule_out(shard, entry, fault)
            return
        found = self._routes.sink_of(entry.job.key)
        if found is None and self._strays:
            fix = "declare one with @node.sink"
            problem = f"no sink takes {entry.job.key!r}"
            self._rule_out(shard, entry, InvalidEvent("no_sink", problem, field="key", fix=fix))
        elif found is not None and found[0].name == self._sink:
            self._waiting.setdefault(entry.job.key, []).append((shard, entry))
        else:
            return
        self.newest.setdefault(shard, {})[entry.job.key] = entry

    def writes(self) -> list[Write[Any]]:
        """What to give to the sink next; nothing, when all is stored or ruled out."""
        return [write for key in list(self._waiting) if (write := self._write_of(key)) is not None]

    def _write_of(self, key: str) -> Write[Any] | None:
        entries = self._waiting[key]
        found = self._routes.sink_of(key)
        while entries and found is not None:
            _, entry = entries[-1]
            assert entry.job is not None
            try:
                value = self._routes.value_of(key, entry.job.value)
                return Write(key=key, params=found[1], value=value, version=entry.version)
            except Exception as error:
                # Also whatever a type of the application's raises when it is made.
                problem = f"the job's value: {type(error).__name__}: {error}"
                fault = InvalidEvent("undecodable", problem, field="value", fix="see the cache")
                self._rule_out(*entries.pop(), fault)
        del self._waiting[key]
        return None

    def delivered(self, refused: Sequence[Refused]) -> None:
        """The sink took all that ``writes`` gave, but these."""
        waiting, self._waiting = self._waiting, {}
        for each in refused:
            entries = waiting[each.write.key]
            fault = InvalidEvent("sink_refused", each.problem, field="value", fix="see the sink")
            self._rule_out(*entries.pop(), fault)
            if entries:
                self._waiting[each.write.key] = entries

    def _rule_out(self, shard: int, entry: Queued, fault: InvalidEvent) -> None:
        self.letters.setdefault(shard, []).append(DeadLetter(entry.id, entry.raw, fault))
        if entry.job is not None:
            self.doubtful.add(entry.job.key)

    def after(self, stretches: Sequence[Stretch]) -> tuple[list[str], list[str]]:
        """Keys and tags to invalidate, now that the source has what it takes."""
        mine = {key for keys in self.newest.values() for key in keys}
        jobs = [
            entry.job
            for stretch in stretches
            for entry in stretch.entries
            if entry.job is not None and entry.job.key in mine
        ]
        keys = [key for job in jobs for key in job.invalidates.keys]
        tags = [tag for job in jobs for tag in job.invalidates.tags]
        return list(dict.fromkeys([*self.doubtful, *keys])), list(dict.fromkeys(tags))

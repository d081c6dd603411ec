"""Stretches of the writes streams: what a lane reads, and what it makes of it.

T1  Whatever stands in an entry, reading it gives a ``Queued``; one without a job is a dead
    letter.
T2  Of a stretch the newest write of a key comes first; one that is refused for good gives way
    to the one before it, so that no write is lost for another's fault.
T3  A write without a sink here must be held, and so must one whose value this member cannot
    decode, since another member may. Neither is done, and its invalidations wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ...coordinator.log.ownership import Claim
from ...schemas.errors import InvalidEntry, InvalidEvent, UnreadableRecord
from ...schemas.jobs import WriteJob, read_write
from ...schemas.replies import WHOLE_MAX, field_map, integer, stream_id
from ..sinks.base import Progress, Write
from .dead_letters import DeadLetter
from .delivery import Refused
from .owned_shards import latest
from .routes import Routes

__all__ = ["Coalescer", "Queued", "Range", "queued"]

_UNDECODABLE = (
    msgspec.MsgspecError,
    ValueError,
    RecursionError,
    OverflowError,
    InvalidEntry,
    UnreadableRecord,
)


class Queued(Struct, frozen=True):
    """One entry of a writes stream, or of those held."""

    id: str
    version: int
    raw: bytes
    job: WriteJob | None
    origin: str  #: the id that it had in the writes stream
    tried: frozenset[str] = frozenset()  #: tokens of the members that could not decode the value

    @property
    def key(self) -> str:
        return self.job.key if self.job is not None else ""


def queued(raw_id: bytes, fields: Sequence[bytes] | None, tried: bytes | None = None) -> Queued:
    found = field_map(fields)
    raw, entry_id = found.get(b"j"), bytes(raw_id).decode()
    try:
        origin = stream_id(found.get(b"f", raw_id), "the id of a held write")
    except UnreadableRecord:
        origin = entry_id
    tokens = frozenset((tried or b"").decode(errors="replace").split())
    if raw is None:
        return Queued(entry_id, 0, b" ".join(fields or ()), None, origin)
    try:
        version = integer(found.get(b"v"), "the version of a write", high=WHOLE_MAX)
        return Queued(entry_id, version, raw, read_write(raw), origin, tokens)
    except _UNDECODABLE:
        return Queued(entry_id, 0, raw, None, origin)


class Range(Struct, frozen=True):
    """A contiguous range of one shard's writes, or of those held."""

    tenure: Claim
    entries: Sequence[Queued]
    follows: str = ""  #: the checkpoint as it was when this was read: the sink has its own up to it
    held: bool = False

    @property
    def shard(self) -> int:
        return self.tenure.resource

    @property
    def last_id(self) -> str:
        return self.entries[-1].id

    @property
    def progress(self) -> Progress:
        position = "0-0" if self.held else self.last_id
        return Progress(shard=self.shard, epoch=self.tenure.epoch, position=position)

    @property
    def size(self) -> int:
        return sum(len(entry.raw) for entry in self.entries)


class Coalescer:
    """The writes of one lane in one round: by key, the newest that is not ruled out."""

    def __init__(
        self,
        routes: Routes,
        sink: str | None,
        *,
        strays: bool,
        token: str = "",
        others: bool = False,
    ) -> None:
        """``strays``: also look for writes without a sink. ``token`` is this member's;
        ``others``: other members may decode values that this one cannot.
        """
        self.letters: dict[int, list[DeadLetter]] = {}
        self.doubtful: set[str] = set()  #: keys whose newest write will never reach the source
        self.strays: dict[int, list[Queued]] = {}  #: to be held: no sink takes them here
        self.undecodable: dict[int, list[Queued]] = {}  #: to be held: another may decode them
        self._routes = routes
        self._sink = sink
        self._look_for_strays = strays
        self._token = token
        self._others = others
        self._taken: list[tuple[int, Queued]] = []
        self._waiting: dict[str, list[tuple[int, Queued]]] = {}

    def take(self, stretches: Sequence[Range]) -> None:
        for stretch in stretches:
            for entry in stretch.entries:
                self._take(stretch, entry)

    def _take(self, stretch: Range, entry: Queued) -> None:
        strays = self._look_for_strays and not stretch.held
        if entry.job is None:
            if strays:
                fix = "entries are made by forebay alone"
                fault = InvalidEvent("undecodable", "this is no write job", field="j", fix=fix)
                self._rule_out(stretch.shard, entry, fault)
            return
        found = self._routes.sink_of(entry.job.key)
        if found is None:
            if strays:
                self.strays.setdefault(stretch.shard, []).append(entry)
        elif (
            found[0].name == self._sink
            and self._token not in entry.tried
            and (stretch.held or latest((stretch.follows or "0-0", entry.id)) != stretch.follows)
        ):
            self._waiting.setdefault(entry.job.key, []).append((stretch.shard, entry))
            self._taken.append((stretch.shard, entry))

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
                self._not_decoded(*entries.pop(), error)
        del self._waiting[key]
        return None

    def _not_decoded(self, shard: int, entry: Queued, error: Exception) -> None:
        if self._others:
            self.undecodable.setdefault(shard, []).append(entry)
            return
        problem = f"the job's value: {type(error).__name__}: {error}"
        fault = InvalidEvent("undecodable", problem, field="value", fix="see the cache")
        self._rule_out(shard, entry, fault)

    def no_room(self, shard: int, entry: Queued) -> None:
        """Called for a write that cannot be held, since too many are."""
        assert entry.job is not None
        problem = f"no sink takes {entry.job.key!r}, and too many writes are held"
        fix = "start a worker that declares the sink"
        self._rule_out(shard, entry, InvalidEvent("no_sink", problem, field="key", fix=fix))
        for held in (self.strays, self.undecodable):
            if entry in held.get(shard, ()):
                held[shard].remove(entry)
        self._taken.append((shard, entry))

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
        self.letters.setdefault(shard, []).append(DeadLetter(entry.origin, entry.raw, fault))
        if entry.job is not None:
            self.doubtful.add(entry.job.key)

    def taken(self) -> Iterator[tuple[int, Queued]]:
        """Shard and entry of all that are for this sink."""
        return iter(self._taken)

    def last_left(self, stretch: Range) -> str:
        """The last entry that must still be in the stream; empty if all were set aside."""
        aside = {
            entry.id
            for held in (self.strays, self.undecodable)
            for entry in held.get(stretch.shard, ())
        }
        left = [entry.id for entry in stretch.entries if entry.id not in aside]
        return left[-1] if left and not stretch.held else ""

    def finished(self) -> Iterator[tuple[int, Queued]]:
        """Shard and entry of all that need not be looked at again, in their order."""
        held = {(shard, each.id) for shard, found in self.undecodable.items() for each in found}
        return ((shard, each) for shard, each in self._taken if (shard, each.id) not in held)

    def newest(self) -> Mapping[int, Mapping[str, Queued]]:
        """By shard and key, the newest of those that are finished, with any outcome."""
        found: dict[int, dict[str, Queued]] = {}
        for shard, entry in self.finished():
            if entry.job is not None:
                found.setdefault(shard, {})[entry.job.key] = entry
        return found

    def after(self) -> tuple[list[str], list[str]]:
        """Keys and tags to invalidate, now that the source has what it takes."""
        jobs = [entry.job for _, entry in self.finished() if entry.job is not None]
        keys = [key for job in jobs for key in job.invalidates.keys]
        tags = [tag for job in jobs for tag in job.invalidates.tags]
        return list(dict.fromkeys([*self.doubtful, *keys])), list(dict.fromkeys(tags))

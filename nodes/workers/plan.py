"""From a batch of events to the scripts that apply them: a pure decision.

P1  Within a shard, steps stand in the order of the events, and so do their marks: each is
    later than the one before.
P2  A mark is the generation of the ingress stream and the place of a step's newest event in it,
    and depends on nothing else. The shard refuses one that is not later than its newest, so a
    batch that is applied again after a crash, whole or cut elsewhere, writes nothing twice. Keys
    whose invalidation was merged with later ones may be invalidated once more, which costs a
    load at most.
P3  Neighbouring invalidations of a shard become one step, of at most 200 keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct

from ...schemas.events import Event, Invalidate, Write
from ...schemas.keys import Names

__all__ = ["Invalidation", "Step", "Taken", "WriteStep", "mark_of", "plan"]

_TOGETHER = 200
_TAGS_FROM = 10_001
_FIRST_MS, _LAST_MS = 10**12, 10**13  # 2001 to 2286: others were made up by a publisher
Kind = Literal["keys", "tags"]


class Taken(Struct, frozen=True):
    """An event taken from the ingress stream."""

    id: str
    event: Event
    raw: bytes  #: as it was published
    generation: int = 0  #: of the stream; all ids of a later generation are later

    held_as: str = ""  #: the id that it had before it was held

    @property
    def published_ms(self) -> int:
        """The publication time on the server's clock; 0 if the id is not a valid time."""
        ms = int((self.held_as or self.id).partition("-")[0])
        return ms if _FIRST_MS <= ms <= _LAST_MS else 0

    def mark(self, place: int) -> str:
        return mark_of(self.id, place, self.generation)


class Invalidation:
    """Keys, or tags, of one shard to invalidate; each with the last event that named it."""

    __slots__ = ("kind", "names", "place", "shard", "soft", "taken")

    def __init__(self, shard: int, kind: Kind, soft: bool) -> None:
        self.shard = shard
        self.kind: Kind = kind
        self.soft = soft
        self.names: dict[str, Taken] = {}
        self.taken: Taken  #: the newest, and the place in it of the newest name
        self.place: int

    def add(self, name: str, taken: Taken, place: int) -> None:
        self.names[name] = self.taken = taken
        self.place = place

    @property
    def mark(self) -> str:
        return self.taken.mark(self.place)

    @property
    def published_ms(self) -> int:
        """Of the oldest event; 0 if none has a valid time."""
        return min((ms for each in self.events() if (ms := each.published_ms)), default=0)

    def events(self) -> Iterator[Taken]:
        """Those that name something here, each once."""
        yield from {taken.id: taken for taken in self.names.values()}.values()

    def __repr__(self) -> str:
        return f"<Invalidation of {len(self.names)} {self.kind} of {self.shard} at {self.mark}>"


class WriteStep(Struct, frozen=True):
    shard: int
    taken: Taken
    body: Write

    @property
    def mark(self) -> str:
        return self.taken.mark(0)

    def events(self) -> Iterator[Taken]:
        yield self.taken


Step = Invalidation | WriteStep


def mark_of(entry_id: str, place: int, generation: int = 0) -> str:
    """A place in the ingress stream that sorts as text. ``place`` is that within the event:
    0 the key written, 1.. keys, 10001.. tags; it does not depend on where a batch begins.
    """
    ms, _, seq = entry_id.partition("-")
    return f"{generation:016}-{int(ms):020}-{int(seq):020}-{place:05}"


def plan(batch: Sequence[Taken], names: Names) -> list[Step]:
    """The steps of a batch; refreshes, which need no order, are left out."""
    steps: dict[int, list[Step]] = {}
    shard_of = names.shard
    for taken in batch:
        body = taken.event.body
        if isinstance(body, Invalidate):
            for place, key in enumerate(body.keys, 1):
                shard = shard_of(key)
                _open(steps, shard, "keys", body.soft).add(key, taken, place)
            for place, tag in enumerate(body.tags, _TAGS_FROM):
                _open(steps, shard_of(tag), "tags", body.soft).add(tag, taken, place)
        elif isinstance(body, Write):
            shard = shard_of(body.key)
            steps.setdefault(shard, []).append(WriteStep(shard, taken, body))
    return [step for shard in sorted(steps) for step in steps[shard]]


def _open(steps: dict[int, list[Step]], shard: int, kind: Kind, soft: bool) -> Invalidation:
    """The step that takes the next name: the shard's last if that is of the same sort."""
    queue = steps.setdefault(shard, [])
    last = queue[-1] if queue else None
    if (
        isinstance(last, Invalidation)
        and last.kind == kind
        and last.soft == soft
        and len(last.names) < _TOGETHER
    ):
        return last
    opened = Invalidation(shard, kind, soft)
    queue.append(opened)
    return opened

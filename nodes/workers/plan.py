"""From a batch of events to the scripts that apply them: a pure decision.

P1  Within a shard, scripts stand in the order of the events.
P2  Each script carries a mark, the place of its newest event in the ingress stream. The
    shard refuses a mark that is not newer than the last one, so a batch that is applied
    again after a crash has no second effect.
P3  Neighbouring invalidations of a shard become one script, of at most 200 keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from ...schemas.events import Event, Invalidate, Write
from ...schemas.keys import Names

__all__ = ["Invalidation", "Step", "Taken", "WriteStep", "mark_of", "plan"]

_TOGETHER = 200
_TAGS_FROM = 10_001


class Taken(Struct, frozen=True):
    """An event taken from the ingress stream."""

    id: str
    event: Event


class Invalidation:
    """Keys, or tags, of one shard to invalidate."""

    __slots__ = ("kind", "mark", "names", "shard", "soft")

    def __init__(self, shard: int, kind: Literal["keys", "tags"], soft: bool) -> None:
        self.shard = shard
        self.kind: Literal["keys", "tags"] = kind
        self.soft = soft
        self.names: dict[str, None] = {}
        self.mark = ""

    def __repr__(self) -> str:
        return f"<Invalidation of {len(self.names)} {self.kind} of {self.shard} at {self.mark}>"


class WriteStep(Struct, frozen=True):
    shard: int
    mark: str
    taken: Taken
    body: Write


Step = Invalidation | WriteStep


def mark_of(entry_id: str, place: int) -> str:
    """A place in the ingress stream that sorts as text. ``place`` is that within the event:
    0 the key written, 1.. keys, 10001.. tags; it does not depend on where a batch begins.
    """
    ms, _, seq = entry_id.partition("-")
    return f"{int(ms):015}-{int(seq):012}-{place:05}"


def plan(batch: Sequence[Taken], names: Names) -> list[Step]:
    """The steps of a batch; refreshes, which need no order, are left out."""
    steps: dict[int, list[Step]] = defaultdict(list)
    for taken in batch:
        body = taken.event.body
        if isinstance(body, Invalidate):
            _add(steps, taken, "keys", body.keys, body.soft, names)
            _add(steps, taken, "tags", body.tags, False, names)
        elif isinstance(body, Write):
            shard = names.shard(body.key)
            steps[shard].append(WriteStep(shard, mark_of(taken.id, 0), taken, body))
    return [step for shard in sorted(steps) for step in steps[shard]]


def _add(
    steps: dict[int, list[Step]],
    taken: Taken,
    kind: Literal["keys", "tags"],
    what: Sequence[str],
    soft: bool,
    names: Names,
) -> None:
    first = 1 if kind == "keys" else _TAGS_FROM
    for place, name in enumerate(what, first):
        shard = names.shard(name)
        last = steps[shard][-1] if steps[shard] else None
        if (
            not isinstance(last, Invalidation)
            or last.kind != kind
            or last.soft != soft
            or len(last.names) >= _TOGETHER
        ):
            last = Invalidation(shard, kind, soft)
            steps[shard].append(last)
        last.names[name] = None
        last.mark = mark_of(taken.id, place)

"""Counts the accepted work that is left undone when a node stops, and logs it in one line.

L1  Counted are events that were not applied, writes that no sink has, and writes that are held.
L2  The work left is lost if the server ends with this node; otherwise it is left to others.
L3  Nothing is reported if other workers go on, or if all work that existed when the drain began
    is done. On a server that ends with this node, later work counts, too.
"""

from __future__ import annotations

import structlog
from msgspec import Struct

from ..coordinator.valkey.link import Commands
from ..coordinator.valkey.scripting import ask_many, granted
from ..schemas.keys import EVENTS, Names
from ..schemas.replies import integer

__all__ = ["DrainOutcome", "Leftovers", "count_leftovers", "left_of", "tell"]

log = structlog.get_logger(__name__)


class DrainOutcome(Struct, frozen=True, kw_only=True):
    """How far a drain got. Each is done, or other workers that run do it."""

    finished: bool  #: in time
    events_done: bool
    writes_done: bool
    held_done: bool


class Leftovers(Struct, frozen=True, kw_only=True):
    events: int = 0
    writes: int = 0
    held: int = 0

    @property
    def count(self) -> int:
        return self.events + self.writes + self.held


async def count_leftovers(commands: Commands, names: Names) -> Leftovers:
    """Count the entries of the streams now.

    Raises:
        Unavailable, ServerRefused: it is not known.
    """
    streams = {
        "events": [names.events, names.part(EVENTS, "before")],
        "writes": [names.part(shard, "writes") for shard in range(names.shards)],
        "held": [names.part(shard, "held") for shard in range(names.shards)],
    }
    found = {}
    for kind, each in streams.items():
        lengths = granted(await ask_many(commands, [("XLEN", name) for name in each]))
        found[kind] = sum(integer(length, "the length of a stream") for length in lengths)
    return Leftovers(**found)


def left_of(found: Leftovers, outcome: DrainOutcome, *, is_temporary: bool) -> Leftovers:
    """The part of the streams' entries that is left undone (L3)."""
    if is_temporary:
        return found
    return Leftovers(
        events=0 if outcome.events_done else found.events,
        writes=0 if outcome.writes_done else found.writes,
        held=0 if outcome.held_done else found.held,
    )


def tell(left: Leftovers, *, is_temporary: bool) -> None:
    fixes = {
        True: "use a server that outlives the node: set valkey.url, or valkey.embedded_dir",
        False: "start a worker that declares the sinks; see workers.drain_ms",
    }
    log.error(
        "node.undrained",
        count=left.count,
        outcome="lost" if is_temporary else "left to others",
        events=left.events,
        writes=left.writes,
        held=left.held,
        fix=fixes[is_temporary],
    )

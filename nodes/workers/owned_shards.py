"""The shards whose writes this node owns, and how far each lane is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ...coordinator.log.ownership import Claim
from ...schemas.replies import order

__all__ = ["Cursor", "OwnedShard", "latest"]


class Cursor:
    """Where one lane is in one shard's writes."""

    __slots__ = (
        "busy",
        "checkpoint",
        "committed",
        "emptied",
        "held",
        "parked",
        "position",
        "rung",
        "sunk",
        "turn",
        "undecodable",
    )

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint  #: its name
        self.committed = "0-0"  #: the checkpoint as it is in Valkey
        self.sunk = "0-0"  #: the furthest position of this tenure
        self.position = ""  #: of the last entry read; empty: the checkpoint is not asked for yet
        self.held: str | None = "0-0"  #: of the last held entry read; None: all were read
        self.undecodable: dict[str, list[tuple[int, str]]] = {}  #: key -> version, id in held
        self.rung = True  #: there may be something to read
        self.busy = False
        self.parked = False  #: a row of it is locked; it is flushed by itself, beside the rounds
        self.turn = 0  #: the round in which it was read last
        self.emptied = 0  #: the round in which nothing was found

    def moved(self, committed: str) -> None:
        """The checkpoint was committed."""
        self.committed, self.sunk = committed, latest((self.sunk, committed))

    def not_decoded(self, key: str, version: int, held_id: str) -> None:
        """A write of this key was set aside; a newer one takes its place."""
        self.undecodable.setdefault(key, []).append((version, held_id))

    def begin_anew(self) -> None:
        """The stream was deleted behind the last id of all: ids are small again."""
        self.position, self.sunk, self.rung = "", "0-0", True

    def begin_again(self) -> None:
        """The remembered position may be of another history: ask for the checkpoint."""
        self.position, self.held, self.rung = "", "0-0", True


class OwnedShard:
    """A shard's writes, for one tenure."""

    __slots__ = ("places", "tenure", "yielding")

    def __init__(self, tenure: Claim, checkpoints: Sequence[str]) -> None:
        """``checkpoints``: the name of each lane's."""
        self.tenure = tenure
        self.places = tuple(Cursor(name) for name in checkpoints)
        self.yielding = False

    def __repr__(self) -> str:
        return f"<OwnedShard {self.shard} passed {self.passed}>"

    @property
    def shard(self) -> int:
        return self.tenure.resource

    @property
    def busy(self) -> bool:
        return any(place.busy or place.parked for place in self.places)

    @property
    def passed(self) -> str:
        """The id that every lane is past."""
        return min((place.position or "0-0" for place in self.places), key=order)

    def checkpoints(self) -> Iterator[str]:
        """Name and position of each lane's, by turns."""
        for place in self.places:
            yield from (place.checkpoint, place.committed)


def latest(ids: Iterable[str]) -> str:
    """The latest of these ids."""
    return max(ids, key=order)

"""The shards whose writes this node owns, and how far each lane is in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...coordinator.ownership import Tenure
from ...schemas.replies import order

__all__ = ["Holding", "Place"]


class Place:
    """Where one lane is in one shard's writes."""

    __slots__ = ("busy", "checkpoint", "emptied", "parked", "position", "rung", "sunk", "turn")

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint  #: its name
        self.sunk = "0-0"  #: the furthest position of this tenure
        self.position = ""  #: the checkpoint as committed; empty: not asked for yet
        self.rung = True  #: there may be something to read
        self.busy = False
        self.parked = False  #: a row of it is locked; it is flushed by itself, beside the rounds
        self.turn = 0  #: the round in which it was read last
        self.emptied = 0  #: the round in which nothing was found

    def moved(self, position: str) -> None:
        """The checkpoint was committed."""
        self.position, self.sunk = position, max(self.sunk, position, key=order)

    def begin_anew(self) -> None:
        """The stream was deleted behind the last id of all: ids are small again."""
        self.position, self.sunk, self.rung = "", "0-0", True

    def begin_again(self) -> None:
        """What is remembered may be of another history: the checkpoint is to be asked for."""
        self.position, self.rung = "", True


class Holding:
    """A shard's writes, for one tenure."""

    __slots__ = ("places", "tenure", "yielding")

    def __init__(self, tenure: Tenure, checkpoints: Sequence[str]) -> None:
        """``checkpoints``: the name of each lane's."""
        self.tenure = tenure
        self.places = tuple(Place(name) for name in checkpoints)
        self.yielding = False

    def __repr__(self) -> str:
        return f"<Holding {self.shard} passed {self.passed}>"

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
            yield from (place.checkpoint, place.position or "0-0")

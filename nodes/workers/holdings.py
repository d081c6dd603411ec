"""The shards whose writes this node owns, and how far each lane is in them."""

from __future__ import annotations

from ...coordinator.ownership import Tenure
from ...schemas.replies import order

__all__ = ["Holding", "Place"]


class Place:
    """Where one lane is in one shard's writes."""

    __slots__ = ("busy", "emptied", "parked", "position", "rung", "turn")

    def __init__(self) -> None:
        self.position = ""  #: the checkpoint as committed; empty: not asked for yet
        self.rung = True  #: there may be something to read
        self.busy = False
        self.parked = False  #: a row of it is locked; it is flushed by itself, beside the rounds
        self.turn = 0  #: the round in which it was read last
        self.emptied = 0  #: the round in which nothing was found


class Holding:
    """A shard's writes, for one tenure."""

    __slots__ = ("places", "tenure", "yielding")

    def __init__(self, tenure: Tenure, lanes: int) -> None:
        self.tenure = tenure
        self.places = tuple(Place() for _ in range(lanes))
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

"""What this node knows of one shard's log: the position, and how far it can be relied on.

E1  Only the notice after the position follows it: seq + 1 of the same epoch.
E2  What a bell told is believed until the next read, which has to find the same notice, by
    id and version, in its place: a bell may come late, or from a server that is not in
    charge any more. So a read begins at what was read, not at what was told.
E3  A read that was sent before the newest doubt proves nothing.

Plain state: reading, applying and resetting are the follower's.
"""

from __future__ import annotations

from ...schemas.notices import Position

__all__ = ["ShardView"]

_NEVER = float("-inf")
_TOLD_MAX = 4_096


class ShardView:
    __slots__ = (
        "_asked",
        "_doubted",
        "_read_seq",
        "_told",
        "epoch",
        "generation",
        "live_until",
        "number",
        "proved_at",
        "refused",
        "seq",
        "spoilt",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.refused = ""  #: why the server does not let us read the log; empty if it does
        self.epoch = 0
        self.seq = 0
        self.live_until = _NEVER  #: monotonic seconds; what the node promises of this shard
        self.proved_at = _NEVER  #: when the last read that proved something was sent
        self.generation = 0  #: goes up with every reset
        self._read_seq = 0  # what lies between this and ``seq`` was told by bells
        self._told: dict[bytes, bytes] = {}  # id -> version
        self.spoilt = False  #: a read found an id that no epoch is past: the log must start over
        self._asked = 0
        self._doubted = 0

    def __repr__(self) -> str:
        return f"<ShardView {self.number} at {self.epoch}-{self.seq} generation {self.generation}>"

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.seq)

    def follows(self, position: Position) -> bool:
        return position.epoch == self.epoch and position.seq == self.seq + 1

    def may_be_told(self, position: Position) -> bool:
        return self.follows(position) and len(self._told) < _TOLD_MAX

    def tell(self, position: Position, version: int) -> None:
        """A bell brought the notice that follows."""
        self.seq = position.seq
        self._told[b"%d-%d" % (position.epoch, position.seq)] = b"%d" % version

    def start_over(self, at: Position) -> None:
        """A read says that we are there."""
        self._told.clear()
        self.spoilt = False
        self.epoch, self.seq, self._read_seq = at.epoch, at.seq, at.seq

    def ask(self) -> str:
        """The id after which to read now."""
        self._asked = self.seq
        return f"{self.epoch}-{self._read_seq}"

    def confirms(self, raw_id: bytes, raw_version: bytes) -> bool:
        """A read found this notice: is it one that was told?"""
        if not self._told or self._told.pop(raw_id, None) != raw_version:
            return False
        self._read_seq += 1
        return True

    def contradicts(self, position: Position) -> bool:
        """A read found this notice, which was not told, where told ones should be."""
        return position.epoch == self.epoch and (position.seq <= self.seq or bool(self._told))

    @property
    def strayed(self) -> bool:
        """The last read, to the log's end, did not find all that had been told before it."""
        return self._read_seq < self._asked

    def doubt(self, reads: int) -> None:
        """The promise is over; only reads after this many can renew it."""
        self.live_until, self._doubted = _NEVER, reads

    def prove(self, read: int, sent_at: float, live_until: float) -> bool:
        """Renew the promise, if this read can."""
        if read <= self._doubted:
            return False
        self.refused = ""
        self.live_until, self.proved_at = live_until, sent_at
        return True

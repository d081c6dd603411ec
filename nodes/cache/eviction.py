"""Which entry has to go when there is no room: two orders, each a list of its own.

E1  The list is threaded through the entries: adding, removing and touching take constant time
    and no memory. Finding who has to go does too; for SIEVE on average, as each step of the
    hand takes back what a hit has given.
E2  After ``add`` there are at most ``entries_max`` entries and ``bytes_max`` bytes, as many as
    fit have stayed, and what had to go is counted by the bound that was reached.
E3  ``Sieve`` (Zhang et al., NSDI '24): a hit sets a bit; the hand passes from old to new, takes
    bits away, and stops at the first entry without one.
E4  ``Lru``: a hit makes an entry the newest; the oldest has to go.

An entry is in at most one order. Whether it is still valid, and under which name it is found,
is known elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["EvictionOrder", "Linked", "Lru", "Sieve"]


class Linked:
    """What has a place in an order. ``size`` is in bytes and must not change meanwhile."""

    __slots__ = ("key", "newer", "older", "size", "visited")

    def __init__(self, key: str, size: int) -> None:
        self.key = key
        self.size = size
        self.visited = False
        self.newer: Linked | None = None
        self.older: Linked | None = None


class EvictionOrder(ABC):
    def __init__(self, *, entries_max: int, bytes_max: int) -> None:
        self.entries_max = entries_max
        self.bytes_max = bytes_max
        self.evicted_for_entries = 0
        self.evicted_for_bytes = 0
        self.clear()

    def __len__(self) -> int:
        return self._entries

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._entries} entries, {self.bytes} bytes>"

    @abstractmethod
    def touch(self, entry: Linked) -> None:
        """It was hit."""

    def add(self, entry: Linked) -> list[Linked]:
        """Make it the newest; what had to go for it. It must fit alone (``bytes_max``)."""
        evicted = []
        while self._oldest is not None:
            if self._entries >= self.entries_max:
                self.evicted_for_entries += 1
            elif self.bytes + entry.size > self.bytes_max:
                self.evicted_for_bytes += 1
            else:
                break
            victim = self._victim(self._oldest)
            self.remove(victim)
            evicted.append(victim)
        self._link(entry)
        self._entries += 1
        self.bytes += entry.size
        return evicted

    def remove(self, entry: Linked) -> None:
        self._unlink(entry)
        self._entries -= 1
        self.bytes -= entry.size

    def clear(self) -> None:
        """Forget all; what was in it may not be removed afterwards."""
        self.bytes = 0
        self._entries = 0
        self._newest: Linked | None = None
        self._oldest: Linked | None = None

    @abstractmethod
    def _victim(self, oldest: Linked) -> Linked:
        """Who has to go next."""

    def _link(self, entry: Linked) -> None:
        entry.older = self._newest
        if self._newest is not None:
            self._newest.newer = entry
        self._newest = entry
        if self._oldest is None:
            self._oldest = entry

    def _unlink(self, entry: Linked) -> None:
        if entry.newer is not None:
            entry.newer.older = entry.older
        else:
            self._newest = entry.older
        if entry.older is not None:
            entry.older.newer = entry.newer
        else:
            self._oldest = entry.newer
        entry.newer = entry.older = None


class Sieve(EvictionOrder):
    _hand: Linked | None = None  #: none: it begins with the oldest

    def touch(self, entry: Linked) -> None:
        entry.visited = True

    def remove(self, entry: Linked) -> None:
        if self._hand is entry:
            self._hand = entry.newer
        super().remove(entry)

    def clear(self) -> None:
        super().clear()
        self._hand = None

    def _victim(self, oldest: Linked) -> Linked:
        hand = self._hand or oldest
        while hand.visited:
            hand.visited = False
            hand = hand.newer or oldest
        self._hand = hand
        return hand


class Lru(EvictionOrder):
    def touch(self, entry: Linked) -> None:
        if entry is not self._newest:
            self._unlink(entry)
            self._link(entry)

    def _victim(self, oldest: Linked) -> Linked:
        return oldest

"""The near cache: decoded values in this process, over the shared tier.

N1  A hit is served only while the entry is fresh, the follower's promise holds, the shard
    was not reset since, and every tag is still at the version embedded in the entry.
N2  A value is kept only under a reservation that was made before it was read or written;
    every notice for the key in between raises the lowest version that may be kept. What is
    known to be newer removes what is older, also when it cannot be kept itself.
N3  Never more than ``entries_max`` entries or ``bytes_max`` bytes; eviction is SIEVE (Zhang
    et al., NSDI '24): a hit sets a bit, the hand passes from old to new and takes the first
    without. No timers: what expired is found when it is read, or evicted.

Nothing here suspends, and nothing here talks to Valkey.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ...coordinator.clock import Clock
from ...coordinator.log import Follower, ShardView
from ...schemas.keys import shard_of
from .tags import TagState

__all__ = ["NearCache", "NearEntry", "NearStatistics", "Reservation"]

_OVERHEAD_BYTES = 400  #: of an entry's objects, measured with tracemalloc


class NearEntry:
    """A value and what decides on its validity. Times are the node's monotonic seconds."""

    __slots__ = (
        "fresh_until",
        "generation",
        "gone_at",
        "key",
        "newer",
        "older",
        "size",
        "tags",
        "value",
        "version",
        "view",
        "visited",
        "written_at",
    )

    def __init__(
        self,
        key: str,
        value: Any,
        *,
        version: int,
        size: int,
        fresh_until: float,
        gone_at: float,
        written_at: float,
        view: ShardView,
        tags: tuple[tuple[TagState, int], ...],
        soft_until: float | None = None,
        negative: bool = False,
    ) -> None:
        self.key = key
        self.value = value
        self.version = version
        self.size = size + _OVERHEAD_BYTES
        self.fresh_until = fresh_until
        self.gone_at = gone_at
        self.written_at = written_at
        self.view = view
        self.generation = view.generation
        self.tags = tags
        self.visited = False
        self.newer: NearEntry | None = None
        self.older: NearEntry | None = None

    def __repr__(self) -> str:
        return f"<NearEntry {self.key} version {self.version}>"

    def tags_hold(self) -> bool:
        for state, version in self.tags:  # noqa: SIM110  # on every hit; all() is slower
            if state.version > version:
                return False
        return True

    def tags_may_hold(self) -> bool:
        """As ``tags_hold``, but what is not known speaks for the entry."""
        return all(not state.known or state.hard <= version for state, version in self.tags)


class Reservation:
    """The right to keep what a read or a write that starts now brings back."""

    __slots__ = ("floor", "generation", "key", "view")

    def __init__(self, key: str, view: ShardView) -> None:
        self.key = key
        self.view = view
        self.generation = view.generation
        self.floor = 0


class NearStatistics(Struct, frozen=True, kw_only=True):
    entries: int
    bytes: int
    hits: int
    evictions: int
    refused: int


class NearCache:
    def __init__(
        self, follower: Follower, *, entries_max: int, bytes_max: int, clock: Clock
    ) -> None:
        self._follower = follower
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._monotonic = clock.monotonic
        self._entries: dict[str, NearEntry] = {}
        self._reservations: dict[str, set[Reservation]] = {}
        self._newest: NearEntry | None = None
        self._oldest: NearEntry | None = None
        self._hand: NearEntry | None = None
        self._bytes = 0
        self.hits = 0
        self.evictions = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> NearStatistics:
        return NearStatistics(
            entries=len(self._entries),
            bytes=self._bytes,
            hits=self.hits,
            evictions=self.evictions,
            refused=self.refused,
        )

    def get(self, key: str) -> NearEntry | None:
        """The entry, if it may be served as fresh right now (N1)."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._monotonic()
        if (
            now < entry.fresh_until
            and now < self._follower.live_until
            and entry.generation == entry.view.generation
            and (not entry.tags or entry.tags_hold())
        ):
            entry.visited = True
            self.hits += 1
            return entry
        return None

    def presumable(self, key: str) -> NearEntry | None:
        """The entry, if nothing is known against serving it as stale while disconnected."""
        entry = self._entries.get(key)
        if entry is not None and self._monotonic() < entry.gone_at and entry.tags_may_hold():
            return entry
        return None

    def ripe(self, key: str) -> NearEntry | None:
        return None

    def peek(self, key: str) -> NearEntry | None:
        """The entry, whether it may be served or not; a look is no hit."""
        return self._entries.get(key)

    def reserved(self, key: str) -> int:
        """Reads and writes under way whose result may be kept."""
        return len(self._reservations.get(key, ()))

    def reserve(self, key: str) -> Reservation:
        """To be made before the shared tier is read (N2)."""
        view = self._follower.views[self._shard(key)]
        reservation = Reservation(key, view)
        self._reservations.setdefault(key, set()).add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """The reservation's read is over."""
        held = self._reservations.get(reservation.key)
        if held is not None:
            held.discard(reservation)
            if not held:
                del self._reservations[reservation.key]

    def keep(self, reservation: Reservation, entry: NearEntry) -> bool:
        """Store what came back, unless a notice said meanwhile that it is old."""
        present = self._entries.get(entry.key)
        if present is not None and (
            present.version < entry.version or present.generation != present.view.generation
        ):
            self._remove(present)
            present = None
        if (
            entry.version < reservation.floor
            or (present is not None and present.version > entry.version)
            or reservation.generation != reservation.view.generation
            or not entry.tags_hold()
            or entry.size > self._bytes_max
        ):
            self.refused += 1
            return False
        self._insert(entry)
        return True

    def drop(self, key: str, version: int) -> None:
        """A notice said that what is older than this version is old."""
        for reservation in self._reservations.get(key, ()):
            reservation.floor = max(reservation.floor, version)
        entry = self._entries.get(key)
        if entry is not None and entry.version < version:
            self._remove(entry)

    def extend(self, key: str, since: int, version: int, fresh_until: float) -> None:
        """The same value lives on under a new version."""
        entry = self._entries.get(key)
        if entry is not None and entry.version == since:
            entry.version, entry.fresh_until = version, fresh_until
            entry.gone_at = max(entry.gone_at, fresh_until)
        self.drop(key, version)

    def clear(self) -> None:
        for held in self._reservations.values():
            for reservation in held:
                reservation.generation = -1
        self._entries.clear()
        self._newest = self._oldest = self._hand = None
        self._bytes = 0

    def _shard(self, key: str) -> int:
        return shard_of(key, len(self._follower.views))

    def _insert(self, entry: NearEntry) -> None:
        present = self._entries.get(entry.key)
        if present is not None:
            self._remove(present)
        while self._entries and (
            len(self._entries) >= self._entries_max or self._bytes + entry.size > self._bytes_max
        ):
            self._evict()
        self._entries[entry.key] = entry
        self._bytes += entry.size
        entry.older = self._newest
        if self._newest is not None:
            self._newest.newer = entry
        self._newest = entry
        if self._oldest is None:
            self._oldest = entry

    def _evict(self) -> None:
        hand = self._hand or self._oldest
        while hand is not None and hand.visited:
            hand.visited = False
            hand = hand.newer or self._oldest
        if hand is None:
            return
        self._hand = hand.newer
        self.evictions += 1
        self._remove(hand)

    def _remove(self, entry: NearEntry) -> None:
        del self._entries[entry.key]
        self._bytes -= entry.size
        if self._hand is entry:
            self._hand = entry.newer
        if entry.newer is not None:
            entry.newer.older = entry.older
        else:
            self._newest = entry.older
        if entry.older is not None:
            entry.older.newer = entry.newer
        else:
            self._oldest = entry.newer
        entry.newer = entry.older = None

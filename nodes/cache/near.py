"""The near cache: decoded values in this process, over the shared tier.

N1  A hit is served only while the entry is fresh, the follower's promise (and no more than
    ``slack_s`` on top) holds, the shard was not reset since, and every tag is still at the
    version embedded in the entry.
N2  A value is kept only under a reservation that was made before it was read or written;
    every notice for the key in between raises the lowest version that may be kept. What is
    known to be newer removes what is older, also when it cannot be kept itself.
N3  Never more than ``entries_max`` values of ``bytes_max`` bytes, and beside them never more
    than ``negatives_max`` known absences of an eighth of these bytes: they never evict values.
    No timers: what expired is found when it is read, or evicted.
N4  A value of more than ``value_bytes_max`` bytes is left to the shared tier.
N5  An entry is given out as ripe once: from ``fresh_until`` on, and before ``soft_until``.

Nothing here suspends, and nothing here talks to Valkey. What is evicted: ``eviction``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from msgspec import Struct

from ...coordinator.clock import Clock
from ...coordinator.log.follower import Follower, ShardView
from ...schemas.settings import CacheDefaults
from .eviction import EvictionOrder, Linked, Lru, Sieve
from .reservations import Reservation, Reservations
from .tags import TagState

__all__ = ["NearCache", "NearEntry", "NearStatistics", "Reservation"]

_OVERHEAD_BYTES = 400  #: of an entry's objects, measured with tracemalloc
_NEGATIVES_PART = 8  #: known absences may take this part of ``bytes_max``, in addition


class NearEntry(Linked):
    """A value and what decides on its validity. Times are the node's monotonic seconds.

    Until ``fresh_until`` it is served without further thought; until ``soft_until`` it is
    fresh, but worth a refresh. ``negative``: it is known that there is no value. ``written_at`` is
    None where that is not known.
    """

    __slots__ = (
        "fresh_until",
        "generation",
        "gone_at",
        "negative",
        "soft_until",
        "tags",
        "value",
        "version",
        "view",
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
        soft_until: float | None = None,
        gone_at: float,
        written_at: float | None,
        view: ShardView,
        tags: tuple[tuple[TagState, int], ...],
        negative: bool = False,
    ) -> None:
        super().__init__(key, size + len(key) + _OVERHEAD_BYTES)
        self.value = value
        self.version = version
        self.fresh_until = fresh_until
        self.soft_until = fresh_until if soft_until is None else soft_until
        self.gone_at = gone_at
        self.written_at = written_at
        self.view = view
        self.generation = view.generation
        self.tags = tags
        self.negative = negative

    def __repr__(self) -> str:
        return f"<NearEntry {self.key} version {self.version}>"

    @property
    def value_bytes(self) -> int:
        return self.size - len(self.key) - _OVERHEAD_BYTES

    def age_ms(self, now: float) -> int | None:
        return None if self.written_at is None else max(0, int((now - self.written_at) * 1000))

    def tags_hold(self) -> bool:
        for state, version in self.tags:  # noqa: SIM110  # on every hit; all() is slower
            if state.version > version:
                return False
        return True

    def tags_may_hold(self) -> bool:
        """As ``tags_hold``, but what is not known speaks for the entry."""
        return all(not state.known or state.hard <= version for state, version in self.tags)


class NearStatistics(Struct, frozen=True, kw_only=True):
    entries: int
    negatives: int  #: of these entries
    bytes: int
    hits: int
    negative_hits: int  #: of these hits
    evictions: int  #: the next three together
    evictions_entries: int  #: of values, as there were too many
    evictions_bytes: int  #: of values, as they were too large together
    evictions_negatives: int
    oversized: int  #: not kept, as the value is too large for the near cache
    refused: int  #: not kept, as it may be old


class NearCache:
    def __init__(
        self,
        follower: Follower,
        *,
        entries_max: int,
        bytes_max: int,
        negatives_max: int,
        value_bytes_max: int,
        policy: Literal["sieve", "lru"],
        slack_s: float = 0.0,
        clock: Clock,
    ) -> None:
        order = Sieve if policy == "sieve" else Lru
        self._values: EvictionOrder = order(entries_max=entries_max, bytes_max=bytes_max)
        self._negatives: EvictionOrder = order(
            entries_max=negatives_max, bytes_max=bytes_max // _NEGATIVES_PART
        )
        self.entries_max = entries_max + negatives_max
        self.bytes_max = bytes_max + bytes_max // _NEGATIVES_PART
        self._follower = follower
        self.value_bytes_max = value_bytes_max
        self._monotonic = clock.monotonic
        self._entries: dict[str, NearEntry] = {}
        reservations = Reservations(follower.views)
        self.reserve = reservations.reserve
        self.release = reservations.release
        self._reservations = reservations
        #: The entry, if it may be served as fresh right now (N1).
        self.get = self._getter(slack_s)
        if policy == "lru":
            self.get = self._moving(self.get)
        self.hits = 0
        self.negative_hits = 0  #: of these hits
        self.oversized = 0
        self.refused = 0

    @classmethod
    def from_defaults(
        cls, follower: Follower, defaults: CacheDefaults, *, slack_s: float, clock: Clock
    ) -> Self:
        """Bounded as the settings say."""
        return cls(
            follower,
            entries_max=defaults.near_entries_max,
            bytes_max=defaults.near_bytes_max,
            negatives_max=defaults.near_negatives_max,
            value_bytes_max=defaults.near_value_bytes_max,
            policy=defaults.near_policy,
            slack_s=slack_s,
            clock=clock,
        )

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> NearStatistics:
        values, negatives = self._values, self._negatives
        return NearStatistics(
            entries=len(self._entries),
            negatives=len(negatives),
            bytes=values.bytes + negatives.bytes,
            hits=self.hits,
            negative_hits=self.negative_hits,
            evictions=self.evictions,
            evictions_entries=values.evicted_for_entries,
            evictions_bytes=values.evicted_for_bytes,
            evictions_negatives=negatives.evicted_for_entries + negatives.evicted_for_bytes,
            oversized=self.oversized,
            refused=self.refused,
        )

    @property
    def evictions(self) -> int:
        orders = self._values, self._negatives
        return sum(each.evicted_for_entries + each.evicted_for_bytes for each in orders)

    def _getter(self, slack_s: float) -> Callable[[str], NearEntry | None]:
        """What a hit needs is closed over: to look it up on ``self`` is a tenth of a hit."""
        entries, follower, monotonic = self._entries, self._follower, self._monotonic

        def get(key: str) -> NearEntry | None:
            entry = entries.get(key)
            if entry is None:
                return None
            now = monotonic()
            if (
                now < entry.fresh_until
                # Nearly all hits need no slack, and to compare is faster than to add.
                and (now < follower.live_until or now < follower.live_until + slack_s)
                and entry.generation == entry.view.generation
                and (not entry.tags or entry.tags_hold())
            ):
                entry.visited = True  # all that SIEVE asks for, without a call
                self.hits += 1
                if entry.negative:
                    self.negative_hits += 1
                return entry
            return None

        return get

    def _moving(self, get: Callable[[str], NearEntry | None]) -> Callable[[str], NearEntry | None]:
        def get_and_move(key: str) -> NearEntry | None:
            entry = get(key)
            if entry is not None:
                self._order_of(entry).touch(entry)
            return entry

        return get_and_move

    def ripe(self, key: str) -> NearEntry | None:
        """A hit for one caller, who sees to a refresh: the others get it as before (N5)."""
        entry = self._entries.get(key)
        if entry is None or not entry.fresh_until <= self._monotonic() < entry.soft_until:
            return None
        ripe_since, entry.fresh_until = entry.fresh_until, entry.soft_until
        if self.get(key) is None:
            entry.fresh_until = ripe_since
            return None
        return entry

    def presumable(self, key: str) -> NearEntry | None:
        """The entry, if nothing is known against serving it as stale while disconnected."""
        entry = self._entries.get(key)
        if entry is not None and self._monotonic() < entry.gone_at and entry.tags_may_hold():
            return entry
        return None

    def peek(self, key: str) -> NearEntry | None:
        """The entry, whether it may be served or not; a look is no hit."""
        return self._entries.get(key)

    def reserved(self, key: str) -> int:
        """Reads and writes under way whose result may be kept."""
        return len(self._reservations.of(key))

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
            or (entry.tags and not entry.tags_hold())
        ):
            self.refused += 1
            return False
        if self._too_large(entry):
            self.oversized += 1
            return False
        self._insert(entry)
        return True

    def leave(self, key: str, version: int) -> None:
        """What came back is too large to be kept (N4); what is older goes all the same."""
        self.oversized += 1
        entry = self._entries.get(key)
        if entry is not None and entry.version < version:
            self._remove(entry)

    def drop(self, key: str, version: int) -> None:
        """A notice said that what is older than this version is old."""
        self._reservations.raise_floor(key, version)
        entry = self._entries.get(key)
        if entry is not None and entry.version < version:
            self._remove(entry)

    def extend(
        self,
        key: str,
        since: int,
        version: int,
        fresh_until: float,
        soft_until: float | None = None,
    ) -> None:
        """The same value lives on under a new version."""
        entry = self._entries.get(key)
        if entry is not None and entry.version == since:
            entry.version, entry.fresh_until = version, fresh_until
            entry.soft_until = fresh_until if soft_until is None else soft_until
            entry.gone_at = max(entry.gone_at, entry.soft_until)
        self.drop(key, version)

    def clear(self) -> None:
        self._reservations.void()
        self._entries.clear()
        self._values.clear()
        self._negatives.clear()

    def _order_of(self, entry: NearEntry) -> EvictionOrder:
        return self._negatives if entry.negative else self._values

    def _too_large(self, entry: NearEntry) -> bool:
        return (
            entry.value_bytes > self.value_bytes_max or entry.size > self._order_of(entry).bytes_max
        )

    def _insert(self, entry: NearEntry) -> None:
        present = self._entries.get(entry.key)
        if present is not None:
            self._remove(present)
        for evicted in self._order_of(entry).add(entry):
            del self._entries[evicted.key]
        self._entries[entry.key] = entry

    def _remove(self, entry: NearEntry) -> None:
        del self._entries[entry.key]
        self._order_of(entry).remove(entry)

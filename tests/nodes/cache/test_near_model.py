"""The near cache beside a plain dict that knows what may be served, under every kind of event."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from forebay.coordinator.log.follower import ShardView
from forebay.nodes.cache.eviction import EvictionOrder, Linked
from forebay.nodes.cache.near import NearCache, NearEntry, Reservation
from support.near import FOREVER, NAMES, OVERHEAD, SHARDS, TAGS, Near

KEYS = [f"k{number}" for number in range(4)]
TTLS = st.sampled_from([(5.0, 0.0), (50.0, 0.0), (50.0, 49.0), (5.0, 4.0)])
SLACK_S = 2.0
BYTES_MAX = 16 * (OVERHEAD + 10)


class InFlight:
    """A read or write that has its value, and has not yet kept it."""

    def __init__(self, reservation: Reservation, began: int, version: int, **options: Any) -> None:
        self.key = reservation.key
        self.reservation = reservation
        self.began = began
        self.version = version
        self.options = options


class Known:
    """What the model knows of an entry that was kept; nothing in the cache writes to it."""

    def __init__(self, flight: InFlight, entry: NearEntry) -> None:
        self.entry = entry
        self.value = entry.value
        self.version = flight.version
        self.fresh_until = entry.fresh_until
        self.soft_until = entry.soft_until
        self.tags = dict(flight.options.get("tags", {}))
        self.began = flight.began


class NearMachine(RuleBasedStateMachine):
    """Nodes write, extend, bump and invalidate; notices of it arrive later, or get lost.

    ``said`` and ``bumped`` are what notices told; whatever is served must agree with them,
    and whatever is there and agrees with them must be served.
    """

    made: ClassVar[type[NearCache]] = NearCache
    policy: ClassVar[str] = "sieve"
    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        self.near = Near(
            made=self.made,
            policy=self.policy,
            entries_max=2,
            bytes_max=BYTES_MAX,
            negatives_max=2,
            value_bytes_max=1_000,
            slack_s=SLACK_S,
        )
        self.cache = self.near.cache
        self.version = 10
        self.stored: dict[str, tuple[int, bool, dict[str, int]]] = {  # on the server
            key: (self.version, False, {TAGS[0]: 1}) for key in KEYS
        }
        self.tag_versions = dict.fromkeys(TAGS, 1)
        self.notices: list[tuple[Any, ...]] = []
        self.said: dict[str, int] = dict.fromkeys(KEYS, 0)
        self.bumped: dict[str, int | None] = dict.fromkeys(TAGS, 1)  # None: not known
        self.resets = [0] * SHARDS
        self.kept: dict[str, Known] = {}
        self.hits = 0

    def tick(self) -> int:
        self.version += 1
        return self.version

    # The server

    @rule(key=st.sampled_from(KEYS), tags=st.sets(st.sampled_from(TAGS)), negative=st.booleans())
    def somebody_writes(self, key: str, tags: set[str], negative: bool) -> None:
        version = self.tick()
        self.stored[key] = version, negative, {tag: self.tag_versions[tag] for tag in tags}
        self.notices.append(("key", key, version))

    @rule(key=st.sampled_from(KEYS), ttl=TTLS)
    def somebody_extends(self, key: str, ttl: tuple[float, float]) -> None:
        if key in self.stored:
            since, negative, tags = self.stored[key]
            version = self.tick()
            self.stored[key] = version, negative, tags
            soft_until = self.near.now + ttl[0]
            self.notices.append(("more", key, version, since, soft_until - ttl[1], soft_until))

    @rule(key=st.sampled_from(KEYS))
    def somebody_invalidates(self, key: str) -> None:
        self.stored.pop(key, None)
        self.notices.append(("key", key, self.tick()))

    @rule(tag=st.sampled_from(TAGS))
    def somebody_bumps(self, tag: str) -> None:
        self.tag_versions[tag] = self.tick()
        self.notices.append(("tag", tag, self.version))

    # The node

    @rule(target=flights, key=st.sampled_from(KEYS), ttl=TTLS)
    def a_read_begins(self, key: str, ttl: tuple[float, float]):
        reservation = self.cache.reserve(key)
        if key not in self.stored:
            self.cache.release(reservation)
            return multiple()
        version, negative, tags = self.stored[key]
        options = {"ttl": ttl[0], "ahead": ttl[1], "tags": tags, "negative": negative}
        return InFlight(reservation, self.resets[NAMES.shard(key)], version, size=10, **options)

    @rule(
        target=flights,
        key=st.sampled_from(KEYS),
        size=st.sampled_from([0, 1_000, 1_001, 10_000]),
        negative=st.booleans(),
    )
    def a_write_of_our_own_begins(self, key: str, size: int, negative: bool):
        reservation = self.cache.reserve(key)
        version = self.tick()
        self.stored[key] = version, negative, {}
        self.notices.append(("key", key, version))
        began = self.resets[NAMES.shard(key)]
        return InFlight(reservation, began, version, size=size * (not negative), negative=negative)

    @rule(key=st.sampled_from(KEYS), other=st.sampled_from(KEYS), data=st.data())
    def a_read_is_overtaken(self, key: str, other: str, data: Any) -> None:
        flight = self.a_read_begins(key, (50.0, 49.0))
        match data.draw(st.sampled_from(["write", "bump", "loss", "extension", "nothing"])):
            case "write":
                self.somebody_writes(key, {TAGS[0]}, key == other)
            case "bump":
                self.somebody_bumps(TAGS[0])
            case "loss":
                self.notices_of_a_shard_are_lost(NAMES.shard(other))
            case "extension":
                self.somebody_extends(key, (50.0, 0.0))
        self.notices_arrive(data.draw(st.sampled_from([0, 99])))
        if isinstance(flight, InFlight):
            self.it_ends(flight)

    @rule(flight=consumes(flights))
    def it_ends(self, flight: InFlight) -> None:
        cache = self.cache
        entry = self.near.entry(flight.key, flight.version, **flight.options)
        others = {key: each for key, each in cache._entries.items() if key != entry.key}
        before = cache.statistics()
        if cache.keep(flight.reservation, entry):
            assert entry.value_bytes <= 1_000
            self.kept[entry.key] = Known(flight, entry)
        else:
            found = cache.statistics()
            counted = found.refused - before.refused, found.oversized - before.oversized
            assert sum(counted) == 1, "it was not told why"
            assert not counted[1] or entry.value_bytes > 1_000
        cache.release(flight.reservation)
        went = [each for key, each in others.items() if key not in cache._entries]
        assert len(went) == cache.evictions - before.evictions
        assert all(each.negative == entry.negative for each in went), "an absence evicts values"

    @rule(key=st.sampled_from(KEYS))
    def a_write_of_our_own_overtakes_an_extension(self, key: str) -> None:
        self.somebody_extends(key, (50.0, 49.0))
        self.it_ends(self.a_write_of_our_own_begins(key, 0, False))
        self.notices_arrive(99)

    @rule(key=st.sampled_from(KEYS))
    def it_is_the_moment_to_look_for_what_is_ripe(self, key: str) -> None:
        known = self.kept.get(key)
        if known is not None and known.fresh_until < known.soft_until:
            self.near.now = max(self.near.now, known.fresh_until)
        self.somebody_looks_for_what_is_ripe(key)

    @rule(flight=consumes(flights))
    def it_is_cancelled(self, flight: InFlight) -> None:
        self.cache.release(flight.reservation)

    @rule(count=st.sampled_from([1, 99]))
    def notices_arrive(self, count: int) -> None:
        for notice in self.notices[:count]:
            self.apply(*notice)
            self.whatever_would_be_served_is_right()
        del self.notices[:count]

    def apply(self, kind: str, name: str, version: int, *more: Any) -> None:
        if kind == "tag":
            self.bumped[name] = max(self.bumped[name] or 0, version)
            self.near.tags.bump(name, version)
            return
        self.said[name] = max(self.said[name], version)
        if kind == "key":
            self.cache.drop(name, version)
            return
        since, fresh_until, soft_until = more
        known = self.kept.get(name)
        if known is not None and known.version == since:
            known.version, known.fresh_until, known.soft_until = version, fresh_until, soft_until
        self.cache.extend(name, since, version, fresh_until, soft_until)

    @rule(shard=st.integers(0, SHARDS - 1))
    def notices_of_a_shard_are_lost(self, shard: int) -> None:
        self.notices = [each for each in self.notices if NAMES.shard(each[1]) != shard]
        self.resets[shard] += 1
        for tag in TAGS:
            if NAMES.shard(tag) == shard:
                self.bumped[tag] = None
        self.near.reset(shard)

    @rule(seconds=st.sampled_from([1.0, 3.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.near.now += seconds

    @rule(seconds=st.sampled_from([-10.0, -1.0, FOREVER, FOREVER, FOREVER]))
    def the_promise_changes(self, seconds: float) -> None:
        self.near.follower.live_until = self.near.now + seconds

    @rule(really=st.sampled_from([False, False, False, True]))
    def all_is_cleared(self, really: bool) -> None:
        if really:
            self.cache.clear()
            self.kept.clear()

    @rule(key=st.sampled_from(KEYS))
    def somebody_reads(self, key: str) -> None:
        self.check_get(key)

    @rule(key=st.sampled_from(KEYS))
    def somebody_looks_for_what_is_ripe(self, key: str) -> None:
        known, entry = self.present(key), self.cache.ripe(key)
        if known is None or not self.stands(key, known):
            assert entry is None, "it must not be served"
        elif not known.fresh_until <= self.near.now < known.soft_until:
            assert entry is None, "it is not ripe, or was given out already"
        else:
            assert entry is known.entry, "it is ripe"
            assert entry.visited
            known.fresh_until = known.soft_until
            self.hits += 1
            self.check_get(key)

    # The model

    def present(self, key: str) -> Known | None:
        """What the model knows of the key, unless it was evicted, or dropped."""
        return self.kept.get(key) if key in self.cache._entries else None

    def stands(self, key: str, known: Known) -> bool:
        """All that a hit asks for (N1, N2) but the time."""
        return (
            self.near.now < self.near.follower.live_until + SLACK_S
            and known.version >= self.said[key]
            and known.began == self.resets[NAMES.shard(key)]
            and all(
                (now := self.bumped[tag]) is not None and now <= version
                for tag, version in known.tags.items()
            )
        )

    def check_get(self, key: str) -> None:
        known, entry = self.present(key), self.cache.get(key)
        if known is None:
            assert entry is None, "it is served, and nobody kept it"
        elif self.near.now < known.fresh_until and self.stands(key, known):
            assert entry is known.entry, "nothing stands against it"
            assert (entry.value, entry.version) == (known.value, known.version)
            self.hits += 1
        else:
            assert entry is None, "it must not be served"

    @invariant()
    def whatever_would_be_served_is_right(self) -> None:
        """From old to new, so that also with LRU the order is the same afterwards."""
        for order in (self.cache._values, self.cache._negatives):
            bits = [(each, each.visited) for each in listed(order)]
            for entry, _ in bits:
                self.check_get(entry.key)
            for entry, visited in bits:
                entry.visited = visited
        for key in KEYS:
            if key not in self.cache._entries:
                assert self.cache.get(key) is None

    @invariant()
    def the_bounds_hold_and_the_figures_agree(self) -> None:
        cache, found = self.cache, self.cache.statistics()
        values, negatives = listed(cache._values), listed(cache._negatives)
        assert {id(each) for each in (*values, *negatives)} == {
            id(each) for each in cache._entries.values()
        }
        assert all(each.negative for each in negatives)
        assert not any(each.negative for each in values)
        assert (found.entries, found.negatives) == (len(values) + len(negatives), len(negatives))
        assert len(cache) == found.entries
        assert len(values) <= 2
        assert len(negatives) <= 2
        sizes = [sum(each.size for each in order) for order in (values, negatives)]
        assert found.bytes == sum(sizes)
        assert sizes[0] <= BYTES_MAX
        assert sizes[1] <= BYTES_MAX // 8
        assert found.hits == self.hits
        assert found.evictions == (
            found.evictions_entries + found.evictions_bytes + found.evictions_negatives
        )


def listed(order: EvictionOrder) -> list[Any]:
    """From old to new."""
    found: list[Linked] = []
    entry = order._oldest
    while entry is not None:
        assert entry.older is (found[-1] if found else None)
        found.append(entry)
        entry = entry.newer
    assert order._newest is (found[-1] if found else None)
    return found


class LruMachine(NearMachine):
    policy = "lru"


SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None)
NearMachine.TestCase.settings = SETTINGS
LruMachine.TestCase.settings = SETTINGS
TestNearMachine = NearMachine.TestCase
TestLruMachine = LruMachine.TestCase


class Floorless(NearCache):
    """Faults to be caught: a notice removes what is there, and is forgotten at once."""

    def drop(self, key: str, version: int) -> None:
        floors = {each: each.floor for each in self._reservations.of(key)}
        super().drop(key, version)
        for reservation, floor in floors.items():
            reservation.floor = floor


class Deaf(NearCache):
    """Only what comes in later hears of a notice."""

    def drop(self, key: str, version: int) -> None:
        for reservation in self._reservations.of(key):
            reservation.floor = max(reservation.floor, version)


class Trusting(NearCache):
    """A reset of the shard meanwhile is not looked at."""

    def keep(self, reservation: Reservation, entry: NearEntry) -> bool:
        reservation.generation = reservation.view.generation
        return super().keep(reservation, entry)


class Timeless(NearCache):
    """An entry refers to a shard that is never reset."""

    def _insert(self, entry: NearEntry) -> None:
        entry.view = ShardView(0)
        entry.generation = entry.view.generation
        super()._insert(entry)


class Tagless(NearCache):
    """Tags are looked at when it is kept, and not later."""

    def _insert(self, entry: NearEntry) -> None:
        entry.tags = ()
        super()._insert(entry)


class Crowded(NearCache):
    """Absences take the room of values."""

    def _order_of(self, entry: NearEntry) -> EvictionOrder:
        return self._values


class Greedy(NearCache):
    """The size of a value is not looked at."""

    def _too_large(self, entry: NearEntry) -> bool:
        return False


class Overripe(NearCache):
    """An entry is given out as ripe to everybody."""

    def ripe(self, key: str) -> NearEntry | None:
        entry = self._entries.get(key)
        until = entry.fresh_until if entry else 0.0
        found = super().ripe(key)
        if found is not None:
            found.fresh_until = until
        return found


class Shortsighted(NearCache):
    """An extension that comes for another version is applied all the same."""

    def extend(self, key: str, since: int, version: int, *until: float) -> None:
        entry = self._entries.get(key)
        super().extend(key, since if entry is None else entry.version, version, *until)


class Hopeful(NearCache):
    """The follower's promise is not looked at."""

    def __init__(self, follower: Any, **options: Any) -> None:
        super().__init__(follower, **{**options, "slack_s": FOREVER})


FAULTS = [
    Floorless,
    Deaf,
    Trusting,
    Timeless,
    Tagless,
    Crowded,
    Greedy,
    Overripe,
    Shortsighted,
    Hopeful,
]


@pytest.mark.parametrize("policy", ["sieve", "lru"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_catches_a_planted_fault(fault: type[NearCache], policy: str) -> None:
    """The negative control: the same machine, and a cache that breaks one promise."""
    name = f"{fault.__name__}Machine"
    machine = type(name, (NearMachine,), {"made": fault, "policy": policy})
    patient = settings(
        max_examples=3_000,
        stateful_step_count=40,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=patient)

"""The near cache: against a model of what it may serve, and SIEVE against a plain one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from forebay.coordinator.log import ShardView
from forebay.nodes.cache.near import NearCache, NearEntry, Reservation
from forebay.nodes.cache.tags import TagTable
from forebay.schemas.keys import Names

SHARDS = 2
OVERHEAD = NearEntry("", 0, version=0, size=0, fresh_until=0, gone_at=0, written_at=0,
                     view=ShardView(0), tags=()).size  # fmt: skip
NAMES = Names("near", SHARDS)
KEYS = [f"k{number}" for number in range(4)]
TAGS = ["red", "blue", "green"]
FOREVER = float("inf")


class Near:
    """A near cache with all that it looks at in our hands."""

    def __init__(self, *, entries_max: int = 100, bytes_max: int = 10**6) -> None:
        self.now = 1_000.0
        self.versions: dict[str, int] = dict.fromkeys(TAGS, 1)
        self.follower: Any = SimpleNamespace(
            views=tuple(ShardView(number) for number in range(SHARDS)), live_until=FOREVER
        )
        self.tags = TagTable(NAMES, self.capture)
        self.states = {tag: self.tags.state(tag) for tag in TAGS}
        for tag in TAGS:
            self.tags.bump(tag, 1)
        clock: Any = SimpleNamespace(monotonic=lambda: self.now)
        self.cache = NearCache(
            self.follower, entries_max=entries_max, bytes_max=bytes_max, clock=clock
        )

    async def capture(self, tags: Any) -> dict[str, int]:
        return {tag: self.versions[tag] for tag in tags}

    def view(self, key: str) -> ShardView:
        view: ShardView = self.follower.views[NAMES.shard(key)]
        return view

    def entry(
        self,
        key: str,
        version: int,
        *,
        size: int = 0,
        ttl: float = 1e9,
        tags: dict[str, int] | None = None,
    ) -> NearEntry:
        return NearEntry(
            key,
            f"{key}@{version}",
            version=version,
            size=size,
            fresh_until=self.now + ttl,
            gone_at=self.now + 2 * ttl,
            written_at=self.now,
            view=self.view(key),
            tags=tuple((self.states[tag], at) for tag, at in (tags or {}).items()),
        )

    def put(self, key: str, version: int = 1, **options: Any) -> bool:
        reservation = self.cache.reserve(key)
        try:
            return self.cache.keep(reservation, self.entry(key, version, **options))
        finally:
            self.cache.release(reservation)

    def reset(self, shard: int) -> None:
        self.follower.views[shard].generation += 1
        self.tags.reset(shard)


class InFlight:
    """A read or write that has got its value, and not yet kept it."""

    def __init__(self, reservation: Reservation, entry: NearEntry, began: int) -> None:
        self.reservation = reservation
        self.entry = entry
        self.began = began


class NearMachine(RuleBasedStateMachine):
    """Nodes write, bump tags and invalidate; notices of it arrive later, or get lost.

    ``applied`` is what notices said, in order; whatever is served must be compatible with it.
    """

    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        self.near = Near(entries_max=2, bytes_max=2 * OVERHEAD + 90)
        self.version = 10
        self.stored: dict[str, tuple[int, dict[str, int]]] = {}  # on the server
        self.tag_versions = dict.fromkeys(TAGS, 1)
        self.notices: list[tuple[str, str, int]] = []
        self.said: dict[str, int] = dict.fromkeys(KEYS, 0)
        self.bumped: dict[str, int | None] = dict.fromkeys(TAGS, 1)  # None: not known
        self.resets = [0] * SHARDS
        self.kept: dict[str, tuple[NearEntry, float, int]] = {}

    def tick(self) -> int:
        self.version += 1
        return self.version

    @rule(key=st.sampled_from(KEYS), tags=st.sets(st.sampled_from(TAGS)))
    def somebody_writes(self, key: str, tags: set[str]) -> None:
        version = self.tick()
        self.stored[key] = version, {tag: self.tag_versions[tag] for tag in tags}
        self.notices.append(("key", key, version))

    @rule(key=st.sampled_from(KEYS))
    def somebody_invalidates(self, key: str) -> None:
        self.stored.pop(key, None)
        self.notices.append(("key", key, self.tick()))

    @rule(tag=st.sampled_from(TAGS))
    def somebody_bumps(self, tag: str) -> None:
        self.tag_versions[tag] = self.tick()
        self.notices.append(("tag", tag, self.version))

    @rule(target=flights, key=st.sampled_from(KEYS), ttl=st.sampled_from([5.0, 50.0]))
    def a_read_begins(self, key: str, ttl: float):
        reservation = self.near.cache.reserve(key)
        if key not in self.stored:
            self.near.cache.release(reservation)
            return multiple()
        version, tags = self.stored[key]
        entry = self.near.entry(key, version, size=len(key) * 10, ttl=ttl, tags=tags)
        return InFlight(reservation, entry, self.resets[NAMES.shard(key)])

    @rule(target=flights, key=st.sampled_from(KEYS), size=st.sampled_from([0, 50, 10_000]))
    def a_write_of_our_own_begins(self, key: str, size: int):
        reservation = self.near.cache.reserve(key)
        version = self.tick()
        self.stored[key] = version, {}
        self.notices.append(("key", key, version))
        entry = self.near.entry(key, version, size=size)
        return InFlight(reservation, entry, self.resets[NAMES.shard(key)])

    @rule(flight=consumes(flights))
    def it_ends(self, flight: InFlight) -> None:
        entry, cache = flight.entry, self.near.cache
        if cache.keep(flight.reservation, entry):
            self.kept[entry.key] = entry, entry.fresh_until, flight.began
        cache.release(flight.reservation)

    @rule(flight=consumes(flights))
    def it_is_cancelled(self, flight: InFlight) -> None:
        self.near.cache.release(flight.reservation)

    @rule()
    def a_notice_arrives(self) -> None:
        if not self.notices:
            return
        kind, name, version = self.notices.pop(0)
        if kind == "key":
            self.said[name] = max(self.said[name], version)
            self.near.cache.drop(name, version)
        else:
            self.bumped[name] = max(self.bumped[name] or 0, version)
            self.near.tags.bump(name, version)

    @rule(shard=st.integers(0, SHARDS - 1))
    def notices_of_a_shard_are_lost(self, shard: int) -> None:
        self.notices = [each for each in self.notices if NAMES.shard(each[1]) != shard]
        self.resets[shard] += 1
        for tag in TAGS:
            if NAMES.shard(tag) == shard:
                self.bumped[tag] = None
        self.near.reset(shard)

    @rule(tag=st.sampled_from(TAGS))
    def a_tag_is_looked_up(self, tag: str) -> None:
        self.near.tags.bump(tag, self.tag_versions[tag])
        self.bumped[tag] = max(self.bumped[tag] or 0, self.tag_versions[tag])

    @rule(seconds=st.sampled_from([1.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.near.now += seconds

    @rule(seconds=st.sampled_from([-1.0, 5.0, FOREVER]))
    def the_promise_changes(self, seconds: float) -> None:
        self.near.follower.live_until = self.near.now + seconds

    @rule()
    def all_is_cleared(self) -> None:
        self.near.cache.clear()
        self.kept.clear()

    @rule(key=st.sampled_from(KEYS))
    def somebody_reads(self, key: str) -> None:
        self.check_hit(key, self.near.cache.get(key))

    @invariant()
    def whatever_would_be_served_is_right(self) -> None:
        for key, entry in list(self.near.cache._entries.items()):
            visited = entry.visited
            self.check_hit(key, self.near.cache.get(key))
            entry.visited = visited

    def check_hit(self, key: str, entry: NearEntry | None) -> None:
        if entry is None:
            return
        assert self.near.now < self.near.follower.live_until, "the promise does not hold"
        kept, fresh_until, began = self.kept[key]
        assert entry is kept
        assert entry.value == f"{key}@{entry.version}"
        assert self.near.now < fresh_until, "it is expired"
        assert entry.version >= self.said[key], "a notice said that it is old"
        assert began == self.resets[NAMES.shard(key)], "its shard was reset"
        for state, version in entry.tags:
            known = self.bumped[state.tag]
            assert known is not None, "a tag of it is not known"
            assert known <= version, "a tag of it was bumped"

    @invariant()
    def the_bounds_hold(self) -> None:
        cache = self.near.cache
        found = cache.statistics()
        assert found.entries == len(cache) <= 2
        assert found.bytes == sum(each.size for each in cache._entries.values())
        assert found.bytes <= 2 * OVERHEAD + 90

    @invariant()
    def the_list_and_the_table_agree(self) -> None:
        cache = self.near.cache
        listed, entry = [], cache._oldest
        while entry is not None:
            listed.append(entry)
            assert entry.newer is None or entry.newer.older is entry
            entry = entry.newer
        assert {id(each) for each in listed} == {id(each) for each in cache._entries.values()}
        assert len(listed) == len(cache)
        assert cache._newest is (listed[-1] if listed else None)
        assert cache._hand is None or cache._hand in listed


NearMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestNearMachine = NearMachine.TestCase


class Sieve:
    """SIEVE as the paper draws it: a list from old to new, a bit each, and a hand."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[list[Any]] = []
        self.hand = 0

    def hit(self, key: str) -> bool:
        for item in self.items:
            if item[0] == key:
                item[1] = True
                return True
        return False

    def add(self, key: str) -> None:
        if len(self.items) >= self.size:
            while self.items[self.hand][1]:
                self.items[self.hand][1] = False
                self.hand = (self.hand + 1) % len(self.items)
            del self.items[self.hand]
            if self.hand == len(self.items):  # it was the newest: begin again with the oldest
                self.hand = 0
        self.items.append([key, False])


@given(st.lists(st.integers(0, 9), max_size=120), st.integers(1, 6))
def test_it_evicts_what_sieve_evicts(reads: list[int], size: int) -> None:
    """N3: the same keys are there as in a plain SIEVE, after every read."""
    near, model = Near(entries_max=size), Sieve(size)
    for number in reads:
        key = f"k{number}"
        hit = near.cache.get(key) is not None
        assert hit == model.hit(key)
        if not hit:
            near.put(key)
            model.add(key)
        assert set(near.cache._entries) == {item[0] for item in model.items}


def test_a_scan_does_not_wash_out_what_is_used() -> None:
    """N3: what was hit survives any number of keys that are read once."""
    near = Near(entries_max=10)
    for number in range(5):
        near.put(f"hot{number}")
    for number in range(1_000):
        for hot in range(5):
            assert near.cache.get(f"hot{hot}") is not None
        near.put(f"cold{number}")


def test_bytes_bound_it_too() -> None:
    """N3: many small ones or few large ones, and one that is too large is not kept."""
    near = Near(bytes_max=10 * (OVERHEAD + 100))
    for number in range(50):
        near.put(f"k{number}", size=100)
    assert len(near.cache) == 10
    assert near.put("large", size=5 * (OVERHEAD + 100))
    assert len(near.cache) <= 6
    assert not near.put("huge", size=10 * (OVERHEAD + 100))
    assert near.cache.statistics().bytes <= 10 * (OVERHEAD + 100)


def test_what_is_kept_is_served() -> None:
    """The model says what must not be served; this is what must be."""
    near = Near()
    assert near.put("k1", 5, tags={"red": 1, "blue": 1})
    entry = near.cache.get("k1")
    assert entry is not None
    assert (entry.value, near.cache.hits) == ("k1@5", 1)


@pytest.mark.parametrize("why", ["time", "promise", "reset", "tag", "tag unknown", "dropped"])
def test_each_condition_of_a_hit_is_looked_at(why: str) -> None:
    """N1: one by one; the entry is served before, and not after."""
    near = Near()
    near.put("k1", 5, ttl=10.0, tags={"red": 1, "blue": 1})
    assert near.cache.get("k1") is not None
    {
        "time": lambda: setattr(near, "now", near.now + 10.0),
        "promise": lambda: setattr(near.follower, "live_until", near.now),
        "reset": lambda: setattr(near.view("k1"), "generation", 1),
        "tag": lambda: near.tags.bump("blue", 2),
        "tag unknown": lambda: near.tags.reset(NAMES.shard("blue")),
        "dropped": lambda: near.cache.drop("k1", 6),
    }[why]()
    assert near.cache.get("k1") is None
    assert near.cache.hits == 1


@pytest.mark.parametrize(("notice", "kept"), [(4, True), (5, True), (6, False)])
def test_a_notice_refuses_what_was_read_before_it(notice: int, kept: bool) -> None:
    """N2: only what is older than the notice says."""
    near = Near()
    reservation = near.cache.reserve("k1")
    near.cache.drop("k1", notice)
    assert near.cache.keep(reservation, near.entry("k1", 5)) is kept
    assert (near.cache.get("k1") is not None) is kept


def test_several_reservations_of_a_key_all_hear_of_it() -> None:
    """N2: and those that were released, or are of other keys, do not."""
    near = Near()
    first, second, other = (near.cache.reserve(key) for key in ("k1", "k1", "k2"))
    near.cache.release(first)
    near.cache.drop("k1", 9)
    assert (first.floor, second.floor, other.floor) == (0, 9, 0)
    near.cache.release(second)
    near.cache.release(second)
    near.cache.release(other)
    assert not near.cache._reservations


def test_an_older_answer_never_replaces_a_newer_one() -> None:
    """Two reads may come back in either order."""
    near = Near()
    slow = near.cache.reserve("k1")
    near.put("k1", 7)
    assert not near.cache.keep(slow, near.entry("k1", 6))
    assert near.cache.get("k1").value == "k1@7"
    assert near.cache.keep(slow, near.entry("k1", 8))
    assert near.cache.get("k1").value == "k1@8"


@pytest.mark.parametrize("why", ["too large", "tag", "reset"])
def test_what_cannot_be_kept_removes_what_it_replaces(why: str) -> None:
    """N2: the older value must not be served beside a write of our own."""
    near = Near()
    near.put("k1", 5)
    reservation = near.cache.reserve("k1")
    entry = near.entry("k1", 6, size=10**7 if why == "too large" else 0, tags={"red": 1})
    if why == "tag":
        near.tags.bump("red", 2)
    if why == "reset":
        reservation.generation -= 1
    assert not near.cache.keep(reservation, entry)
    assert near.cache.get("k1") is None
    assert len(near.cache) == 0


def test_a_server_that_lost_its_clock_is_believed_again() -> None:
    """After a reset, versions may be smaller than those remembered from before."""
    near = Near()
    near.put("k1", 1_000)
    near.reset(NAMES.shard("k1"))
    assert near.put("k1", 3)
    assert near.cache.get("k1").value == "k1@3"


def test_an_extension_keeps_the_value_under_its_new_version() -> None:
    """Said twice it changes nothing; said of another version it drops."""
    near = Near()
    near.put("k1", 5, ttl=10.0)
    for _ in range(2):
        near.cache.extend("k1", 5, 6, near.now + 100)
        entry = near.cache.get("k1")
        assert (entry.value, entry.version, entry.fresh_until) == ("k1@5", 6, near.now + 100)
        assert entry.gone_at >= entry.fresh_until
    near.cache.extend("k1", 7, 8, near.now + 100)
    assert near.cache.get("k1") is None


def test_a_read_from_before_an_extension_is_not_kept() -> None:
    """N2: an extension is a notice too."""
    near = Near()
    near.put("k1", 5)
    reservation = near.cache.reserve("k1")
    near.cache.extend("k1", 5, 6, near.now + 100)
    assert not near.cache.keep(reservation, near.entry("k1", 5))
    assert near.cache.get("k1").version == 6


def test_what_may_be_served_while_disconnected() -> None:
    """Stale or doubtful, but not gone, dropped, or with a tag known to be newer."""
    near = Near()
    near.put("k1", 5, ttl=10.0, tags={"red": 1})
    assert near.cache.presumable("k1").value == "k1@5"
    near.follower.live_until = 0.0
    near.now += 11
    assert near.cache.get("k1") is None
    assert near.cache.presumable("k1") is not None
    near.reset(NAMES.shard("red"))
    near.reset(NAMES.shard("k1"))
    assert near.cache.presumable("k1") is not None
    near.tags.bump("red", 2)
    assert near.cache.presumable("k1") is None
    near.put("k1", 6, ttl=10.0)
    near.now += 20
    assert near.cache.presumable("k1") is None
    near.put("k1", 7)
    near.cache.drop("k1", 8)
    assert near.cache.presumable("k1") is None


def test_clearing_refuses_what_was_under_way() -> None:
    """As if all had been dropped."""
    near = Near()
    near.put("k1")
    reservation = near.cache.reserve("k1")
    near.cache.clear()
    assert not near.cache.keep(reservation, near.entry("k1", 99))
    found = near.cache.statistics()
    assert (found.entries, found.bytes, found.refused) == (0, 0, 1)

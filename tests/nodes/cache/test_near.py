"""The near cache, condition by condition. What it may serve at all: test_near_model."""

from __future__ import annotations

import tracemalloc

import pytest

from forebay.nodes.cache.near import NearCache
from forebay.schemas.settings import CacheDefaults
from support.near import NAMES, OVERHEAD, Near


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
    near = Near(bytes_max=10 * (OVERHEAD + 103))
    for number in range(50):
        near.put(f"k{number:02}", size=100)
    assert len(near.cache) == 10
    assert near.put("large", size=5 * (OVERHEAD + 100))
    assert len(near.cache) <= 6
    assert not near.put("huge", size=10 * (OVERHEAD + 103))
    found = near.cache.statistics()
    assert found.bytes <= 10 * (OVERHEAD + 103)
    assert (found.evictions_bytes, found.oversized, found.refused) == (46, 1, 0)


@pytest.mark.parametrize("policy", ["sieve", "lru"])
def test_a_flood_of_absent_keys_evicts_no_value(policy: str) -> None:
    """N3: known absences have a list of their own, with a bound of its own."""
    near = Near(policy=policy, entries_max=10, negatives_max=5)
    for number in range(10):
        near.put(f"k{number}")
    for number in range(1_000):
        assert near.put(f"absent{number}", negative=True)
    assert all(near.cache.get(f"k{number}") is not None for number in range(10))
    assert near.cache.get("absent999").value is None
    found = near.cache.statistics()
    assert (found.entries, found.negatives) == (15, 5)
    assert (found.evictions, found.evictions_negatives) == (995, 995)


def test_absences_with_long_names_take_little_room() -> None:
    """N3: an eighth of the bytes, whatever their number may be."""
    near = Near(bytes_max=80_000, negatives_max=1_000)
    for number in range(1_000):
        assert near.put(f"{number:0500}", negative=True)
    found = near.cache.statistics()
    assert found.entries == found.negatives == 10_000 // (OVERHEAD + 500)
    assert found.bytes <= 10_000


def test_a_key_moves_between_values_and_absences() -> None:
    """It is in one of the lists, and both are left as they should be."""
    near = Near()
    for version in range(1, 6):
        near.put("k1", version, size=10, negative=version % 2 == 0)
        found = near.cache.statistics()
        assert (found.entries, found.negatives) == (1, 1 - version % 2)
        assert found.bytes == OVERHEAD + 2 + 10
    near.cache.drop("k1", 9)
    assert near.cache.statistics().bytes == 0


def test_lru_keeps_what_was_used_last() -> None:
    """N3: a hit makes it the newest; SIEVE would keep the one that was hit in any case."""
    near = Near(policy="lru", entries_max=3)
    for key in ("a", "b", "c"):
        near.put(key)
    for key in ("a", "b"):
        assert near.cache.get(key) is not None
    near.put("d")
    near.put("e")
    assert [key for key in "abcde" if near.cache.get(key)] == ["b", "d", "e"]


@pytest.mark.parametrize(("size", "kept"), [(1_000, True), (1_001, False)])
def test_a_large_value_is_left_to_the_shared_tier(size: int, kept: bool) -> None:
    """N4, N2: and what it replaces is not served beside it."""
    near = Near(value_bytes_max=1_000)
    near.put("k1", 1, size=1)
    assert near.put("k1", 2, size=size) is kept
    entry = near.cache.get("k1")
    assert (entry is not None and entry.version == 2) is kept
    assert len(near.cache) == kept
    assert near.cache.statistics().oversized == (not kept)


def test_it_may_be_served_longer_than_the_follower_promises() -> None:
    """N1: by the slack of a cache that allows more staleness, and not a moment longer."""
    near = Near(slack_s=2.0)
    near.put("k1")
    near.follower.live_until = near.now
    for seconds, served in ((0.0, True), (1.5, True), (0.5, False)):
        near.now += seconds
        assert (near.cache.get("k1") is not None) is served


@pytest.mark.parametrize("policy", ["sieve", "lru"])
def test_one_caller_is_told_that_an_entry_is_ripe(policy: str) -> None:
    """N5: who is told counts as a hit, and everybody else is served as before."""
    near = Near(policy=policy, entries_max=2)
    near.put("k1", ttl=10.0, ahead=3.0)
    near.put("k2")
    assert near.cache.ripe("k1") is None, "it is served without further thought"
    near.now += 7.0
    assert near.cache.get("k1") is None
    entry = near.cache.ripe("k1")
    assert (entry.value, near.cache.hits) == ("k1@1", 1)
    assert near.cache.ripe("k1") is None
    assert near.cache.get("k1") is entry
    near.put("k3")
    assert near.cache.get("k2") is None, "the one that was hit stays"
    near.now += 3.0
    assert near.cache.get("k1") is None
    assert near.cache.ripe("k1") is None
    assert near.cache.ripe("nothing") is None


@pytest.mark.parametrize("why", ["time", "promise", "reset", "tag", "tag unknown", "dropped"])
def test_what_is_not_valid_is_not_ripe(why: str) -> None:
    """N5, N1: and if it is valid again, it is as ripe as before."""
    near = Near()
    near.put("k1", 5, ttl=10.0, ahead=5.0, tags={"blue": 1})
    near.now += 5.0
    {
        "time": lambda: setattr(near, "now", near.now + 5.0),
        "promise": lambda: setattr(near.follower, "live_until", near.now),
        "reset": lambda: setattr(near.view("k1"), "generation", 1),
        "tag": lambda: near.tags.bump("blue", 2),
        "tag unknown": lambda: near.tags.reset(NAMES.shard("blue")),
        "dropped": lambda: near.cache.drop("k1", 6),
    }[why]()
    assert near.cache.ripe("k1") is None
    assert near.cache.hits == 0
    near.follower.live_until = near.now + 1.0
    assert (near.cache.ripe("k1") is not None) is (why == "promise")


def test_an_extension_says_from_when_on_it_is_ripe() -> None:
    """N5: it begins anew; without a second time it is fresh until it is old."""
    near = Near()
    near.put("k1", 5, ttl=10.0, ahead=5.0)
    near.now += 5.0
    assert near.cache.ripe("k1") is not None
    near.cache.extend("k1", 5, 6, near.now + 5.0, near.now + 10.0)
    near.now += 5.0
    assert near.cache.ripe("k1").version == 6
    near.cache.extend("k1", 6, 7, near.now + 5.0)
    near.now += 5.0
    assert near.cache.ripe("k1") is None
    assert near.cache.get("k1") is None


@pytest.mark.parametrize("count", [5_000, 20_000])
def test_an_entry_takes_the_memory_it_is_said_to_take(count: int) -> None:
    """N3: bytes are bytes; a value of no size, with five times, a version and a key."""
    near = Near(entries_max=count, bytes_max=10**9)
    tracemalloc.start()
    try:
        for number in range(count):
            near.now = 1_000.0 + number
            near.put(f"product:{number}", 10**15 + number, ttl=10.0, ahead=5.0, negative=False)
            near.cache._entries[f"product:{number}"].value = None
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(near.cache) == count
    assert near.cache.statistics().bytes == pytest.approx(taken, rel=0.15)


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
    assert near.put("k1"), "it begins anew"


@pytest.mark.parametrize("policy", ["sieve", "lru"])
def test_the_settings_bound_it(policy) -> None:
    """N3, N4: each of them, and the order of eviction."""
    defaults = CacheDefaults(
        near_entries_max=2, near_negatives_max=1, near_value_bytes_max=10, near_policy=policy
    )
    near = Near(made=lambda follower, clock, **_: NearCache.from_defaults(
        follower, defaults, slack_s=0.0, clock=clock
    ))  # fmt: skip
    for key in ("a", "b"):
        near.put(key)
        near.put(f"absent {key}", negative=True)
    assert not near.put("large", size=11)
    for key in ("b", "a"):
        assert near.cache.get(key) is not None
    near.put("c", size=10)
    assert [key for key in "abc" if near.cache.get(key)] == {
        "sieve": ["b", "c"],
        "lru": ["a", "c"],
    }[policy]
    found = near.cache.statistics()
    assert (found.entries, found.negatives, found.oversized) == (3, 1, 1)
    assert (found.evictions_entries, found.evictions_bytes, found.evictions_negatives) == (1, 0, 1)

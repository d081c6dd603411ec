"""The dispatch of notices and messages, with recording parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.nodes.cache.tags import Captured, TagTable
from forebay.nodes.notice_dispatch import NoticeDispatcher
from forebay.schemas.keys import Names, dependents_of
from forebay.schemas.notices import Bumped, Changed, Dropped, Extended, Notice

NAMES = Names("hearing", 4)
OFFSET_S = 1_000_000.0  #: the server's clock less ours


class Path:
    """A cache that records its calls."""

    def __init__(self, name: str, told: list[Any]) -> None:
        self.name = name
        self.flights = SimpleNamespace(detach_all=lambda: told.append((name, "detach all")))
        source = SimpleNamespace(heard=lambda *, failing: told.append((name, failing)))
        self.loads = SimpleNamespace(source=source)
        self._told = told

    def extended(self, notice: Extended, version: int, soft_until: float) -> None:
        self._told.append((self.name, "extend", notice.key, notice.since, version, soft_until))

    def noticed(self, key: str, version: int) -> None:
        self._told.append((self.name, key, version))

    def tag_noticed(self, tag: str) -> None:
        self._told.append((self.name, tag))


class Told:
    """A dispatcher and the calls that it made."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.now_s = 500.0
        self.tags = TagTable(NAMES, self.capture)
        waits: Any = SimpleNamespace(wake=lambda key: self.told.append(("wake", key)))
        clock: Any = SimpleNamespace(monotonic=lambda: self.now_s)
        server_clock: Any = SimpleNamespace(offset_s=OFFSET_S)
        self.hearing = NoticeDispatcher(self.tags, waits, clock, server_clock, shards=NAMES.shards)
        paths: Any = [Path("a", self.told), Path("b", self.told)]
        self.hearing.paths = paths

    async def capture(self, tags: Sequence[str]) -> Mapping[str, Captured]:
        return {tag: Captured(100, 100) for tag in tags}

    def of(self, version: int, notice: Notice) -> list[Any]:
        """The calls that this notice causes."""
        self.told.clear()
        self.hearing.apply(version, notice)
        return list(self.told)


@pytest.fixture
def told() -> Told:
    return Told()


KEY = [("a", "k", 200), ("b", "k", 200), ("wake", "k")]
OUTDATED = [("a", dependents_of("k")), ("b", dependents_of("k"))]


async def test_a_written_key_outdates_what_depends_on_it(told: Told) -> None:
    """E2: a change invalidates the copies of the key and its dependents."""
    (state,) = [told.tags.state(dependents_of("k"))]
    await told.tags.versions([dependents_of("k")], trust=True)
    assert told.of(200, Changed("k", outdates=True)) == [*KEY, *OUTDATED]
    assert state.versions == (200, 200)


async def test_a_loaded_key_outdates_nothing(told: Told) -> None:
    """E3: a fill makes copies old, and invalidates no dependents."""
    state = told.tags.state(dependents_of("k"))
    await told.tags.versions([dependents_of("k")], trust=True)
    assert told.of(200, Changed("k")) == KEY
    assert state.versions == (100, 100)


@pytest.mark.parametrize("soft", [True, False])
async def test_dropped_keys_outdate_what_depends_on_them(told: Told, soft: bool) -> None:
    """E2: a soft drop makes the dependents soft-stale too."""
    states = [told.tags.state(dependents_of("k")), told.tags.state(dependents_of("l"))]
    await told.tags.versions([dependents_of("k"), dependents_of("l")], trust=True)
    got = told.of(200, Dropped(("k", "l", "m"), soft))
    assert got[: len(KEY) + 2] == [*KEY, *OUTDATED]
    assert [each for each in got if each[0] == "wake"] == [("wake", key) for key in "klm"]
    assert [each for each in got if each[:2] == ("a", "m")] == [("a", "m", 200)]
    assert [state.versions for state in states] == [(200, 100 if soft else 200)] * 2


@pytest.mark.parametrize("soft", [True, False])
async def test_bumped_tags_have_new_versions(told: Told, soft: bool) -> None:
    """E1: a bump reaches every cache; entries of a soft bump may be served as stale."""
    state = told.tags.state("red")
    await told.tags.versions(["red"], trust=True)
    assert told.of(200, Bumped(("red", "blue"), soft=soft)) == [("a", "red"), ("b", "red")]
    assert state.versions == (200, 100 if soft else 200)
    assert told.tags.stand_as_known({"red": 150}) == ("stale" if soft else "invalid")


def test_a_tag_that_nobody_here_knows_is_nobody_s_business(told: Told) -> None:
    """An unknown tag changes nothing: otherwise each write would cost a scan of all loads."""
    assert told.of(200, Changed("k", outdates=True)) == KEY
    assert told.of(200, Bumped(("red",))) == []
    assert len(told.tags) == 0


@pytest.mark.parametrize(("ahead_s", "until_s"), [(0.0, 503.0), (-7.0, 496.0), (7.0, 503.0)])
def test_what_was_extended_lives_from_the_moment_of_its_version(
    told: Told, ahead_s: float, until_s: float
) -> None:
    """An extension ends at the earlier of both clocks, and wakes the waiters of the key."""
    version = int((told.now_s + OFFSET_S + ahead_s) * 1e6)
    got = told.of(version, Extended("k", 150, 3_000, 9_000))
    assert [each[:5] for each in got[:2]] == [
        (name, "extend", "k", 150, version) for name in ("a", "b")
    ]
    assert [each[5] for each in got[:2]] == pytest.approx([until_s] * 2)
    assert got[2:] == [("wake", "k")]


async def test_a_reset_forgets_tags_of_its_shard_and_all_loads(told: Told) -> None:
    """A reset forgets the tags of the shard, and detaches all loads."""
    tags = [str(number) for number in range(20)]
    states = [told.tags.state(tag) for tag in tags]
    await told.tags.versions(tags, trust=True)
    told.hearing.reset(2)
    assert told.told == [("a", "detach all"), ("b", "detach all")]
    assert all(state.known == (state.shard != 2) for state in states)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"f a", [("a", True)]),
        (b"o b", [("b", False)]),
        (b"f c", []),
        (b"f ", []),
        (b"f", []),
        (b"r 0", [("r", 0)]),
        (b"w 3", [("w", 3)]),
        (b"w 4", []),
        (b"w -1", []),
        (b"w", []),
        (b"w x", []),
        (b"w 1 2", []),
        (b"w " + b"9" * 5_000, []),
        (b"w \xb2", []),
        (b"x 1", []),
        (b"", []),
        (b"\xff\xfe 1", []),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_words_are_for_one_cache_or_one_shard(told: Told, payload: bytes, expected) -> None:
    """An unknown message is ignored; no message raises an error."""
    jobs = {
        kind: lambda shard, kind=kind: told.told.append((kind.decode(), shard))
        for kind in (b"w", b"r")
    }
    told.hearing.word(payload, jobs)
    assert told.told == expected


def test_words_of_jobs_are_for_those_who_work(told: Told) -> None:
    """A node without workers receives messages about sources too."""
    told.hearing.word(b"w 1", {})
    told.hearing.word(b"o a", {})
    assert told.told == [("a", False)]

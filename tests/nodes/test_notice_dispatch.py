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

NAMES = Names("dispatch", 4)
OFFSET_S = 1_000_000.0  #: the server's clock less ours


class RecordingPath:
    """A cache that records its calls."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name = name
        self.flights = SimpleNamespace(detach_all=lambda: calls.append((name, "detach all")))
        source = SimpleNamespace(heard=lambda *, failing: calls.append((name, failing)))
        self.loads = SimpleNamespace(source=source)
        self._calls = calls

    def extended(self, notice: Extended, version: int, soft_until: float) -> None:
        self._calls.append((self.name, "extend", notice.key, notice.since, version, soft_until))

    def noticed(self, key: str, version: int) -> None:
        self._calls.append((self.name, key, version))

    def tag_noticed(self, tag: str) -> None:
        self._calls.append((self.name, tag))


class Recorder:
    """A dispatcher and the calls that it made."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.now_s = 500.0
        self.tags = TagTable(NAMES, self.capture)
        waits: Any = SimpleNamespace(wake=lambda key: self.calls.append(("wake", key)))
        clock: Any = SimpleNamespace(monotonic=lambda: self.now_s)
        server_clock: Any = SimpleNamespace(offset_s=OFFSET_S)
        self.dispatcher = NoticeDispatcher(
            self.tags, waits, clock, server_clock, shards=NAMES.shards
        )
        paths: Any = [RecordingPath("a", self.calls), RecordingPath("b", self.calls)]
        self.dispatcher.paths = paths

    async def capture(self, tags: Sequence[str]) -> Mapping[str, Captured]:
        return {tag: Captured(100, 100) for tag in tags}

    def of(self, version: int, notice: Notice) -> list[Any]:
        """The calls that this notice causes."""
        self.calls.clear()
        self.dispatcher.apply(version, notice)
        return list(self.calls)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


KEY = [("a", "k", 200), ("b", "k", 200), ("wake", "k")]
OUTDATED = [("a", dependents_of("k")), ("b", dependents_of("k"))]


async def test_a_written_key_invalidates_its_dependents(recorder: Recorder) -> None:
    """E2: a change invalidates the copies of the key and its dependents."""
    (state,) = [recorder.tags.state(dependents_of("k"))]
    await recorder.tags.versions([dependents_of("k")], trust=True)
    assert recorder.of(200, Changed("k", outdates=True)) == [*KEY, *OUTDATED]
    assert state.versions == (200, 200)


async def test_a_loaded_key_invalidates_nothing(recorder: Recorder) -> None:
    """E3: a fill makes copies old, and invalidates no dependents."""
    state = recorder.tags.state(dependents_of("k"))
    await recorder.tags.versions([dependents_of("k")], trust=True)
    assert recorder.of(200, Changed("k")) == KEY
    assert state.versions == (100, 100)


@pytest.mark.parametrize("soft", [True, False])
async def test_dropped_keys_invalidate_their_dependents(recorder: Recorder, soft: bool) -> None:
    """E2: a soft drop makes the dependents soft-stale too."""
    states = [recorder.tags.state(dependents_of("k")), recorder.tags.state(dependents_of("l"))]
    await recorder.tags.versions([dependents_of("k"), dependents_of("l")], trust=True)
    got = recorder.of(200, Dropped(("k", "l", "m"), soft))
    assert got[: len(KEY) + 2] == [*KEY, *OUTDATED]
    assert [each for each in got if each[0] == "wake"] == [("wake", key) for key in "klm"]
    assert [each for each in got if each[:2] == ("a", "m")] == [("a", "m", 200)]
    assert [state.versions for state in states] == [(200, 100 if soft else 200)] * 2


@pytest.mark.parametrize("soft", [True, False])
async def test_bumped_tags_have_new_versions(recorder: Recorder, soft: bool) -> None:
    """E1: a bump reaches every cache; entries of a soft bump may be served as stale."""
    state = recorder.tags.state("red")
    await recorder.tags.versions(["red"], trust=True)
    assert recorder.of(200, Bumped(("red", "blue"), soft=soft)) == [("a", "red"), ("b", "red")]
    assert state.versions == (200, 100 if soft else 200)
    assert recorder.tags.stand_as_known({"red": 150}) == ("stale" if soft else "invalid")


def test_an_unknown_tag_changes_nothing(recorder: Recorder) -> None:
    """An unknown tag changes nothing: otherwise each write would cost a scan of all loads."""
    assert recorder.of(200, Changed("k", outdates=True)) == KEY
    assert recorder.of(200, Bumped(("red",))) == []
    assert len(recorder.tags) == 0


@pytest.mark.parametrize(("ahead_s", "until_s"), [(0.0, 503.0), (-7.0, 496.0), (7.0, 503.0)])
def test_an_extension_begins_at_its_version(
    recorder: Recorder, ahead_s: float, until_s: float
) -> None:
    """An extension ends at the earlier of both clocks, and wakes the waiters of the key."""
    version = int((recorder.now_s + OFFSET_S + ahead_s) * 1e6)
    got = recorder.of(version, Extended("k", 150, 3_000, 9_000))
    assert [each[:5] for each in got[:2]] == [
        (name, "extend", "k", 150, version) for name in ("a", "b")
    ]
    assert [each[5] for each in got[:2]] == pytest.approx([until_s] * 2)
    assert got[2:] == [("wake", "k")]


async def test_a_reset_forgets_tags_of_its_shard_and_all_loads(recorder: Recorder) -> None:
    """A reset forgets the tags of the shard, and detaches all loads."""
    tags = [str(number) for number in range(20)]
    states = [recorder.tags.state(tag) for tag in tags]
    await recorder.tags.versions(tags, trust=True)
    recorder.dispatcher.reset(2)
    assert recorder.calls == [("a", "detach all"), ("b", "detach all")]
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
def test_a_message_reaches_one_cache_or_one_shard(
    recorder: Recorder, payload: bytes, expected
) -> None:
    """An unknown message is ignored; no message raises an error."""
    jobs = {
        kind: lambda shard, kind=kind: recorder.calls.append((kind.decode(), shard))
        for kind in (b"w", b"r")
    }
    recorder.dispatcher.dispatch_message(payload, jobs)
    assert recorder.calls == expected


def test_messages_about_jobs_need_workers(recorder: Recorder) -> None:
    """A node without workers receives messages about sources too."""
    recorder.dispatcher.dispatch_message(b"w 1", {})
    recorder.dispatcher.dispatch_message(b"o a", {})
    assert recorder.calls == [("a", False)]

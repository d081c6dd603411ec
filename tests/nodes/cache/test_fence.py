"""No stale fill, in any order of events: every interleaving, on the real scripts.

A story is one order of the steps of a few actors, each step atomic, on a key of its own.
All stories take their first step together, then their second, and so on; so a few thousand
of them are a few dozen round trips. A fill, or an extension, is stale if it is accepted with a
value that was overwritten in the source, and the invalidation for that is over; an entry is stale
if it is fresh in the end, by its lifetime and its tags, and differs from the source.

The same check finds stale fills in scripts whose fence was taken out: otherwise it would
prove nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec
import pytest

from forebay.coordinator.valkey.link import Link
from forebay.coordinator.valkey.scripting import Call, Script, load_scripts, run_many
from forebay.nodes.cache.shared import TAG_KEEP_MS, SharedTier
from forebay.nodes.cache.tags import Captured, TagTable, TagVersions, standing
from forebay.schemas.entry import EntryMeta, make_tail, read_entry
from forebay.schemas.jobs import RefreshJob, WriteJob, write_job
from forebay.schemas.keys import Names, dependents_of
from forebay.schemas.notices import Changed, Extended, write_notice
from forebay.schemas.settings import Durable
from support.links import link_to, running

Steps = Generator[Any, Any, None]  #: yields what is to be run in this step; None: nothing

SCRIPTS = load_scripts()
ANY_VERSION = 2**60
LEASE_MS = 600_000
TOGETHER = 2_000
TOKEN_CHECK = r"^if .*KEYS\[2\].* ~= ARGV\[1\] then return { 0 } end$"
PENDING_CHECK = r"^if is_write_pending\(.*then return { 0 } end$"


def traced(story: Story) -> Sequence[str]:
    """What is only bumped where it exists."""
    return [dependents_of(story.base)]


class World:
    """The names and scripts that the stories of a test share."""

    def __init__(self, **planted: Script) -> None:
        self.names = Names("fence", 8)
        self.scripts = {**SCRIPTS, **planted}
        self.tier = SharedTier(
            None, None, self.names, self.scripts, origin="", durable=Durable()  # type: ignore[arg-type]
        )  # fmt: skip


class Story:
    """One order of events on one key."""

    def __init__(self, world: World, number: int, order: Sequence[str]) -> None:
        self.world = world
        self.order = order
        self.key = f"k{number}"
        self.tag = f"t{number}"
        self.base = f"b{number}"  #: a key that this one depends on
        self.source = 0  #: the value in the source: how often it was written
        self.settled = 0  #: the newest value whose write was followed by its invalidation
        self.pending = False
        self.row_version = 0  #: for the guard of a sink
        self.stale_fills = 0
        self.fills = 0
        self.actors = {name: ACTORS[name.rstrip("12")](self, name) for name in set(order)}
        self.replies: dict[str, Any] = dict.fromkeys(self.actors)

    def step(self, at: int) -> Any:
        """Let the actor whose turn it is act; returns what is to be sent."""
        name = self.order[at]
        return self.actors[name].send(self.replies.pop(name, None))

    def begin(self, token: str) -> Call:
        return self.call("entry_begin", self.entry_keys[:2], token, LEASE_MS, ANY_VERSION, 0)

    def capture(self, tag: str) -> Call:
        names = self.world.names
        head = names.part(names.shard(tag), "head")
        return self.call("tags_capture", [head, names.tag(tag)], TAG_KEEP_MS)

    def call(self, script: str, keys: Sequence[str], *args: Any) -> Call:
        return Call(script=self.world.scripts[script], keys=keys, args=args)

    @property
    def entry_keys(self) -> list[str]:
        names = self.world.names
        shard = names.shard(self.key)
        parts = [names.part(shard, "head"), names.part(shard, "log")]
        return [names.entry(self.key), names.lease(self.key), *parts]

    @property
    def fence(self) -> str:
        return self.world.names.fence(self.key)

    @property
    def announcement(self) -> list[Any]:
        names = self.world.names
        return [write_notice(Changed(self.key)), names.bell, names.shard(self.key)]


def tail_of(value: int, tags: dict[str, int] | None = None) -> bytes:
    meta = EntryMeta(tags=tags or {})
    return make_tail(msgspec.msgpack.encode(value), kind="v", codec="m", meta=meta)


def fill(story: Story, token: str, value: int, tags: dict[str, int] | None = None) -> Call:
    lifetime = (LEASE_MS, LEASE_MS)
    args = (token, *lifetime, tail_of(value, tags), *story.announcement, "")
    return story.call("entry_fill", story.entry_keys, *args)


def loader(story: Story, name: str) -> Steps:
    """Takes the lease, reads the source, fills."""
    granted, *_ = yield story.begin(name)
    value = story.source
    yield
    if granted:
        yield Judged(story, value, fill(story, name, value))
    yield


def refresher(story: Story, name: str) -> Steps:
    """As a loader, but its lease comes with a job."""
    names = story.world.names
    shard = names.shard(story.key)
    job = write_job(RefreshJob(cache="c", key=story.key, token=name))
    keys = [*story.entry_keys[:2], names.part(shard, "refreshes")]
    published = yield story.call(
        "refresh_publish", keys, name, LEASE_MS, ANY_VERSION, job, 10**6, names.work, shard
    )
    value = story.source
    yield
    if published == 1:
        yield Judged(story, value, fill(story, name, value))
    yield


def tagged(story: Story, name: str) -> Steps:
    """A loader whose value carries a tag, captured before it reads."""
    granted, *_ = yield story.begin(name)
    version, *_ = yield story.capture(story.tag)
    value = story.source
    yield
    if granted:
        yield Judged(story, value, fill(story, name, value, {story.tag: int(version)}))
    yield


def reliant(story: Story, name: str) -> Steps:
    """A loader that reads the value of another key, and was declared to."""
    granted, *_ = yield story.begin(name)
    version, *_ = yield story.capture(dependents_of(story.base))
    value = story.source
    yield
    if granted:
        yield Judged(
            story, value, fill(story, name, value, {dependents_of(story.base): int(version)})
        )
    yield


def finder(story: Story, name: str) -> Steps:
    """As a reliant, but it says so when it has read it."""
    granted, _, since, *_ = yield story.begin(name)
    value = story.source
    yield
    captured = yield story.capture(dependents_of(story.base))
    tags = discovered(story, captured, int(since))
    if granted and tags is not None:
        yield Judged(story, value, fill(story, name, value, tags))
    elif granted:
        yield story.call("lease_release", story.entry_keys[1:2], name)
    yield


def discovered(story: Story, reply: Sequence[Any], since: int) -> dict[str, int] | None:
    """What the table of tags makes of this answer."""

    async def capture(tags: Sequence[str]) -> dict[str, Captured]:
        version, hard, made = reply
        return {dependents_of(story.base): Captured(int(version), int(hard), int(made))}

    table = TagTable(story.world.names, capture)
    asking = table.discovered([dependents_of(story.base)], since=since, traced=traced(story))
    with pytest.raises(StopIteration) as done:
        asking.send(None)
    found: dict[str, int] | None = done.value.value
    return found


def extender(story: Story, name: str) -> Steps:
    """As a loader, but what is there already only has its life extended."""
    granted, raw, *_ = yield story.begin(name)
    value = story.source
    yield
    if not granted:
        return (yield from idle(2))
    entry = read_entry(raw, bytes_max=10_000) if raw else None
    whole = Judged(story, value, fill(story, name, value))
    if entry is None or msgspec.msgpack.decode(entry.payload) != value:
        yield whole
        return (yield from idle(1))
    lifetime = (LEASE_MS, LEASE_MS)
    middle = make_tail(b"", kind="v", codec="m", meta=EntryMeta())
    said = [write_notice(Extended(story.key, entry.version, *lifetime)), *story.announcement[1:]]
    extend = story.call(
        "entry_extend", story.entry_keys, name, entry.version, *lifetime, middle, *said
    )
    reply = yield Judged(story, value, extend)
    yield whole if reply[0] == 2 else None
    yield


def idle(steps: int) -> Steps:
    for _ in range(steps + 1):
        yield


def writer(story: Story, name: str) -> Steps:
    """Writes the source, then invalidates."""
    story.source += 1
    value = story.source
    yield
    story.settled = max(story.settled, value)
    (calls,) = story.world.tier.invalidate_calls([story.key]).values()
    yield calls[0]


def softener(story: Story, name: str) -> Steps:
    """As a writer, but leaves a stale copy, whose age is known."""
    story.source += 1
    value = story.source
    yield
    story.settled = max(story.settled, value)
    (calls,) = story.world.tier.invalidate_calls([story.key], soft=True).values()
    yield calls[0]


def bumper(story: Story, name: str) -> Steps:
    """Writes the source, then bumps the tag."""
    story.source += 1
    yield
    (calls,) = story.world.tier.bump_calls([story.tag]).values()
    yield calls[0]


def nudger(story: Story, name: str) -> Steps:
    """As a bumper, but softly."""
    story.source += 1
    yield
    (calls,) = story.world.tier.bump_calls([story.tag], soft=True).values()
    yield calls[0]


def rebaser(story: Story, name: str) -> Steps:
    """Writes the source of the key that this one depends on, then invalidates that one."""
    story.source += 1
    yield
    (calls,) = story.world.tier.invalidate_calls([story.base]).values()
    yield calls[0]


def underminer(story: Story, name: str) -> Steps:
    """As a rebaser, but softly."""
    story.source += 1
    yield
    (calls,) = story.world.tier.invalidate_calls([story.base], soft=True).values()
    yield calls[0]


def through(story: Story, name: str) -> Steps:
    """Writes the source, then puts the value."""
    story.source += 1
    value = story.source
    yield
    story.settled = max(story.settled, value)
    keys = [*story.entry_keys, story.world.names.tag(dependents_of(story.key)), story.fence]
    written = (LEASE_MS, LEASE_MS, tail_of(value), *story.announcement, TAG_KEEP_MS, 0)
    yield story.call("entry_put", keys, *written)


def leased(story: Story, name: str) -> Steps:
    """Writes through under the lease: the row with its guard, the entry, or an invalidation."""
    code, *version = yield story.call("write_begin", story.entry_keys, name, LEASE_MS)
    value = int(name[-1]) if code == 1 else 0
    if value and int(version[0]) > story.row_version:
        story.source, story.row_version = value, int(version[0])
    yield None
    keys = [*story.entry_keys, story.world.names.tag(dependents_of(story.key))]
    args = [name, LEASE_MS, LEASE_MS, tail_of(value), *story.announcement, TAG_KEEP_MS]
    stored = Judged(story, value, story.call("write_fill", keys, *args))
    reply = yield stored if value else None
    if value and not reply[0]:
        (calls,) = story.world.tier.invalidate_calls([story.key]).values()
        yield calls[0]
    yield


def unleased(story: Story, name: str) -> Steps:
    """The negative control: as ``through``, with the guard of the row and no lease."""
    version = int(name[-1])
    yield None
    if version > story.row_version:
        story.source, story.row_version = version, version
    yield None
    keys = [*story.entry_keys, story.world.names.tag(dependents_of(story.key)), story.fence]
    written = (LEASE_MS, LEASE_MS, tail_of(version), *story.announcement, TAG_KEEP_MS, 0)
    yield story.call("entry_put", keys, *written)
    yield


def behind(story: Story, name: str) -> Steps:
    """Writes the entry; the sink writes the source later, then the checkpoint moves."""
    names = story.world.names
    shard, value = names.shard(story.key), 100
    story.pending = True
    reply = yield story.world.tier.write_call(
        WriteJob(key=story.key, value=b""), soft_ms=LEASE_MS, hard_ms=LEASE_MS, tail=tail_of(value)
    )
    story.source = value
    yield
    story.pending = False
    # Each story moves a checkpoint of its own name, and trims nothing.
    keys = [names.part(shard, "own"), names.part(shard, "done"), names.part(shard, "writes")]
    yield story.call(
        "checkpoint_commit", [*keys, names.part(shard, "head"), *names.of_key(story.key)[:2]],
        "me", 1, story.key, "0-1", "0-1", "", shard, "", "", int(reply[1]),
    )  # fmt: skip


def loss(story: Story, name: str) -> Steps:
    """The lease record is evicted, or expires."""
    yield ("DEL", story.entry_keys[1])


ACTORS = {
    each.__name__: each
    for each in (
        loader, refresher, tagged, reliant, finder, extender, writer, softener, bumper, nudger,
        rebaser, underminer, through, behind, loss, leased, unleased,
    )
}  # fmt: skip
LEASED = {
    f"{each}{number}"
    for each in ("loader", "refresher", "tagged", "reliant", "finder", "extender", "leased")
    for number in ("", 1, 2)
}
LENGTHS = {
    "loader": 3, "refresher": 3, "tagged": 4, "reliant": 4, "finder": 4, "extender": 4,
    "writer": 2, "softener": 2, "bumper": 2, "nudger": 2, "rebaser": 2, "underminer": 2,
    "through": 2, "behind": 3, "loss": 1, "leased": 4, "unleased": 4,
}  # fmt: skip


class Judged:
    """A fill, to be judged as soon as it was carried out."""

    def __init__(self, story: Story, value: int, call: Call) -> None:
        self.call = call
        self._story = story
        self._value = value

    def judge(self, reply: Any) -> None:
        if reply[0] == 1:
            self._story.fills += 1
            overwritten = self._value < self._story.settled
            self._story.stale_fills += overwritten or self._story.pending


def orders(actors: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All interleavings; of actors that only differ in number, the first always begins.

    A lease is only lost while there may be one: otherwise the story is told without that.
    """
    left = Counter({name: LENGTHS[name.rstrip("12")] for name in actors})

    def rest(done: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if not +left:
            yield done
        for name in actors:
            too_early = name.endswith("2") and f"{name[:-1]}1" not in done
            pointless = name == "loss" and not any(
                0 < left[each] < LENGTHS[each.rstrip("12")] for each in LEASED & left.keys()
            )
            if left[name] and not (too_early or pointless):
                left[name] -= 1
                yield from rest((*done, name))
                left[name] += 1

    return rest(())


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    stories: int
    fills: int
    stale_fills: int
    stale_entries: int


async def told(link: Link, world: World, actors: Sequence[str]) -> Verdict:
    """Play all stories of these actors to their ends."""
    for shard in range(world.names.shards):
        await link.call("HSET", world.names.part(shard, "own"), "o", "me", "e", "1")
    found: Counter[str] = Counter()
    numbered = enumerate(orders(actors))
    while some := list(islice(numbered, TOGETHER)):
        stories = [Story(world, number, order) for number, order in some]
        for at in range(len(stories[0].order)):
            await _play(link, stories, at)
        found["stories"] += len(stories)
        found["fills"] += sum(story.fills for story in stories)
        found["stale_fills"] += sum(story.stale_fills for story in stories)
        found["stale_entries"] += await _stale_entries(link, stories)
    return Verdict(**{name: found[name] for name in Verdict.__struct_fields__})


async def _play(link: Link, stories: Sequence[Story], at: int) -> None:
    acts = [(story, act) for story in stories if (act := story.step(at)) is not None]
    calls = [act.call if isinstance(act, Judged) else act for _, act in acts]
    scripted = [(n, call) for n, call in enumerate(calls) if isinstance(call, Call)]
    plain = [(n, call) for n, call in enumerate(calls) if not isinstance(call, Call)]
    replies: dict[int, Any] = {}
    done = await run_many(link, [call for _, call in scripted], timeout_ms=30_000)
    replies.update(zip([n for n, _ in scripted], done, strict=True))
    done = await link.call_many([call for _, call in plain], timeout_ms=30_000)
    replies.update(zip([n for n, _ in plain], done, strict=True))
    for n, (story, act) in enumerate(acts):
        assert not isinstance(replies[n], Exception), replies[n]
        story.replies[story.order[at]] = replies[n]
        if isinstance(act, Judged):
            act.judge(replies[n])


async def _stale_entries(link: Link, stories: Sequence[Story]) -> int:
    names, stale = stories[0].world.names, 0
    entries = await link.call("MGET", *[names.entry(story.key) for story in stories])
    tags = await link.call("MGET", *[names.tag(story.tag) for story in stories])
    bases = await link.call("MGET", *[names.tag(dependents_of(story.base)) for story in stories])
    seconds, _ = await link.call("TIME")
    for story, raw, *versions in zip(stories, entries, tags, bases, strict=True):
        if raw is None:
            continue
        entry = read_entry(raw, bytes_max=10_000)
        current = {
            tag: TagVersions(*_versions_of(version))
            for tag, version in zip((story.tag, dependents_of(story.base)), versions, strict=True)
            if version is not None
        }
        fresh = entry.soft_at_ms > (int(seconds) + 60) * 1000
        value = msgspec.msgpack.decode(entry.payload)
        held = fresh and standing(entry.meta.tags, current) == "fresh"
        stale += held and value != story.source
    return stale


def _versions_of(stored: bytes) -> tuple[int, int]:
    version, _, hard = stored.partition(b" ")
    return int(version), int(hard or version)


def planted(name: str, *changes: tuple[str, str]) -> Script:
    """A script of ours with a line taken out, or another in its place."""
    text = SCRIPTS[name].source
    for old, new in changes:
        text, count = re.subn(old, new, text, flags=re.MULTILINE)
        assert count == 1, f"{name} does not say {old!r} once"
    return Script.of(name, text)


@pytest.fixture
async def link(make_server) -> AsyncIterator[Link]:
    made = link_to(make_server().socket_url, command_timeout_ms=30_000)
    async with running(made):
        yield made


@pytest.mark.parametrize(
    ("actors", "stories"),
    [
        (["loader1", "loader2", "writer1", "writer2"], 6_300),
        (["loader1", "loader2", "writer", "loss"], 1_764),
        (["loader", "refresher", "writer"], 560),
        (["loader", "refresher", "softener", "loss"], 3_528),
        (["loader1", "loader2", "through"], 280),
        (["loader1", "loader2", "behind", "loss"], 5_880),
        (["loader", "behind", "writer"], 560),
        (["leased1", "leased2", "loss"], 244),
        (["leased1", "loader", "loss"], 208),
        (["leased1", "leased2", "loader"], 5_775),
        (["tagged1", "tagged2", "bumper"], 1_575),
        (["tagged", "bumper1", "bumper2"], 210),
        (["tagged1", "tagged2", "nudger"], 1_575),
        (["tagged", "nudger", "bumper"], 420),
        (["reliant1", "reliant2", "rebaser"], 1_575),
        (["reliant1", "reliant2", "rebaser", "loss"], 13_420),
        (["reliant", "rebaser", "underminer"], 420),
        (["finder", "reliant", "rebaser"], 3_150),
        (["loader", "extender", "writer"], 1_260),
        (["loader", "extender", "softener", "loss"], 9_360),
        (["extender1", "extender2", "softener"], 1_575),
        (["loader", "extender", "through"], 1_260),
        (["loader", "extender", "behind"], 4_200),
        pytest.param(
            ["loader1", "loader2", "writer1", "writer2", "loss"], 48_510, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
async def test_no_order_of_events_leaves_a_stale_value(link: Link, actors, stories) -> None:
    """entry_fill I1, with whatever makes a value old; also when the lease record is lost."""
    verdict = await told(link, World(), actors)
    assert verdict.stories == stories
    assert (verdict.stale_fills, verdict.stale_entries) == (0, 0)
    assert verdict.fills > stories / 20, "or nothing was tried"


@pytest.mark.parametrize("writer", ["rebaser", "underminer"])
async def test_a_dependency_that_is_named_late_leaves_no_stale_value(
    link: Link, writer: str
) -> None:
    """Loading A2: who names it first makes its tag, and stores nothing if there was a change."""
    verdict = await told(link, World(), ["finder1", "finder2", writer])
    assert verdict.stories == 1_575
    assert verdict.fills > 0, "a second one stores"
    assert (verdict.stale_fills, verdict.stale_entries) == (0, 0)


@pytest.mark.parametrize("writer", ["rebaser", "underminer"])
async def test_who_names_a_dependency_first_looks_at_the_head(link: Link, writer: str) -> None:
    """Loading A2: an invalidation before there was a tag left its trace there, and only one that
    fell between the beginning of the load and its question speaks against it."""
    verdict = await told(link, World(), ["finder", writer])
    assert (verdict.stories, verdict.fills) == (15, 5)
    assert (verdict.stale_fills, verdict.stale_entries) == (0, 0)


async def test_a_dependency_that_nobody_changed_is_stored_at_once(link: Link) -> None:
    """Loading A2: though its tag had to be made."""
    verdict = await told(link, World(), ["finder"])
    assert (verdict.stories, verdict.fills) == (1, 1)


BLIND = planted("entry_fill", (TOKEN_CHECK, ""))
LENIENT = planted(
    "entry_fill",
    (
        TOKEN_CHECK,
        'local at = redis.call("GET", KEYS[2]) if at and at ~= ARGV[1] then return { 0 } end',
    ),
)
FORGETFUL = planted("entries_invalidate", (r"^  redis.call\(\"DEL\", KEYS\[i \+ 1\]\)$", ""))
HASTY = planted("entry_fill", (TOKEN_CHECK, ""), (PENDING_CHECK, ""))


CARELESS = planted("entry_extend", (TOKEN_CHECK, ""))
SOLITARY = planted("entries_invalidate", (r"^  outdate_dependents\(.*\)$", ""))


@pytest.mark.parametrize(
    ("script", "actors"),
    [
        (BLIND, ["loader1", "loader2", "writer"]),
        (LENIENT, ["loader1", "loader2", "writer"]),
        (FORGETFUL, ["loader1", "loader2", "writer"]),
        (HASTY, ["loader1", "loader2", "behind"]),
    ],
    ids=["blind set", "an absent token will do", "the lease survives", "over a pending write"],
)
async def test_the_check_finds_what_a_broken_fence_lets_through(link: Link, script, actors) -> None:
    """The negative control: stale fills, and stale entries in the end."""
    verdict = await told(link, World(**{script.name: script}), actors)
    assert verdict.stale_fills > 0
    assert verdict.stale_entries > 0


async def test_a_write_through_without_a_lease_is_found(link: Link) -> None:
    """The negative control for X2 and X3 of the write path: entries older than their rows."""
    verdict = await told(link, World(), ["unleased1", "unleased2"])
    assert verdict.stale_entries > 0


async def test_an_extension_without_a_fence_is_found(link: Link) -> None:
    """The negative control: what was softly invalidated meanwhile would live on as fresh."""
    verdict = await told(link, World(entry_extend=CARELESS), ["loader", "extender", "softener"])
    assert verdict.stale_fills > 0
    assert verdict.stale_entries > 0


@pytest.mark.parametrize(
    "actors", [["reliant", "rebaser"], ["finder1", "finder2", "rebaser"]], ids=" ".join
)
async def test_dependents_that_are_not_outdated_are_found(link: Link, actors) -> None:
    """The negative control: the invalidation of a key leaves what depends on it as it is."""
    verdict = await told(link, World(entries_invalidate=SOLITARY), actors)
    assert verdict.stale_entries > 0


async def test_a_dependency_that_had_no_tag_is_found(link: Link, monkeypatch) -> None:
    """The negative control: the key was invalidated after it was read, when it had no tag yet."""
    monkeypatch.setitem(globals(), "traced", lambda story: ())
    verdict = await told(link, World(), ["finder", "rebaser"])
    assert verdict.stale_entries > 0


async def test_a_change_that_leaves_no_trace_in_the_head_is_found(link: Link) -> None:
    """The negative control: as before there was one."""
    trace = r"^  accepted\(true, redis.pcall\(\"HSET\", head, \"o\", version\)\)$"
    traceless = planted("entries_invalidate", (trace, ""))
    verdict = await told(link, World(entries_invalidate=traceless), ["finder", "rebaser"])
    assert verdict.stale_entries > 0


async def test_a_tag_captured_too_late_is_found(link: Link, monkeypatch) -> None:
    """The negative control for tags: captured after the source was read."""

    def late(story: Story, name: str) -> Steps:
        steps = tagged(story, name)
        begun = yield next(steps)
        value = story.source
        yield
        version, *_ = yield story.capture(story.tag)
        if begun[0]:
            yield fill(story, name, value, {story.tag: int(version)})
        yield

    monkeypatch.setitem(ACTORS, "tagged", late)
    verdict = await told(link, World(), ["tagged1", "tagged2", "bumper"])
    assert verdict.stale_entries > 0

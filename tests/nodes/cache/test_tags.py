"""Tag versions: followed from the moment they were looked up, and never guessed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.cache import tags as tags_module
from forebay.nodes.cache.tags import Captured, TagTable, TagVersions, standing
from forebay.schemas.errors import Disconnected
from forebay.schemas.keys import Names

NAMES = Names("tags", 4)


class Server:
    """Has versions for each tag, and answers when it is let."""

    def __init__(self) -> None:
        self.versions: dict[str, int | tuple[int, int]] = {}
        self.asked: list[list[str]] = []
        self.gate = anyio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.changed = 1  #: when a key of the shard was changed

    async def capture(self, tags: Sequence[str]) -> Mapping[str, Captured]:
        self.asked.append(list(tags))
        found = {tag: self.answer(tag) for tag in tags}
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return found

    def answer(self, tag: str) -> Captured:
        made = tag not in self.versions
        found = self.versions.setdefault(tag, 100)
        version, hard = found if isinstance(found, tuple) else (found, found)
        return Captured(version, hard, self.changed if made else 0)


def hard(**versions: int) -> dict[str, TagVersions]:
    """Tags of which the last bump was a hard one."""
    return {tag: TagVersions(version, version) for tag, version in versions.items()}


async def look_up(table: TagTable, found: dict[str, TagVersions], *tags: str) -> None:
    found.update(await table.versions(tags, trust=True))


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def table(server: Server) -> TagTable:
    return TagTable(NAMES, server.capture)


async def test_a_tag_is_looked_up_once_and_then_followed(table: TagTable, server: Server) -> None:
    """T1: notices move it on; older ones, and repetitions, change nothing."""
    assert await table.versions(["a", "b"], trust=True) == hard(a=100, b=100)
    table.bump("a", 105)
    table.bump("a", 105)
    table.bump("a", 103)
    assert await table.versions(["a", "b"], trust=True) == hard(a=105, b=100)
    assert server.asked == [["a", "b"]]


async def test_without_trust_all_are_asked_for(table: TagTable, server: Server) -> None:
    """While notices may be missing; what comes back is never older than what is known."""
    await table.versions(["a", "b"], trust=True)
    server.versions.update(a=110)
    table.bump("b", 120)
    assert await table.versions(["a", "b"], trust=False) == hard(a=110, b=120)
    assert server.asked[1:] == [["a", "b"]]
    assert await table.versions(["a"], trust=True) == hard(a=110)


async def test_a_bump_while_it_is_being_looked_up_counts(table: TagTable, server: Server) -> None:
    """T1: the reply may be from before it."""
    server.gate = anyio.Event()
    found: dict[str, TagVersions] = {}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_up, table, found, "a")
        await anyio.wait_all_tasks_blocked()
        table.bump("a", 130)
        server.gate.set()
    assert found == hard(a=130)
    assert table.state("a").versions == (130, 130)


async def test_a_reset_while_it_is_being_looked_up_forgets_the_answer(
    table: TagTable, server: Server
) -> None:
    """T2: notices that came after the reply was made may be among the lost ones."""
    server.gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: table.versions(["a"], trust=True))
        await anyio.wait_all_tasks_blocked()
        table.reset(NAMES.shard("a"))
        server.gate.set()
    assert not table.state("a").known


async def test_a_reset_meanwhile_of_a_tag_that_was_known_has_it_asked_for(
    table: TagTable, server: Server
) -> None:
    """T2: or it would be taken for version 0, to which every entry is equal or later."""
    known, unknown = "k", next(t for t in map(str, range(99)) if NAMES.shard(t) != NAMES.shard("k"))
    await table.versions([known], trust=True)
    server.gate = anyio.Event()
    found: dict[str, TagVersions] = {}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_up, table, found, known, unknown)
        await anyio.wait_all_tasks_blocked()
        server.versions[known] = 140
        table.reset(NAMES.shard(known))
        server.gate.set()
    assert found == hard(**{known: 140, unknown: 100})
    assert standing({known: 100, unknown: 100}, found) == "invalid"


async def test_a_reset_makes_only_its_shard_unknown(table: TagTable) -> None:
    """T2: until a notice tells, or it is asked for."""
    tags = [str(number) for number in range(20)]
    await table.versions(tags, trust=True)
    table.reset(2)
    assert {tag for tag in tags if not table.state(tag).known} == {
        tag for tag in tags if NAMES.shard(tag) == 2
    }
    lost = next(tag for tag in tags if NAMES.shard(tag) == 2)
    assert table.stand_as_known({lost: 10**9}) is None
    table.bump(lost, 150)
    assert table.stand_as_known({lost: 150}) == "fresh"
    assert table.stand_as_known({lost: 149}) == "invalid"


async def test_a_server_that_does_not_answer_teaches_nothing(
    table: TagTable, server: Server
) -> None:
    """The error goes to whoever asked."""
    server.error = Disconnected("gone")
    with pytest.raises(Disconnected):
        await table.versions(["a"], trust=True)
    assert not table.state("a").known


BOTH = {"a": TagVersions(7, 5), "b": TagVersions(3, 3)}


@pytest.mark.parametrize(
    ("embedded", "current", "found"),
    [
        ({}, {}, "fresh"),
        ({}, BOTH, "fresh"),
        ({"a": 7}, BOTH, "fresh"),
        ({"a": 8}, BOTH, "fresh"),
        ({"a": 6}, BOTH, "stale"),
        ({"a": 5}, BOTH, "stale"),
        ({"a": 4}, BOTH, "invalid"),
        ({"a": 7, "b": 3}, BOTH, "fresh"),
        ({"a": 5, "b": 3}, BOTH, "stale"),
        ({"b": 3, "a": 5}, BOTH, "stale"),
        ({"a": 7, "b": 2}, BOTH, "invalid"),
        ({"a": 5, "b": 2}, BOTH, "invalid"),
        ({"b": 2, "a": 5}, BOTH, "invalid"),
        ({"c": 10**9}, BOTH, "invalid"),
        ({"a": 5}, {}, "invalid"),
    ],
)
async def test_the_worst_of_an_entry_s_tags_says_how_it_stands(
    table: TagTable, server: Server, embedded, current, found
) -> None:
    """Below the hard version it is invalid, below the version stale; so is what is not known."""
    assert standing(embedded, current) == found
    server.versions.update(current)
    await table.versions(tuple(current), trust=True)
    known = embedded.keys() <= current.keys()
    assert table.stand_as_known(embedded) == (found if known else None)


async def test_one_tag_that_is_known_to_be_invalid_is_enough(table: TagTable) -> None:
    """Nobody is asked about the others."""
    await table.versions(["a"], trust=True)
    assert table.stand_as_known({"a": 99, "b": 100}) == "invalid"
    assert table.stand_as_known({"b": 100, "a": 99}) == "invalid"
    assert table.stand_as_known({"a": 100, "b": 100}) is None


async def test_a_soft_bump_raises_the_version_and_not_the_hard_one(table: TagTable) -> None:
    """What carries less is stale, not invalid; older ones and repetitions change nothing."""
    await table.versions(["a"], trust=True)
    for version in (105, 103, 105):
        table.bump("a", version, soft=True)
    assert table.state("a").versions == (105, 100)
    assert table.stand_as_known({"a": 104}) == "stale"
    table.bump("a", 110)
    table.bump("a", 108, soft=True)
    assert table.state("a").versions == (110, 110)
    assert table.stand_as_known({"a": 109}) == "invalid"


async def test_a_soft_bump_of_a_tag_that_is_not_known_leaves_it_so(
    table: TagTable, server: Server
) -> None:
    """T1: it does not tell the hard version; but no answer from before it is believed later."""
    state = table.state("a")
    table.bump("a", 105, soft=True)
    assert not state.known
    assert table.stand_as_known({"a": 10**9}) is None
    server.versions["a"] = 102
    assert await table.versions(["a"], trust=True) == {"a": TagVersions(105, 102)}
    assert state.versions == (105, 102)


async def test_a_soft_bump_while_it_is_being_looked_up_counts(
    table: TagTable, server: Server
) -> None:
    """T1: whoever asked is told of it, and the hard version is asked for again."""
    server.gate = anyio.Event()
    found: dict[str, TagVersions] = {}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_up, table, found, "a")
        await anyio.wait_all_tasks_blocked()
        table.bump("a", 130, soft=True)
        server.gate.set()
    assert found == {"a": TagVersions(130, 100)}
    assert not table.state("a").known
    server.versions["a"] = 130, 120
    assert await table.versions(["a"], trust=True) == {"a": TagVersions(130, 120)}
    assert table.state("a").versions == (130, 120)


async def test_a_soft_bump_while_a_known_tag_is_being_asked_for_counts(
    table: TagTable, server: Server
) -> None:
    """T1: without trust the answer is only added to what is known."""
    await table.versions(["a"], trust=True)
    server.gate = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: table.versions(["a"], trust=False))
        await anyio.wait_all_tasks_blocked()
        table.bump("a", 130, soft=True)
        server.gate.set()
    assert table.state("a").versions == (130, 100)


@pytest.mark.parametrize(
    ("version", "hard_version", "found"),
    [(500, 500, 500), (501, 501, None), (501, 100, None), (400, 100, 400)],
)
async def test_tags_named_late_are_those_of_before_the_load(
    table: TagTable, server: Server, version: int, hard_version: int, found: int | None
) -> None:
    """One that was bumped since, hard or softly, speaks against what was loaded."""
    server.versions.update(a=(version, hard_version), b=100)
    named = await table.discovered(["a", "b"], since=500)
    assert named == (None if found is None else {"a": found, "b": 100})
    assert table.state("a").versions == (version, hard_version)


async def test_a_tag_that_had_no_version_was_not_bumped(table: TagTable, server: Server) -> None:
    """Bumps make the tags that they name; those of what others depend on they do not."""
    assert await table.discovered(["a"], since=50) == {"a": 100}
    assert await table.discovered(["a"], since=50) is None
    assert await table.discovered(["b"], since=50, traced={"b"}) == {"b": 100}
    server.changed = 70
    assert await table.discovered(["c"], since=50, traced={"c"}) is None
    assert await table.discovered(["d"], since=80, traced={"d"}) == {"d": 100}
    assert await table.discovered(["e"], since=50) == {"e": 100}


async def test_a_late_tag_is_asked_for_though_it_is_known(table: TagTable, server: Server) -> None:
    """The notice of a bump since then may be under way."""
    await table.versions(["a"], trust=True)
    server.versions["a"] = 700
    assert await table.discovered(["a"], since=500) is None
    assert table.state("a").version == 700


Bumps = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.booleans()), max_size=20)


@given(Bumps, st.randoms())
def test_notices_in_any_order_and_number_lead_to_the_same(bumps, rng) -> None:
    """T1: the newest counts, also for what is said before the tag was ever looked up."""
    tables = [TagTable(NAMES, Server().capture) for _ in range(2)]
    again = bumps + bumps[: len(bumps) // 2]
    rng.shuffle(again)
    for table, said in zip(tables, (bumps, again), strict=True):
        states = [table.state(tag) for tag in "abc"]
        for tag, version, soft in said:
            table.bump(tag, version, soft=soft)
        for state in states:
            told = [(version, soft) for tag, version, soft in bumps if tag == state.tag]
            if hards := [version for version, soft in told if not soft]:
                assert state.versions == (max(version for version, _ in told), max(hards))
            else:
                assert not state.known


@given(Bumps, st.integers(0, 20))
async def test_a_known_state_is_never_behind_what_was_told(bumps, asked_after) -> None:
    """T1: whenever the server was asked, and however old its answer."""
    table, told = TagTable(NAMES, Server().capture), dict[str, int]()
    states = [table.state(tag) for tag in "abc"]
    for number, (tag, version, soft) in enumerate(bumps):
        if number == asked_after:
            await table.versions(list("abc"), trust=True)
        table.bump(tag, version + 96, soft=soft)
        told[tag] = max(version + 96, told.get(tag, 0))
        assert all(not state.known or state.version >= told.get(state.tag, 0) for state in states)


def test_states_live_as_long_as_somebody_refers_to_them(
    table: TagTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3: a node that sees a million tags does not remember them all."""
    monkeypatch.setattr(tags_module, "_KEEP", 10)
    held = table.state("held")
    table.bump("held", 7)
    for number in range(1_000):
        table.state(str(number))
    gc.collect()
    assert len(table) == 11
    assert table.state("held") is held
    assert table.state("held").version == 7
    table.bump("nobody asks for this one", 1)
    assert len(table) <= 12

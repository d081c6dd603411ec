"""Tag versions: followed from the moment they were looked up, and never guessed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.cache import tags as tags_module
from forebay.nodes.cache.tags import TagTable
from forebay.schemas.errors import Disconnected
from forebay.schemas.keys import Names

NAMES = Names("tags", 4)


class Server:
    """Has a version for each tag, and answers when it is let."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.asked: list[list[str]] = []
        self.gate = anyio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def capture(self, tags: Sequence[str]) -> Mapping[str, int]:
        self.asked.append(list(tags))
        found = {tag: self.versions.setdefault(tag, 100) for tag in tags}
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return found


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def table(server: Server) -> TagTable:
    return TagTable(NAMES, server.capture)


async def test_a_tag_is_looked_up_once_and_then_followed(table: TagTable, server: Server) -> None:
    """T1: notices move it on; older ones, and repetitions, change nothing."""
    assert await table.versions(["a", "b"], trust=True) == {"a": 100, "b": 100}
    table.bump("a", 105)
    table.bump("a", 105)
    table.bump("a", 103)
    assert await table.versions(["a", "b"], trust=True) == {"a": 105, "b": 100}
    assert server.asked == [["a", "b"]]


async def test_without_trust_all_are_asked_for(table: TagTable, server: Server) -> None:
    """While notices may be missing; what comes back is never older than what is known."""
    await table.versions(["a", "b"], trust=True)
    server.versions.update(a=110)
    table.bump("b", 120)
    assert await table.versions(["a", "b"], trust=False) == {"a": 110, "b": 120}
    assert server.asked[1:] == [["a", "b"]]
    assert await table.versions(["a"], trust=True) == {"a": 110}


async def test_a_bump_while_it_is_being_looked_up_counts(table: TagTable, server: Server) -> None:
    """T1: the reply may be from before it."""
    server.gate = anyio.Event()
    found = {}

    async def look_up() -> None:
        found.update(await table.versions(["a"], trust=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_up)
        await anyio.wait_all_tasks_blocked()
        table.bump("a", 130)
        server.gate.set()
    assert found == {"a": 130}
    assert table.state("a").version == 130


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
    found = {}

    async def look_up() -> None:
        found.update(await table.versions([known, unknown], trust=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_up)
        await anyio.wait_all_tasks_blocked()
        server.versions[known] = 140
        table.reset(NAMES.shard(known))
        server.gate.set()
    assert found == {known: 140, unknown: 100}
    assert not table.hold({known: 100, unknown: 100}, found)


async def test_a_reset_makes_only_its_shard_unknown(table: TagTable) -> None:
    """T2: until a notice tells, or it is asked for."""
    tags = [str(number) for number in range(20)]
    await table.versions(tags, trust=True)
    table.reset(2)
    assert {tag for tag in tags if not table.state(tag).known} == {
        tag for tag in tags if NAMES.shard(tag) == 2
    }
    lost = next(tag for tag in tags if NAMES.shard(tag) == 2)
    assert table.hold_as_known({lost: 10**9}) is None
    table.bump(lost, 150)
    assert table.hold_as_known({lost: 150}) is True
    assert table.hold_as_known({lost: 149}) is False


async def test_a_server_that_does_not_answer_teaches_nothing(
    table: TagTable, server: Server
) -> None:
    """The error goes to whoever asked."""
    server.error = Disconnected("gone")
    with pytest.raises(Disconnected):
        await table.versions(["a"], trust=True)
    assert not table.state("a").known


@pytest.mark.parametrize(
    ("embedded", "current", "holds"),
    [
        ({}, {}, True),
        ({"a": 5}, {"a": 5}, True),
        ({"a": 6}, {"a": 5}, True),
        ({"a": 4}, {"a": 5}, False),
        ({"a": 5, "b": 4}, {"a": 5, "b": 5}, False),
        ({"a": 5}, {}, False),
    ],
)
def test_every_embedded_version_must_be_at_least_the_known_one(
    table: TagTable, embedded, current, holds
) -> None:
    """And a tag of which nothing is known speaks against the entry."""
    assert table.hold(embedded, current) is holds


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=20), st.randoms())
def test_notices_in_any_order_and_number_lead_to_the_same(bumps, rng) -> None:
    """T1: the newest counts, also for what is said before the tag was ever looked up."""
    tables = [TagTable(NAMES, Server().capture) for _ in range(2)]
    again = bumps + bumps[: len(bumps) // 2]
    rng.shuffle(again)
    for table, said in zip(tables, (bumps, again), strict=True):
        states = [table.state(tag) for tag in "abc"]
        for tag, version in said:
            table.bump(tag, version)
        newest = {tag: max((v for t, v in bumps if t == tag), default=None) for tag in "abc"}
        assert [state.version if state.known else None for state in states] == [*newest.values()]


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

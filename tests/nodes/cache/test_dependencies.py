"""What depends on a key is old with it: declared or named by the loader, through any number."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import msgspec
import pytest

import forebay


class World:
    """A node with users, teams of users, and pages of teams: each depends on the one before."""

    def __init__(self, node: forebay.Node, source: Any) -> None:
        self.node = node

        @node.cached("user:{id}", ttl=600, stale_for=600, tags=["users"])
        async def user(id: int) -> str | None:
            return await source.get(f"user:{id}")

        @node.cached("team:{id}", ttl=600, stale_for=600, depends_on=["user:{id}"], tags=["teams"])
        async def team(id: int) -> str | None:
            return await source.get(f"team:{id}")

        @node.cached("page:{id}", ttl=600, stale_for=600, depends_on=["team:{id}"])
        async def page(id: int) -> str | None:
            return await source.get(f"page:{id}")

        @node.cached("note:{id}", ttl=600, stale_for=600)
        async def note(id: int) -> str | None:
            forebay.loading().depends_on(f"team:{id}")
            return await source.get(f"note:{id}")

        @node.sink("user:{id}")
        async def nowhere(writes: list[forebay.Write[str]]) -> None:
            """No worker is there to use it."""

        self.user, self.team, self.page, self.note = user, team, page, note
        self.all = [user, team, page, note]

    async def warm(self) -> None:
        for cached in self.all:
            await cached(1)
            await cached(1)  # the first load of a note may not have been stored

    async def old(self) -> list[str]:
        """Whose entries are not served as fresh any more; it does not look for long."""
        hits = {each.name: await each.get_with_info(1) for each in self.all}
        return [name for name, hit in hits.items() if hit.tier == "source" or hit.stale]


@pytest.fixture
async def worlds(make_node, source) -> AsyncIterator[list[World]]:
    """Two, which have read everything of number 1."""
    made = [World(make_node(jitter=0.0, lease_ms=60_000), source) for _ in range(2)]
    for name in ("user", "team", "page", "note"):
        source.values[f"{name}:1"] = f"{name} one"
    async with AsyncExitStack() as stack:
        for each in made:
            await stack.enter_async_context(each.node)
        for each in made:
            await each.warm()
        yield made


async def test_a_fill_outdates_nothing(worlds) -> None:
    """NoticeDispatcher E3: what was loaded replaces what has ended, and the rest stays near."""
    for world in worlds:
        assert await world.old() == []
        world.user._cache.path.near.clear()
        await world.node._parts.backend.link.call("DEL", world.node._parts.names.entry("user:1"))
        assert (await world.user.get_with_info(1)).tier == "source"
        for cached in (world.team, world.page, world.note):
            assert (await cached.get_with_info(1)).tier == "near"


async def test_a_reload_outdates_nothing_elsewhere(worlds, eventually) -> None:
    """E3: also as a notice; the other nodes go on with what they have."""
    one, two = worlds
    await one.node._parts.backend.link.call("DEL", one.node._parts.names.entry("user:1"))
    one.user._cache.path.near.clear()
    loaded = await one.user.get_with_info(1)

    async def told() -> bool:
        return (await two.user.get_with_info(1)).version == loaded.version

    await eventually(told)
    assert [(await each.get_with_info(1)).tier for each in (two.team, two.page, two.note)] == [
        "near"
    ] * 3


CHANGES = {
    "invalidate": lambda world: world.user.invalidate(1),
    "node.invalidate": lambda world: world.node.invalidate(["user:1"]),
    "tag of the dependency": lambda world: world.node.invalidate(tags=["users"]),
    "write_behind": lambda world: world.user.write_behind(1, "another"),
    "deletion": lambda world: world.user.write_behind(1, None),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_what_depends_on_it_is_old_with_it(worlds, source, eventually, change: str) -> None:
    """E2: transitively, declared or named; here before the change returns, elsewhere soon."""
    one, two = worlds
    source.values.update({f"{name}:1": f"new {name}" for name in ("team", "page", "note")})
    await CHANGES[change](one)
    for cached in (one.page, one.note, one.team):
        assert await cached(1) == f"new {cached.name}"

    async def all_new() -> bool:
        return [await each(1) for each in (two.page, two.note, two.team)] == [
            "new page", "new note", "new team",
        ]  # fmt: skip

    await eventually(all_new)
    assert source.asked.count("page:1") == 2


@pytest.mark.parametrize("way", ["put", "write_behind"])
async def test_a_write_is_known_here_before_its_notice_comes(worlds, source, way: str) -> None:
    """Writes X1, E2: also by what depends on the key."""
    one = worlds[0]
    one.node._parts.follower.bell = lambda payload: None
    source.values.update({f"{name}:1": f"new {name}" for name in ("team", "page", "note")})
    await getattr(one.user, way)(1, "another")
    assert [await each(1) for each in (one.page, one.note, one.team)] == [
        "new page", "new note", "new team",
    ]  # fmt: skip


async def test_dependencies_go_one_way(worlds) -> None:
    """What it depends on is not old with it."""
    await worlds[0].page.invalidate(1)
    assert await worlds[0].old() == ["page"]
    await worlds[0].team.invalidate(1)
    assert await worlds[0].old() == ["team", "page", "note"]


async def test_another_number_is_another_matter(worlds, source) -> None:
    """Fields of the key tell whose they are."""
    source.values["page:2"] = "page two"
    await worlds[0].page(2)
    await worlds[0].user.invalidate(1)
    assert (await worlds[0].page.get_with_info(2)).tier == "near"


@pytest.mark.parametrize("by", ["key", "tag"])
async def test_a_soft_invalidation_reaches_what_depends_softly(
    worlds, source, eventually, by: str
) -> None:
    """E2: as softly; it is served stale and refreshed."""
    one, two = worlds
    source.hold()
    given = {"keys": ["user:1"]} if by == "key" else {"tags": ["users"]}
    await one.node.invalidate(**given, soft=True)
    for cached in one.all:
        hit = await cached.get_with_info(1)
        assert (hit.value, hit.stale) == (f"{cached.name} one", True)

    async def all_stale() -> bool:
        return all([(await each.get_with_info(1)).stale for each in two.all])

    await eventually(all_stale)
    source.values["page:1"] = "new page"
    source.let_go()

    async def refreshed() -> bool:
        hits = [await each.page.get_with_info(1) for each in worlds]
        return [(hit.value, hit.stale) for hit in hits] == [("new page", False)] * 2

    # What was asked for before the answer changed may have been stored first.
    await one.page.invalidate(1)
    await eventually(refreshed)


async def test_an_event_reaches_what_depends(worlds, make_node, source, eventually) -> None:
    """Invalidations and writes, as published in any language."""
    worker = World(make_node(workers=True), source)
    async with worker.node:
        source.values["page:1"] = "new page"
        await worker.node.publish([b'{"type": "invalidate", "keys": ["user:1"]}'])

        async def reads(value: str) -> bool:
            return all([await each.page(1) == value for each in worlds])

        await eventually(lambda: reads("new page"))
        source.values["page:1"] = "newer page"
        write = {"type": "write", "key": "user:1", "value": "published"}
        await worlds[0].warm()

        await worker.node.publish([msgspec.json.encode(write)])
        await eventually(lambda: reads("newer page"))
        assert await worlds[1].user(1) == "published"


async def test_a_dependency_that_changes_while_the_dependent_loads(
    worlds, source, valkey_server
) -> None:
    """Loads L1: declared, it is captured before; what was loaded does not hold."""
    one, two = worlds
    await one.page.invalidate(1)
    source.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.page, 1)
        await source.began.wait()
        source.values["page:1"] = "new page"
        await two.user.invalidate(1)
        source.let_go()
    assert await one.page(1) == await two.page(1) == "new page"


@pytest.mark.parametrize("known", [True, False])
async def test_a_named_dependency_that_changes_while_the_dependent_loads(
    make_node, source, known: bool
) -> None:
    """Loading A2: also if nothing depended on it before, so that no tag of it was there."""
    node, other = make_node(lease_ms=60_000), make_node()

    @node.cached("note:{id}", ttl=600)
    async def note(id: int) -> str | None:
        value: str | None = await source.get(id)
        forebay.loading().depends_on("user:1")
        return value

    source.values.update({1: "old", 2: "other"})
    async with node, other:
        if known:
            await note(2)
            await note(2)
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(note, 1)
            await source.began.wait()
            source.values[1] = "new"
            await other.invalidate(["user:1"])
            source.let_go()
        assert await note(1) == "new"


async def test_a_named_dependency_is_worth_one_load(make_node, source) -> None:
    """The loader reads what it depends on, which is cold; both are stored at once."""
    node = make_node()

    @node.cached("user:{id}", ttl=600)
    async def user(id: int) -> str | None:
        return await source.get(f"user:{id}")

    @node.cached("note:{id}", ttl=600)
    async def note(id: int) -> str | None:
        forebay.loading().depends_on(f"user:{id}")
        return f"by {await user(id)}: {await source.get(f'note:{id}')}"

    source.values.update({"user:1": "ada", "note:1": "hello"})
    async with node:
        assert await note(1) == "by ada: hello"
        assert (await note.get_with_info(1)).tier == "near"
        assert source.asked == ["user:1", "note:1"]
        source.values["user:1"] = "eve"
        await user.invalidate(1)
        assert await note(1) == "by eve: hello"


async def test_what_loaders_name_is_passed_on(make_node, source, eventually) -> None:
    """Load Y1: through any number of entries, with their tags; here and elsewhere."""
    nodes = [make_node(jitter=0.0, lease_ms=60_000) for _ in range(2)]

    def declare(node: forebay.Node) -> Any:
        @node.cached("low:{id}", ttl=600)
        async def low(id: int) -> str | None:
            forebay.loading().tag("author:7")
            return await source.get("low")

        @node.cached("middle:{id}", ttl=600)
        async def middle(id: int) -> str | None:
            forebay.loading().depends_on(f"low:{id}")
            return f"{await low(id)}, {await source.get('middle')}"

        @node.cached("high:{id}", ttl=600)
        async def high(id: int) -> str | None:
            forebay.loading().depends_on(f"middle:{id}")
            return f"{await middle(id)}, {await source.get('high')}"

        return high

    one, two = map(declare, nodes)
    source.values.update(low="low", middle="middle", high="high")
    async with nodes[0], nodes[1]:
        for _ in range(2):
            assert await one(1) == await two(1) == "low, middle, high"
        source.values["low"] = "new"
        await nodes[1].invalidate(["low:1"])
        assert await two(1) == "new, middle, high"
        await eventually(lambda: _reads(one, "new, middle, high"))
        source.values["low"] = "newer"
        await nodes[0].invalidate(tags=["author:7"])
        assert await one(1) == "newer, middle, high"
        await eventually(lambda: _reads(two, "newer, middle, high"))


async def _reads(cached: Any, value: str) -> bool:
    return bool(await cached(1) == value)


async def test_circles_are_no_trouble(make_node, source) -> None:
    """Each depends on the other: both are old when one is, and nothing runs in a circle."""
    one, two = make_node(), make_node()
    made = []
    for node in (one, two):

        @node.cached("egg:{id}", ttl=600, depends_on=["hen:{id}"])
        async def egg(id: int) -> str | None:
            return await source.get(f"egg:{id}")

        @node.cached("hen:{id}", ttl=600, depends_on=["egg:{id}", "hen:{id}"])
        async def hen(id: int) -> str | None:
            return await source.get(f"hen:{id}")

        made.append((egg, hen))
    async with one, two:
        for caches in made:
            for cached in caches:
                await cached(1)
        for changed, other in ((0, 1), (1, 0)):
            await made[0][changed].invalidate(1)
            assert (await made[0][other].get_with_info(1)).tier == "source"
            assert (await made[0][changed].get_with_info(1)).tier == "source"
            assert (await made[0][other].get_with_info(1)).tier == "near"


async def test_in_a_request_scope_what_depends_is_read_anew(worlds, source) -> None:
    """Scope S2: the request changes the user, and so sees another page."""
    one = worlds[0]
    for change in (
        lambda: one.user.invalidate(1),
        lambda: one.node.invalidate(["user:1"]),
        lambda: one.user.write_behind(1, "another"),
    ):
        async with forebay.request_scope():
            before = await one.page(1)
            source.values["page:1"] = f"{before}!"
            await change()
            assert await one.page(1) == f"{before}!"


async def test_a_key_that_depends_on_too_much_is_refused(make_node, source) -> None:
    """Routes: over a thousand; the caller is told, rather than served what cannot be kept right."""
    node = make_node()

    @node.cached("sum:{id}", ttl=600, depends_on=[f"part-{n}:{{id}}" for n in range(1_001)])
    async def total(id: int) -> int:
        return id

    async with node:
        with pytest.raises(forebay.ForebayError, match="depends on over"):
            await total(1)


@pytest.mark.parametrize("labels", [{"tags": ["row:{id}"]}, {"depends_on": ["row:{id}"]}])
async def test_what_is_labelled_with_its_own_key_outlives_its_own_write(
    make_node, source, labels: dict[str, list[str]]
) -> None:
    """Or a put would outdate what it puts, here and in the shared tier."""
    one, two = make_node(), make_node()
    caches = []
    for node in (one, two):

        @node.cached("row:{id}", ttl=600, **labels)
        async def row(id: int) -> str | None:
            return await source.get(id)

        caches.append(row)
    source.values[1] = "loaded"
    async with one, two:
        assert await caches[0](1) == "loaded"
        await caches[0].put(1, "put")
        assert await caches[0](1) == await caches[1](1) == "put"
        caches[0]._cache.path.near.clear()
        assert await caches[0](1) == "put"
        assert source.asked == [1]

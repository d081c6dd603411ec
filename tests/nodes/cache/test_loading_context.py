"""What a loader says of its load: lifetimes, etag, tags, and that nothing was modified."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.schemas.entry import Entry, read_entry
from forebay.schemas.errors import ConfigError, InvalidKey, LoaderError
from forebay.schemas.jobs import RefreshJob
from support.valkey_server import ValkeyServer


class Page:
    """A cache on one node whose loader does what the test says, with the load in hand."""

    def __init__(self, node: forebay.Node, source: Any, **options: Any) -> None:
        self.node = node
        self.say: Any = lambda load: None
        self.seen: list[forebay.Loading] = []
        options = {"ttl": 600.0, "stale_for": 600.0, "tags": ["pages"], **options}

        @node.cached("page:{id}", **options)
        async def page(id: int) -> str | None:
            load = forebay.loading()
            self.seen.append(load)
            value = await source.get(id)
            said = self.say(load)
            return value if said is None else said

        self.cached: Cached[Any, str | None] = page

    def entry(self, server: ValkeyServer, key: str = "page:1") -> Entry | None:
        raw = server.execute("GET", self.node._parts.names.entry(key))
        return None if raw is None else read_entry(raw, bytes_max=100_000)

    async def refresh(self, key: str = "page:1") -> bool:
        """As a job does; on top of whatever is stored."""
        shared = self.node._parts.shared
        await shared.begin(key, "token", lease_ms=60_000, seen=2**60)
        return await self.cached._cache.refresh(RefreshJob(cache="page", key=key, token="token"))


@pytest.fixture
async def pages(make_node, source) -> AsyncIterator[list[Page]]:
    """On two nodes."""
    made = [Page(make_node(jitter=0.0, lease_ms=60_000), source) for _ in range(2)]
    source.values.update({1: "one", 2: "two"})
    async with AsyncExitStack() as stack:
        for each in made:
            await stack.enter_async_context(each.node)
        yield made


async def test_a_loader_may_say_how_long_its_value_lives(pages, valkey_server) -> None:
    """A1: this once; what it does not say is as declared."""
    page = pages[0]
    page.say = lambda load: load.keep(ttl=5, stale_for=7)
    await page.cached(1)
    entry = page.entry(valkey_server)
    born_ms = entry.version // 1_000
    assert (entry.soft_at_ms - born_ms, entry.hard_at_ms - born_ms) == (5_000, 12_000)
    page.say = lambda load: None
    await page.refresh()
    entry = page.entry(valkey_server)
    born_ms = entry.version // 1_000
    assert (entry.soft_at_ms - born_ms, entry.hard_at_ms - born_ms) == (600_000, 1_200_000)


async def test_what_a_loader_says_is_checked(pages, source) -> None:
    """A1: as where a cache is declared; the callers get the error, and nothing is stored."""
    page = pages[0]
    for say, error in (
        (lambda load: load.keep(ttl=-1), ConfigError),
        (lambda load: load.keep(ttl=float("nan")), ConfigError),
        (lambda load: load.keep(stale_for="5"), ConfigError),
        (lambda load: load.tag("no tag"), InvalidKey),
        (lambda load: load.depends_on(""), InvalidKey),
        (lambda load: load.tag(*[f"t{n}" for n in range(101)]), LoaderError),
        (lambda load: load.not_modified(), LoaderError),
    ):
        page.say = say
        with pytest.raises(error):
            await page.cached(1)
    page.say = lambda load: None
    assert await page.cached(1) == "one"


async def test_what_is_not_to_be_stored_is_given_to_those_who_wait(
    pages, source, valkey_server
) -> None:
    """keep(store=False): and the next one asks again, on whatever node; no lease is left."""
    for page in pages:
        page.say = lambda load: load.keep(store=False)
        hit = await page.cached.get_with_info(1)
        assert (hit.value, hit.tier, hit.version) == ("one", "source", 0)
    assert source.loads == 2
    assert pages[0].entry(valkey_server) is None
    assert valkey_server.execute("GET", pages[0].node._parts.names.lease("page:1")) is None


async def test_an_etag_is_handed_to_the_next_load(pages, source, valkey_server) -> None:
    """With the value that it belongs to; that of an old value is never kept for a new one."""
    one, two = pages
    one.say = two.say = lambda load: load.keep(etag="v1")
    await one.cached(1)
    assert (one.seen[-1].etag, one.seen[-1].previous) == ("", None)
    source.values[1] = "other"
    two.say = lambda load: None
    await two.refresh()
    assert (two.seen[-1].etag, two.seen[-1].previous) == ("v1", "one")
    assert two.entry(valkey_server).meta.etag == ""
    await one.refresh()
    assert (one.seen[-1].etag, one.seen[-1].previous) == ("", "other")


async def test_what_is_invalid_is_seen_by_the_loader_alone(pages, source) -> None:
    """Loading.previous: it may be of use for what is loaded, and is not served."""
    one = pages[0]
    await one.cached(1)
    await one.node.invalidate(tags=["pages"])
    source.values[1] = "new"
    assert await one.cached(1) == "new"
    assert one.seen[-1].previous == "one"


async def test_not_modified_lets_the_entry_live_on(
    pages, source, valkey_server, grow_old, eventually
) -> None:
    """A3, Loads L5: the version grows, the payload, the etag and the tags are the same."""
    one, two = pages
    one.say = lambda load: load.keep(etag="v1")
    await one.cached(1)
    await two.cached(1)
    grow_old("page:1", 700.0, one.cached, two.cached)
    before = one.entry(valkey_server)
    one.say = lambda load: load.not_modified()
    source.values[1] = "not looked at"
    assert await one.refresh()
    after = one.entry(valkey_server)
    assert after.version > before.version
    assert after.soft_at_ms - after.version // 1_000 == 600_000
    assert (after.payload, after.meta.etag) == (before.payload, "v1")
    assert after.meta.tags == before.meta.tags
    hit = await one.cached.get_with_info(1)
    assert (hit.value, hit.tier, hit.version, hit.stale) == ("one", "near", after.version, False)
    assert (await two.cached.get_with_info(1)).version == after.version
    await one.node.invalidate(tags=["pages"])
    one.say = lambda load: None
    assert await one.cached(1) == "not looked at"


@pytest.mark.parametrize("say", [lambda load: None, lambda load: load.not_modified()])
async def test_other_nodes_near_entries_live_on_too(
    pages, source, valkey_server, eventually, say: Any
) -> None:
    """Extended: they read nothing for it; also where equal content was loaded again."""
    one, two = pages
    await one.cached(1)
    old = await two.cached.get_with_info(1)
    one.say = say
    assert await one.refresh()
    new = one.entry(valkey_server)
    assert new.version > old.version
    # From here on there is nothing in Valkey to read it from.
    name = one.node._parts.names.entry("page:1")
    valkey_server.execute("SET", name, b"broken", "PX", 60_000)

    async def told() -> bool:
        return (await two.cached.get_with_info(1)).version == new.version

    await eventually(told)
    hit = await two.cached.get_with_info(1)
    assert (hit.value, hit.tier, hit.stale) == ("one", "near", False)
    assert source.loads == 2


async def test_other_content_is_no_extension(pages, source, eventually) -> None:
    """The control: the other node's near entry is gone."""
    one, two = pages
    await one.cached(1)
    await two.cached(1)
    source.values[1] = "other"
    assert await one.refresh()

    async def told() -> bool:
        return await two.cached(1) == "other"

    await eventually(told)


async def test_equal_content_under_another_tag_is_followed_by_it(pages, source, eventually) -> None:
    """Near N1: the copies of other nodes, too, are old with a tag that is new to the entry."""
    one, two = pages
    await one.cached(1)
    await two.cached(1)
    one.say = two.say = lambda load: load.tag("fresh-tag")
    assert await one.refresh()
    new = await one.cached.get_with_info(1)

    async def told() -> bool:
        return (await two.cached.get_with_info(1)).version == new.version

    await eventually(told)
    source.values[1] = "other"
    await one.node.invalidate(tags=["fresh-tag"])
    await eventually(lambda: _reads(two, "other"))


async def _reads(page: Page, value: str) -> bool:
    return bool(await page.cached(1) == value)


async def test_an_extension_of_what_was_invalidated_meanwhile_is_refused(
    pages, source, valkey_server
) -> None:
    """Loads L1: by key the lease is gone; by tag the entry stays as invalid as it was."""
    one, two = pages
    await one.cached(1)
    for number, invalidation in enumerate(
        [lambda: two.node.invalidate(["page:1"]), lambda: two.node.invalidate(tags=["pages"])]
    ):
        one.say = lambda load: load.not_modified()
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.refresh)
            await source.began.wait()
            await invalidation()
            source.let_go()
        one.say = lambda load: None
        source.values[1] = f"new {number}"
        assert await one.cached(1) == f"new {number}"


async def test_not_modified_never_brings_back_what_cannot_be_read(
    pages, source, valkey_server
) -> None:
    """A3: an etag of bytes that the cache's type does not fit is not shown; it would never end."""
    one = pages[0]
    one.say = lambda load: load.keep(etag="v1")
    await one.cached(1)
    name = one.node._parts.names.entry("page:1")
    raw = valkey_server.execute("GET", name)
    one.cached._cache.path.near.clear()
    valkey_server.execute("SET", name, raw[: -len("one") - 1] + b"\x07", "PX", 60_000)
    one.say = lambda load: load.not_modified() if load.etag else load.keep(etag="v2")
    assert await one.cached(1) == "one"
    assert (one.seen[-1].etag, one.seen[-1].previous) == ("", None)
    assert one.entry(valkey_server).meta.etag == "v2"


async def test_tags_named_by_the_loader_invalidate(pages, source, eventually) -> None:
    """A2: on both nodes, as those that were declared."""
    one, two = pages
    one.say = two.say = lambda load: load.tag("author:7")
    await one.cached(1)
    assert await two.cached(1) == "one"
    source.values[1] = "new"
    await two.node.invalidate(tags=["author:7"])
    assert await two.cached(1) == "new"
    await eventually(lambda: _reads(one, "new"))


async def test_a_named_tag_that_was_bumped_during_the_load_keeps_it_out(
    pages, source, valkey_server
) -> None:
    """A2, Loads L6: also one that nobody had carried before; it is loaded once more instead."""
    one, two = pages
    one.say = two.say = lambda load: load.tag("author:7")
    source.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.cached, 1)
        await source.began.wait()
        source.values[1] = "new"
        await two.node.invalidate(tags=["author:7"])
        source.let_go()
    assert one.entry(valkey_server) is not None
    assert one.node._instruments.counts["fills_refused", "page"] == 1
    assert await two.cached(1) == await one.cached(1) == "new"
    assert source.loads == 2


async def test_a_value_survives_whose_named_tags_cannot_be_asked_for(
    make_node, source, make_server
):
    """Loads L2: the callers get it, though it is not stored; the source is not to blame."""
    server = make_server()
    page = Page(make_node(server), source, tags=[])
    page.say = lambda load: load.tag("author:7")
    source.values[1] = "one"
    async with page.node:
        source.hold()
        got: list[Any] = []

        async def read() -> None:
            got.append(await page.cached(1))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await source.began.wait()
            server.execute("CONFIG", "SET", "maxmemory", "1")
            source.let_go()
        server.execute("CONFIG", "SET", "maxmemory", "0")
        assert got == ["one"]
        assert await page.cached(1) == "one"


async def test_outside_of_a_loader_there_is_no_load(pages) -> None:
    """It says so; also in what runs beside, and after a load."""
    with pytest.raises(forebay.ForebayError, match="loaders of one key"):
        forebay.loading()
    await pages[0].cached(1)
    with pytest.raises(forebay.ForebayError, match="loaders of one key"):
        forebay.loading()


async def test_a_batch_loader_has_no_load_of_one_key(make_node) -> None:
    """What it said would hold for one of its keys only, whichever that is."""
    node = make_node()

    @node.cached("row:{id}", ttl=600)
    async def row(id: int) -> int:
        return id

    @row.batch
    async def rows(ids: list[int]) -> dict[int, int]:
        forebay.loading().keep(ttl=1)
        return {each: each for each in ids}

    async with node:
        for call in (row(1), row.many([1])):
            with pytest.raises(forebay.ForebayError, match="loaders of one key"):
                await call


async def test_each_load_has_its_own(pages, source) -> None:
    """A1: loads at the same time, and a load inside a load, do not hear each other."""
    pages[0].say = lambda load: load.keep(ttl=(load.key.endswith("1") and 5) or 50)
    async with anyio.create_task_group() as tasks:
        source.hold()
        tasks.start_soon(pages[0].cached, 1)
        tasks.start_soon(pages[0].cached, 2)
        with anyio.fail_after(20):
            while source.loads < 2:
                await anyio.sleep(0.005)
        source.let_go()
    assert sorted((load.key, load.ttl_ms) for load in pages[0].seen) == [
        ("page:1", 5_000), ("page:2", 50_000),
    ]  # fmt: skip


async def test_a_loader_that_needs_another_cache_keeps_its_own_load(make_node, source) -> None:
    """A1: after the inner load the outer one is the one under way again."""
    node = make_node()
    keys = []

    @node.cached("inner:{id}", ttl=600)
    async def inner(id: int) -> int:
        keys.append(forebay.loading().key)
        return id

    @node.cached("outer:{id}", ttl=600)
    async def outer(id: int) -> int:
        keys.append(forebay.loading().key)
        value = await inner(id)
        keys.append(forebay.loading().key)
        return value

    async with node:
        await outer(1)
    assert keys == ["outer:1", "inner:1", "outer:1"]


async def test_loads_that_wait_for_each_other_are_told(make_node, source, valkey_server) -> None:
    """Flights F5: each asks for what the other is loading, which no stack of calls shows."""
    node = make_node(lease_ms=60_000)
    both = anyio.Event()
    running = []

    async def meet(name: str) -> None:
        running.append(name)
        if len(running) == 2:
            both.set()
        await both.wait()

    @node.cached("one:{id}", ttl=600)
    async def one(id: int) -> int:
        await meet("one")
        return await two(id)

    @node.cached("two:{id}", ttl=600)
    async def two(id: int) -> int:
        await meet("two")
        return await one(id)

    errors: list[Exception] = []

    async def read(cached: Any) -> None:
        try:
            await cached(1)
        except LoaderError as error:
            errors.append(error)

    async with node:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read, one)
                tasks.start_soon(read, two)
        assert len(errors) == 2
        assert any("itself" in str(error) for error in errors)


async def test_a_refresh_whose_loader_asks_for_its_own_key_is_told(make_node, source) -> None:
    """Flights F5: a job's load is a load like any other."""
    node = make_node(lease_ms=60_000)

    @node.cached("self:{id}", ttl=600)
    async def itself(id: int) -> int:
        return await itself(id)

    async with node:
        await node._parts.shared.begin("self:1", "token", lease_ms=60_000, seen=-1)
        job = RefreshJob(cache="itself", key="self:1", token="token")
        with anyio.fail_after(5), pytest.raises(LoaderError, match="itself"):
            await itself._cache.refresh(job)

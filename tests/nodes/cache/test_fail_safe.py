"""What readers get while the loader fails: what was kept for that, flagged; the source rests."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Self

import anyio
import pytest

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.schemas.errors import LoaderError, SourceFailing
from forebay.schemas.jobs import RefreshJob

Row = dict[str, int]
GRACE_S = 130.0  #: past ttl and stale_for of ``declare``, and within stale_if_error
GONE_S = 700.0  #: past all of it
NEVER_MS = 60_000


class Absent(Exception):
    """Says nothing of the source."""


def declare(node: forebay.Node, source: Any, **options: Any) -> Cached[Any, Row | None]:
    options = {"ttl": 60.0, "stale_for": 60.0, "stale_if_error": 600.0, "tags": ["rows"], **options}

    @node.cached("row:{id}", **options)
    async def row(id: int) -> Row | None:
        return await source.get(id)

    return row


class Pair:
    """Two nodes, and what they share."""

    def __init__(self, one: forebay.Node, two: forebay.Node, source: Any, **options: Any) -> None:
        self.nodes = one, two
        self.row, self.again = declare(one, source, **options), declare(two, source, **options)

    @property
    def caches(self) -> tuple[Cached[Any, Row | None], ...]:
        return self.row, self.again

    def breakers(self) -> list[str]:
        return [cached._cache.path.loads.source.breaker.state for cached in self.caches]

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        for node in self.nodes:
            await self._stack.enter_async_context(node)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


@pytest.fixture
def make_pair(make_node, source):
    """Two nodes with the same cache; a failed key is left alone for a minute."""

    def make(options: dict[str, Any] | None = None, **cache: Any) -> Pair:
        cache = {"jitter": 0.0, "throttle_ms": NEVER_MS, "lease_ms": 60_000, **cache}
        source.values.update({n: {"n": n} for n in range(20)})
        return Pair(make_node(**cache), make_node(**cache), source, **(options or {}))

    return make


def lease_of(pair: Pair, server: Any, key: str) -> Any:
    return server.execute("GET", pair.nodes[0]._parts.names.lease(key))


def end_throttle(pair: Pair, server: Any, key: str) -> None:
    """As if throttle_ms had passed."""
    assert lease_of(pair, server, key) == b"!"
    server.execute("DEL", pair.nodes[0]._parts.names.lease(key))


async def fails(call: Any, error: type[Exception] = ConnectionError) -> Exception:
    with pytest.raises(error) as caught:
        await call
    return caught.value


async def open_breaker(pair: Pair, source: Any, failures: int) -> None:
    """By failures of keys that have no entry, on the first node."""
    source.error = source.error or ConnectionError("down")
    for number in range(100, 100 + failures):
        await fails(pair.row(number), Exception)


async def test_what_is_past_its_stale_time_is_served_if_the_loader_fails(
    make_pair, source, grow_old
) -> None:
    """R5: flagged, after the loader was tried; past stale_if_error its error is raised."""
    async with make_pair() as pair:
        before = await pair.row.get_with_info(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.error = ConnectionError("down")
        hit = await pair.row.get_with_info(1)
        assert (hit.value, hit.tier, hit.stale, hit.version) == (
            {"n": 1}, "shared", True, before.version,
        )  # fmt: skip
        assert source.loads == 2
        assert (await pair.again.get_with_info(1)).stale
        grow_old("row:1", GONE_S - GRACE_S, *pair.caches)
        for cached in pair.caches:
            await fails(cached(1))
        assert source.loads == 4


async def test_what_is_past_its_stale_time_is_loaded_if_the_loader_works(
    make_pair, source, grow_old
) -> None:
    """D3: it is kept for errors only, and nobody gets it otherwise."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.values[1] = {"n": 2}
        hit = await pair.row.get_with_info(1)
        assert (hit.value, hit.tier, hit.stale) == ({"n": 2}, "source", False)
        assert (await pair.again.get_with_info(1)).value == {"n": 2}
        assert source.loads == 2


async def test_a_loader_given_lifetime_does_not_move_the_end_of_the_fallback(
    make_node, source, grow_old
) -> None:
    """stale_if_error counts from the end of ttl, however long the loader lets it be stale."""
    node = make_node(jitter=0.0)

    @node.cached("page:{id}", ttl=60, stale_for=60, stale_if_error=600)
    async def page(id: int) -> str:
        value = await source.get(id)
        forebay.loading().keep(stale_for=float(id))
        return value

    source.values.update({0: "short", 300: "long", 900: "longer"})
    async with node:
        for number, hard_s in ((0, 660), (300, 660), (900, 960)):
            await page(number)
            hit = await page.get_with_info(number)
            raw = await node._parts.backend.link.call(
                "GET", node._parts.names.entry(f"page:{number}")
            )
            assert int(bytes(raw)[33:46]) == hit.version // 1_000 + hard_s * 1_000


async def test_between_failures_the_source_is_left_alone(
    make_pair, source, grow_old, valkey_server
) -> None:
    """L2: one try of a key in throttle_ms, over both nodes, by readers at once or in turn."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.error = ConnectionError("down")
        for tried in (2, 3):
            crowd = [cached.get_with_info(1) for cached in pair.caches * 50]
            hits = [*await asyncio.gather(*crowd), await pair.row.get_with_info(1)]
            hits.append(await pair.again.get_with_info(1))
            assert all((hit.value, hit.stale) == ({"n": 1}, True) for hit in hits)
            assert source.loads == tried
            name = pair.nodes[0]._parts.names.lease("row:1")
            assert 0 < valkey_server.execute("PTTL", name) <= NEVER_MS
            end_throttle(pair, valkey_server, "row:1")


async def test_those_who_wait_for_another_nodes_load_are_served_when_it_fails(
    make_pair, source, grow_old
) -> None:
    """R5: they asked before it was known; none of them tries for itself."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.error = ConnectionError("down")
        source.hold()
        hits = []

        async def read(cached: Any) -> None:
            hits.append(await cached.get_with_info(1))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, pair.row)
            await source.began.wait()
            for _ in range(20):
                tasks.start_soon(read, pair.again)
            await anyio.sleep(0.05)  # so that they have found the lease taken
            source.let_go()
        assert [(hit.value, hit.stale) for hit in hits] == [({"n": 1}, True)] * 21
        assert source.loads == 2


async def test_without_an_entry_the_error_is_raised(make_pair, source, valkey_server) -> None:
    """And the next caller tries again at once: there is nothing to serve meanwhile."""
    async with make_pair() as pair:
        source.error = ConnectionError("down")
        for cached in pair.caches * 2:
            assert str(await fails(cached(1))) == "down"
        assert source.loads == 4
        assert lease_of(pair, valkey_server, "row:1") is None


@pytest.mark.parametrize("by", ["key", "tag"])
async def test_what_was_invalidated_is_no_fallback(make_pair, source, grow_old, by: str) -> None:
    """D2: also if the source was left alone for it before; by the other node, too."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.error = ConnectionError("down")
        assert await pair.row(1) == {"n": 1}
        if by == "key":
            await pair.row.invalidate(1)
        else:
            await pair.nodes[0].invalidate(tags=["rows"])
        await fails(pair.row(1))
        await until_fails(pair.again)
        source.error = None
        assert await pair.again(1) == await pair.row(1) == {"n": 1}


async def until_fails(cached: Any) -> None:
    """Until the node has heard of it."""
    with anyio.fail_after(20), pytest.raises(ConnectionError):
        while True:
            await cached(1)


@pytest.mark.parametrize("by", ["key", "tag"])
async def test_what_was_softly_invalidated_is_a_fallback(
    make_pair, source, grow_old, by: str
) -> None:
    """It was said that it may still be served."""
    async with make_pair() as pair:
        await pair.row(1)
        names = {"keys": ["row:1"]} if by == "key" else {"tags": ["rows"]}
        await pair.nodes[0].invalidate(**names, soft=True)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.error = ConnectionError("down")
        for cached in pair.caches:
            hit = await cached.get_with_info(1)
            assert (hit.value, hit.stale) == ({"n": 1}, True)


async def test_a_recovered_source_is_asked_once_for_all(
    make_pair, source, grow_old, valkey_server
) -> None:
    """When the throttle is over: the value is new on both nodes, and stored."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.error = ConnectionError("down")
        await pair.row(1)
        source.error, source.values[1] = None, {"n": 2}
        assert (await pair.again.get_with_info(1)).stale, "it is left alone still"
        end_throttle(pair, valkey_server, "row:1")
        hits = await asyncio.gather(*[each.get_with_info(1) for each in pair.caches * 20])
        assert all((hit.value, hit.stale) == ({"n": 2}, False) for hit in hits)
        assert source.loads == 3
        assert lease_of(pair, valkey_server, "row:1") is None


async def test_an_error_neither_replaces_nor_shortens_an_entry(
    make_pair, source, grow_old, valkey_server
) -> None:
    """L3: byte for byte, and until the same moment."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        name = pair.nodes[0]._parts.names.entry("row:1")
        before = [valkey_server.execute(each, name) for each in ("GET", "PEXPIRETIME")]
        source.error = ConnectionError("down")
        for _ in range(3):
            assert await pair.row(1) == {"n": 1}
            end_throttle(pair, valkey_server, "row:1")
        assert before == [valkey_server.execute(each, name) for each in ("GET", "PEXPIRETIME")]


async def test_a_failed_refresh_lets_the_source_rest_too(
    make_pair, source, grow_old, valkey_server, eventually
) -> None:
    """Between ttl and stale_for: served at once, and one job in throttle_ms is enough."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", 70.0, *pair.caches)
        source.error = ConnectionError("down")
        assert (await pair.row.get_with_info(1)).stale
        await eventually(lambda: lease_of(pair, valkey_server, "row:1") == b"!")
        job = RefreshJob(cache="row", key="row:1", token="token")
        assert await pair.nodes[0]._parts.shared.refresh(job, lease_ms=1_000, seen=2**60) == 0
        assert all([(await each.get_with_info(1)).stale for each in pair.caches * 5])
        assert source.loads == 2


async def test_a_caller_who_goes_away_takes_no_load_along(make_pair, source, grow_old) -> None:
    """Flights F1: the load goes on, and what it brings is stored."""
    async with make_pair() as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        source.values[1] = {"n": 2}
        source.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.row, 1)
            await source.began.wait()
            tasks.cancel_scope.cancel()
        source.let_go()
        assert await pair.again(1) == {"n": 2}
        assert source.loads == 2


async def test_harmless_errors_say_nothing_of_the_source(make_pair, source) -> None:
    """O4: however many; the callers get them all the same."""
    async with make_pair({"harmless": (Absent,)}, breaker_failures=2) as pair:
        source.error = Absent("no such row")
        for number in range(10):
            await fails(pair.row(number), Absent)
        assert pair.breakers() == ["closed", "closed"]


async def test_one_broken_key_does_not_stop_the_others(make_pair, source) -> None:
    """O1: it fails again and again, which may be its own fault."""
    async with make_pair(breaker_failures=2) as pair:
        source.error = ConnectionError("no such row")
        for _ in range(10):
            await fails(pair.row(1))
        assert pair.breakers() == ["closed", "closed"]


async def test_a_success_between_failures_keeps_the_source_trusted(make_pair, source) -> None:
    """O1: in a row is meant."""
    async with make_pair(breaker_failures=3) as pair:
        for number in range(0, 18, 3):
            source.error = ConnectionError("now and then")
            await fails(pair.row(number))
            await fails(pair.row(number + 1))
            source.error = None
            await pair.row(number + 2)
        assert pair.breakers() == ["closed", "closed"]


async def test_failures_of_several_keys_stop_the_loads_of_all_nodes(
    make_pair, source, eventually
) -> None:
    """O1: the node that hears of it asks nothing; the error says what, and until when."""
    async with make_pair(breaker_failures=3, breaker_recovery_ms=NEVER_MS) as pair:
        await open_breaker(pair, source, 3)
        assert source.loads == 3
        await eventually(lambda: pair.breakers() == ["open", "open"])
        for cached in pair.caches:
            error = await fails(cached(9), SourceFailing)
            assert isinstance(error, LoaderError)
            assert (error.cache, error.key) == ("row", "row:9")
            assert 0 < error.retry_after_ms <= NEVER_MS
        assert source.loads == 3


async def test_while_the_source_rests_what_was_kept_is_served(
    make_pair, source, grow_old, eventually, valkey_server
) -> None:
    """R5: without a call of the loader, on every node, and counted."""
    async with make_pair(breaker_failures=3, breaker_recovery_ms=NEVER_MS) as pair:
        await pair.row(1)
        grow_old("row:1", GRACE_S, *pair.caches)
        await open_breaker(pair, source, 3)
        await eventually(lambda: pair.breakers() == ["open", "open"])
        asked = source.loads
        for cached in pair.caches:
            hit = await cached.get_with_info(1)
            assert (hit.value, hit.stale) == ({"n": 1}, True)
        assert source.loads == asked
        assert lease_of(pair, valkey_server, "row:1") is None
        counts = pair.nodes[1]._instruments.counts
        assert counts["loads", "row", "refused"] == 1
        assert counts["cache_requests", "row", "shared", "stale"] == 1


async def test_one_load_in_each_recovery_time_finds_out(make_pair, source, eventually) -> None:
    """O2: in the whole cluster, however many read."""
    recovery_s = 0.1
    async with make_pair(breaker_failures=3, breaker_recovery_ms=100) as pair:
        clock = pair.nodes[0]._parts.clock
        await open_breaker(pair, source, 3)
        began, number = clock.monotonic(), 0
        with anyio.fail_after(30):
            while source.loads < 3 + 5:
                number += 1
                for cached in pair.caches:
                    await fails(cached(number), Exception)
        took_s = clock.monotonic() - began
        assert took_s / recovery_s + 1 >= 5
        assert number > 20, "many read meanwhile"


async def test_the_probe_that_succeeds_opens_it_for_all(make_pair, source, eventually) -> None:
    """O3: the other nodes are told, and load at once."""
    async with make_pair(breaker_failures=3, breaker_recovery_ms=100) as pair:
        await open_breaker(pair, source, 3)
        await eventually(lambda: "closed" not in pair.breakers())
        source.error = None
        with anyio.fail_after(20):
            while pair.breakers()[0] != "closed":
                try:
                    await pair.row(1)
                except SourceFailing:
                    await anyio.sleep(0.01)
        await eventually(lambda: pair.breakers() == ["closed", "closed"])
        assert await pair.again(2) == {"n": 2}


async def test_a_probe_that_is_cut_off_is_made_by_another(make_pair, source, eventually) -> None:
    """Breaker I2: it says nothing of the source; nobody waits for what will not be told."""
    async with make_pair(breaker_failures=3, breaker_recovery_ms=100) as pair:
        await open_breaker(pair, source, 3)
        source.error = None
        await eventually(lambda: set(pair.breakers()) == {"half_open"})
        await pair.nodes[0]._parts.shared.begin("row:1", "t", lease_ms=60_000, seen=-1)
        source.hold()
        async with anyio.create_task_group() as tasks:
            job = RefreshJob(cache="row", key="row:1", token="t")
            tasks.start_soon(pair.row._cache.refresh, job)
            await source.began.wait()
            tasks.cancel_scope.cancel()
        source.let_go()

        async def loaded() -> bool:
            try:
                return await pair.again(2) == {"n": 2}
            except SourceFailing:
                return False

        await eventually(loaded)
        await eventually(lambda: pair.breakers() == ["closed", "closed"])
        assert await pair.row(3) == {"n": 3}

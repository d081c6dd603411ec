"""Request scope in isolation: which values it keeps, for which tasks, and for how long."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections.abc import Iterator
from threading import Thread
from typing import Any

import anyio
import pytest

from forebay.nodes import request_scope as scope
from forebay.nodes.cache.core import Hit
from forebay.nodes.request_scope import RequestScope, current, outside, request_scope
from forebay.schemas.errors import ForebayError
from support.clock import ManualClock

CACHE, OTHER = object(), object()


class Source:
    """Returns a higher number at each read; ``hold`` delays the answers."""

    def __init__(self) -> None:
        self.reads = 0
        self.began = anyio.Event()
        self._gate = anyio.Event()
        self._gate.set()

    def hold(self) -> None:
        self.began, self._gate = anyio.Event(), anyio.Event()

    def let_go(self) -> None:
        self._gate.set()

    async def read(self) -> Hit[int]:
        self.reads += 1
        number, gate = self.reads, self._gate
        self.began.set()
        await gate.wait()
        return hit_of(number)


def hit_of(value: Any, *, size: int = 10, age_ms: int = 0) -> Hit[Any]:
    return Hit(value=value, tier="near", version=7, age_ms=age_ms, size=size)


async def value_of(source: Source, key: str = "a", cache: object = CACHE) -> int:
    """Read like a cached function: through the open scope, if there is one."""
    found = current()
    if found is None:
        return (await source.read()).value
    return (await found.read(cache, key, source.read)).value


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture(autouse=True)
def none_is_left_open() -> Iterator[None]:
    """S6: no scope is open after a test."""
    yield
    assert scope.opened == 0


async def test_key_that_was_read_keeps_its_value(source: Source) -> None:
    """S1: the second read in a scope repeats the first; without a scope it does not."""
    async with request_scope():
        assert [await value_of(source), await value_of(source)] == [1, 1]
    assert [await value_of(source), await value_of(source)] == [2, 3]


async def test_known_absence_is_a_value_too(source: Source) -> None:
    """S1: None is kept like any other value."""
    with request_scope() as seen:
        seen.put(CACHE, "a", hit_of(None), seen.changes)

        assert (await seen.read(CACHE, "a", source.read)).value is None
    assert source.reads == 0


async def test_equal_keys_of_two_caches_are_two(source: Source) -> None:
    """S1: equal keys of another cache or another node are separate."""
    with request_scope():
        assert await value_of(source) == 1
        assert await value_of(source, cache=OTHER) == 2
        assert await value_of(source) == 1


async def test_of_two_concurrent_reads_both_get_the_first_value(source: Source) -> None:
    """S1: both callers get the value of the read that ended first."""
    values = []

    async def read() -> None:
        values.append(await value_of(source))

    async with request_scope(), anyio.create_task_group() as tasks:
        source.hold()
        tasks.start_soon(read)
        await source.began.wait()
        first, source._gate = source._gate, anyio.Event()
        source._gate.set()
        assert await value_of(source) == 2
        first.set()
    assert values == [2]


async def test_error_is_not_kept(source: Source) -> None:
    """S1: a failed read is repeated."""

    async def fails() -> Hit[int]:
        raise OSError

    async with request_scope() as seen:
        with pytest.raises(OSError):
            await seen.read(CACHE, "a", fails)
        assert await value_of(source) == 1


async def test_own_change_is_seen_at_once(source: Source) -> None:
    """S2: after its own change, a request reads the key again, and no other key."""
    async with request_scope():
        assert [await value_of(source, "a"), await value_of(source, "b")] == [1, 2]
        scope.forget(["a"])
        assert [await value_of(source, "a"), await value_of(source, "b")] == [3, 2]
        scope.forget(["a"], more=True)
        assert [await value_of(source, "a"), await value_of(source, "b")] == [4, 5]


@pytest.mark.parametrize("more", [False, True])
async def test_read_that_began_before_an_own_change_is_not_kept(source: Source, more: bool) -> None:
    """S2: it may have read the value before the change."""
    values = []

    async def read() -> None:
        values.append(await value_of(source))

    async with request_scope(), anyio.create_task_group() as tasks:
        source.hold()
        tasks.start_soon(read)
        await source.began.wait()
        scope.forget(["a"], more=more)
        source.let_go()
        await anyio.wait_all_tasks_blocked()

        assert values == [1]
        assert await value_of(source) == 2


async def test_changes_beyond_the_limit_keep_out_every_running_read(source: Source) -> None:
    """S2, S4: with too many changed keys to remember, no running read is kept."""
    async with request_scope(entries_max=3) as seen:
        since = seen.changes
        scope.forget(f"k{number}" for number in range(10))

        assert seen.put(CACHE, "k0", hit_of("old"), since).value == "old"
        assert seen.get(CACHE, "k0") is None
        assert len(seen._forgotten) <= 3


async def test_own_change_inside_a_fresh_scope_reaches_the_scopes_around(source: Source) -> None:
    """S2: a change applies to the enclosing scopes of the same request."""
    async with request_scope():
        assert [await value_of(source, "a"), await value_of(source, "b")] == [1, 2]
        async with request_scope(fresh=True):
            scope.forget(["a"])
        assert [await value_of(source, "a"), await value_of(source, "b")] == [3, 2]
        async with request_scope(fresh=True):
            scope.forget([], more=True)
        assert await value_of(source, "b") == 4


async def test_requests_do_not_see_each_other(source: Source) -> None:
    """S3: each of a hundred concurrent requests keeps its own values."""
    seen: list[tuple[int, int]] = []
    all_have_read = anyio.Event()

    async def request() -> None:
        async with request_scope():
            first = await value_of(source)
            if source.reads == 100:
                all_have_read.set()
            await all_have_read.wait()
            seen.append((first, await value_of(source)))

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(request)

    assert sorted(seen) == [(number, number) for number in range(1, 101)]


async def test_scope_inside_a_scope_is_the_same_one(source: Source) -> None:
    """An inner block neither ends nor replaces the scope that the middleware opened."""
    async with request_scope() as outer:
        async with request_scope() as inner:
            assert inner is outer
            assert await value_of(source) == 1
        assert await value_of(source) == 1


async def test_fresh_scope_reads_again_and_leaves_the_outer_scope_unchanged(source: Source) -> None:
    """``fresh``: the inner scope has its own values; afterwards the outer scope has its values
    again.
    """
    async with request_scope():
        assert await value_of(source) == 1
        async with request_scope(fresh=True):
            assert [await value_of(source), await value_of(source)] == [2, 2]
        assert await value_of(source) == 1


async def test_task_started_inside_reads_from_the_scope(source: Source) -> None:
    """S3: the tasks of a request share its scope."""
    values = []

    async def read() -> None:
        values.append(await value_of(source))

    async with request_scope():
        await value_of(source)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(read)
    assert values == [1, 1]


async def test_task_that_outlives_the_scope_is_served_nothing_from_it(source: Source) -> None:
    """S3: a background task reads current values and may open its own scope."""
    values = []
    end = anyio.Event()

    async def background() -> None:
        values.append(await value_of(source))
        await end.wait()
        values.append(await value_of(source))
        async with request_scope() as own:
            assert own.around is None
            values.extend([await value_of(source), await value_of(source)])

    async with anyio.create_task_group() as tasks:
        async with request_scope():
            tasks.start_soon(background)
            await anyio.wait_all_tasks_blocked()
        end.set()
    assert values == [1, 2, 3, 3]


async def test_task_that_outlives_the_scope_keeps_no_value_alive() -> None:
    """S3: a closed scope holds no values, although the context of a task still refers to it."""

    class Value: ...

    end = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with request_scope() as seen:
            value = Value()
            gone = weakref.ref(value)
            seen.put(CACHE, "a", hit_of(value), seen.changes)
            tasks.start_soon(end.wait)
        del value
        gc.collect()
        assert gone() is None
        assert seen.statistics().bytes == 0
        end.set()


async def test_read_that_ends_after_the_scope_is_returned_and_not_kept(source: Source) -> None:
    """S3: a closed scope does not keep the result of a running read."""
    values = []

    async def read() -> None:
        values.append(await value_of(source))

    source.hold()
    async with anyio.create_task_group() as tasks:
        async with request_scope() as seen:
            tasks.start_soon(read)
            await source.began.wait()
        source.let_go()
    assert values == [1]
    assert seen.statistics().entries == 0


async def test_task_of_a_closed_fresh_scope_falls_back_to_the_one_around(source: Source) -> None:
    """S3: the innermost open scope is used."""
    values = []
    go_on = anyio.Event()

    async def read() -> None:
        await go_on.wait()
        values.append(await value_of(source))

    async with request_scope(), anyio.create_task_group() as tasks:
        await value_of(source)
        async with request_scope(fresh=True):
            await value_of(source)
            tasks.start_soon(read)
        go_on.set()
    assert values == [1]


async def test_cancelled_request_closes_its_scope(source: Source) -> None:
    """S3: a request that is cancelled during a read leaves no open scope."""
    scopes: list[RequestScope] = []
    source.hold()

    async def request() -> None:
        async with request_scope() as seen:
            scopes.append(seen)
            await value_of(source)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(request)
        await source.began.wait()
        tasks.cancel_scope.cancel()

    assert scopes[0].closed
    assert current() is None
    assert scope.opened == 0


async def test_exception_passes_and_closes_the_scope(source: Source) -> None:
    """S3: the exception of a request is raised unchanged."""
    error = LookupError("x")
    with pytest.raises(LookupError) as caught:
        async with request_scope() as seen:
            await value_of(source)
            raise error
    assert caught.value is error
    assert seen.closed
    assert current() is None


def test_scope_that_is_left_in_another_context_is_closed() -> None:
    """S3: a generator may be finalised in another context."""
    block = request_scope()
    elsewhere = contextvars.copy_context()
    seen = elsewhere.run(block.__enter__)
    assert current() is None

    block.__exit__()

    assert seen.closed
    assert elsewhere.run(current) is None


def test_scopes_of_threads_are_counted_together() -> None:
    """S6: concurrent counting in several threads loses no scope."""

    def work() -> None:
        for _ in range(2_000):
            with request_scope() as seen:
                assert current() is seen

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scope.opened == 0


@pytest.mark.parametrize("bounds", [{"entries_max": 2}, {"bytes_max": 25}])
async def test_values_beyond_the_limits_are_returned_and_not_kept(
    source: Source, bounds: dict[str, int]
) -> None:
    """S4: kept values stay; further values are read again each time."""
    async with request_scope(**bounds) as seen:  # type: ignore[arg-type]
        values = [await value_of(source, key) for key in "abcabc"]

        assert values == [1, 2, 3, 1, 2, 4]
        assert seen.statistics() == scope.ScopeStatistics(entries=2, bytes=20, refused=2)
        scope.forget(["a"])
        assert [await value_of(source, "c"), await value_of(source, "c")] == [5, 5]


async def test_scope_ends_by_itself_when_its_time_is_over(source: Source) -> None:
    """S4: a response that streams for hours reads current values."""
    clock = ManualClock()
    async with request_scope(clock=clock, lasts_s=30) as seen:
        assert await value_of(source) == 1
        clock.now_s += 29.9
        assert await value_of(source) == 1
        clock.now_s += 0.2
        assert [await value_of(source), await value_of(source)] == [2, 3]
        assert seen.closed
        async with request_scope(clock=clock) as again:
            assert again is not seen
            assert [await value_of(source), await value_of(source)] == [4, 4]


async def test_kept_hit_has_its_present_age(source: Source) -> None:
    """The age grows between two reads of the same value."""
    clock = ManualClock()
    with request_scope(clock=clock) as seen:
        seen.put(CACHE, "a", hit_of(1, age_ms=40), seen.changes)
        clock.now_s += 0.5
        found = seen.get(CACHE, "a")

        assert found is not None
        assert (found.age_ms, found.value, found.version) == (540, 1, 7)


async def test_outside_hides_the_scope(source: Source) -> None:
    """S5: a loader and its tasks do not read the values of the request."""
    values = []

    async def read() -> None:
        values.append(await value_of(source))

    async with request_scope() as seen:
        await value_of(source)
        with outside():
            assert current() is None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
        assert current() is seen
        assert await value_of(source) == 1
    assert values == [2]


async def test_block_is_entered_once() -> None:
    """A block that is entered twice raises an error: the first exit would close it for both."""
    block = request_scope()
    async with block:
        with pytest.raises(ForebayError, match="entered once"):
            await block.__aenter__()


async def test_shared_block_does_not_close_the_outer_scope(source: Source) -> None:
    """Only the owner can close a scope early."""
    async with request_scope() as outer:
        block = request_scope()
        async with block:
            block.close()
            assert current() is outer
    assert outer.closed

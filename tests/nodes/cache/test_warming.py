"""Warming on a real server: which keys are loaded, at which rate, and how it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

import forebay
from forebay.nodes.cache.warming import FAILURES_KEPT, TOGETHER, Pacer, WarmReport
from forebay.schemas.errors import ConfigError, ForebayError, InvalidKey, LoaderError
from support.clock import ManualClock

PATIENCE_S = 10.0
MakeNode = Callable[..., forebay.Node]


def product_on(node: forebay.Node, source: Any, **declared: Any) -> Any:
    @node.cached("product:{id}", **{"ttl": 600, **declared})
    async def product(id: int) -> int | None:
        return await source.get(id)

    source.values.update({n: n for n in range(1_000)})
    return product


def counts(report: WarmReport) -> tuple[int, int, int, int]:
    return report.asked, report.loaded, report.fresh, report.failed


async def test_warming_twice_loads_nothing_the_second_time(
    make_node: MakeNode, source: Any
) -> None:
    """Fresh keys are counted as fresh, on the node that loaded them and on another."""
    one, two = make_node(), make_node()
    products = product_on(one, source), product_on(two, source)
    async with one, two:
        first = await products[0].warm(range(250))
        again = await products[0].warm(range(250))
        elsewhere = await products[1].warm(range(250))
        assert await products[1](7) == 7

    assert counts(first) == (250, 250, 0, 0)
    assert counts(again) == counts(elsewhere) == (250, 0, 250, 0)
    assert sorted(source.asked) == list(range(250))


async def test_items_are_arguments_or_tuples_of_them(make_node: MakeNode, source: Any) -> None:
    """Items may come from an asynchronous source."""
    node = make_node()
    seen = []

    @node.cached("price:{id}:{zone}", ttl=60)
    async def price(id: int, zone: str) -> int:
        seen.append((id, zone))
        return id

    async def items() -> AsyncIterator[tuple[int, str]]:
        for n in range(3):
            yield n, "eu"

    product = product_on(node, source)
    async with node:
        assert counts(await price.warm(items())) == (3, 3, 0, 0)
        assert counts(await product.warm((n,) for n in range(3))) == (3, 3, 0, 0)
        assert counts(await product.warm([])) == (0, 0, 0, 0)

    assert sorted(seen) == [(0, "eu"), (1, "eu"), (2, "eu")]


async def test_a_batch_loader_is_called_for_whole_parts(make_node: MakeNode, source: Any) -> None:
    """M1: one part runs at a time, with all its misses in one call."""
    node, calls = make_node(), []
    product = product_on(node, source)

    @product.batch
    async def products(ids: list[int]) -> dict[int, int]:
        calls.append(sorted(ids))
        return {each: each for each in ids}

    async with node:
        first = await product.warm(range(TOGETHER * 2))
        again = await product.warm((n,) for n in range(TOGETHER))

    assert counts(first) == (TOGETHER * 2, TOGETHER * 2, 0, 0)
    assert calls == [list(range(TOGETHER)), list(range(TOGETHER, TOGETHER * 2))]
    assert counts(again) == (TOGETHER, 0, TOGETHER, 0)
    assert source.asked == []


async def test_failures_are_counted_and_the_first_are_kept(
    make_node: MakeNode, source: Any
) -> None:
    """M3: a failing loader and an argument without a key do not affect other keys."""
    node = make_node()

    @node.cached("odd:{id}", ttl=60)
    async def odd(id: int) -> int:
        if id % 2:
            raise LookupError(id)
        return id

    async with node:
        report = await odd.warm([*range(40), [1], "", (1, 2)])

    assert counts(report) == (43, 20, 0, 23)
    assert len(report.failures) == FAILURES_KEPT
    kinds = {type(each.error) for each in report.failures}
    assert kinds == {InvalidKey, TypeError, LookupError}


async def test_stale_entries_are_refreshed_and_waited_for(make_node: MakeNode, source: Any) -> None:
    """M5: when warming returns, readers get the new value."""
    node = make_node()
    product = product_on(node, source, stale_for=600)
    async with node:
        await product.warm([1, 2, 3])
        source.values.update({1: 10, 2: 20})
        await node.invalidate(["product:1", "product:2"], soft=True)
        report = await product.warm([1, 2, 3])
        assert [await product(n) for n in (1, 2, 3)] == [10, 20, 3]

    assert counts(report) == (3, 2, 1, 0)


async def test_a_refresh_that_does_not_come_is_a_failure(make_node: MakeNode, source: Any) -> None:
    """Warming waits for a refresh for at most the length of a lease."""
    node = make_node(lease_ms=300)
    product = product_on(node, source, stale_for=600)
    async with node:
        await product.warm([1])
        await node.invalidate(["product:1"], soft=True)
        source.error = LookupError("down")
        report = await product.warm([1])

    assert counts(report) == (1, 0, 0, 1)
    assert isinstance(report.failures[0].error, LoaderError)


async def test_a_value_that_could_not_be_stored_is_a_failure(
    make_node: MakeNode, source: Any
) -> None:
    """M3: it was loaded, but the next reader has to load it again."""
    node = make_node(value_bytes_max=100)
    product = product_on(node, source)
    async with node:
        source.values[5] = None  # an absence is stored

        @on_load(source, 6)
        async def invalidated_meanwhile() -> None:
            await node.invalidate(["product:6"])

        report = await product.warm([5, 6])

    assert counts(report) == (2, 1, 0, 1)
    assert "could not be stored" in str(report.failures[0].error)


def on_load(source: Any, key: int) -> Callable[[Any], None]:
    """Run a callback while this key is loaded."""

    def plant(happens: Callable[[], Any]) -> None:
        async def before() -> None:
            if source.asked[-1] == key:
                await happens()

        source.before = before

    return plant


async def test_concurrency_is_limited(make_node: MakeNode, source: Any) -> None:
    """M1: concurrent loads of one call reach its concurrency and never exceed it."""
    node, running, most = make_node(), 0, 0

    @node.cached("slow:{id}", ttl=60)
    async def slow(id: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001)
        running -= 1
        return id

    async with node:
        report = await slow.warm(range(60), concurrency=7)

    assert (counts(report), most) == ((60, 60, 0, 0), 7)


async def test_an_endless_source_is_taken_in_parts(make_node: MakeNode, source: Any) -> None:
    """M2, M4: at most one part is taken ahead; after cancellation no further key starts."""
    node = make_node()
    product = product_on(node, source)
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            yield taken
            taken += 1

    async with node:
        source.hold()
        with anyio.fail_after(
            PATIENCE_S
        ):  # the loaders are held: a caller that waits for them hangs
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: product.warm(endless(), concurrency=3))
                await source.began.wait()
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        begun = source.loads
        source.let_go()
        assert await product(begun + 500) == begun + 500  # the node still works

    assert begun <= 3
    assert taken < TOGETHER
    assert source.loads == begun + 1


async def test_progress_is_reported_after_each_key(make_node: MakeNode, source: Any) -> None:
    """Each report holds the counts so far; the last report is complete."""
    node = make_node()
    product = product_on(node, source)
    reports: list[WarmReport] = []
    async with node:
        report = await product.warm(range(TOGETHER + 5), progress=reports.append)

    assert [each.asked for each in reports] == list(range(1, TOGETHER + 6))
    assert counts(reports[-1]) == counts(report)


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"concurrency": 5_000}, {"per_second": 0}, {"per_second": -1}]
)
async def test_invalid_numbers_are_refused(
    make_node: MakeNode, source: Any, options: dict[str, float]
) -> None:
    """The error names the argument."""
    node = make_node()
    product = product_on(node, source)
    with pytest.raises(ForebayError):
        await product.warm([1])
    async with node:
        with pytest.raises(ConfigError) as caught:
            await product.warm([1], **options)

    assert caught.value.setting in options


@pytest.mark.parametrize("per_second", [0.5, 1, 7, 100, 5_000])
async def test_pacer_keeps_to_the_rate(per_second: float) -> None:
    """M1: at any time since the start, at most the rate and one burst have started."""
    clock = ManualClock(50.0)
    pacer = Pacer(per_second, clock=clock, sleep=clock.sleep)
    began_at, begun = clock.now_s, 0
    for _ in range(50):
        await pacer.wait_turn(pacer.burst)
        begun += pacer.burst
        assert begun <= (clock.now_s - began_at) * per_second + pacer.burst + 1e-6

    assert pacer.burst <= max(1, per_second / 10)
    assert clock.now_s - began_at == pytest.approx(49 * pacer.burst / per_second)


async def test_pacer_does_not_make_up_for_idle_time() -> None:
    """M1: after a pause the rate is unchanged; without a rate there is no wait."""
    clock = ManualClock(50.0)
    pacer = Pacer(10, clock=clock, sleep=clock.sleep)
    await pacer.wait_turn(1)
    clock.now_s += 60
    for _ in range(3):
        await pacer.wait_turn(1)
    assert clock.now_s == pytest.approx(50 + 60 + 0.2)

    free = Pacer(None, clock=clock, sleep=clock.sleep)
    before = clock.now_s
    await free.wait_turn(free.burst)
    await free.wait_turn(free.burst)
    assert (free.burst, clock.now_s) == (TOGETHER, before)

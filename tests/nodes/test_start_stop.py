"""A node is started and stopped by other tasks than its users, or by another event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

import forebay

MakeNode = Callable[..., forebay.Node]
Declared = tuple[forebay.Node, Any]


async def squared(id: int) -> int:
    return id * id


@pytest.fixture
def declared(make_node: MakeNode) -> Declared:
    node = make_node()
    cached = node.cached("a:{id}", ttl=60)(squared)

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        await anyio.lowlevel.checkpoint()

    return node, cached


async def in_a_task(call: Callable[[], Awaitable[object]]) -> Any:
    async def run() -> object:
        return await call()

    with anyio.fail_after(20):
        return await asyncio.create_task(run())


async def test_start_use_and_stop_in_a_task_each(declared: Declared) -> None:
    """I5: start and stop work from framework hooks, and again with the same node."""
    node, cached = declared
    for _ in range(2):
        await in_a_task(node.start)
        assert await in_a_task(lambda: cached(3)) == 9
        await in_a_task(node.stop)
        assert (node.state, node.drained) == ("not running", True)


async def test_block_left_in_another_task(declared: Declared) -> None:
    """I5: start and stop work from pytest-asyncio fixtures, whose tasks have ended."""
    node, cached = declared
    await in_a_task(node.__aenter__)
    assert await cached(3) == 9
    await in_a_task(lambda: node.__aexit__(None, None, None))
    assert (node.state, node.drained) == ("not running", True)


async def test_block_left_in_another_task_while_its_own_goes_on(declared: Declared) -> None:
    """I5: scopes and groups of the entering task are unchanged."""
    node, _ = declared
    with anyio.CancelScope() as outer:
        await node.__aenter__()
        with anyio.CancelScope() as inner:
            await in_a_task(lambda: node.__aexit__(None, None, None))
            inner.cancel()
            await anyio.sleep_forever()
        outer.cancel()
        await anyio.sleep_forever()
    assert (inner.cancelled_caught, outer.cancelled_caught) == (True, True)


async def test_stop_may_be_asked_for_by_several_and_without_need(declared: Declared) -> None:
    """Each call of stop returns when the node has stopped; a second stop does nothing."""
    node, cached = declared
    await node.stop()
    await node.start()
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(node.stop)
    assert node.state == "not running"
    await node.stop()
    async with node:
        assert await cached(4) == 16
        await in_a_task(node.stop)
        with pytest.raises(forebay.ForebayError, match="not running"):
            await cached(5)
    assert node.state == "not running"


async def test_stop_ends_a_start(declared: Declared) -> None:
    """A start that is stopped raises an error, and the node can be started again."""
    node, cached = declared
    for turns in range(0, 40, 4):
        start = asyncio.ensure_future(node.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await in_a_task(node.stop)
        (outcome,) = await asyncio.gather(start, return_exceptions=True)
        await node.stop()
        assert isinstance(outcome, forebay.ForebayError | forebay.Node), outcome
        assert node.state == "not running"
    async with node:
        assert await cached(4) == 16


async def test_state_tells_of_a_drain(declared: Declared) -> None:
    """The state goes from running to draining to drained; a drained node serves reads."""
    node, cached = declared
    states = [node.state]
    release = anyio.Event()

    @node.on_start
    async def look() -> None:
        states.append(node.state)

    async with node:
        states.append(node.state)
        crew = node._parts.crew
        assert crew is not None
        drain = crew.drain

        async def held_up() -> bool:
            states.append(node.state)
            await release.wait()
            return await drain()

        crew.drain = held_up  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(node.drain)
            await anyio.wait_all_tasks_blocked()
            release.set()
        states.append(node.state)
        assert "drained" in repr(node)
        assert await cached(3) == 9
    states.append(node.state)
    assert states == ["not running", "starting", "running", "draining", "drained", "not running"]


async def test_hook_cannot_stop_its_node(declared: Declared) -> None:
    """A hook that stops its own node gets an error: it would wait for itself."""
    node, _ = declared
    node.on_start(node.stop)
    with anyio.fail_after(20), pytest.raises(forebay.ForebayError, match="a hook of the node"):
        await node.start()
    assert node.state == "not running"


class Oops(Exception):
    """A failure inside the node."""


async def _fail() -> None:
    raise Oops


async def test_failure_of_a_started_node_is_told(declared: Declared) -> None:
    """L3: without a block, the failure is logged, calls raise, and ``stop`` raises it."""
    node, cached = declared
    await in_a_task(node.start)
    with capture_logs() as lines:
        node._parts.tasks.start_soon(_fail)
        with anyio.fail_after(10):
            while not (told := [line for line in lines if line["event"] == "node.failed"]):
                await anyio.sleep(0)
    assert [line["log_level"] for line in told] == ["error"]
    assert node.state == "failed"
    assert not node.is_running
    with pytest.raises(forebay.ForebayError, match=r"has failed.*start it again"):
        await node.invalidate(["a:1"])
    with pytest.raises(forebay.ForebayError, match="not running"):
        await cached(1)
    with pytest.raises(ExceptionGroup) as caught:
        await node.stop()
    assert caught.group_contains(Oops)
    await node.stop()
    async with node:
        assert await cached(2) == 4


async def test_failed_node_may_be_started_without_a_stop(declared: Declared) -> None:
    """A new start clears the old failure."""
    node, cached = declared
    await node.start()
    node._parts.tasks.start_soon(_fail)
    with anyio.fail_after(10):
        while node.state != "failed":
            await anyio.sleep(0)
    async with node:
        assert await cached(2) == 4


def test_loop_that_ends_without_a_stop(declared: Declared) -> None:
    """If ``asyncio.run`` ends before the node, that is logged, and the next loop can start it."""
    node, cached = declared

    async def forgetful() -> int:
        await node.start()
        return int(await cached(3))

    async def proper() -> int:
        async with node:
            return int(await cached(4))

    with capture_logs() as lines:
        assert asyncio.run(forgetful()) == 9
    assert "node.failed" in [line["event"] for line in lines]
    assert asyncio.run(proper()) == 16


@pytest.fixture
async def elsewhere() -> AsyncIterator[Callable[[Callable[[], Awaitable[object]]], Any]]:
    """Run a call in the event loop of another thread, and raise its exceptions here."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def run(call: Callable[[], Awaitable[object]]) -> Any:
        async def called() -> object:
            return await call()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(called(), loop))

    yield run
    loop.call_soon_threadsafe(loop.stop)
    await anyio.to_thread.run_sync(thread.join)
    loop.close()


async def test_use_from_another_loop_is_one_clear_error(
    make_node: MakeNode, elsewhere: Callable[..., Any]
) -> None:
    """Every call from another loop raises; calls in the node's own loop still work."""
    node = make_node()
    cached = node.cached("a:{id}", ttl=60)(squared)

    @node.cached("b:{id}", ttl=60)
    async def single(id: int) -> int:
        return id

    @single.batch
    async def many(ids: list[int]) -> dict[int, int]:
        return {each: each for each in ids}

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        await anyio.lowlevel.checkpoint()

    limit = node.limit("api", rate=10)
    async with node:

        async def locked() -> None:
            async with node.lock("l"):
                pass

        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: cached(1),
            lambda: single(1),
            lambda: single.many([1, 2]),
            lambda: cached.get_with_info(1),
            lambda: cached.put(1, 1),
            lambda: cached.write_behind(1, 1),
            lambda: cached.invalidate(1),
            lambda: cached.warm([1]),
            lambda: node.read("a:1"),
            lambda: node.invalidate(["a:1"]),
            lambda: node.publish([b'{"type":"refresh","keys":["a:1"]}']),
            lambda: node.explain("a:1"),
            lambda: limit.take("me"),
            locked,
            node.stats,
            node.drain,
            node.stop,
        ]
        for use in uses:
            with anyio.fail_after(20), pytest.raises(forebay.ForebayError, match="another event"):
                await elsewhere(use)
        assert (await cached(3), await single(4), node.state) == (9, 4, "running")
        node.checks()
        assert b"forebay_backend_up 1.0" in await anyio.to_thread.run_sync(scrape, node)


def scrape(node: forebay.Node) -> bytes:
    from prometheus_client import generate_latest

    return generate_latest(node.registry)

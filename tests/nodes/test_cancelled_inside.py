"""Application code that cancels itself fails alone, and never ends the node."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

import forebay
from forebay.nodes.cancellation import run_apart
from forebay.schemas.errors import CancelledInside
from support.eventually import wait_until
from support.node_process import NodeProcess
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]
Fault = Callable[[], Awaitable[object]]


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await anyio.sleep_forever()


async def cancels_itself_and_returns() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def awaits_what_is_cancelled() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.fixture(params=[cancels_itself, awaits_what_is_cancelled])
def fault(request: pytest.FixtureRequest) -> Fault:
    found: Fault = request.param
    return found


@pytest.mark.parametrize("batch", [False, True])
async def test_loader(make_node: MakeNode, fault: Fault, batch: bool) -> None:
    """A cancelled loader raises LoaderError in a read, a bulk read, a read by key and a refresh."""
    node = make_node()
    well = False

    @node.cached("a:{id}", ttl=60, stale_for=60)
    async def loaded(id: int) -> int:
        if not well:
            await fault()
        return id

    if batch:

        @loaded.batch
        async def many(ids: list[int]) -> dict[int, int]:
            if not well:
                await fault()
            return {each: each for each in ids}

    with anyio.fail_after(20):
        async with node:
            with pytest.raises(forebay.LoaderError, match=r"loaded.*cancelled from inside"):
                await loaded(1)
            with pytest.raises(forebay.LoaderError, match="cancelled from inside"):
                await node.read("a:1")
            with pytest.raises(forebay.PartialFailure):
                await loaded.many([1, 2])
            well = True
            assert await loaded(1) == 1
            well = False
            await node.invalidate(["a:1"], soft=True)
            while not node._instruments.counts["refreshes", "failed"]:
                hit = await loaded.get_with_info(1)
                assert (hit.value, hit.stale) == (1, True)
                await anyio.sleep(0.005)
            assert node.state == "running"
            well = True
            assert await loaded(3) == 3
    assert node.drained is True


async def test_loader_cancelled_while_the_node_stops(make_node: MakeNode) -> None:
    """A cancellation from outside propagates: the loader cleans up, the reader gets an error."""
    node = make_node()
    told: list[str] = []
    begun = anyio.Event()

    @node.cached("a:{id}", ttl=60)
    async def loaded(id: int) -> int:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            told.append("cleaned up")
        return id

    async with node:
        read = asyncio.ensure_future(loaded(1))
        await begun.wait()
    with pytest.raises(forebay.Unavailable):
        await read
    assert told == ["cleaned up"]


async def test_sink(make_node: MakeNode, fault: Fault) -> None:
    """The sink is reported as stopped, or the write-through fails; both errors name the sink."""
    node = make_node()

    @node.cached("a:{id}", ttl=60)
    async def loaded(id: int) -> int:
        return id

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        await fault()

    with anyio.fail_after(20), capture_logs() as lines:
        async with node:
            with pytest.raises(forebay.FatalSinkError, match=r"sink .*save was cancelled from"):
                await loaded.write_through(1, 1)
            await loaded.write_behind(2, 2)
            while not (told := [each for each in lines if each["event"] == "sink.stopped"]):
                await anyio.sleep(0.005)
            assert node.state == "running"
            assert await loaded(3) == 3
            assert node._parts.crew is not None
            await node._parts.crew.ownership.leave(patient=False, rejoin=False)
    assert "save was cancelled from inside" in told[0]["error"]


@pytest.mark.parametrize(
    "fault", [cancels_itself, cancels_itself_and_returns, awaits_what_is_cancelled]
)
@pytest.mark.parametrize("when", ["on_start", "on_stop"])
async def test_hook(make_node: MakeNode, fault: Fault, when: str) -> None:
    """H4: the start, or the block, raises an error that names the hook; other hooks run."""
    node = make_node()
    ended: list[str] = []

    @node.on_stop
    async def end() -> None:
        await anyio.sleep(0.001)
        ended.append("end")

    getattr(node, when)(fault)
    with anyio.fail_after(20), pytest.raises(CancelledInside) as caught:
        async with node:
            assert when == "on_stop"
    assert f"the {when} hook" in str(caught.value)
    assert fault.__name__ in str(caught.value)
    assert ended == ["end"]
    assert node.state == "not running"


async def test_hooks_share_a_task_and_its_context(make_node: MakeNode) -> None:
    """H4: the stop hook sees a context variable set by the start hook."""
    node = make_node()
    bound = ContextVar("bound", default="nothing")
    seen: list[object] = []

    @node.on_start
    async def begin() -> None:
        bound.set("by the start hook")
        seen.append(asyncio.current_task())

    @node.on_stop
    async def end() -> None:
        seen.extend((asyncio.current_task(), bound.get()))

    async with node:
        pass
    assert seen == [seen[0], seen[0], "by the start hook"]


async def test_call_apart_returns_raises_and_is_cancelled() -> None:
    """C1, C2, C3: a result, an error and each kind of cancellation come out as promised."""

    async def give(value: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    assert await run_apart("it", give, 7) == 7
    for error in (ValueError("x"), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            await run_apart("it", give, error)
        assert caught.value is error
    with pytest.raises(CancelledInside, match="it was cancelled from inside"):
        await run_apart("it", cancels_itself)
    assert await run_apart("it", cancels_itself_and_returns) is None
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_apart("it", anyio.sleep_forever)
    assert scope.cancelled_caught
    task = asyncio.ensure_future(run_apart("it", anyio.sleep_forever))
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


APP = """
import asyncio
import forebay

node = forebay.Node("shop")


@node.cached("a:{id}", ttl=60)
async def loaded(id: int) -> int:
    if id == 1:
        asyncio.current_task().cancel()
        await asyncio.sleep(30)
    if id == 2:  # a fault of the node itself
        next(each for each in asyncio.all_tasks() if each.get_name() == "forebay node").cancel()
    return id
"""


@pytest.fixture
def process(valkey_server: ValkeyServer, namespace: str, tmp_path: Path) -> NodeProcess:
    (tmp_path / "selfish.py").write_text(APP)
    assert valkey_server.socket_url
    return NodeProcess(
        tmp_path,
        app="selfish:node",
        valkey__url=valkey_server.socket_url,
        node__namespace=namespace,
    )


def test_process_goes_on(process: NodeProcess) -> None:
    """`forebay run`: the request fails, and the next one is served."""
    with process as node:
        assert node.get("/v1/cache/a:1").status == 504
        assert node.get("/v1/cache/a:3").status == 200
        wait_until(lambda: node.get("/readyz").status == 200, what="readiness")


def test_process_never_ends_unasked_without_an_error(process: NodeProcess) -> None:
    """`forebay run`: any cancellation of the node is logged, and the exit code is 1."""
    with process as node:
        with suppress(OSError, http.client.HTTPException):
            node.get("/v1/cache/a:2")
        assert node.wait() == 1
        assert "Error: the node's task was cancelled although nobody stopped" in node.said()

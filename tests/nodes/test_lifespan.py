"""A node is started, cancelled, drained, stopped, and started again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest
import structlog
from structlog.testing import capture_logs

import forebay
from conftest import MakeServer
from forebay.schemas.settings import Secret, Valkey
from forebay.schemas.settings import Workers as WorkerSettings
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]


async def until_it_owns_all(node: forebay.Node) -> None:
    """Wait until one node owns four shards and the ingress stream."""
    assert node._parts.crew is not None
    with anyio.fail_after(30):
        while len(node._parts.crew.ownership.tenures) < 5:
            await anyio.sleep(0.005)


async def squared(id: int) -> int:
    return id * id


async def test_nothing_works_before_the_start(make_node: MakeNode) -> None:
    """Each call of a node or its caches raises an error that the node is not running."""
    node = make_node()
    cached = node.cached("a:{id}", ttl=60)(squared)
    uses: list[Callable[[], Awaitable[object]]] = [
        lambda: cached(1),
        lambda: cached.invalidate(1),
        lambda: cached.write_behind(1, 1),
        lambda: node.invalidate(["a:1"]),
        lambda: node.publish([b'{"type":"refresh","keys":["a:1"]}']),
        lambda: node.read("a:1"),
        node.stats,
        node.drain,
    ]
    for _ in range(2):
        for use in uses:
            with pytest.raises(
                forebay.ForebayError, match="the node is not running; use it inside"
            ):
                await use()
        async with node:
            assert await cached(3) == 9


async def test_same_node_starts_again(make_node: MakeNode, valkey_server: ValkeyServer) -> None:
    """I3: a stopped node starts again, with an empty near cache and the shared tier."""
    node = make_node()
    loads: list[int] = []

    @node.cached("a:{id}", ttl=60)
    async def loaded(id: int) -> int:
        loads.append(id)
        return id

    instances = set()
    for _ in range(3):
        async with node:
            assert node.drained is None
            assert (await loaded(1), await loaded(1)) == (1, 1)
            instances.add(node.instance)
        assert node.drained is True
        assert not node.is_running
    assert loads == [1]
    assert len(instances) == 3
    await _until_nobody_is_connected(valkey_server, instances)


async def _until_nobody_is_connected(server: ValkeyServer, instances: set[str]) -> None:
    with anyio.fail_after(5):
        while True:
            clients = server.execute("CLIENT", "LIST").decode()
            if not any(instance in clients for instance in instances):
                return
            await anyio.sleep(0.01)


async def test_second_start_is_refused_and_harms_nothing(make_node: MakeNode) -> None:
    """I3: a second start raises an error, in sequence or concurrently, and the first one counts."""
    node = make_node()
    outcomes: list[str] = []

    async def start() -> None:
        try:
            async with node:
                outcomes.append("started")
                await anyio.sleep(0.05)
        except forebay.ConfigError:
            outcomes.append("refused")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        tasks.start_soon(start)
    assert sorted(outcomes) == ["refused", "started"]

    async with node:
        with pytest.raises(forebay.ConfigError, match="start it once"):
            await node.start()
        await node.invalidate(["a:1"])


async def test_start_that_fails_leaves_nothing_behind(
    make_node: MakeNode, make_server: MakeServer
) -> None:
    """After a failed start the node starts normally."""
    server = make_server()
    valkey = Valkey(url=server.socket_url, startup_timeout_ms=100, connect_timeout_ms=100)
    node = make_node(valkey=valkey)
    cached = node.cached("a:{id}", ttl=60)(squared)
    server.stop()
    with pytest.raises(forebay.StartupError):
        await node.start()
    with pytest.raises(forebay.ForebayError, match="not running"):
        await cached(2)

    server.start()
    async with node:
        assert await cached(2) == 4


async def test_user_without_a_right_is_told_at_the_start(
    make_node: MakeNode, make_server: MakeServer
) -> None:
    """U5: a required command that the server refuses is a StartupError, not a silent wait."""
    server = make_server(
        acl=["user default on nopass ~* &* +@all", "user weak on >pw ~* &* +@all -xread"]
    )
    valkey = Valkey(url=server.socket_url, username="weak", password=Secret("pw"))
    with anyio.fail_after(10), pytest.raises(forebay.StartupError, match="xread") as caught:
        async with make_node(valkey=valkey):
            pytest.fail("it has started")
    assert caught.value.setting == "valkey.username"


class Oops(Exception):
    """Raised by the application."""


@pytest.mark.parametrize("kind", [Oops, SystemExit])
async def test_exception_of_the_body_comes_out_as_itself(
    make_node: MakeNode, kind: type[BaseException]
) -> None:
    """I5: the error of the body is raised unchanged, after the drain and the stop."""
    node = make_node(workers=WorkerSettings(enabled=True))
    raised = kind("x")
    with pytest.raises(kind) as caught:
        async with node:
            raise raised

    assert caught.value is raised
    assert node.drained is True
    assert not node.is_running


@pytest.fixture(params=["scope", "task"])
def cancelled_body(request: pytest.FixtureRequest) -> Callable[[forebay.Node], Awaitable[None]]:
    """Run a node whose body is cancelled, by an anyio scope or as an asyncio task."""

    async def by_scope(node: forebay.Node) -> None:
        with anyio.CancelScope() as scope:
            async with node:
                await until_it_owns_all(node)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught

    async def by_task(node: forebay.Node) -> None:
        begun = asyncio.Event()

        async def body() -> None:
            async with node:
                await until_it_owns_all(node)
                begun.set()
                await anyio.sleep_forever()

        task = asyncio.create_task(body())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    return by_scope if request.param == "scope" else by_task


async def test_cancelled_body_still_drains(
    make_node: MakeNode, cancelled_body: Callable[[forebay.Node], Awaitable[None]]
) -> None:
    """I5, H2: accepted writes are in the sink, and the stop hook has completed."""
    node = make_node(workers=WorkerSettings(flush_delay_ms=200))
    cached = node.cached("a:{id}", ttl=60)(squared)
    sunk: list[int] = []
    told: list[str] = []

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        sunk.extend(write.value for write in writes if write.value is not None)

    @node.on_start
    async def write() -> None:
        await cached.write_behind(1, 11)

    @node.on_stop
    async def close() -> None:
        await anyio.sleep(0.01)
        told.append(f"closed after {sunk}")

    await cancelled_body(node)

    assert (told, node.drained, node.is_running) == (["closed after [11]"], True, False)


async def test_cancelled_start_leaves_nothing_behind(make_node: MakeNode) -> None:
    """A start may be cancelled at any await: the node can be started again."""
    node = make_node(workers=WorkerSettings(enabled=True))
    cached = node.cached("a:{id}", ttl=60)(squared)
    for at in range(0, 60, 3):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_cancel_after, scope, at)
                async with node:
                    await anyio.sleep_forever()
        assert not node.is_running
    async with node:
        assert await cached(5) == 25


async def _cancel_after(scope: anyio.CancelScope, turns: int) -> None:
    for _ in range(turns):
        await anyio.sleep(0)
    scope.cancel()


async def test_drain_happens_once(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """U3: several callers and the end of the block share one drain."""
    node = make_node(workers=WorkerSettings(enabled=True))
    drains: list[None] = []
    async with node:
        crew = node._parts.crew
        assert crew is not None
        real = crew.drain

        async def counted() -> bool:
            drains.append(None)
            return await real()

        monkeypatch.setattr(crew, "drain", counted)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(node.drain)
        assert await node.drain() is True
    assert (len(drains), node.drained) == (1, True)


async def test_drain_is_not_cut_short_by_who_asked(make_node: MakeNode) -> None:
    """U3: cancelling the draining task does not interrupt the drain."""
    node = make_node()
    cached = node.cached("a:{id}", ttl=60)(squared)
    sunk: list[str] = []

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        await anyio.sleep(0.05)
        sunk.extend(write.key for write in writes)

    async with node:
        await until_it_owns_all(node)
        await cached.write_behind(1, 1)
        with anyio.CancelScope() as scope:
            scope.cancel()
            assert await node.drain() is True
        assert sunk == ["a:1"]


async def test_worker_that_fails_ends_the_node(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L3, U3: a fault of the node is raised, and there is no drain without workers."""
    node = make_node(workers=WorkerSettings(enabled=True, drain_ms=600_000))

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        raise AssertionError("there is nothing to save")

    with anyio.fail_after(40), pytest.raises(ExceptionGroup) as caught:
        async with node:
            await until_it_owns_all(node)
            assert node._parts.crew is not None
            monkeypatch.setattr(node._parts.crew.ownership, "beat", _fail)
            await anyio.sleep_forever()

    assert caught.group_contains(Oops)
    assert (node.is_running, node.drained) == (False, None)


async def _fail() -> None:
    raise Oops


async def test_failing_worker_does_not_hide_what_the_body_raises(make_node: MakeNode) -> None:
    """L4: the body's own error is raised, and the fault is logged."""
    node = make_node()
    with capture_logs() as lines, pytest.raises(ZeroDivisionError):
        async with node:
            try:
                node._parts.tasks.start_soon(_fail)
                await anyio.sleep_forever()
            finally:
                _ = 1 / 0
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["node.failed"]


async def test_second_cancellation_cuts_the_drain_short(make_node: MakeNode) -> None:
    """L1: a second cancellation during the drain ends the task soon, and leaves nothing behind."""
    node = make_node(workers=WorkerSettings(drain_ms=60_000))
    cached = node.cached("a:{id}", ttl=60)(squared)
    reached, begun = anyio.Event(), anyio.Event()

    @node.sink("a:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        reached.set()
        await anyio.sleep_forever()

    async def body() -> None:
        async with node:
            await cached.write_behind(1, 1)
            begun.set()
            await anyio.sleep_forever()

    task = asyncio.create_task(body())
    await begun.wait()
    await reached.wait()
    task.cancel()
    with anyio.fail_after(10):
        while not (node.is_running and node._parts.draining):
            await anyio.sleep(0)
    task.cancel()
    with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):
        await task
    assert (node.is_running, node.drained) == (False, None)


class Gone:
    """A logger whose stream raises."""

    def msg(self, line: str) -> None:
        if "node." in line:  # the lines during a start or stop
            raise BrokenPipeError

    info = debug = warning = error = msg


async def test_logging_that_fails_neither_stops_a_start_nor_spoils_an_end(
    make_node: MakeNode,
) -> None:
    """A logger that raises does not break a start or stop."""
    node = make_node()
    structlog.configure(logger_factory=lambda *_: Gone(), cache_logger_on_first_use=False)
    async with node:
        assert node.is_running
    assert node.drained is True

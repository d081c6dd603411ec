"""A node inside a service: declared, started, used, cancelled, stopped, started again."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from conftest import MakeServer
from programs import installed
from structlog.testing import capture_logs

import forebay
from forebay.nodes import hooks
from forebay.schemas.errors import InvalidEvent
from forebay.schemas.settings import (
    CacheDefaults,
    Log,
    NodeSettings,
    Secret,
    Settings,
    Valkey,
)
from forebay.schemas.settings import Workers as WorkerSettings
from forebay.schemas.settings_sources import Resolved
from valkeyd import ValkeyServer

MakeNode = Callable[..., forebay.Node]
ROOT = Path(__file__).parents[2]
TYPED = """
import forebay
from msgspec import Struct

class Product(Struct):
    id: int

node = forebay.Node("shop")
node.sink("order:{id}", forebay.SqlSink("sqlite+aiosqlite:///x.db", table="orders", key=("id",)))

@node.cached("product:{id}/{lang}", ttl=60)
async def product(id: int, lang: str = "en") -> Product:
    return Product(id)

@node.sink("product:{id}/{lang}")
async def save(writes: list[forebay.Write[Product]]) -> None:
    reveal_type(writes[0].value)

@node.on_start
async def warm() -> int:
    return 1

async def main() -> None:
    async with node as same:
        reveal_type(same)
    reveal_type(product)
    reveal_type(await product(42))
    reveal_type(await product(id=42, lang="de"))
    reveal_type((await product.get_with_info(42)).value)
    reveal_type(save)
    reveal_type(warm)
    await product("42")
    await product()
    await product.invalidate(42, 43)
    await node.invalidate(42)
    forebay.Node(42)

@node.cached("price:{id}", ttl=60)
def price(id: int) -> int:
    return id

@node.sink("price:{id}")
async def wrong(writes: list[int]) -> None: ...
"""
REVEALED = [
    "service.Product | None",
    "forebay.nodes.node.Node",
    "forebay.nodes.cache.cached.Cached[[id: int, lang: str =], service.Product]",
    "service.Product",
    "service.Product",
    "service.Product",
    (
        "def (writes: list[forebay.nodes.sinks.base.Write[service.Product]]) -> "
        "typing.Coroutine[Any, Any, None]"
    ),
    "def () -> typing.Coroutine[Any, Any, int]",
]
REFUSED = [
    'Argument 1 to "__call__" of "Cached" has incompatible type "str"; expected "int"',
    'Missing positional argument "id" in call to "__call__" of "Cached"',
    'Argument 2 to "invalidate" of "Cached" has incompatible type "int"; expected "str"',
    'Argument 1 to "invalidate" of "Node" has incompatible type "int"; expected "Sequence[str]"',
    'Argument 1 to "Node" has incompatible type "int"; expected "str | None"',
    'Argument 1 has incompatible type "Callable[[int], int]"',
    'Value of type variable "S" of function cannot be "Callable[[list[int]], ',
]


@pytest.fixture
def make_node(valkey_server: ValkeyServer, namespace: str) -> MakeNode:
    """A node of four shards on the test's server; sections of settings may be given."""

    def make(name: str = namespace, **sections: Any) -> forebay.Node:
        given = {"valkey": Valkey(url=valkey_server.socket_url), "node": NodeSettings(shards=4)}
        return forebay.Node(name, settings=Settings(**{**given, **sections}))

    return make


async def until_it_owns_all(node: forebay.Node) -> None:
    """Four shards and the ingress stream: from then on a drain is about all of them."""
    assert node.parts.crew is not None
    with anyio.fail_after(10):
        while len(node.parts.crew.ownership.tenures) < 5:
            await anyio.sleep(0.005)


async def squared(id: int) -> int:
    return id * id


# Declaring


@pytest.mark.parametrize("ttl", [0, -1, math.nan, math.inf, 1e9, 0.0001, True, "60", None])
def test_lifetime_that_cannot_be_is_refused(make_node: MakeNode, ttl: Any) -> None:
    """D1: a lifetime is a number of seconds, above zero and within a year."""
    with pytest.raises(forebay.ConfigError, match="ttl"):
        make_node().cached("a:{id}", ttl=ttl)(squared)


@pytest.mark.parametrize("name", ["stale_for", "negative_ttl"])
@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 1e9])
def test_second_lifetimes_are_checked_too(make_node: MakeNode, name: str, seconds: float) -> None:
    """D1: the other lifetimes may be zero, and are no more special."""
    options: dict[str, Any] = {name: seconds}
    with pytest.raises(forebay.ConfigError, match=name):
        make_node().cached("a:{id}", ttl=60, **options)(squared)
    make_node().cached("a:{id}", ttl=60, **{name: 0})(squared)


@pytest.mark.parametrize(
    "template,tags",
    [
        ("a", []),
        ("a:{other}", []),
        ("a:{id}:{other}", []),
        ("a:{id}", ["b:{other}"]),
        ("a:{id}{id}", []),
        ("a b:{id}", []),
        ("", []),
        ("a:{id}", ["b*"]),
        ("a:{id}", "catalog"),
    ],
)
def test_template_that_does_not_fit_is_refused(
    make_node: MakeNode, template: str, tags: Any
) -> None:
    """D1: every parameter is a field of the key, every field is a parameter; tags are a list."""
    with pytest.raises((forebay.ConfigError, forebay.InvalidKey)):
        make_node().cached(template, ttl=60, tags=tags)(squared)


def test_two_caches_for_one_key_are_refused(make_node: MakeNode) -> None:
    """D1: a second cache of the same name, or for the same keys, is a mistake."""
    node = make_node()
    node.cached("a:{id}", ttl=60)(squared)

    with pytest.raises(forebay.ConfigError, match="declared already"):
        node.cached("b:{id}", ttl=60)(squared)
    with pytest.raises(forebay.ConfigError, match="declared already"):
        node.cached("a:{id}", ttl=60, name="other")(squared)
    node.cached("b:{id}", ttl=60, name="other")(squared)


def test_two_sinks_of_one_name_are_refused(make_node: MakeNode) -> None:
    """D1: by its name a sink gets its writes: two functions of one name would mix theirs."""
    node = make_node()

    def declare(template: str) -> None:
        @node.sink(template)
        async def save(writes: list[forebay.Write[int]]) -> None:
            """It takes whatever comes."""

    declare("a:{id}")
    with pytest.raises(forebay.ConfigError, match="another sink has that name"):
        declare("b:{id}")
    with pytest.raises(forebay.ConfigError, match="for this key template"):
        node.sink("a:{id}")(_takes_all)


def test_one_sink_may_serve_two_templates(make_node: MakeNode, tmp_path: Path) -> None:
    """The same sink object is one sink, however many kinds of keys it gets."""
    node = make_node()
    sink = forebay.SqlSink(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}", table="x", key=("id",))
    node.sink("a:{id}", sink)
    node.sink("b:{id}", sink)

    assert len(node._routes.all_sinks()) == 1


async def test_nothing_is_declared_on_a_running_node(make_node: MakeNode) -> None:
    """D3: caches, sinks, hooks and settings come before the start, also for a start hook."""
    node = make_node()
    refused: list[str] = []

    def try_all() -> None:
        tries: dict[str, Callable[[], object]] = {
            "cached": lambda: node.cached("a:{id}", ttl=60)(squared),
            "sink": lambda: node.sink("a:{id}")(_takes_all),
            "on_start": lambda: node.on_start(_nothing),
            "on_stop": lambda: node.on_stop(_nothing),
            "configure": lambda: node.configure(Resolved(settings=Settings(), origins={})),
        }
        for name, attempt in tries.items():
            with pytest.raises(forebay.ConfigError, match="running already"):
                attempt()
            refused.append(name)

    @node.on_start
    async def early() -> None:
        try_all()

    async with node:
        try_all()
    assert refused == ["cached", "sink", "on_start", "on_stop", "configure"] * 2
    node.cached("a:{id}", ttl=60)(squared)


async def _takes_all(writes: list[forebay.Write[Any]]) -> None:
    """Nothing is done with them."""


async def _nothing() -> None:
    """Nothing is done."""


# Settings


@pytest.mark.parametrize("namespace", ["", "a b", "a:b", "{a}", "x" * 64, "-a"])
def test_namespace_that_cannot_be_is_refused(namespace: str) -> None:
    """I2: a namespace given in code is checked like one from outside."""
    with pytest.raises(forebay.ConfigError, match="namespace") as caught:
        forebay.Node(namespace)
    assert caught.value.origin == "the code"


def test_settings_in_code_are_checked() -> None:
    """I2: a value outside its limits, or a pair that does not go together, is refused."""
    for settings in (
        Settings(cache=CacheDefaults(max_staleness_ms=-5)),
        Settings(workers=WorkerSettings(beat_ms=2_000, ownership_ttl_ms=1_000)),
        Settings(log=Log(level="loud")),  # type: ignore[arg-type]
        Settings(valkey=Valkey(url="nonsense")),
    ):
        with pytest.raises(forebay.ConfigError) as caught:
            forebay.Node(settings=settings)
        assert caught.value.origin == "the code"


def test_password_in_a_url_in_code_is_not_shown(valkey_server: ValkeyServer) -> None:
    """It is taken out of the URL, as it is of one from outside."""
    url = valkey_server.url.replace("//", "//user:hunter2@")
    node = forebay.Node(settings=Settings(valkey=Valkey(url=url)))

    assert node._in_code.settings.valkey.password == Secret("hunter2")
    assert "hunter2" not in node._in_code.settings.valkey.url


@pytest.mark.parametrize(
    "in_code,outside,expected",
    [(None, None, "default"), ("code", None, "code"), ("code", "env", "env"), (None, "env", "env")],
)
async def test_namespace_from_outside_goes_before_the_one_in_code(
    valkey_server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    in_code: str | None,
    outside: str | None,
    expected: str,
) -> None:
    """I2: without settings in code, the environment decides; the argument is a default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_URL", valkey_server.socket_url)
    if outside:
        monkeypatch.setenv("FOREBAY_NAMESPACE", outside)
    async with forebay.Node(in_code) as node:
        assert node.namespace == expected
        assert repr(node) == f"<Node {expected} {node.instance} running>"


async def test_namespace_in_settings_goes_before_the_argument(make_node: MakeNode) -> None:
    """I2: the argument is a default for settings in code as well."""
    async with make_node("argument", node=NodeSettings(namespace="settings", shards=4)) as node:
        assert node.namespace == "settings"


def test_settings_from_the_command_line_replace_those_in_code(make_node: MakeNode) -> None:
    """configure: what `forebay run` found is in force, and a line says what is not."""
    node = make_node()
    with capture_logs() as lines:
        node.configure(Resolved(settings=Settings(), origins={}))

    assert [line["event"] for line in lines] == ["node.settings_replaced"]
    assert node._settings().settings.valkey.url == ""


# Starting and stopping


async def test_nothing_works_before_the_start(make_node: MakeNode) -> None:
    """Each way to use a node or its caches says that it is not running."""
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
            with pytest.raises(forebay.ForebayError, match=r"not running|before its node"):
                await use()
        async with node:
            assert await cached(3) == 9


async def test_same_node_starts_again(make_node: MakeNode, valkey_server: ValkeyServer) -> None:
    """I3: after its stop a node starts anew, with an empty near cache and the shared tier."""
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
    """I3: started twice, one after the other or at once, the first start is the one that counts."""
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
    """The second try works as if there had been no first."""
    server = make_server()
    valkey = Valkey(url=server.socket_url, startup_timeout_ms=100, connect_timeout_ms=100)
    node = make_node(valkey=valkey)
    cached = node.cached("a:{id}", ttl=60)(squared)
    server.stop()
    with pytest.raises(forebay.StartupError):
        await node.start()
    with pytest.raises(forebay.ForebayError, match="before its node"):
        await cached(2)

    server.start()
    async with node:
        assert await cached(2) == 4


async def test_user_without_a_right_is_told_at_the_start(
    make_node: MakeNode, make_server: MakeServer
) -> None:
    """U5: a command that will be needed and is refused is a StartupError, not a silent wait."""
    server = make_server(
        acl=["user default on nopass ~* &* +@all", "user weak on >pw ~* &* +@all -xread"]
    )
    valkey = Valkey(url=server.socket_url, username="weak", password=Secret("pw"))
    with anyio.fail_after(10), pytest.raises(forebay.StartupError, match="xread") as caught:
        async with make_node(valkey=valkey):
            pytest.fail("it has started")
    assert caught.value.setting == "valkey.username"


async def test_hooks_run_in_order_and_can_use_the_node(make_node: MakeNode) -> None:
    """Start hooks in their order once the node works; stop hooks backwards while it still does."""
    node = make_node()
    cached = node.cached("a:{id}", ttl=60)(squared)
    told: list[object] = []

    for number in (1, 2):

        @node.on_start
        async def begin(number: int = number) -> None:
            await node.invalidate(["a:7"])
            told.append(("start", number, await cached(7), node.is_running))

        @node.on_stop
        async def end(number: int = number) -> None:
            await node.invalidate(["a:7"])
            told.append(("stop", number, await cached(7), node.parts.drained))

    async with node:
        told.append("body")

    assert told == [
        ("start", 1, 49, True),
        ("start", 2, 49, True),
        "body",
        ("stop", 2, 49, True),
        ("stop", 1, 49, True),
    ]


class Oops(Exception):
    """Raised by the application."""


@pytest.mark.parametrize("kind", [Oops, SystemExit])
async def test_exception_of_the_body_comes_out_as_itself(
    make_node: MakeNode, kind: type[BaseException]
) -> None:
    """I5: not in a group, not another one; and the node has drained and stopped."""
    node = make_node(workers=WorkerSettings(enabled=True))
    raised = kind("x")
    with pytest.raises(kind) as caught:
        async with node:
            raise raised

    assert caught.value is raised
    assert node.drained is True
    assert not node.is_running


async def test_start_hook_that_fails_stops_the_start(make_node: MakeNode) -> None:
    """H1: its error comes out as it is; the hooks behind it do not run, all stop hooks do."""
    node = make_node()
    told: list[str] = []

    @node.on_start
    async def begin() -> None:
        raise Oops("database")

    @node.on_start
    async def never() -> None:
        told.append("never")

    @node.on_stop
    async def end() -> None:
        told.append("end")

    with pytest.raises(Oops, match="database"):
        async with node:
            told.append("body")
    assert told == ["end"]
    assert not node.is_running


async def test_stop_hooks_that_fail_stop_nobody(make_node: MakeNode) -> None:
    """H1, H3: the others run; the first error comes out, but never in place of the body's."""
    node = make_node()
    told: list[str] = []

    @node.on_stop
    async def last() -> None:
        told.append("last")

    @node.on_stop
    async def second() -> None:
        raise Oops("second")

    @node.on_stop
    async def first() -> None:
        raise Oops("first")

    with capture_logs() as lines, pytest.raises(Oops, match="first"):
        async with node:
            told.append("body")
    assert [str(line["exc_info"]) for line in lines if line["event"] == "hook.failed"] == ["second"]

    with capture_logs() as lines, pytest.raises(ZeroDivisionError):
        async with node:
            _ = 1 / 0
    failures = [line["exc_info"] for line in lines if line["log_level"] == "error"]
    assert sorted(map(str, failures)) == ["first", "second"]
    assert told == ["body", "last", "last"]


async def test_stop_hook_that_hangs_is_given_up(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H2: it is cancelled after its limit, and that is an error."""
    monkeypatch.setattr(hooks, "LIMIT_S", 0.05)
    node = make_node()

    @node.on_stop
    async def hang() -> None:
        await anyio.sleep_forever()

    with pytest.raises(forebay.ForebayError, match="took longer"):
        async with node:
            pass
    assert not node.is_running


@pytest.fixture(params=["scope", "task"])
def cancelled_body(request: pytest.FixtureRequest) -> Callable[[forebay.Node], Awaitable[None]]:
    """Runs a node whose body is cancelled: by a scope of anyio, or as a task of asyncio."""

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
    """I5, H2: what was accepted is in the sink, and the stop hook has run to its end."""
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
    """A start may be given up at any await: the node can be started again."""
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
    """U3: asked for by several and again by the end of the block, there is one drain."""
    node = make_node(workers=WorkerSettings(enabled=True))
    drains: list[None] = []
    async with node:
        crew = node.parts.crew
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
    """U3: cancelling the task that drains does not: what was under way is finished."""
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


async def test_worker_that_fails_ends_the_node(make_node: MakeNode) -> None:
    """A fault of ours in the background is not hidden: the body is cancelled, the fault shown."""
    node = make_node()
    with pytest.raises(ExceptionGroup) as caught:
        async with node:
            node.parts.tasks.start_soon(_fail)
            await anyio.sleep_forever()

    assert caught.group_contains(Oops)
    assert not node.is_running


async def _fail() -> None:
    raise Oops


async def test_failing_worker_does_not_hide_what_the_body_raises(make_node: MakeNode) -> None:
    """L4: the body was ending with an error of its own: that comes out, the fault is logged."""
    node = make_node()
    with capture_logs() as lines, pytest.raises(ZeroDivisionError):
        async with node:
            try:
                node.parts.tasks.start_soon(_fail)
                await anyio.sleep_forever()
            finally:
                _ = 1 / 0
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["node.failed"]


async def test_second_cancellation_cuts_the_drain_short(make_node: MakeNode) -> None:
    """L1: a task that is cancelled again while its node drains ends soon, and leaves nothing."""
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
        while not (node.is_running and node.parts.draining):
            await anyio.sleep(0)
    task.cancel()
    with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):
        await task
    assert (node.is_running, node.drained) == (False, None)


# Using


@pytest.fixture
async def node(make_node: MakeNode) -> AsyncIterator[forebay.Node]:
    node = make_node()
    node.cached("a:{id}", ttl=60, tags=["all"])(squared)

    @node.cached("bad:{id}", ttl=60)
    async def bad(id: int) -> int:
        raise Oops("database")

    async with node:
        yield node


async def test_read_goes_through_the_cache_of_the_key(node: forebay.Node) -> None:
    """A key is read as its cache would; one that no cache declares is None."""
    first, second = await node.read("a:4"), await node.read("a:4")

    assert first is not None
    assert second is not None
    assert (first.json, first.tier, first.negative) == (b"16", "source", False)
    assert (second.json, second.tier, second.version) == (b"16", "near", first.version)
    assert await node.read("nobodys:4") is None


async def test_read_tells_whose_fault_it_is(node: forebay.Node) -> None:
    """What a loader raises is a LoaderError that names the cache, and stands in the log."""
    with capture_logs() as lines, pytest.raises(forebay.LoaderError) as caught:
        await node.read("bad:1")

    assert (caught.value.cache, caught.value.key) == ("bad", "bad:1")
    assert isinstance(caught.value.__cause__, Oops)
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["loader.failed"]


@pytest.mark.parametrize("how", [{"keys": ["a:4"]}, {"tags": ["all"]}])
async def test_invalidation_is_seen_by_the_next_read(
    node: forebay.Node, how: dict[str, list[str]]
) -> None:
    """Before ``invalidate`` returns this node has forgotten; the new entry is newer."""
    first = await node.read("a:4")
    await node.invalidate(**how)
    second = await node.read("a:4")

    assert first is not None
    assert second is not None
    assert second.tier == "source"
    assert second.version > first.version


@pytest.mark.parametrize(
    "how",
    [{"keys": "a:4"}, {"tags": "all"}, {"keys": ["a 4"]}, {"tags": ["{all}"]}, {"keys": [""]}],
)
async def test_what_cannot_be_a_key_is_not_invalidated(
    node: forebay.Node, how: dict[str, Any]
) -> None:
    """A string in the place of a list would be taken for its letters: it is refused."""
    with pytest.raises(forebay.InvalidKey):
        await node.invalidate(**how)


async def test_published_events_are_stored_in_order(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """publish: all of them, as they are, under ids that rise."""
    events = [f'{{"type":"refresh","keys":["a:{n}"]}}'.encode() for n in range(3)]
    ids = await node.publish(events)
    stored = valkey_server.execute("XRANGE", f"forebay:{node.namespace}:events", "-", "+")

    assert [(entry.decode(), fields[1]) for entry, fields in stored] == list(
        zip(ids, events, strict=True)
    )
    assert node.instruments.counts["events_published", "refresh"] == 3
    assert await node.publish([]) == []


async def test_one_bad_event_keeps_all_out(node: forebay.Node, valkey_server: ValkeyServer) -> None:
    """publish: what can never be applied is refused with the reason, and nothing is stored."""
    good = b'{"type":"refresh","keys":["a:1"]}'
    for bad in (b"{", b"[]", b'{"type":"juggle"}', b'{"type":"refresh"}', b" " * 70_000):
        with pytest.raises(InvalidEvent):
            await node.publish([good, bad])

    assert valkey_server.execute("EXISTS", f"forebay:{node.namespace}:events") == 0


async def test_events_of_a_newer_version_are_published(node: forebay.Node) -> None:
    """publish: a newer node may know them; here they are counted as unknown."""
    event = b'{"specversion":"1.0","type":"dev.forebay.cache.write.v2","id":"1","source":"x"}'

    assert len(await node.publish([event])) == 1
    assert node.instruments.counts["events_published", "unknown"] == 1


async def test_two_nodes_in_one_process_share_one_server(make_node: MakeNode) -> None:
    """Each has its caches, metrics and near cache; what one invalidates the other reads anew."""
    loads: list[str] = []

    def shop(name: str) -> forebay.Node:
        node = make_node()

        @node.cached("a:{id}", ttl=60)
        async def loaded(id: int) -> int:
            loads.append(name)
            return len(loads)

        return node

    async with shop("one") as one, shop("two") as two:
        tiers = []
        for node in (one, two, one, two):
            hit = await node.read("a:1")
            assert hit is not None
            tiers.append((hit.tier, hit.json))
        assert tiers == [("source", b"1"), ("shared", b"1"), ("near", b"1"), ("near", b"1")]

        await one.invalidate(["a:1"])
        with anyio.fail_after(5):
            while (hit := await two.read("a:1")) is None or hit.json == b"1":
                await anyio.sleep(0.005)
        counts = [
            node.instruments.counts["cache_requests", "loaded", "source", "hit"]
            for node in (one, two)
        ]
    assert loads == ["one", "two"]
    assert counts == [1, 1]
    assert one.instance != two.instance


async def test_two_namespaces_on_one_server_do_not_meet(
    make_node: MakeNode, namespace: str
) -> None:
    """The same key in two namespaces is two entries."""
    one, two = make_node(f"{namespace}-1"), make_node(f"{namespace}-2")
    cached = [node.cached("a:{id}", ttl=60)(squared) for node in (one, two)]
    async with one, two:
        assert [(await each.get_with_info(3)).tier for each in cached] == ["source", "source"]
        await one.invalidate(["a:3"])
        assert [(await each.get_with_info(3)).tier for each in cached] == ["source", "near"]


async def test_node_without_logging_configured_keeps_quiet_about_secrets(
    make_server: MakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """An embedding service that configures no logs still gets no password on its terminal."""
    structlog.reset_defaults()
    server = make_server(config={"requirepass": "hunter2"})
    url = server.url.replace("//", "//:hunter2@")
    async with forebay.Node("shop", settings=Settings(valkey=Valkey(url=url))) as node:
        assert node.is_running
    out, err = capsys.readouterr()

    assert "node.running" in out
    assert "hunter2" not in out + err


# Types


@pytest.mark.slow
def test_public_face_is_typed(tmp_path: Path) -> None:
    """D2: mypy sees the loader's types through the decorators, and refuses wrong calls."""
    installed("mypy")
    (tmp_path / "service.py").write_text(TYPED)
    (tmp_path / "forebay").symlink_to(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-codes",
         "--cache-dir", "cache", "--follow-imports", "silent", "service.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=55,
    )  # fmt: skip
    told = re.findall(r"^service.py:\d+: (note|error): (.*)$", done.stdout, re.MULTILINE)
    revealed = [text.split('"', 1)[1].rstrip('"') for kind, text in told if kind == "note"]
    refused = [text for kind, text in told if kind == "error"]

    assert revealed == REVEALED, done.stdout + done.stderr
    assert len(refused) == len(REFUSED), done.stdout
    assert [text for text, begin in zip(refused, REFUSED, strict=True) if begin not in text] == []

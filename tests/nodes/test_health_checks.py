"""Health checks name stalled work and its cause: S4, S5, L1-L4, C1-C3."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

import forebay
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.valkey.handshake import read_info
from forebay.coordinator.write_check import WriteCheck
from forebay.nodes.status import gauges
from forebay.nodes.web.health import verdict
from forebay.nodes.web.protocols import Check
from forebay.nodes.workers.backlog import Backlog
from forebay.schemas.errors import ServerRefused, TransientSinkError
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer

WORK = ("ingress", "ownership", "writes", "refreshes")


class Faulty:
    """A sink that fails on request."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.stored: list[Any] = []

    async def save(self, writes: list[forebay.Write[Any]]) -> None:
        if self.fault is not None:
            raise self.fault
        self.stored += writes


@asynccontextmanager
async def shop(server: ValkeyServer, namespace: str, sink: Faulty) -> AsyncIterator[forebay.Node]:
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=4),
            valkey=Valkey(
                url=server.socket_url,
                command_timeout_ms=300,
                connect_timeout_ms=300,
                reconnect_jitter_ms=10,
                reconnect_max_ms=50,
                breaker_recovery_ms=50,
            ),
            workers=Workers(beat_ms=100, ownership_ttl_ms=1_000, flush_delay_ms=0),
        )
    )

    @node.cached("item:{id}", ttl=60)
    async def item(id: int) -> int:
        return id

    node.sink("item:{id}")(sink.save)
    async with node:
        await until(lambda: node._parts.crew.ownership.statistics().owned == 5)
        yield node


@pytest.fixture
def sink() -> Faulty:
    return Faulty()


@pytest.fixture
async def node(
    valkey_server: ValkeyServer, namespace: str, sink: Faulty
) -> AsyncIterator[forebay.Node]:
    async with shop(valkey_server, namespace, sink) as node:
        yield node


def check(node: forebay.Node, name: str) -> Check:
    return next(each for each in node.checks() if each.name == name)


def warns(node: forebay.Node, name: str, words: str = "") -> Callable[[], bool]:
    def look() -> bool:
        found = check(node, name)
        return found.state == "warn" and words in found.detail

    return look


async def test_each_kind_of_work_has_a_check_that_passes(node: forebay.Node) -> None:
    """S4: without a fault every check passes without details."""
    found = {each.name: each for each in node.checks()}
    assert set(WORK) | {"valkey_writes"} <= set(found)
    assert {name: found[name].state for name in WORK} == dict.fromkeys(WORK, "pass")
    assert [found[name].detail for name in WORK] == [""] * 4


async def test_a_paused_sink_says_for_how_long_which_attempt_and_why(
    node: forebay.Node, sink: Faulty
) -> None:
    """S5: a failed database warns at once, fails no probe, and passes after its recovery."""
    sink.fault = TransientSinkError("connection refused")
    (name,) = node._parts.crew.deliveries
    await node.caches[0].write_behind(1, 1)
    await until(warns(node, f"sink {name}", "attempt 3)"))
    detail = check(node, f"sink {name}").detail
    assert detail.startswith("the sink is paused: ")
    assert "connection refused" in detail
    assert "(for " in detail
    await until(lambda: verdict(node.checks(), "ready") == "warn")
    assert (await node.stats())["workers"]["sinks"][name].startswith("the sink is paused")
    shown = {(each[0], *each[1]): each[2] for each in gauges(node._parts_if_running())}
    assert shown["sink_paused_seconds", name] > 0
    sink.fault = None
    await until(lambda: check(node, f"sink {name}").state == "pass")
    assert (await node.stats())["workers"]["sinks"][name] == "ok"


@pytest.mark.parametrize("kind", ["events", "writes", "refreshes"])
async def test_work_that_nobody_does_is_late(
    valkey_server: ValkeyServer, namespace: str, sink: Faulty, kind: Any
) -> None:
    """L1, L4: a waiting entry is found in the stream, even if the workers consider it done."""
    async with shop(valkey_server, namespace, sink) as node:
        parts, crew = node._parts, node._parts.crew
        names, link = parts.names, parts.backend.link
        await crew.ownership.give_up(list(crew.ownership.tenures.values()))
        backlog = backlog_of(node, Owner(range(-1, 4)))
        stream = names.events if kind == "events" else names.part(2, kind)
        await backlog.look()
        assert dict(backlog.ages()) == {"events": 0.0, "writes": 0.0, "refreshes": 0.0}
        await link.call("XADD", stream, "1-1", "x", "y")  # an id of 1970: not 56 years late
        await backlog.look()
        assert backlog.late(kind) == ""
        with capture_logs() as lines:
            await until(lambda: _looked_late(backlog, kind))
            await backlog.look()
        assert stream in backlog.late(kind)
        assert 0.05 < dict(backlog.ages())[kind] < 60
        late = [each for each in lines if each["event"] == "work.late"]
        assert [(each["kind"], each["log_level"]) for each in late[:2]] == [(kind, "warning")]
        await link.call("DEL", stream)
        await backlog.look()
        assert backlog.late(kind) == ""


async def _looked_late(backlog: Backlog, kind: Any) -> bool:
    return bool(backlog.late(kind))


class Owner:
    def __init__(self, resources: range) -> None:
        self.tenures = dict.fromkeys(resources)


def backlog_of(node: forebay.Node, owner: Any) -> Backlog:
    parts = node._parts
    return Backlog(
        parts.backend.link,
        parts.names,
        owner,
        clock=SystemClock(),
        server_clock=parts.server_clock,
        lease_ms=0,
        late_s=0.05,
    )


async def test_an_entry_is_as_old_as_its_id_says(node: forebay.Node) -> None:
    """L2: a new owner knows how long the work has waited already."""
    parts = node._parts
    stream = parts.names.part(2, "dead")  # a stream that nobody reads
    backlog = backlog_of(node, Owner(range(2, 3)))
    old = int(parts.server_clock.now_ms()) - 60_000
    await parts.backend.link.call("XADD", stream, f"{old}-0", "x", "y")
    part = parts.names.part
    backlog._names = type("Moved", (), {"part": lambda _, n, name: part(n, "dead")})()
    await backlog.look()
    assert 59 < dict(backlog.ages())["writes"] < 120


async def test_a_node_without_its_server_says_what_stands_still(
    make_server: Any, namespace: str, sink: Faulty
) -> None:
    """S5: ownership, ingress and writes name the current failure, and pass after it."""
    server = make_server()
    async with shop(server, namespace, sink) as node:
        server.stop()
        await until(warns(node, "ownership", "no beat succeeds for"))
        await until(warns(node, "ingress", "events are not applied for"))
        server.start()
        for name in WORK:
            await until(lambda name=name: check(node, name).state == "pass")


async def test_a_key_of_a_wrong_type_is_seen_in_ownership(node: forebay.Node) -> None:
    """S5: a claim that the server refuses is reported with its error."""
    own, link = node._parts.names.part(1, "own"), node._parts.backend.link
    await link.call("SET", own, "x")
    await until(warns(node, "ownership", "WRONGTYPE"))
    await link.call("DEL", own)
    await until(lambda: check(node, "ownership").state == "pass")


@pytest.mark.parametrize(
    "refuse,accept,code",
    [
        (("maxmemory", 1), ("maxmemory", 0), "OOM"),
        (("min-replicas-to-write", 1), ("min-replicas-to-write", 0), "NOREPLICAS"),
    ],
)
async def test_a_server_that_refuses_all_writes_fails_readiness(
    make_server: Any, namespace: str, sink: Faulty, refuse: Any, accept: Any, code: str
) -> None:
    """S4, C1: readiness fails until the server accepts writes; liveness is not affected."""
    server = make_server(config={"maxmemory-policy": "noeviction"})
    async with shop(server, namespace, sink) as node:
        server.execute("CONFIG", "SET", *refuse)
        await until(lambda: check(node, "valkey_writes").state == "fail")
        assert code in check(node, "valkey_writes").detail
        assert verdict(node.checks(), "ready") == "fail"
        assert verdict(node.checks(), "live") != "fail"
        server.execute("CONFIG", "SET", *accept)
        await until(lambda: check(node, "valkey_writes").state == "pass")


class Counting:
    """Counts commands, and refuses them on request."""

    def __init__(self) -> None:
        self.calls = 0
        self.code = ""

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        self.calls += 1
        if self.code:
            raise ServerRefused(self.code, "as told", "SET")


async def test_health_is_asked_often_and_the_server_seldom(node: forebay.Node) -> None:
    """C2: a thousand probes send no command."""
    counting = Counting()
    asked = WriteCheck(counting, "none", clock=SystemClock())  # type: ignore[arg-type]
    node._parts.write_check = asked
    await asked.ask()
    for _ in range(1_000):
        node.checks()
    assert counting.calls == 1


@pytest.mark.parametrize("code", ["MISCONF", "OOM", "READONLY", "NOREPLICAS", "NOPERM"])
async def test_what_is_refused_to_all_and_what_is_not(code: str) -> None:
    """C1: a user without the right to write that name proves nothing about other writes."""
    counting = Counting()
    asked = WriteCheck(counting, "none", clock=SystemClock())  # type: ignore[arg-type]
    counting.code = code
    await asked.ask()
    assert (asked.refusal is None) == (code == "NOPERM")
    counting.code = ""
    await asked.ask()
    assert asked.refusal is None


async def test_asking_writes_nothing(make_server: Any) -> None:
    """C1: the check creates no key, and sends nothing to the disk or a replica."""
    server = make_server()

    class Direct:
        async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
            return server.execute(*args)

    def changes() -> int:
        found = read_info(server.execute("INFO", "persistence"))
        return int(found["rdb_changes_since_last_save"])

    server.execute("SET", "other", "x")
    asked, before = WriteCheck(Direct(), "none", clock=SystemClock()), changes()  # type: ignore[arg-type]
    for _ in range(10):
        await asked.ask()
    assert asked.refusal is None
    assert server.execute("EXISTS", "none") == 0
    assert changes() == before > 0


async def test_a_key_of_another_type_is_named_until_it_is_gone(
    make_node: Any, valkey_server: ValkeyServer
) -> None:
    """A refused put shows the key and its expected type; readiness does not change."""
    node = make_node()

    @node.cached("row:{id}", ttl=60)
    async def row(id: int) -> int:
        return id

    async with node:
        names = node._parts.names
        log = names.part(names.shard("row:1"), "log")

        def check() -> Check:
            return next(each for each in node.checks() if each.name == "keys")

        assert check().state == "pass"
        valkey_server.execute("SET", log, "x")
        with pytest.raises(ServerRefused):
            await row.put(1, 7)
        assert (check().state, check().gates) == ("warn", frozenset())
        assert check().detail == f"{log} is a string, and should be a stream"
        valkey_server.execute("DEL", log)
        await until(lambda: check().state == "pass")

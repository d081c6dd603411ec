"""Node status: checks, gauges, and the document of /stats."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest

import forebay
from conftest import MakeServer
from forebay.nodes.status import gauges
from forebay.nodes.workers.delivery import Outage
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from forebay.schemas.settings import Workers as WorkerSettings
from support.valkey_server import ValkeyServer

ALWAYS = {
    "version": str,
    "uptime_s": float,
    "backend": {"why": str, "kind": str, "version": str, "run_id": str},
    "connection": {
        "name": str,
        "connected": bool,
        "connects": int,
        "reconnects": int,
        "calls": int,
        "replies": int,
        "timeouts": int,
        "dropped_replies": int,
        "in_flight": int,
        "in_flight_max_seen": int,
        "breaker": str,
    },
    "log": {"shards": int, "suspect": int, "sweeps": int, "notices": int, "resets": int},
    "counters": dict,
}
OF_THE_SERVER = {
    "keys": int,
    "memory": {"used_memory": str, "maxmemory": str, "maxmemory_policy": str},
    "backlog": {"events": int, "writes": int},
    "dead_letters": int,
}
OF_A_CACHE = {"entries": int, "bytes": int, "evictions": int, "loading": int}
OF_WORKERS = {
    "owned": int,
    "shards": int,
    "events": bool,
    "nodes": list,
    "dead_letters": int,
    "sinks": dict,
}


def shop(valkey: Valkey, namespace: str) -> forebay.Node:
    workers = WorkerSettings(beat_ms=100, ownership_ttl_ms=1_000)
    settings = Settings(valkey=valkey, node=NodeSettings(shards=4), workers=workers)
    node = forebay.Node(namespace, settings=settings)

    @node.cached("product:{id}", ttl=60)
    async def product(id: int) -> int:
        return id

    @node.sink("product:{id}")
    async def save(writes: list[forebay.Write[int]]) -> None:
        """Accept all writes."""

    return node


@pytest.fixture
async def node(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[forebay.Node]:
    async with shop(Valkey(url=valkey_server.socket_url), namespace) as node:
        yield node


def misfits(document: object, shape: object, path: str = "") -> list[str]:
    """The paths where the document lacks a field of the shape, or has another type."""
    if isinstance(shape, dict):
        if not isinstance(document, dict):
            return [f"{path}: {document!r}"]
        return [
            misfit
            for name, part in shape.items()
            for misfit in misfits(document.get(name, "(missing)"), part, f"{path}.{name}")
        ]
    assert isinstance(shape, type)
    return [] if isinstance(document, shape) else [f"{path}: {document!r}"]


async def test_stats_have_the_documented_shape(node: forebay.Node) -> None:
    """S2: fields may be added; the fields of this list keep their names and types."""
    await node.publish([b'{"type":"invalidate","keys":["product:1"]}'])
    await node.read("product:1")
    document = msgspec.json.decode(msgspec.json.encode(await node.stats()))

    assert misfits(document, {**ALWAYS, **OF_THE_SERVER}) == []
    assert document["unavailable"] is None
    assert misfits(document["caches"]["product"], OF_A_CACHE) == []
    assert misfits(document["workers"], OF_WORKERS) == []
    assert document["workers"]["sinks"] == {"save": "ok"}
    assert document["counters"]["events_published invalidate"] == 1
    assert 0 <= document["uptime_s"] < 60


async def test_stats_of_a_node_without_workers(valkey_server: ValkeyServer, namespace: str) -> None:
    """S2: ``workers`` is null on a node without workers, and all else is there."""
    node = forebay.Node(namespace, settings=Settings(valkey=Valkey(url=valkey_server.socket_url)))
    async with node:
        document = await node.stats()

    assert document["workers"] is None
    assert document["caches"] == {}
    assert misfits(document, {**ALWAYS, **OF_THE_SERVER}) == []


async def test_stats_count_what_waits_and_what_is_dead(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """The backlog counts the undone work of the whole namespace."""
    node = forebay.Node(namespace, settings=Settings(valkey=Valkey(url=valkey_server.socket_url)))
    async with node:
        names = node._parts.names
        valkey_server.execute("XADD", names.events, "*", "event", "{}")
        valkey_server.execute("XADD", names.part(2, "writes"), "*", "j", "x")
        valkey_server.execute("XADD", names.part(1, "dead"), "*", "event", "x")
        document = await node.stats()

    assert document["backlog"] == {"events": 1, "writes": 1}
    assert document["dead_letters"] == 1


async def test_stats_say_why_the_server_is_not_asked(
    make_server: MakeServer, namespace: str
) -> None:
    """S2: without Valkey all fields are there, null with a reason; nothing raises."""
    server = make_server()
    async with shop(Valkey(url=server.socket_url, command_timeout_ms=300), namespace) as node:
        server.kill9()
        document = await node.stats()
        server.start()

    assert misfits(document, ALWAYS) == []
    assert {document[name] for name in OF_THE_SERVER} == {None}
    assert "unavailable" in str(document["unavailable"])


async def test_refused_commands_do_not_break_stats(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """S2: a key of another type in the place of a stream is left out, and named."""
    dead = node._parts.names.part(3, "dead")
    valkey_server.execute("SET", dead, "x")
    document = await node.stats()

    assert document["dead_letters"] == 0
    assert "WRONGTYPE" in str(document["unavailable"])
    assert dead in str(document["unavailable"])


def failing(node: forebay.Node, gate: str) -> set[str]:
    return {each.name for each in node.checks() if each.state == "fail" and gate in each.gates}


async def eventually(node: forebay.Node, gate: str, names: set[str]) -> None:
    with anyio.fail_after(10):
        while failing(node, gate) != names:
            await anyio.sleep(0.005)


async def test_checks_follow_the_node(make_server: MakeServer, namespace: str) -> None:
    """S1, S3: a running node passes both gates; without Valkey, or draining, it is not ready."""
    server = make_server()
    valkey = Valkey(
        url=server.socket_url, command_timeout_ms=300, reconnect_jitter_ms=5, reconnect_max_ms=50
    )
    node = shop(valkey, namespace)
    assert failing(node, "start") == failing(node, "ready") == {"node"}

    async with node:
        await eventually(node, "ready", set())
        server.kill9()
        await eventually(node, "ready", {"valkey", "log"})
        assert failing(node, "start") == failing(node, "live") == set()
        server.start()
        await eventually(node, "ready", set())
        await node.drain()
        await eventually(node, "ready", {"drain"})
        assert failing(node, "start") == set()

    assert failing(node, "ready") == {"node"}


async def test_stopped_sink_warns_and_fails_nothing(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """A stopped sink is shown; the node keeps serving."""
    async with shop(Valkey(url=valkey_server.socket_url), namespace) as node:
        assert node._parts.crew is not None
        delivery = node._parts.crew.deliveries["save"]
        delivery.stopped = "no such table"
        delivery.paused = Outage(node._parts.clock.monotonic() - 30, 4, "no such table")
        (check,) = [each for each in node.checks() if each.name == "sink save"]
        document = await node.stats()
        delivery.stopped, delivery.paused = "", None

    assert (check.state, check.gates) == ("warn", frozenset())
    assert re.fullmatch(
        r"the sink is stopped: no such table \(for 3\d\.\d s, attempt 4\)", check.detail
    )
    shown = document["workers"]["sinks"]["save"]  # type: ignore[index]
    assert shown.startswith("the sink is stopped: no such table (")


async def test_gauges_are_there_while_the_node_runs(node: forebay.Node) -> None:
    """S6: a scrape has the gauges, with a value for each cache."""
    await node.read("product:1")
    found = {(name, *labels): value for name, labels, value in gauges(node._parts_if_running())}

    assert found["build_info", forebay.__version__] == 1
    assert found["backend_up",] == 1
    assert found["breaker_state", "valkey", "closed"] == 1
    assert found["breaker_state", "valkey", "open"] == 0
    assert found["cache_entries", "product"] == 1
    assert found["cache_size_bytes", "product"] > 0
    assert 0 <= found["log_staleness_seconds",] < 60


def test_gauges_of_a_node_that_does_not_run() -> None:
    """S6: before the start and after the stop a scrape has the gauges of a stopped node only."""
    found = list(gauges(None))

    down = [("ready", (), 0.0), ("draining", (), 0.0), ("backend_up", (), 0.0)]
    assert found == [("build_info", (forebay.__version__,), 1.0), *down]

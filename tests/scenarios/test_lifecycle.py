"""Nodes that start, stop, die, and lose their Valkey: what the rest of the world sees of it."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import MakeServer
from support.eventually import wait_until
from support.node_process import NodeProcess, Shop
from support.publisher import KEYS, Publisher, assert_in_order, write_event
from support.valkey_server import ValkeyServer

QUICK = {"workers__ownership_ttl_ms": 1_000, "workers__beat_ms": 200}
IMPATIENT = {
    "valkey__command_timeout_ms": 200,
    "valkey__breaker_recovery_ms": 200,
    "valkey__reconnect_jitter_ms": 10,
    "valkey__reconnect_max_ms": 100,
}


@pytest.fixture
def shop(valkey_server: ValkeyServer, tmp_path: Path, namespace: str) -> Iterator[Shop]:
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url, **QUICK) as shop:
        yield shop


def test_draining_node_is_alive_but_not_ready_and_a_second_signal_ends_it(shop: Shop) -> None:
    """P1, P2: during a drain /livez is 200 and /readyz 503; the second SIGTERM ends it: 143."""
    node = shop.node(sink="hang", workers__drain_ms=30_000).start()
    assert node.post(write_event(1, 5)).status == 202
    wait_until(lambda: shop.sink_reached, what="the write in the sink")

    node.signal(signal.SIGTERM)
    wait_until(lambda: node.get("/readyz").status == 503, what="unreadiness")

    assert node.get("/livez").status == 200
    assert node.get("/startupz").status == 200
    assert b"[-]drain failed: draining" in node.get("/readyz").body
    assert node.ended() is None
    node.signal(signal.SIGTERM)
    assert node.wait() == 128 + signal.SIGTERM


def test_second_signal_ends_a_node_whose_event_loop_is_held_up(shop: Shop) -> None:
    """P2: a sink that blocks the loop does not keep the process: 130 after a second SIGINT."""
    node = shop.node(sink="block").start()
    node.post(write_event(1, 5))
    wait_until(lambda: shop.sink_reached, what="the write in the sink")

    def signalled() -> bool:
        node.signal(signal.SIGINT)
        time.sleep(0.05)  # two that come together are one
        return node.ended() is not None

    wait_until(signalled, what="the end")
    assert node.ended() == 128 + signal.SIGINT


def test_signal_during_the_start_ends_it(make_server: MakeServer, tmp_path: Path) -> None:
    """P2: while the server is waited for there is nothing to drain: 143 at once, no traceback."""
    server = make_server()
    server.sigstop()
    node = NodeProcess(tmp_path, valkey__url=server.url, valkey__startup_timeout_ms=60_000)
    node.spawn()
    wait_until(lambda: node.event("backend.chosen"), what="the start")

    node.signal(signal.SIGTERM)

    assert node.wait() == 128 + signal.SIGTERM
    assert "Traceback" not in node.said()


def test_drain_empties_the_queues_of_the_last_node(shop: Shop) -> None:
    """U3: what was accepted before the signal is in the sink when the process has ended."""
    node = shop.node(workers__flush_delay_ms=500).start()
    node.post(*[write_event(number, 100 + number) for number in range(KEYS)])
    wait_until(lambda: node.stats()["backlog"]["events"] == 0, what="all events applied")

    assert node.stop() == 0
    assert shop.stored() == {f"product:{n}": 100 + n for n in range(KEYS)}


@pytest.mark.parametrize("fault", ["frozen", "killed"])
def test_node_bridges_an_outage_of_valkey(
    make_server: MakeServer, tmp_path: Path, namespace: str, fault: str
) -> None:
    """While Valkey is away: alive, not ready, reads come from the source; then ready again."""
    server = make_server()
    with Shop(tmp_path, namespace, valkey__url=server.url, **QUICK, **IMPATIENT) as shop:
        shop.price(1, 10)
        node = shop.node().start()
        assert node.get("/v1/cache/product:1").json["price"] == 10

        if fault == "frozen":
            server.sigstop()
        else:
            server.kill9()
        wait_until(lambda: node.get("/readyz").status == 503, what="unreadiness")
        shop.price(1, 20)
        degraded = wait_until(lambda: node.get("/v1/cache/product:1"), what="an answer")

        assert (degraded.status, degraded.json["price"]) == (200, 20)
        assert degraded.headers["X-Forebay-Tier"] == "source"
        assert node.get("/livez").status == node.get("/startupz").status == 200
        refused = node.post(write_event(1, 99))
        assert (refused.status, "Retry-After" in refused.headers) == (503, True)
        assert node.stats()["keys"] is None

        if fault == "frozen":
            server.sigcont()
        else:
            server.start()
        wait_until(lambda: node.get("/readyz").status == 200, what="readiness")
        assert node.post(write_event(1, 30)).status == 202
        wait_until(lambda: node.get("/v1/cache/product:1").json["price"] == 30, what="the write")
        wait_until(lambda: shop.stored().get("product:1") == 30, what="the write in the sink")
        assert node.stop() == 0


@pytest.mark.slow
def test_rolling_restart_under_load_loses_nothing(shop: Shop, valkey_server: ValkeyServer) -> None:
    """Three nodes are restarted in turn while events come: each exits 0, all writes are stored."""
    nodes = [shop.node(f"node-{number}").spawn() for number in (1, 2, 3)]
    for node in nodes:
        node.until_ready()
    publisher = Publisher(valkey_server, shop.stream)
    publisher.start()
    try:
        wait_until(lambda: publisher.count > 50, what="some events")
        for node in nodes:
            assert node.stop() == 0
            node.start()
    finally:
        publisher.end()

    wait_until(lambda: shop.stored() == publisher.published, what="every last write in the sink")
    assert_in_order(shop)
    assert [node.stats()["dead_letters"] for node in nodes] == [0, 0, 0]
    for node in nodes:
        wait_until(
            lambda node=node: served(node) == publisher.published, what=f"all of it on {node}"
        )


def served(node: NodeProcess) -> dict[str, int]:
    keys = [f"product:{number}" for number in range(KEYS)]
    return {key: node.get(f"/v1/cache/{key}").json["price"] for key in keys}


def owned(node: NodeProcess) -> tuple[int, bool]:
    workers = node.stats()["workers"]
    return workers["shards"], workers["events"]


@pytest.mark.slow
def test_work_of_a_killed_node_is_taken_over(shop: Shop, valkey_server: ValkeyServer) -> None:
    """kill -9 under load: the other node owns all soon, no write is lost, order is kept."""
    nodes = [shop.node(f"node-{number}").start() for number in (1, 2)]
    wait_until(lambda: all(owned(node)[0] > 20 for node in nodes), what="a fair share for each")
    victim, heir = sorted(nodes, key=lambda node: not owned(node)[1])
    assert owned(victim)[1]
    publisher = Publisher(valkey_server, shop.stream)
    publisher.start()
    try:
        wait_until(lambda: publisher.count > 100, what="some events")
        victim.signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        wait_until(lambda: owned(heir) == (64, True), what="all in the hands of the other")
    finally:
        publisher.end()

    wait_until(lambda: shop.stored() == publisher.published, what="every last write in the sink")
    assert_in_order(shop)


def test_two_processes_with_one_id_are_two_owners(shop: Shop) -> None:
    """I4 of the node: a node id given twice does not make two processes own the same shards."""
    nodes = [shop.node(f"node-{number}", node__id="web").start() for number in (1, 2)]

    wait_until(
        lambda: all(20 < owned(node)[0] < 45 for node in nodes), what="a fair share for each"
    )

    assert sum(owned(node)[0] for node in nodes) <= 64
    assert [node.stats()["instance"] for node in nodes] == ["web", "web"]


@pytest.fixture(scope="module")
def lone_node(
    valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    directory = tmp_path_factory.mktemp("lone")
    settings = {"valkey__url": valkey_server.url, "http__header_timeout_ms": 300}
    with Shop(directory, f"lone-{directory.name}", **settings) as shop:
        yield shop.node().start()


def test_bad_bodies_are_refused_with_the_reason(lone_node: NodeProcess) -> None:
    """Over the limit: 413; not JSON: 400; a wrong field: 422 that names it; none is published."""
    before = lone_node.stats()["counters"].get("events_published write", 0)
    kind = "application/json"
    large = lone_node.request("POST", "/v1/events", b" " * 1_100_000, content_type=kind)
    broken = lone_node.request("POST", "/v1/events", b'{"type":', content_type=kind)
    wrong = lone_node.post({"type": "write", "key": "product:1"})

    assert [each.status for each in (large, broken, wrong)] == [413, 400, 422]
    assert "JSON" in broken.json["error"]["problem"]
    assert "value" in wrong.json["error"]["problem"]
    assert lone_node.stats()["counters"].get("events_published write", 0) == before


def test_slow_headers_are_closed(lone_node: NodeProcess) -> None:
    """A client that never ends its headers is hung up on, and others are served meanwhile."""
    with socket.create_connection((lone_node.host, lone_node.port), timeout=10) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        assert lone_node.get("/livez").status == 200
        assert slow.recv(100) == b""


def test_loader_that_fails_is_not_the_nodes_fault(lone_node: NodeProcess) -> None:
    """The application's error is a 504 for who asks, and a traceback in the log."""
    answer = lone_node.get("/v1/cache/broken:1")

    assert (answer.status, answer.json["error"]["code"]) == (504, "loader_failed")
    assert "no database" not in answer.body.decode()
    wait_until(lambda: "no database" in lone_node.said(), what="the reason in the log")

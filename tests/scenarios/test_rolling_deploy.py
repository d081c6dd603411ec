"""A rolling deploy that adds a sink, with real processes: no accepted write is a dead letter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forebay.schemas.keys import shard_of
from support.eventually import wait_until
from support.node_process import NodeProcess
from support.valkey_server import ValkeyServer

WRITES, SHARDS = 40, 64


class Rollout:
    """Processes of several releases in one namespace."""

    def __init__(self, server: ValkeyServer, directory: Path, namespace: str) -> None:
        self.server = server
        self.namespace = namespace
        self._directory = directory
        self._stack = ExitStack()
        self._count = 0

    def start(self, release: str, *, writes: int = 0) -> NodeProcess:
        return self.spawn(release, writes=writes).until_ready()

    def spawn(self, release: str, *, writes: int = 0) -> NodeProcess:
        self._count += 1
        node = NodeProcess(
            self._directory,
            name=f"{release}-{self._count}",
            app=f"support.rollout:{release}",
            environ={"ROLLOUT_DIR": str(self._directory), "ROLLOUT_WRITES": str(writes)},
            valkey__url=self.server.url,
            node__namespace=self.namespace,
            workers__beat_ms=200,
            workers__ownership_ttl_ms=2_000,
        )
        self._stack.callback(node.close)
        return node.spawn()

    def start_all(self, *releases: str) -> list[NodeProcess]:
        return [node.until_ready() for node in [self.spawn(each) for each in releases]]

    def close(self) -> None:
        self._stack.close()

    def sunk(self, name: str) -> set[str]:
        path = self._directory / name
        lines = path.read_bytes().splitlines() if path.exists() else []
        return {json.loads(line)["key"] for line in lines}

    def dead(self) -> list[dict[bytes, bytes]]:
        names = [f"{{{self.namespace}:{n:02}}}:dead" for n in range(SHARDS)]
        names.append(f"{{forebay:{self.namespace}:events}}:dead")
        found = [self.server.execute("XRANGE", name, "-", "+") for name in names]
        return [dict(zip(f[::2], f[1::2], strict=True)) for each in found for _, f in each]

    def publish(self, *events: dict[str, Any]) -> None:
        for event in events:
            name = f"forebay:{self.namespace}:events"
            self.server.execute("XADD", name, "*", "event", json.dumps(event))


@contextmanager
def _closed(rollout: Rollout) -> Iterator[Rollout]:
    try:
        yield rollout
    finally:
        rollout.close()


@pytest.fixture
def rollout(valkey_server: ValkeyServer, tmp_path: Path, namespace: str) -> Iterator[Rollout]:
    with _closed(Rollout(valkey_server, tmp_path, namespace)) as rollout:
        yield rollout


INVOICES = {f"invoice:{number}" for number in range(WRITES)}


def owned(node: NodeProcess) -> int:
    shards: int = node.stats()["workers"]["shards"]
    return shards


def held(node: NodeProcess) -> int:
    writes: int = node.stats()["workers"]["held"]["writes"]
    return writes


def test_writes_of_a_new_sink_reach_it_while_the_old_release_works(rollout: Rollout) -> None:
    """Three processes of v1, then one of v2 that writes 40 invoices: all of them are sunk."""
    rollout.start_all("v1", "v1", "v1")
    rollout.start("v2", writes=WRITES)
    wait_until(
        lambda: rollout.sunk("invoice") == INVOICES or rollout.dead(),
        what="each invoice in the sink",
    )
    assert rollout.dead() == []
    assert rollout.sunk("invoice") == INVOICES


def test_writes_that_wait_for_their_sink_are_seen_and_are_not_lost(rollout: Rollout) -> None:
    """Events of a release that is not there yet: held, in health, metrics and log; then sunk."""
    old = rollout.start("v1")
    for number in range(WRITES):
        total = {"id": number, "total": 1}
        rollout.publish({"type": "write", "key": f"invoice:{number}", "value": total})
    rollout.publish({"type": "write", "key": "order:1", "value": 1})
    wait_until(lambda: rollout.sunk("order") == {"order:1"}, what="the order in its sink")
    wait_until(lambda: held(old) == WRITES, what="all invoices held")
    health = old.get("/healthz?verbose")
    assert f"{WRITES} writes are held" in health.body.decode()
    wait_until(lambda: old.get("/healthz").status == 200, what="readiness")
    metrics = old.get("/metrics").body.decode()
    assert f"forebay_writebehind_held_entries {WRITES}.0" in metrics
    assert "forebay_writebehind_held_age_seconds" in metrics
    assert old.event("writes.held")["count"] > 0
    new = rollout.start("v2")
    wait_until(lambda: rollout.sunk("invoice") == INVOICES, what="each invoice in the sink")
    wait_until(lambda: held(new) == 0 and held(old) == 0, what="nothing held")
    assert owned(old) == 0
    assert rollout.dead() == []


def test_a_worker_without_sinks_says_so_and_owns_no_shard(rollout: Rollout) -> None:
    """Alone it applies events, and leaves their writes to a worker that has the sink."""
    bare = rollout.start("bare")
    assert bare.event("workers.without_sinks")
    rollout.publish({"type": "write", "key": "order:1", "value": 1})
    wait_until(
        lambda: bare.stats()["backlog"] == {"events": 0, "writes": 1}, what="the event applied"
    )
    assert owned(bare) == 0
    worker = rollout.start("v1")
    wait_until(lambda: owned(worker) == SHARDS, what="all shards owned by the worker with the sink")
    wait_until(lambda: rollout.sunk("order") == {"order:1"}, what="the order in its sink")
    assert owned(bare) == 0
    assert bare.stop() == 0
    assert rollout.dead() == []


def test_values_that_one_release_cannot_decode_go_to_the_other(rollout: Rollout) -> None:
    """The sink is there, and its cache has another type: v3 stores the writes of v3."""
    old = rollout.start("v2")
    rollout.start("v3")
    rollout.start("v3", writes=WRITES)
    wait_until(
        lambda: rollout.sunk("invoice") == INVOICES or rollout.dead(),
        what="each invoice in the sink",
    )
    assert rollout.dead() == []
    assert old.ended() is None


def test_values_that_no_release_can_decode_are_dead_letters(rollout: Rollout) -> None:
    """After the process that could decode them is gone, without waiting for workers.hold_ms."""
    rollout.start("v2", writes=0)
    job = msgspec.msgpack.encode({"type": "w", "key": "invoice:1", "value": b"\xa4text"})
    shard = shard_of("invoice:1", SHARDS)
    stream = f"{{{rollout.namespace}:{shard:02}}}:writes"
    rollout.server.execute("XADD", stream, "*", "v", "7", "j", job)
    wait_until(lambda: bool(rollout.dead()), what="the dead letter")
    assert [each[b"reason"] for each in rollout.dead()] == [b"undecodable"]

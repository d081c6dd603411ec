"""A rolling deploy that adds a sink, with real processes: no accepted write becomes a dead letter."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from noded import NodeProcess, until
from valkeyd import ValkeyServer

WRITES, SHARDS = 40, 64


class Rollout:
    """Processes of several releases in one namespace."""

    def __init__(self, server: ValkeyServer, directory: Path, namespace: str) -> None:
        self.server = server
        self.namespace = namespace
        self._directory = directory
        self._stack = ExitStack()
        self._count = 0

    def start(self, release: str, *, writes: int = 0, **settings: object) -> NodeProcess:
        self._count += 1
        return self._stack.enter_context(
            NodeProcess(
                self._directory,
                name=f"{release}-{self._count}",
                app=f"rollout:{release}",
                environ={"ROLLOUT_DIR": str(self._directory), "ROLLOUT_WRITES": str(writes)},
                valkey__url=self.server.url,
                node__namespace=self.namespace,
                workers__beat_ms=200,
                workers__ownership_ttl_ms=1_000,
                **settings,
            )
        )

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


def owned(node: NodeProcess) -> int:
    shards: int = node.stats()["workers"]["shards"]
    return shards


def test_writes_of_a_new_sink_reach_it_while_the_old_release_works(rollout: Rollout) -> None:
    """Three processes of v1, then one of v2 that writes 40 invoices: all of them are sunk."""
    for _ in range(3):
        rollout.start("v1")
    rollout.start("v2", writes=WRITES)
    wanted = {f"invoice:{number}" for number in range(WRITES)}
    until(
        lambda: rollout.sunk("invoice") == wanted or rollout.dead(),
        what="each invoice in the sink",
    )
    assert rollout.dead() == []
    assert rollout.sunk("invoice") == wanted

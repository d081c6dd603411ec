"""The number of log lines of a node without a server."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

from structlog.testing import capture_logs

import forebay
from forebay.nodes.sinks.base import Write
from forebay.schemas.errors import ForebayError
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until


async def test_an_outage_is_one_line_for_each_loop(make_server: Any, namespace: str) -> None:
    """A worker without its server fails hundreds of times, and logs each failure once a minute."""
    server = make_server()
    options = Valkey(
        url=server.socket_url,
        command_timeout_ms=100,
        connect_timeout_ms=100,
        reconnect_jitter_ms=10,
        reconnect_max_ms=20,
        breaker_recovery_ms=20,
    )
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=4),
            valkey=options,
            workers=Workers(beat_ms=100, ownership_ttl_ms=1_000),
        )
    )

    @node.cached("item:{id}", ttl=60)
    async def item(id: int) -> int:
        return id

    @node.sink("item:{id}")
    async def save(writes: list[Write[int]]) -> None:
        return None

    async def read() -> None:
        for number in range(10):
            await item(number)

    async with node:
        await read()
        with capture_logs() as lines, suppress(ForebayError):  # of the lease, which is lost
            async with node.lock("x", lease=2):
                server.stop()
                await until(lambda: _beats_failed(lines) >= 15)
                await read()
        server.start()
        await until(lambda: node._parts.backend.link.connected)
    said = Counter(
        (line["event"], line.get("link")) for line in lines if line["log_level"] != "debug"
    )
    assert {name: n for name, n in said.items() if n > 1} == {}
    assert sum(said.values()) < 25
    failures = Counter(line["event"] for line in lines)
    assert failures["beat.failed"] >= 15
    assert failures["link.connect_failed"] >= 15


def _beats_failed(lines: list[Any]) -> int:
    return sum(line["event"] == "beat.failed" for line in lines)

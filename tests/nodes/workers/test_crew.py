"""How the workers of a node stop: K1 and K2, on whole nodes."""

from __future__ import annotations

import itertools
from typing import Any

import anyio
import pytest

import forebay
from forebay.schemas.errors import FatalSinkError, TransientSinkError
from forebay.schemas.keys import EVENTS
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer
from support.workers import SHARDS, Table, write


def node_with(table: Table, server: ValkeyServer, namespace: str, **workers: Any) -> forebay.Node:
    limits: dict[str, Any] = {"ownership_ttl_ms": 2_000, "beat_ms": 200, "flush_delay_ms": 5}
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=SHARDS),
            valkey=Valkey(url=server.socket_url),
            workers=Workers(**limits | workers),
        )
    )
    node.sink("flight:{id}", table)
    return node


def publish(server: ValkeyServer, namespace: str, *events: bytes) -> None:
    for raw in events:
        server.execute("XADD", f"forebay:{namespace}:events", "*", "event", raw)


async def test_the_last_worker_empties_the_queues(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """K2: what ingress had taken is in the sink when the node has stopped."""
    table = Table()
    node = node_with(table, valkey_server, namespace, flush_rows_max=2)
    publish(valkey_server, namespace, *[write(f"flight:{n}", n) for n in range(300)])
    async with node:
        await until(lambda: len(table.rows) > 0)
    assert node.drained is True
    taken = node._instruments.counts["events_processed", "write", "applied"]
    assert len(table.rows) == taken > 0
    assert table.closed == 1


async def test_a_drain_takes_nothing_new_while_it_empties(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """K2: publishers go on, but ingress was given up first, for good; so the drain ends."""
    table = Table()
    table.hang_at = 1
    node = node_with(table, valkey_server, namespace)
    async with anyio.create_task_group() as tasks:

        async def go_on_publishing() -> None:
            for n in itertools.count():
                publish(valkey_server, namespace, write(f"flight:{n}", n))
                await anyio.sleep(0.005)

        async with node:
            tasks.start_soon(go_on_publishing)
            await table.hanging.wait()
            crew = node._parts.crew
            assert crew is not None
            tasks.start_soon(node.drain)
            await until(lambda: EVENTS not in crew.ownership.tenures)
            await anyio.sleep(1.0)  # some beats, which must not take it again
            assert EVENTS not in crew.ownership.tenures
            table.go_on.set()
        assert node.drained is True
        tasks.cancel_scope.cancel()
    assert len(table.rows) == node._instruments.counts["events_processed", "write", "applied"]


async def test_one_of_several_leaves_its_work_to_the_others(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """K2: its shards are free at once, and nothing is lost on the way."""
    table = Table()
    first, second = (node_with(table, valkey_server, namespace) for _ in range(2))
    numbers = itertools.count()
    async with second, anyio.create_task_group() as tasks:

        async def go_on_publishing() -> None:
            while True:
                n = next(numbers)
                publish(valkey_server, namespace, write(f"flight:{n % 50}", n))
                await anyio.sleep(0.002)

        async with first:
            tasks.start_soon(go_on_publishing)
            crew = first._parts.crew
            assert crew is not None
            await until(lambda: len(crew.ownership.tenures) > 1)
            await until(lambda: len(table.rows) == 50)
        assert first.drained is True
        other = second._parts.crew
        assert other is not None
        await until(lambda: len(other.ownership.tenures) == SHARDS + 1)
        tasks.cancel_scope.cancel()
    last = next(numbers) - 1
    async with node_with(table, valkey_server, namespace) as node:

        async def all_done() -> bool:
            stats: Any = await node.stats()
            return stats["backlog"] == {"events": 0, "writes": 0}

        await until(all_done)
    assert table.rows[f"flight:{last % 50}"][1] == last
    history: dict[str, int] = {}
    for each in table.stored:
        assert history.get(each.key, 0) < each.version
        history[each.key] = each.version


async def test_a_drain_ends_in_time_though_the_sink_is_away(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """K2: it says that it was not enough, and the next worker finds what is left."""
    table = Table()
    table.faults = [TransientSinkError("away")] * 10_000
    node = node_with(table, valkey_server, namespace, drain_ms=1_000, ownership_ttl_ms=60_000)
    publish(valkey_server, namespace, write("flight:1", 1))
    async with node:
        await until(lambda: len(table.batches) > 0)
        with anyio.fail_after(3):
            assert await node.drain() is False
    assert node.drained is False
    table.faults.clear()
    async with node_with(table, valkey_server, namespace):  # it need not wait for a lease to end
        await until(lambda: table.values() == {"flight:1": 1})


async def test_a_sink_that_is_stopped_shows_in_the_checks(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """Loudly: a warning with the reason, while everything else is well."""
    table = Table()
    table.faults = [FatalSinkError("no such table: flights")]
    node = node_with(table, valkey_server, namespace, drain_ms=300)
    publish(valkey_server, namespace, write("flight:1", 1))
    async with node:

        def shown() -> list[str]:
            return [each.detail for each in node.checks() if each.name == "sink table"]

        await until(lambda: "no such table: flights" in shown()[0])
        await until(lambda: not any(each.state == "fail" for each in node.checks()))


@pytest.mark.parametrize("command_timeout_ms", [100, 400])
async def test_a_short_command_timeout_does_not_cut_off_ingress(
    valkey_server: ValkeyServer, namespace: str, command_timeout_ms: int
) -> None:
    """Reading blocks for less time than its connection takes for silence."""
    table = Table()
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=SHARDS),
            valkey=Valkey(url=valkey_server.socket_url, command_timeout_ms=command_timeout_ms),
        )
    )
    node.sink("flight:{id}", table)
    async with node:
        crew = node._parts.crew
        assert crew is not None
        blocking: Any = crew.ingress._blocking
        await anyio.sleep(1.5)
        # Cut off at every read it would be some ten; 0.2 s of silence may be a busy machine's.
        assert blocking.connects <= (2 if command_timeout_ms == 100 else 1)
        publish(valkey_server, namespace, write("flight:1", 1))
        await until(lambda: table.values() == {"flight:1": 1})

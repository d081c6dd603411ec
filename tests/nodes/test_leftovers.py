"""Work that a node leaves undone when it stops, and its report: nodes/leftovers.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

import forebay
from forebay.nodes.leftovers import DrainOutcome, Leftovers, left_of
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until, wait_until
from support.node_process import NodeProcess, Shop
from support.valkey_server import ValkeyServer
from support.workers import SHARDS, Table, write

COUNT = 200
Logged = Callable[[], Sequence[Any]]


@pytest.fixture
def logged() -> Iterator[Logged]:
    """Log lines that report leftovers."""
    with capture_logs() as lines:
        yield lambda: [each for each in lines if each["event"] == "node.undrained"]


def failing(namespace: str, table: Table, valkey: Valkey, **workers: Any) -> Any:
    """A node and its cache, with a sink that is away."""
    options: dict[str, Any] = {"drain_ms": 500, "beat_ms": 200} | workers
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=SHARDS),
            valkey=valkey,
            workers=Workers(**options),
        )
    )

    @node.cached("flight:{id}", ttl=60)
    async def flight(id: int) -> int | None:
        return None

    node.sink("flight:{id}", table)
    return node, flight


def away() -> Table:
    table = Table()
    table.faults = [forebay.TransientSinkError("away")] * 100_000
    return table


async def write_all(node: forebay.Node, flight: Any) -> None:
    async with node:
        for number in range(COUNT):
            await flight.write_behind(number, number)


async def test_writes_that_end_with_an_embedded_server_are_told_as_lost(
    namespace: str, tmp_path: Path, logged: Logged
) -> None:
    """An error line with the count, nothing is raised; with a directory they are not lost."""
    await write_all(*failing(namespace, away(), Valkey()))
    (line,) = logged()
    assert (line["log_level"], line["count"], line["outcome"]) == ("error", COUNT, "lost")
    directory = Valkey(embedded_dir=str(tmp_path / "data"))
    node, flight = failing(namespace, away(), directory)
    await write_all(node, flight)
    assert node.drained is False
    assert (logged()[1]["count"], logged()[1]["outcome"]) == (COUNT, "left to others")
    table = Table()
    node, _ = failing(namespace, table, directory, drain_ms=20_000)
    async with node:
        pass
    assert node.drained is True
    assert len(table.rows) == COUNT
    assert len(logged()) == 2


async def test_a_node_without_workers_tells_what_is_lost_with_its_server(
    namespace: str, logged: Logged
) -> None:
    """No worker brings its writes to the sink; on an external server others may."""
    node, flight = failing(namespace, away(), Valkey(), enabled=False)
    await write_all(node, flight)
    assert node.drained is False
    assert [(each["writes"], each["outcome"]) for each in logged()] == [(COUNT, "lost")]


async def test_what_other_workers_do_is_not_told(
    valkey_server: ValkeyServer, namespace: str, logged: Logged
) -> None:
    """One of two leaves, while the sink is away for both."""
    valkey = Valkey(url=valkey_server.socket_url)
    (first, _), (second, _) = (failing(namespace, away(), valkey) for _ in range(2))
    async with second:
        async with first:
            crew = first._parts.crew
            await until(lambda: len(crew.ownership.nodes) == 2)
        assert first.drained is True
        assert logged() == []
        async with failing(namespace, away(), valkey, enabled=False)[0] as writer:
            await writer.publish([write("flight:1", 1).decode()])
    assert second.drained is False
    assert [(each["count"], each["outcome"]) for each in logged()] == [(1, "left to others")]


async def test_a_waiter_for_the_sink_is_not_told_of_a_write_that_is_held(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """NodeWrites P1: the checkpoint has passed it, and no sink has it."""
    node, flight = failing(namespace, away(), Valkey(url=valkey_server.socket_url), enabled=False)
    async with node:
        receipt = await flight.write_behind(1, 1)
        part = node._parts.names.part
        link = node._parts.backend.link
        await link.call("HSET", part(receipt.shard, "done"), "writes:table", receipt.job_id)
        held = part(receipt.shard, "held")
        await link.call("XADD", held, "*", "v", 1, "j", b"", "f", receipt.job_id)
        writing = node._parts.writing
        history = writing.history
        terms: dict[str, Any] = {"history": history, "sink": "table", "timeout_ms": 300}
        with pytest.raises(forebay.Unconfirmed):
            await writing.confirm("flight:1", receipt, "sink", **terms)
        await link.call("DEL", held)
        found = await writing.confirm("flight:1", receipt, "sink", **terms)
        assert found.reached == "sink"


@pytest.fixture
def shop(valkey_server: ValkeyServer, tmp_path: Path, namespace: str) -> Iterator[Shop]:
    quick = {"workers__ownership_ttl_ms": 2_000, "workers__beat_ms": 200}
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url, **quick) as shop:
        yield shop


def fill(server: ValkeyServer, shop: Shop, count: int) -> None:
    for number in range(count):
        value = {"id": number, "price": 1}
        server.execute("XADD", shop.stream, "*", "event", write(f"product:{number}", value))


def left(node: NodeProcess) -> dict[str, Any]:
    lines = [line for line in node.said().splitlines() if '"node.undrained"' in line]
    return msgspec.json.decode(lines[0]) if lines else {}


def test_the_last_worker_applies_all_events_before_it_ends(
    valkey_server: ValkeyServer, shop: Shop
) -> None:
    """K2: events published before the signal are in the sink, and the exit code is 0."""
    node = shop.node().start()
    fill(valkey_server, shop, 3_000)
    assert node.stop() == 0
    assert len(shop.stored()) == 3_000
    assert valkey_server.execute("XLEN", shop.stream) == 0
    assert left(node) == {}


def test_events_that_are_left_unapplied_are_counted_and_exit_4(
    valkey_server: ValkeyServer, shop: Shop
) -> None:
    """The drain had no time for them: it does not say that it was finished."""
    node = shop.node(sink="hang", workers__drain_ms=500, durable__writes_max=1).start()
    fill(valkey_server, shop, 1_000)
    wait_until(lambda: shop.sink_reached, what="a write in the sink")
    assert node.stop() == 4
    said = left(node)
    assert said["outcome"] == "left to others"
    assert said["events"] == valkey_server.execute("XLEN", shop.stream) > 0


def test_what_counts_as_left_undone() -> None:
    """L3: not the work of others, nor later work, unless the server ends with the node."""
    found = Leftovers(events=1, writes=2, held=4)
    done = DrainOutcome(finished=True, events_done=True, writes_done=True, held_done=True)
    assert left_of(found, done, is_temporary=False).count == 0
    assert left_of(found, done, is_temporary=True).count == 7
    alone = DrainOutcome(finished=True, events_done=True, writes_done=True, held_done=False)
    assert left_of(found, alone, is_temporary=False) == Leftovers(held=4)
    late = DrainOutcome(finished=False, events_done=False, writes_done=False, held_done=False)
    assert left_of(found, late, is_temporary=False) == found

"""A real node under a real Prometheus."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.eventually import wait_until
from support.node_process import NodeProcess, Shop
from support.programs import tool
from support.prometheus import prometheus_on, query
from support.valkey_server import ValkeyServer

SERIES_MAX = 500
WRITES = 20


@pytest.fixture(scope="module")
def node(
    valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """A node that has done some of everything."""
    directory = tmp_path_factory.mktemp("prometheus")
    with Shop(directory, f"prom-{directory.name}", valkey__url=valkey_server.url) as shop:
        node = shop.node().start()
        writes = [
            {"type": "write", "key": f"product:{number}", "value": {"id": number, "price": 1}}
            for number in range(WRITES)
        ]
        others = [
            {"type": "invalidate", "keys": ["product:1"], "tags": ["catalog"]},
            {"type": "refresh", "keys": ["product:2"]},
        ]
        assert node.post(*writes, *others).status == 202
        assert node.post({"type": "juggle"}).status == 422
        valkey_server.execute("XADD", shop.stream, "*", "event", "no event")
        wait_until(lambda: len(shop.stored()) == WRITES, what="the writes in the sink")
        for key in ("product:1", "product:1", "product:999", "broken:1", "nobodys:1"):
            node.get(f"/v1/cache/{key}")
        wait_until(lambda: node.stats()["dead_letters"] == 1, what="the dead letter")
        yield node


def test_metrics_of_a_node_pass_promtool(node: NodeProcess) -> None:
    """Names, types, help and values are as the linter of Prometheus wants them."""
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=node.get("/metrics").body,
        capture_output=True,
        timeout=30,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_node_has_few_series(node: NodeProcess) -> None:
    """With two caches and a sink, all at work, far fewer than 500."""
    lines = node.get("/metrics").body.decode().splitlines()
    series = [line for line in lines if line and not line.startswith("#")]

    assert 100 < len(series) < SERIES_MAX


def test_counters_tell_what_was_done(node: NodeProcess) -> None:
    """What was published to this node, and applied by it, is what it counted."""
    families = text_string_to_metric_families(node.get("/metrics").body.decode())
    values = {
        (sample.name.removeprefix("forebay_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }

    assert values["events_published_total", "write"] == WRITES
    assert values["events_processed_total", "applied", "write"] == WRITES
    assert values["events_processed_total", "applied", "invalidate"] == 1
    assert values["events_processed_total", "dead", "unknown"] == 1
    assert values["dead_letters_total", "undecodable"] == 1
    assert values["writebehind_rows_total", "stored", "save"] == WRITES
    assert values["cache_requests_total", "broken", "error", "source"] == 1
    assert values["owned_shards",] == 64
    assert values["backend_up",] == 1
    assert values["log_suspect_shards",] == 0


@pytest.mark.slow
async def test_prometheus_scrapes_a_node(
    node: NodeProcess, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With the shipped configuration: up is 1, and the processed events are there."""
    target, directory = f"{node.host}:{node.port}", tmp_path_factory.mktemp("prometheusd")
    async with prometheus_on(target, directory) as session:
        with anyio.fail_after(40):
            while await query(session, 'up{job="forebay"}') is None:
                await anyio.sleep(0.05)

        assert await query(session, 'up{job="forebay"}') == 1
        processed = await query(session, "sum(forebay_events_processed_total)")
        assert processed is not None
        assert processed > WRITES
        assert await query(session, "forebay_backend_up") == 1

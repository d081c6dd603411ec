"""The series of a node: from its start it exports every series that can occur, and no other."""

from __future__ import annotations

import ast
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

import forebay
from forebay.coordinator.catalogue import CATALOGUE, Instrument
from forebay.coordinator.instruments import PREFIX
from forebay.coordinator.log.follower import ResetReason
from forebay.nodes.workers.delivery import Outage
from forebay.schemas.settings import Http, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.programs import tool
from support.valkey_server import ValkeyServer

PATIENCE_S = 40.0
SERIES_MAX = 900
CACHES = [f"cache{number}" for number in range(10)]
SINKS = ["orders", "products"]  #: of the first two caches
LEGACY = "cache9"  #: it takes over entries of another service
LIMITS = ["api", "login"]
Series = set[tuple[str, tuple[str, ...]]]


def declare(node: forebay.Node) -> None:
    for name in CACHES:
        old = f"old:{name}:{{id}}" if name == LEGACY else ""

        @node.cached(name + ":{id}", ttl=60, name=name, legacy_key=old)
        async def cached(id: int) -> int:
            return id

    @node.sink("cache0:{id}")
    async def orders(writes: list[forebay.Write[int]]) -> None:
        """Accept the writes."""

    @node.sink("cache1:{id}")
    async def products(writes: list[forebay.Write[int]]) -> None:
        """Accept the writes."""

    for limit in LIMITS:
        node.limit(limit, rate=10)


class Cluster:
    """A node with ten caches, two sinks and two limits that knows three other nodes."""

    def __init__(self, node: forebay.Node, others: Sequence[forebay.Node], url: str) -> None:
        self.node = node
        self.others = others
        self.url = url

    async def text(self) -> str:
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{self.url}/metrics") as response,
        ):
            assert response.status == 200
            return await response.text()


@pytest.fixture
async def cluster(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[Cluster]:
    def make() -> forebay.Node:
        settings = Settings(
            node=NodeSettings(namespace=namespace, shards=4),
            valkey=Valkey(url=valkey_server.socket_url),
            http=Http(port=0),
            workers=Workers(beat_ms=100),
        )
        node = forebay.Node(settings=settings)
        declare(node)
        return node

    node, *others = [make() for _ in range(4)]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(node)
        crew = node._parts.crew
        assert crew is not None
        await until(lambda: crew.leader_metrics.leading)
        for other in others:
            await stack.enter_async_context(other)
        await until(lambda: crew.ownership.members().get("active") == 4)
        yield Cluster(node, others, await stack.enter_async_context(node.serving()))


def exposed(text: str) -> Series:
    """Series by the metric's name and its label values, without buckets."""
    found: Series = set()
    for family in text_string_to_metric_families(text):
        suffix = "_total" if family.type == "counter" else ""
        name = family.name + suffix
        for sample in family.samples:
            labels = {label: v for label, v in sample.labels.items() if label != "le"}
            found.add((name.removeprefix(PREFIX), values(name.removeprefix(PREFIX), labels)))
    return found


def values(name: str, labels: Mapping[str, str]) -> tuple[str, ...]:
    known = {each.name: each.labels for each in CATALOGUE}
    return tuple(labels[label] for label in known.get(name, sorted(labels)))


def can_occur(routes: Sequence[str]) -> Series:
    """All series of the catalogue for the declarations of this test."""
    breakers = ["valkey", *(f"loader {name}" for name in CACHES)]
    names: Mapping[str, Sequence[str]] = {
        "cache": CACHES,
        "sink": SINKS,
        "limit": [*LIMITS, "default"],
        "route": [*routes, "unmatched", "malformed"],
        "breaker": breakers,
        "legacy": [LEGACY],
        "version": [forebay.__version__],
    }
    return {
        (each.name, (*first, *rest))
        for each in CATALOGUE
        for first in ([(name,) for name in names[each.owner]] if each.owner else [()])
        for rest in each.series
        if _possible(each, (*first, *rest))
    }


def _possible(each: Instrument, labels: tuple[str, ...]) -> bool:
    if each.name == "writes_total":  # only caches with a sink write to one
        return labels[0] in ("cache0", "cache1") or labels[1] == "put"
    if each.name == "http_requests_total":
        return labels[0] not in ("unmatched", "malformed") or labels[1] != "2xx"
    return True


async def test_every_series_exists_before_its_first_event(cluster: Cluster) -> None:
    """Each family of the catalogue is exported before any read, write, event or refusal."""
    async with aiohttp.ClientSession() as client, client.get(f"{cluster.url}/") as response:
        routes = ["/", *{each["path"] for each in (await response.json())["routes"]}]
    text = await cluster.text()
    found, expected = exposed(text), can_occur(routes)

    process = {series for series in found if series[0].startswith("process_")}
    assert sorted(expected - found) == []
    assert sorted(found - process - expected) == []
    assert {name for name, _ in found} - {name for name, _ in process} == {
        each.name for each in CATALOGUE
    }


async def test_a_node_has_at_most_900_series(cluster: Cluster) -> None:
    """Ten caches, two sinks, two limits, three known nodes; buckets and process included."""
    samples = [line for line in (await cluster.text()).splitlines() if line[0] != "#"]

    assert len(samples) <= SERIES_MAX


async def test_promtool_accepts_what_a_node_exports(cluster: Cluster) -> None:
    """Names, types, help and values, with those of the process."""
    text = await cluster.text()
    done = await anyio.run_process(
        [tool("promtool"), "check", "metrics"], input=text.encode(), check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_the_process_is_measured(cluster: Cluster) -> None:
    """CPU, memory, descriptors and the start time, under their usual names."""
    value = cluster.node.registry.get_sample_value
    names = ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds")

    assert all((value(f"process_{name}") or 0) > 0 for name in names)
    assert (value("process_start_time_seconds") or 0) > 1_000_000_000


async def test_ready_draining_and_the_event_loop(cluster: Cluster) -> None:
    """The gauges are 1 while their state holds; the delay is the maximum of 15 seconds."""
    value = cluster.node.registry.get_sample_value
    await until(lambda: value("forebay_ready") == 1)
    assert value("forebay_draining") == 0
    await cluster.node.drain()
    assert (value("forebay_ready"), value("forebay_draining")) == (0, 1)


def state_of(node: forebay.Node, metric: str, **labels: str) -> list[str]:
    """The states of a state set that are 1."""
    samples = [each for family in node.registry.collect() for each in family.samples]
    return [
        each.labels["state"]
        for each in samples
        if each.name == f"forebay_{metric}" and labels.items() <= each.labels.items() and each.value
    ]


async def test_breakers_and_sinks_tell_their_state_by_name(cluster: Cluster) -> None:
    """S7: each state set has one state; a failing loader and a stopped sink are distinguished."""
    node = cluster.node
    crew = node._parts.crew
    assert crew is not None
    node.caches[3]._cache.path.loads.source.breaker.trip()
    crew.deliveries["orders"].paused = Outage(0.0, 1, "away")
    crew.deliveries["orders"].stopped = "no such table"
    crew.deliveries["products"].paused = Outage(0.0, 1, "away")

    names = ["valkey", "loader cache3", "loader cache4"]
    states = [state_of(node, "breaker_state", name=name) for name in names]
    assert states == [["closed"], ["open"], ["closed"]]
    assert state_of(node, "sink_state", sink="orders") == ["stopped"]
    assert state_of(node, "sink_state", sink="products") == ["paused"]
    crew.deliveries["orders"].paused = None
    assert state_of(node, "sink_state", sink="orders") == ["running"]


async def test_fill_levels_have_their_bounds_beside_them(cluster: Cluster) -> None:
    """C3: a fill level and its bound have the same labels, so that their ratio is the usage."""
    node, (cached, *_) = cluster.node, cluster.node.caches
    await cached.many(range(50))
    samples = {
        (each.name, *sorted(each.labels.items())): each.value
        for family in node.registry.collect()
        for each in family.samples
    }
    filled = {
        series: (samples[name.removesuffix("_max"), *rest], bound)
        for series, bound in samples.items()
        for name, *rest in [series]
        if name.startswith("forebay_") and name.endswith("_max")
    }
    assert len({series[0] for series in filled}) == 10
    assert all(0 <= level <= bound for level, bound in filled.values()), filled
    assert filled["forebay_cache_entries_max", ("cache", "cache0")][0] == 50


async def test_each_node_measures_the_time_from_publishing_to_applying(cluster: Cluster) -> None:
    """Each notice of an event is one sample on every node; calls of a node make none."""
    nodes = [cluster.node, *cluster.others]
    name = "forebay_event_propagation_seconds"
    await cluster.node.invalidate(["cache0:7"], tags=["t"])
    await cluster.node.publish(
        [
            {"type": "invalidate", "keys": ["cache0:1"]},
            {"type": "invalidate", "tags": ["t"]},
            {"type": "write", "key": "cache1:2", "value": 3},
        ]
    )
    for node in nodes:
        value = node.registry.get_sample_value
        await until(lambda value=value: value(f"{name}_count") == 3)  # type: ignore[misc]
        seconds = value(f"{name}_sum")
        assert seconds is not None
        assert 0 <= seconds < 3 * PATIENCE_S


async def test_what_a_node_changes_itself_is_counted_apart_from_events(cluster: Cluster) -> None:
    """POST and publish are events; an invalidation and a write-behind by a call are not."""
    node, other = cluster.node, cluster.others[0]
    (first, second) = [each for each in node.caches if each.name in ("cache0", "cache1")]
    await node.publish([{"type": "invalidate", "keys": ["cache0:1"]}])
    async with aiohttp.ClientSession() as client:
        event = {"type": "invalidate", "keys": ["cache0:2"]}
        async with client.post(f"{cluster.url}/v1/events", json=event) as response:
            assert response.status == 202
        async with client.post(f"{cluster.url}/v1/events", json={"type": "juggle"}) as response:
            assert response.status == 422
    await node.invalidate(["cache0:1", "cache0:2"], tags=["all"])
    await first.invalidate(3)
    await second.write_behind(4, 5)

    counts, written = node._instruments.counts, ("writes", "cache1", "behind", "stored")
    published = {key[1]: n for key, n in counts.items() if key[0] == "events_published" and n}
    assert published == {"invalidate": 2}
    assert (counts["invalidations", "key"], counts["invalidations", "tag"]) == (3, 1)
    assert counts[written] == 1
    crews = [node, *cluster.others]
    await until(
        lambda: (
            sum(n._instruments.counts["events_processed", "invalidate", "applied"] for n in crews)
            == 2
        )
    )
    assert other._instruments.counts["events_published", "invalidate"] == 0


def test_gaps_are_those_of_the_follower() -> None:
    """The catalogue lists each reason that ``coordinator.log`` counts."""
    (gaps,) = [each for each in CATALOGUE if each.name == "log_gaps_total"]

    assert {labels[0] for labels in gaps.series} == set(ResetReason.__args__)  # type: ignore[attr-defined]


def counted_in_code() -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Every metric that the code counts or yields, with its literal label values."""
    package = Path(forebay.__file__).parent
    for folder in ("coordinator", "nodes"):
        for path in (package / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Subscript) and _name_of(node.value).endswith("counts"):
                    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
                    yield from _literal(parts)
                elif isinstance(node, ast.Call) and _name_of(node.func) == "observe":
                    yield from _literal(node.args[:1])
                elif isinstance(node, ast.Call) and _name_of(node.func) in _REACHED:
                    bounds = [text for text in map(_text, node.args) if text is not None]
                    yield from (("limit_reached", (bound,)) for bound in bounds)


_REACHED = {"limit_reached", "reached", "_full"}


def _name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _literal(parts: Sequence[ast.expr]) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    if parts and (name := _text(parts[0])) is not None:
        yield name, tuple(_text(part) for part in parts[1:])


def test_what_the_code_counts_is_in_the_catalogue() -> None:
    """Literal labels in the code are combinations of the catalogue."""
    known = {each.short: each for each in CATALOGUE}
    counted = list(counted_in_code())
    assert len(counted) > 60

    for name, labels in counted:
        each = known[name]
        listed = labels[1:] if each.owner else labels
        assert each.buckets or any(
            all(said in (None, value) for said, value in zip(listed, series, strict=True))
            for series in each.series
        ), (name, labels)


def test_every_counter_and_histogram_of_the_catalogue_is_counted() -> None:
    """The code counts every family of the catalogue."""
    counted = {name for name, _ in counted_in_code()}
    expected = {each.short for each in CATALOGUE if each.kind != "gauge"}
    by_variable = {"limiter_shadow_refused", "limiter_returned"}  # Desk.count

    assert expected - counted - by_variable == set()

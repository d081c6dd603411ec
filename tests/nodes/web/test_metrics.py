"""/metrics: the format, the number of series, and a real Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import anyio
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from forebay.coordinator.catalogue import CATALOGUE
from forebay.coordinator.instruments import PREFIX, SERIES_MAX, Instruments
from support.prometheus import prometheus_on, query

if TYPE_CHECKING:
    from forebay.nodes.web.server import EndpointAddress
    from tests.nodes.web.conftest import FakeNode

NAMES = {
    "cache": "product",
    "legacy": "product",
    "sink": "save",
    "limit": "api",
    "route": "/v1/events",
}


def count_everything(instruments: Instruments) -> None:
    """Count every possible series of one cache, sink, limit and route."""
    for owner, name in NAMES.items():
        instruments.declare(owner, name)  # type: ignore[arg-type]
    instruments.add_source(gauges)


def gauges() -> Iterator[tuple[str, tuple[str, ...], float]]:
    for each in CATALOGUE:
        for labels in each.series if each.kind == "gauge" else ():
            yield (
                each.name,
                (NAMES.get(each.owner, "other"), *labels) if each.owner else labels,
                1.0,
            )


async def scrape(client: aiohttp.ClientSession, accept: str = "text/plain") -> str:
    async with client.get("/metrics", headers={"Accept": accept}) as response:
        assert response.status == 200
        return await response.text()


async def test_what_is_exported_is_the_catalogue(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """I1: every name of the catalogue is exported, with its help and type, and no other."""
    count_everything(fake_node.instruments)
    families = list(text_string_to_metric_families(await scrape(client)))

    assert {each.name: each.type for each in families} == {
        PREFIX + each.short: each.kind for each in CATALOGUE
    }
    assert not [f.name for f in families if not f.samples]
    assert not [s for f in families for s in f.samples if s.name.endswith("_created")]


async def test_promtool_finds_nothing_to_complain_of(
    client: aiohttp.ClientSession, fake_node: FakeNode, tool: Callable[[str], str]
) -> None:
    """The linter of Prometheus accepts names, types and help of everything exported."""
    count_everything(fake_node.instruments)
    text = await scrape(client)
    done = await anyio.run_process(
        [tool("promtool"), "check", "metrics"], input=text.encode(), check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_the_scraper_chooses_the_format(client: aiohttp.ClientSession) -> None:
    """S5: the answer is OpenMetrics if the scraper accepts it, and plain text otherwise."""
    openmetrics = await scrape(client, "application/openmetrics-text; version=1.0.0")
    plain = await scrape(client)

    assert openmetrics.endswith("# EOF\n")
    assert "# EOF" not in plain
    assert "forebay_events_processed_total{" in plain


@pytest.mark.parametrize(
    "key",
    [
        ("nothing",),
        ("events_processed", "write"),
        ("events_processed", "write", "lost"),
        ("events_processed", "write", "applied", "more"),
        ("backend_up",),
        ("loader_seconds", "product"),
        ("cache_requests", "product", "near", "miss"),
    ],
)
def test_a_series_that_is_not_in_the_catalogue_is_an_error(key: tuple[str, ...]) -> None:
    """I1: a wrong name, number of labels or label value is found at its first use."""
    counts = Instruments(CollectorRegistry()).counts
    with pytest.raises(AssertionError):
        counts[key] += 1
    assert key not in counts


def test_a_wrong_histogram_or_gauge_is_an_error() -> None:
    """I1 holds for durations and for gauges too."""
    registry = CollectorRegistry()
    instruments = Instruments(registry)
    with pytest.raises(AssertionError):
        instruments.observe("event_delay_seconds", 1.0, "product:1")
    instruments.add_source(lambda: [("events_processed", (), 1.0)])
    with pytest.raises(AssertionError):
        list(registry.collect())


def test_more_labels_than_allowed_become_other() -> None:
    """I2: the number of series has a bound, and no count is lost at it."""
    registry = CollectorRegistry()
    instruments = Instruments(registry)
    for number in range(SERIES_MAX + 500):
        instruments.counts["fills_refused", f"cache-{number}"] += 2
        instruments.observe("loader_seconds", 0.01, f"cache-{number}")

    families = {each.name: each.samples for each in registry.collect()}
    refused, loads = families["forebay_fills_refused"], families["forebay_loader_seconds"]
    counts = [each for each in loads if each.name.endswith("_count")]
    assert (len(refused), len(counts)) == (SERIES_MAX, SERIES_MAX)
    assert sum(each.value for each in refused) == 2 * (SERIES_MAX + 500)
    assert sum(each.value for each in counts) == SERIES_MAX + 500
    assert counts[-1].labels == {"cache": "other"}


def test_what_is_declared_again_keeps_its_counts() -> None:
    """I3: a node that starts a second time continues its counts."""
    registry = CollectorRegistry()
    instruments = Instruments(registry)
    for _ in range(2):
        instruments.declare("cache", "product", {"way": ("put",)})
        instruments.counts["writes", "product", "put", "stored"] += 1
        instruments.observe("loader_seconds", 0.01, "product")

    stored = {"cache": "product", "way": "put", "result": "stored"}
    assert registry.get_sample_value("forebay_writes_total", stored) == 2
    assert registry.get_sample_value("forebay_loader_seconds_count", {"cache": "product"}) == 2
    behind = {"cache": "product", "way": "behind", "result": "stored"}
    assert registry.get_sample_value("forebay_writes_total", behind) is None


def test_a_histogram_counts_a_bound_into_its_own_bucket() -> None:
    """Buckets are cumulative and include their bound; the last holds everything."""
    registry = CollectorRegistry()
    instruments = Instruments(registry)
    for seconds in (0.0005, 0.0006, 10.0, 11.0):
        instruments.observe("event_delay_seconds", seconds, "write")

    def bucket(le: str) -> float | None:
        labels = {"type": "write", "le": le}
        return registry.get_sample_value("forebay_event_delay_seconds_bucket", labels)

    total = registry.get_sample_value("forebay_event_delay_seconds_sum", {"type": "write"})
    assert [bucket(le) for le in ("0.0005", "0.001", "10.0", "+Inf")] == [1, 2, 3, 4]
    assert total == pytest.approx(21.0011)


@pytest.fixture
async def target(endpoint: EndpointAddress, fake_node: FakeNode) -> str:
    """host:port of an endpoint that counted three writes."""
    fake_node.instruments.counts["events_processed", "write", "applied"] += 3
    return f"{endpoint.host}:{endpoint.port}"


@pytest.fixture
async def prometheus(target: str, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a real Prometheus that runs with our configuration on this target."""
    async with prometheus_on(target, tmp_path) as session:
        yield session


@pytest.mark.slow
async def test_a_real_prometheus_scrapes_us(prometheus: aiohttp.ClientSession) -> None:
    """With the shipped configuration the target is up, and its event counters arrive."""
    with anyio.fail_after(40):
        while await query(prometheus, 'up{job="forebay"}') is None:
            await anyio.sleep(0.1)

    assert await query(prometheus, 'up{job="forebay"}') == 1
    processed = 'forebay_events_processed_total{type="write",result="applied"}'
    assert await query(prometheus, processed) == 3

"""/metrics: the format, the number of series, and a real Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import anyio
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from forebay.coordinator.instruments import CATALOGUE, PREFIX, SERIES_MAX, Instruments
from prometheusd import prometheus_on, query

if TYPE_CHECKING:
    from forebay.nodes.web.server import Address
    from tests.nodes.web.conftest import Station

CACHES = [f"cache-{number}" for number in range(10)]
TIERS = {
    "near": ("hit", "stale", "miss"),
    "shared": ("hit", "stale", "miss", "negative"),
    "source": ("hit", "error"),
}


def work_hard(instruments: Instruments) -> None:
    """What a node with ten caches and two sinks has counted after a bad day."""
    counts = instruments.counts
    for cache in CACHES:
        for tier, results in TIERS.items():
            for result in results:
                counts["cache_requests", cache, tier, result] += 1
        counts["cache_evictions", cache, "size"] += 1
        counts["fills_refused", cache] += 1
        instruments.observe("loader_seconds", 0.02, cache, "ok")
        counts["writes", cache, "through", "stored"] += 1
    for cache in CACHES[:3]:
        instruments.observe("loader_seconds", 0.02, cache, "error")
        counts["cache_decode_errors", cache, "bad_magic"] += 1
    for kind in ("invalidate", "write", "refresh"):
        instruments.observe("event_delay_seconds", 0.001, kind)
        instruments.observe("event_processing_seconds", 0.001, kind)
    for limit in ("api", "login"):
        for source, result in (("server", "allowed"), ("server", "refused"), ("lease", "allowed")):
            counts["limiter_decisions", limit, source, result] += 1
        counts["limiter_shadow_refused", limit] += 1
        counts["limiter_returned", limit] += 1
    for sink, result in product(("products", "orders"), ("ok", "error")):
        instruments.observe("writebehind_flush_seconds", 0.1, sink, result)
        counts["writebehind_rows", sink, result] += 1
    for reason in ("undecodable", "oversized", "unknown_type", "wrong_field", "sink_refused"):
        counts["dead_letters", reason] += 1
    instruments.observe("lock_wait_seconds", 0.01)
    counts["backend_reconnects", "link"] += 1
    for code in ("200", "202", "400", "413", "422", "429", "503"):
        counts["http_requests", "/v1/events", code] += 1
        counts["http_requests", "/v1/cache/{key}", code] += 1
    for name in ("log_gaps", "refreshes", "limit_reached", "ownership_changes"):
        for label in ("one", "two", "three"):
            counts[name, label] += 1
    instruments.add_source(gauges)


def gauges() -> Iterator[tuple[str, tuple[str, ...], float]]:
    for cache in CACHES:
        yield "cache_entries", (cache,), 1.0
        yield "cache_size_bytes", (cache,), 1.0
    for limit in ("api", "login"):
        yield "limiter_leased_tokens", (limit,), 1.0
    for stream in ("events", "writes", "refreshes"):
        yield "stream_lag_events", (stream,), 1.0
        yield "stream_oldest_undelivered_age_seconds", (stream,), 1.0
        yield "work_oldest_age_seconds", (stream,), 1.0
    for sink in ("products", "orders"):
        yield "sink_paused_seconds", (sink,), 1.0
        yield "sink_locked_rows", (sink,), 1.0
    for state in ("closed", "open", "half_open"):
        yield "breaker_state", ("link", state), 0.0
    for state in ("active", "suspect", "leaving", "away"):
        yield "members", (state,), 1.0
    for each in CATALOGUE:
        if each.kind == "gauge" and not each.labels:
            yield each.name, (), 1.0


async def scrape(client: aiohttp.ClientSession, accept: str = "text/plain") -> str:
    async with client.get("/metrics", headers={"Accept": accept}) as response:
        assert response.status == 200
        return await response.text()


async def test_what_is_exported_is_the_catalogue(
    client: aiohttp.ClientSession, station: Station
) -> None:
    """I1: every name of the catalogue is exported, with its help and type, and no other."""
    work_hard(station.instruments)
    families = list(text_string_to_metric_families(await scrape(client)))

    assert {each.name: each.type for each in families} == {
        PREFIX + each.short: each.kind for each in CATALOGUE
    }
    assert not [f.name for f in families if not f.samples]
    assert not [s for f in families for s in f.samples if s.name.endswith("_created")]


async def test_promtool_finds_nothing_to_complain_of(
    client: aiohttp.ClientSession, station: Station, tool: Callable[[str], str]
) -> None:
    """The linter of Prometheus accepts names, types and help of everything exported."""
    work_hard(station.instruments)
    text = await scrape(client)
    done = await anyio.run_process(
        [tool("promtool"), "check", "metrics"], input=text.encode(), check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_a_busy_node_has_fewer_than_600_series(
    client: aiohttp.ClientSession, station: Station
) -> None:
    """Ten caches, two sinks and most of what can go wrong still fit one small scrape."""
    work_hard(station.instruments)
    samples = [each for each in (await scrape(client)).splitlines() if each[0] != "#"]

    assert 400 < len(samples) < 600


async def test_the_scraper_chooses_the_format(client: aiohttp.ClientSession) -> None:
    """M2: OpenMetrics is given to who asks for it, plain text to everybody else."""
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
        ("loader_seconds", "product", "ok"),
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
    for number in range(1_000):
        instruments.counts["dead_letters", f"reason-{number}"] += 2
        instruments.observe("loader_seconds", 0.01, f"cache-{number}", "ok")

    families = {each.name: each.samples for each in registry.collect()}
    letters, loads = families["forebay_dead_letters"], families["forebay_loader_seconds"]
    counts = [each for each in loads if each.name.endswith("_count")]
    assert (len(letters), len(counts)) == (SERIES_MAX, SERIES_MAX)
    assert sum(each.value for each in letters) == 2_000
    assert sum(each.value for each in counts) == 1_000
    assert counts[-1].labels == {"cache": "other", "result": "other"}


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
async def target(endpoint: Address, station: Station) -> str:
    """host:port of an endpoint that counted three writes."""
    station.instruments.counts["events_processed", "write", "applied"] += 3
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

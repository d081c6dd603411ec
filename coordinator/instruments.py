"""Counts, and the scrape. The catalogue lists the metrics.

Counting is a dict of ints, since a hit in the near cache is cheaper than one call into a
metrics library; Prometheus types are made only at a scrape.

    instruments.declare("cache", "product")                            # its series begin at 0
    instruments.counts["events_processed", "write", "applied"] += 1    # a counter, less _total
    instruments.observe("loader_seconds", 0.012, "product")            # a histogram
    instruments.add_source(lambda: [("owned_shards", (), 12.0)])       # gauges, read at a scrape

I1  A series exists only for a metric of the catalogue, and for a combination of label values that
    it lists: the first use of another is an error.
I2  A metric never has more than ``SERIES_MAX`` series; further ones are summed into ``other``.
I3  Counters and histograms exist before their first event: from the start, or from ``declare`` on
    where the first label is the name of a cache, sink, limit or route.
I4  A scrape reads memory only. Sources are called before counts are read, so that a source may
    update a count that is kept elsewhere. A gauge without a source is absent, not 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import reduce
from itertools import accumulate
from operator import add
from types import MappingProxyType
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from .catalogue import CATALOGUE, Instrument, Labels, Owner

__all__ = ["PREFIX", "SERIES_MAX", "Counts", "Gauges", "Instruments"]

SERIES_MAX = 1_000
PREFIX = "forebay_"

Gauges = Callable[[], Iterable[tuple[str, Labels, float]]]

_ALL: Mapping[str, Collection[str]] = MappingProxyType({})


class Counts(dict[Labels, int]):
    """(short name, label values...) -> count. A missing one is 0, if the catalogue allows it."""

    __slots__ = ("_allowed",)

    def __init__(self, counters: Iterable[Instrument]) -> None:
        self._allowed = {each.short: each for each in counters}
        super().__init__()

    def __missing__(self, key: Labels) -> int:
        name, *values = key
        _demand(self._allowed, name, tuple(values))
        return 0


class _Times:
    """One series of a histogram."""

    __slots__ = ("buckets", "counts", "sum_s")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.buckets, seconds)] += 1
        self.sum_s += seconds

    def __add__(self, other: _Times) -> _Times:
        both = _Times(self.buckets)
        both.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        both.sum_s = self.sum_s + other.sum_s
        return both

    def cumulative(self) -> list[tuple[str, float]]:
        bounds = [*map(str, self.buckets), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class Instruments(Collector):
    """The metrics of one node, exported through one registry."""

    def __init__(self, registry: CollectorRegistry, *, version: str = "") -> None:
        of_kind: dict[str, dict[str, Instrument]] = {"counter": {}, "gauge": {}, "histogram": {}}
        for each in CATALOGUE:
            of_kind[each.kind][each.short] = each
        self.counts = Counts(of_kind["counter"].values())
        self._gauges = of_kind["gauge"]
        self._histograms = of_kind["histogram"]
        self._times: dict[Labels, _Times] = {}
        self._sources: list[Gauges] = []
        self._begin("", (), _ALL)
        if version:
            self.add_source(lambda: [("build_info", (version,), 1.0)])
        registry.register(self)

    def __repr__(self) -> str:
        series = len(self.counts) + len(self._times)
        return f"<Instruments: {series} series counted, {len(self._sources)} sources>"

    def declare(self, owner: Owner, name: str, only: Mapping[str, Collection[str]] = _ALL) -> None:
        """Have the series of a declared cache, sink, limit or route begin at 0; again: no effect.

        ``only`` are the values that a label can take, where they are not all of the catalogue.
        """
        self._begin(owner, (name,), only)

    def _begin(self, owner: Owner, first: Labels, only: Mapping[str, Collection[str]]) -> None:
        for each in CATALOGUE:
            if each.owner != owner or each.kind == "gauge":
                continue
            for rest in each.series:
                labels = (*first, *rest)
                pairs = zip(each.labels, labels, strict=True)
                if not all(value in only.get(label, (value,)) for label, value in pairs):
                    continue
                key = (each.short, *labels)
                if each.buckets:
                    self._times.setdefault(key, _Times(each.buckets))
                else:
                    self.counts.setdefault(key, 0)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """Count a duration in a histogram."""
        times = self._times.get((name, *labels))
        if times is None:
            instrument = _demand(self._histograms, name, labels)
            times = self._times[(name, *labels)] = _Times(instrument.buckets)
        times.observe(seconds)

    def add_source(self, source: Gauges) -> None:
        """Ask this for gauges at every scrape. It reads memory only, and never suspends."""
        self._sources.append(source)

    def remove_source(self, source: Gauges) -> None:
        self._sources.remove(source)

    def describe(self) -> list[Metric]:
        return [_family(each, ()) for each in CATALOGUE]

    def collect(self) -> Iterator[Metric]:
        series: dict[str, list[tuple[Labels, Any]]] = {each.short: [] for each in CATALOGUE}
        gauges = self._read_sources()
        for values in (gauges, self.counts, self._times):
            for (name, *labels), value in list(values.items()):
                series[name].append((tuple(labels), value))
        for each in CATALOGUE:
            yield _family(each, _bounded(series[each.short]))

    def _read_sources(self) -> dict[Labels, float]:
        gauges: dict[Labels, float] = {}
        for source in self._sources:
            for name, labels, value in source():
                _demand(self._gauges, name, labels)
                gauges[(name, *labels)] = value
        return gauges


def _demand(known: dict[str, Instrument], name: str, labels: Labels) -> Instrument:
    instrument = known.get(name)
    if instrument is None:
        raise AssertionError(f"no metric {name!r} of this kind is in the catalogue")
    if not instrument.allows(labels):
        raise AssertionError(f"{name} with {instrument.labels} = {labels} is not in the catalogue")
    return instrument


def _bounded(series: list[tuple[Labels, Any]]) -> list[tuple[Labels, Any]]:
    if len(series) <= SERIES_MAX:
        return series
    kept, rest = series[: SERIES_MAX - 1], series[SERIES_MAX - 1 :]
    names = len(rest[0][0])
    return [*kept, (("other",) * names, reduce(add, (value for _, value in rest)))]


def _family(each: Instrument, series: Iterable[tuple[Labels, Any]]) -> Metric:
    name = PREFIX + each.short
    if each.kind == "histogram":
        histogram = HistogramMetricFamily(name, each.help, labels=each.labels)
        for labels, times in series:
            histogram.add_metric(labels, times.cumulative(), times.sum_s)
        return histogram
    family = CounterMetricFamily if each.kind == "counter" else GaugeMetricFamily
    single = family(name, each.help, labels=each.labels)
    for labels, value in series:
        single.add_metric(labels, value)
    return single

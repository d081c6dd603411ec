"""Every metric that a node exports: the catalogue, the counting, and the scrape.

Counting is a dict of ints, since a hit in the near cache is cheaper than one call into a
metrics library; Prometheus types are made only when somebody scrapes.

    instruments.counts["events_processed", "write", "applied"] += 1    # a counter, less _total
    instruments.observe("loader_seconds", 0.012, "product", "ok")      # a histogram
    instruments.add_source(lambda: [("owned_shards", (), 12.0)])       # gauges, read at a scrape

I1  A series exists only for a metric of the catalogue, with its number of labels, and with a
    label value of the closed set where there is one: the first use of another is an error.
I2  A metric never has more than ``SERIES_MAX`` series; further ones are summed into ``other``.
I3  A scrape reads memory only. Sources are asked before counts are read, so that one may bring
    a count up to date that is kept elsewhere. A gauge that nobody gives is absent, not 0.

No metric is labelled with a key, a tag, an address or the text of an error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import accumulate, product
from operator import add
from typing import Any, Literal

from msgspec import Struct
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

__all__ = ["CATALOGUE", "SERIES_MAX", "Counts", "Gauges", "Instrument", "Instruments"]

SERIES_MAX = 200
PREFIX = "forebay_"

FINE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: For what exists once per cache or sink: a histogram costs three series more than its buckets.
COARSE_S = (0.005, 0.025, 0.1, 0.5, 2.5)

Labels = tuple[str, ...]
Gauges = Callable[[], Iterable[tuple[str, Labels, float]]]


class Instrument(Struct, frozen=True):
    """One line of the catalogue. A label is a name, or a name with its closed set."""

    name: str  #: as it is exported, less the prefix
    help: str
    labels: tuple[str | tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]:
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def short(self) -> str:
        return self.name.removesuffix("_total")

    @property
    def label_names(self) -> Labels:
        return tuple(each if isinstance(each, str) else each[0] for each in self.labels)

    def allows(self, values: Labels) -> bool:
        return len(values) == len(self.labels) and all(
            isinstance(each, str) or value in each[1]
            for each, value in zip(self.labels, values, strict=True)
        )

    def known(self) -> Iterator[Labels]:
        """The series that exist from the start, so that the first event is an increase."""
        sets = [each[1] for each in self.labels if not isinstance(each, str)]
        return product(*sets) if len(sets) == len(self.labels) else iter(())


_TYPE = ("type", ("invalidate", "write", "refresh", "unknown"))
_RESULT = ("result", ("applied", "duplicate", "dead", "held"))
_STREAM = ("stream", ("events", "writes", "refreshes"))
_KIND = ("kind", ("changed", "dropped", "bumped", "extended"))
_TIER = ("tier", ("near", "shared", "source"))
_OUTCOME = ("result", ("hit", "stale", "miss", "negative", "error", "refused"))
_LEGACY = ("result", ("used", "absent", "outdated", "unreadable", "refused", "closed"))
_WAY = ("way", ("put", "through", "around", "behind"))
_END = ("result", ("stored", "refused", "unknown"))
_EXTERNAL = ("kind", ("set", "deleted", "flushed", "missed", "overflow"))
_HANDOVER = ("kind", ("free", "wished", "forced", "dead"))
_MEMBER = ("state", ("active", "suspect", "leaving", "away"))
_DECIDER = ("source", ("server", "deny_cache", "lease", "local"))
_VERDICT = ("result", ("allowed", "refused"))
_BREAKER = ("state", ("closed", "open", "half_open"))

_ACQUIRED = ("result", ("taken", "waited", "refused", "timed_out", "cancelled", "failed"))
_LOST = ("reason", ("expired", "taken", "forced", "stopped"))
_RENEWED = ("result", ("renewed", "reclaimed", "failed"))
_ANOMALY = ("kind", ("loop_stalled", "server_clock_jumped"))

CATALOGUE = (
    Instrument("build_info", "Always 1; the label tells the version.", ("version",)),
    Instrument("events_published_total", "Events this node put into the stream.", (_TYPE,)),
    Instrument(
        "ingress_generations_total",
        "Times that the ids of the ingress stream began anew, by the reason.",
        (("reason", ("begun", "restored", "replaced", "lost", "drained")),),
    ),
    Instrument(
        "ingress_id_ahead_seconds",
        "How far the newest id of the ingress stream is ahead of the server's clock; its owner.",
    ),
    Instrument("events_processed_total", "Events taken from the stream.", (_TYPE, _RESULT)),
    Instrument("event_delay_seconds", "From publishing to applied.", (_TYPE,), FINE_S),
    Instrument("event_processing_seconds", "Applying one event.", (_TYPE,), COARSE_S),
    Instrument(
        "stream_oldest_undelivered_age_seconds",
        "Age of the oldest entry that nobody has taken.",
        (_STREAM,),
    ),
    Instrument("stream_lag_events", "Entries that nobody has taken.", (_STREAM,)),
    Instrument("dead_letters_total", "Entries put aside as unusable.", ("reason",)),
    Instrument("dead_letter_entries", "Entries in the dead letters."),
    Instrument("notices_applied_total", "Change notices applied from shard logs.", (_KIND,)),
    Instrument("log_gaps_total", "Times a shard log could not be followed.", ("reason",)),
    Instrument(
        "external_changes_total",
        "Entries that others set or deleted; times when all had to be doubted.",
        (_EXTERNAL,),
    ),
    Instrument("log_suspect_shards", "Shards not known to be current on this node."),
    Instrument("log_staleness_seconds", "Age of the oldest proof of being current."),
    Instrument(
        "cache_requests_total",
        "Reads, by the tier that answered.",
        ("cache", _TIER, _OUTCOME),
    ),
    Instrument("cache_entries", "Entries in the near cache.", ("cache",)),
    Instrument("cache_size_bytes", "Bytes in the near cache.", ("cache",)),
    Instrument("cache_evictions_total", "Entries dropped for space.", ("cache", "reason")),
    Instrument("cache_decode_errors_total", "Entries not readable.", ("cache", "reason")),
    Instrument(
        "legacy_entries_total",
        "Misses that asked for a value of another service, by what came of it.",
        ("cache", _LEGACY),
    ),
    Instrument("fills_refused_total", "Fills whose lease was gone.", ("cache",)),
    Instrument("loader_seconds", "One call of a loader.", ("cache", "result"), COARSE_S),
    Instrument("refreshes_total", "Refresh jobs, by their end.", ("result",)),
    Instrument(
        "work_oldest_age_seconds",
        "Age of the oldest work that this node is responsible for; 0: none waits.",
        (("kind", ("events", "writes", "refreshes")),),
    ),
    Instrument(
        "sink_paused_seconds", "Since a sink takes nothing, tried again and again.", ("sink",)
    ),
    Instrument("sink_locked_rows", "Writes that wait for a row locked by others.", ("sink",)),
    Instrument("writebehind_queue_entries", "Writes that no sink has stored yet."),
    Instrument(
        "writebehind_held_total",
        "Writes set aside: without a sink here, or not decodable here.",
        (("reason", ("no_sink", "undecodable")),),
    ),
    Instrument("writebehind_held_entries", "Writes held in the shards that this node owns."),
    Instrument("writebehind_held_age_seconds", "Since when the oldest of these is held."),
    Instrument("writebehind_flush_seconds", "One batch to a sink.", ("sink", "result"), COARSE_S),
    Instrument("writebehind_rows_total", "Rows given to a sink.", ("sink", "result")),
    Instrument("writes_total", "Writes through a cache, by their end.", ("cache", _WAY, _END)),
    Instrument("owned_shards", "Shards whose ordered work this node does."),
    Instrument(
        "ownership_changes_total",
        "Shards taken and given up.",
        ("direction",),
    ),
    Instrument(
        "handovers_total",
        "Resources taken: free, released to us, by force, of a dead owner.",
        (_HANDOVER,),
    ),
    Instrument("members", "Members of the cluster, as this node knows them.", (_MEMBER,)),
    Instrument("fenced_total", "Commits refused since another node had taken over."),
    Instrument("locks_held", "Leases that this process has."),
    Instrument("lock_waiters", "Callers of this process that wait for a lock."),
    Instrument("lock_acquires_total", "Tries to get a lock, by their end.", (_ACQUIRED,)),
    Instrument("lock_wait_seconds", "Time in the queue of a lock.", (), COARSE_S),
    Instrument("lock_losses_total", "Leases that ended under their holders.", (_LOST,)),
    Instrument("lock_renewals_total", "Leases to be renewed, by how it went.", (_RENEWED,)),
    Instrument("lock_reaped_total", "Releases made good afterwards."),
    Instrument("time_anomalies_total", "Times when time passed unevenly.", (_ANOMALY,)),
    Instrument("backend_up", "1 while Valkey answers this node."),
    Instrument("backend_reconnects_total", "Connections made anew.", ("connection",)),
    Instrument("backend_timeouts_total", "Commands without a reply in time."),
    Instrument("breaker_state", "1 for the state the breaker is in.", ("name", _BREAKER)),
    Instrument("link_in_flight", "Commands sent and not answered yet."),
    Instrument("event_loop_lag_seconds", "The latest beat of late, by how late it was."),
    Instrument(
        "limiter_decisions_total",
        "Asks of a limit, by who decided; for a partial ask, its tokens.",
        ("limit", _DECIDER, _VERDICT),
    ),
    Instrument("limiter_shadow_refused_total", "Asks a shadow would have refused.", ("limit",)),
    Instrument("limiter_returned_total", "Grants and tokens given back unspent.", ("limit",)),
    Instrument(
        "limiter_leased_tokens",
        "Tokens charged and not spent; summed over nodes, what a window may admit more.",
        ("limit",),
    ),
    Instrument("limit_reached_total", "Times a bound held something back.", ("limit",)),
    Instrument("http_requests_total", "Requests, by route template and status.", ("route", "code")),
)


class Counts(dict[Labels, int]):
    """(short name, label values...) -> count. A missing one is 0, if the catalogue allows it."""

    __slots__ = ("_allowed",)

    def __init__(self, counters: Iterable[Instrument]) -> None:
        self._allowed = {each.short: each for each in counters}
        super().__init__(
            ((each.short, *values), 0) for each in self._allowed.values() for values in each.known()
        )

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
        if version:
            self.add_source(lambda: [("build_info", (version,), 1.0)])
        registry.register(self)

    def __repr__(self) -> str:
        series = len(self.counts) + len(self._times)
        return f"<Instruments: {series} series counted, {len(self._sources)} sources>"

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
        raise AssertionError(f"{name} is labelled {instrument.labels}, {labels} does not fit")
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
        histogram = HistogramMetricFamily(name, each.help, labels=each.label_names)
        for labels, times in series:
            histogram.add_metric(labels, times.cumulative(), times.sum_s)
        return histogram
    family = CounterMetricFamily if each.kind == "counter" else GaugeMetricFamily
    single = family(name, each.help, labels=each.label_names)
    for labels, value in series:
        single.add_metric(labels, value)
    return single

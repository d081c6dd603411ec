"""The catalogue: every metric that a node exports, with all its series.

C1  A label takes its values from a closed set, or from what the application declares: caches,
    sinks, limits, and the routes of the endpoint. No label holds a key, a tag, an address or the
    text of an error.
C2  The combinations of label values are listed, so that each series exists before its first event.
    A combination that cannot occur has no series.
C3  A fill level has its bound beside it, as a gauge of the same name and labels with ``_max``.

A histogram costs three series more than its buckets. What exists once per cache has few buckets.
"""

from __future__ import annotations

from itertools import product
from typing import Literal, get_args

from msgspec import Struct

from ..schemas.errors import EntryFault, EventFault

__all__ = ["CATALOGUE", "Instrument", "Labels", "Owner"]

Labels = tuple[str, ...]
Owner = Literal["", "cache", "sink", "limit", "route", "breaker", "legacy", "version"]

FINE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COARSE_S = (0.005, 0.025, 0.1, 0.5, 2.5)


class Instrument(Struct, frozen=True):
    """One metric. If it has an ``owner``, its first label is the name of a declared cache, sink,
    limit or route, and ``series`` lists the values of the labels that follow. ``legacy``: a cache
    with a ``legacy_key``.
    """

    name: str  #: as exported, less the prefix
    help: str
    labels: Labels = ()
    series: tuple[Labels, ...] = ((),)
    owner: Owner = ""
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]:
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def short(self) -> str:
        return self.name.removesuffix("_total")

    def allows(self, values: Labels) -> bool:
        listed = values[1:] if self.owner else values
        return len(values) == len(self.labels) and listed in self.series


def _one(values: tuple[str, ...]) -> tuple[Labels, ...]:
    return tuple((value,) for value in values)


def _all(*values: tuple[str, ...]) -> tuple[Labels, ...]:
    return tuple(product(*values))


def _pairs(results: dict[str, tuple[str, ...]]) -> tuple[Labels, ...]:
    return tuple((first, second) for first, seconds in results.items() for second in seconds)


_EVENTS = ("invalidate", "write", "refresh")
_STREAMS = _one(("events", "writes", "refreshes"))
_BREAKER = _one(("closed", "open", "half_open"))
_READS = {
    "request": ("hit", "negative", "stale"),
    "near": ("hit", "negative", "stale"),
    "shared": ("hit", "negative", "stale", "error", "cancelled"),
    "source": ("miss", "error", "refused", "cancelled"),
}
_PROCESSED = {
    "invalidate": ("applied", "dead"),
    "write": ("applied", "duplicate", "dead"),
    "refresh": ("applied",),
    "unknown": ("dead", "held"),
}
_GAPS = ("trimmed", "epoch", "run_id", "false_bell", "newer", "failed", "refused")
_DECISIONS = {
    "server": ("allowed", "refused"),
    "deny_cache": ("refused",),
    "lease": ("allowed",),
    "local": ("allowed", "refused"),
}
_REFRESHES = ("done", "refused", "expired", "failed", "undecodable", "unknown_cache")
_BOUNDS = (
    *("value_bytes", "loads", "waiters"),
    *("writes", "refreshes", "held", "dead_letters", "seen", "memory"),
    *("http_connections", "http_headers", "http_unread_answer"),
    *("http_bodies", "http_body_bytes", "http_body_time", "http_lock_waiters"),
    "http_read_bytes",
    *("limiter_subjects", "lock_reaper", "explain", "explain_answers"),
)

_PROCESS = (
    Instrument(
        "build_info", "Always 1; the label tells the version.", ("version",), owner="version"
    ),
    Instrument("ready", "1 while the node is ready, as /readyz tells."),
    Instrument("draining", "1 while the node drains, and once it has drained."),
    Instrument(
        "event_loop_lag_max_seconds", "Longest delay of the event loop in the last 15 seconds."
    ),
    Instrument(
        "time_anomalies_total",
        "Stalls of the event loop, and jumps of the clock of Valkey.",
        ("kind",),
        _one(("loop_stalled", "server_clock_jumped")),
    ),
    Instrument("limit_reached_total", "Times a bound was reached.", ("limit",), _one(_BOUNDS)),
    Instrument("http_connections", "Connections of the endpoint; the spare ones left out."),
    Instrument("http_connections_max", "Connections that the endpoint serves at a time."),
    Instrument(
        "http_requests_total",
        "Requests, by route template and class of the status code.",
        ("route", "code"),
        _one(("2xx", "4xx", "5xx")),
        "route",
    ),
)

_EVENT_STREAM = (
    Instrument(
        "events_published_total",
        "Events that this node put into the ingress stream.",
        ("type",),
        _one((*_EVENTS, "unknown")),
    ),
    Instrument(
        "events_processed_total",
        "Events that this node took from the ingress stream, whoever published them.",
        ("type", "result"),
        _pairs(_PROCESSED),
    ),
    Instrument(
        "event_delay_seconds",
        "From the publication of an event to its application by the owner of the ingress stream.",
        ("type",),
        _one(_EVENTS),
        buckets=FINE_S,
    ),
    Instrument(
        "event_propagation_seconds",
        "From the publication of an event to the application of its notice on this node.",
        buckets=FINE_S,
    ),
    Instrument(
        "event_processing_seconds",
        "Time that this node took to apply an event: that of its batch, shared equally.",
        buckets=COARSE_S,
    ),
    Instrument(
        "invalidations_total",
        "Keys and tags that this node invalidated by itself, without an event.",
        ("target",),
        _one(("key", "tag")),
    ),
    Instrument(
        "ingress_generations_total",
        "Times the ids of the ingress stream began anew.",
        ("reason",),
        _one(("begun", "restored", "replaced", "lost", "drained")),
    ),
    Instrument(
        "ingress_id_ahead_seconds",
        "How far the newest id of the ingress stream is ahead of the clock of Valkey.",
    ),
    Instrument(
        "stream_oldest_undelivered_age_seconds",
        "Age of the oldest entry that waits, over all shards; given by the leader.",
        ("stream",),
        _STREAMS,
    ),
    Instrument(
        "stream_lag_events",
        "Entries that wait, over all shards; given by the leader.",
        ("stream",),
        _STREAMS,
    ),
    Instrument(
        "stream_lag_events_max",
        "Entries that may wait, over all shards.",
        ("stream",),
        _STREAMS,
    ),
    Instrument(
        "dead_letters_total",
        "Entries put into the dead letters.",
        ("reason",),
        _one(get_args(EventFault)),
    ),
    Instrument("dead_letter_entries", "Entries in the dead letters; given by the leader."),
    Instrument("dead_letter_entries_max", "Entries that the dead letters of all shards may hold."),
)

_LOG = (
    Instrument(
        "notices_applied_total",
        "Change notices applied from shard logs.",
        ("kind",),
        _one(("changed", "dropped", "bumped", "extended")),
    ),
    Instrument(
        "log_gaps_total",
        "Times a shard log could not be followed.",
        ("reason",),
        _one(_GAPS),
    ),
    Instrument("log_suspect_shards", "Shards not known to be current on this node."),
    Instrument("log_staleness_seconds", "Age of the oldest proof of being current."),
    Instrument(
        "external_changes_total",
        "Entries that others set or deleted; times when all entries had to be doubted.",
        ("kind",),
        _one(("set", "deleted", "flushed", "missed", "overflow")),
    ),
)

_CACHE = (
    Instrument(
        "cache_requests_total",
        "Reads, one sample each, by the tier that answered.",
        ("cache", "tier", "result"),
        _pairs(_READS),
        "cache",
    ),
    Instrument(
        "cache_read_seconds",
        "Time of a read that the near cache did not answer; many keys at once are one read.",
        ("cache",),
        owner="cache",
        buckets=COARSE_S,
    ),
    Instrument("cache_entries", "Entries in the near cache.", ("cache",), owner="cache"),
    Instrument(
        "cache_entries_max", "Entries that the near cache may hold.", ("cache",), owner="cache"
    ),
    Instrument("cache_size_bytes", "Bytes in the near cache.", ("cache",), owner="cache"),
    Instrument(
        "cache_size_bytes_max", "Bytes that the near cache may hold.", ("cache",), owner="cache"
    ),
    Instrument(
        "cache_evictions_total",
        "Entries dropped from the near cache for space.",
        ("cache", "reason"),
        _one(("space",)),
        "cache",
    ),
    Instrument(
        "cache_decode_errors_total",
        "Stored entries that could not be read, by cache.",
        ("cache",),
        owner="cache",
    ),
    Instrument(
        "entry_faults_total",
        "Stored entries that could not be read, by reason.",
        ("reason",),
        _one(get_args(EntryFault)),
    ),
    Instrument(
        "loads_total",
        "Loads, by their end; refused: the source fails, and was not asked.",
        ("cache", "result"),
        _one(("loaded", "error", "timeout", "refused")),
        "cache",
    ),
    Instrument(
        "loader_seconds", "Time of a call of a loader.", ("cache",), owner="cache", buckets=COARSE_S
    ),
    Instrument("loads_running", "Loads under way, in the cache with most of them."),
    Instrument("loads_running_max", "Loads that may be under way in a cache."),
    Instrument("load_waiters", "Callers that wait for loads, in the cache with most of them."),
    Instrument("load_waiters_max", "Callers that may wait for the loads of a cache."),
    Instrument(
        "legacy_entries_total",
        "Misses that asked for a value of another service, by what came of it.",
        ("cache", "result"),
        _one(("used", "absent", "outdated", "unreadable", "refused", "closed")),
        "legacy",
    ),
    Instrument("fills_refused_total", "Fills whose lease was gone.", ("cache",), owner="cache"),
    Instrument(
        "writes_total",
        "Writes through a cache, by their end.",
        ("cache", "way", "result"),
        _all(("put", "through", "around", "behind"), ("stored", "refused", "unknown")),
        "cache",
    ),
    Instrument(
        "refresh_requests_total",
        "Refreshes that reads of this node asked for, by what came of it.",
        ("result",),
        _one(("published", "not_needed", "shed")),
    ),
    Instrument(
        "refreshes_total", "Refresh jobs that this node took, by their end.", ("result",),
        _one(_REFRESHES),
    ),
)  # fmt: skip

_WORK = (
    Instrument(
        "work_oldest_age_seconds",
        "Age of the oldest work that this node is responsible for; 0: none waits.",
        ("kind",),
        _STREAMS,
    ),
    Instrument(
        "sink_state",
        "1 for the state that the sink is in.",
        ("sink", "state"),
        _one(("running", "paused", "stopped")),
        "sink",
    ),
    Instrument(
        "sink_paused_seconds",
        "Time since a sink takes nothing; 0: it takes writes.",
        ("sink",),
        owner="sink",
    ),
    Instrument(
        "sink_locked_rows", "Writes that wait for a locked row.", ("sink",), owner="sink"
    ),
    Instrument("writebehind_queue_entries", "Writes read and not stored yet, of the slowest sink."),
    Instrument("writebehind_queue_entries_max", "Writes that a sink may be given together."),
    Instrument(
        "writebehind_flush_seconds", "Time of a batch to a sink.", ("sink",), owner="sink",
        buckets=COARSE_S,
    ),
    Instrument(
        "writebehind_rows_total",
        "Rows given to a sink.",
        ("sink", "result"),
        _one(("stored", "error")),
        "sink",
    ),
    Instrument(
        "writebehind_held_total",
        "Writes held: without a sink here, or not decodable here.",
        ("reason",),
        _one(("no_sink", "undecodable")),
    ),
    Instrument("writebehind_held_entries", "Writes held in the shards that this node owns."),
    Instrument(
        "writebehind_held_entries_max", "Writes that the shards of this node may hold."
    ),
    Instrument("writebehind_held_age_seconds", "Age of the oldest write held here."),
    Instrument("owned_shards", "Shards whose ordered work this node does."),
    Instrument(
        "ownership_changes_total", "Shards taken and given up.", ("direction",),
        _one(("gained", "lost")),
    ),
    Instrument(
        "handovers_total",
        "Shards taken: free, released to this node, by force, of a dead owner.",
        ("kind",),
        _one(("free", "wished", "forced", "dead")),
    ),
    Instrument(
        "members",
        "Members of the cluster, as this node knows them.",
        ("state",),
        _one(("active", "suspect", "leaving", "away")),
    ),
    Instrument("fenced_total", "Commits refused since another node had taken over."),
)  # fmt: skip

_LOCKS = (
    Instrument("locks_held", "Leases that this process has."),
    Instrument("lock_waiters", "Callers of this process that wait for a lock."),
    Instrument(
        "lock_acquires_total",
        "Attempts to acquire a lock, by their end.",
        ("result",),
        _one(("taken", "waited", "refused", "timed_out", "cancelled", "failed")),
    ),
    Instrument("lock_wait_seconds", "Time in the queue of a lock.", buckets=COARSE_S),
    Instrument(
        "lock_losses_total",
        "Leases that ended under their holders.",
        ("reason",),
        _one(("expired", "taken", "forced", "stopped")),
    ),
    Instrument(
        "lock_renewals_total",
        "Renewals of leases, by their end.",
        ("result",),
        _one(("renewed", "reclaimed", "failed")),
    ),
    Instrument("lock_reaped_total", "Releases made good afterwards."),
)

_BACKEND = (
    Instrument("backend_up", "1 while Valkey answers this node."),
    Instrument(
        "backend_reconnects_total",
        "Connections made again.",
        ("connection",),
        _one(("primary", "tracking")),
    ),
    Instrument("backend_timeouts_total", "Commands without a reply in time."),
    Instrument(
        "breaker_state",
        "1 for the state that the breaker of Valkey or of a loader is in.",
        ("name", "state"),
        _BREAKER,
        "breaker",
    ),
    Instrument("link_in_flight", "Commands sent and not answered yet."),
    Instrument("link_in_flight_max", "Commands that may be sent and not answered."),
)

_LIMITS = (
    Instrument(
        "limiter_decisions_total",
        "Decisions on a limit, by their source; for a partial request, its tokens.",
        ("limit", "source", "result"),
        _pairs(_DECISIONS),
        "limit",
    ),
    Instrument(
        "limiter_shadow_refused_total",
        "Requests that a shadow limit would have refused.",
        ("limit",),
        owner="limit",
    ),
    Instrument(
        "limiter_returned_total",
        "Grants and tokens given back unspent.",
        ("limit",),
        owner="limit",
    ),
    Instrument(
        "limiter_leased_tokens",
        "Tokens charged and not spent; summed over nodes, what a window may admit more.",
        ("limit",),
        owner="limit",
    ),
)

CATALOGUE = (
    *_PROCESS, *_EVENT_STREAM, *_LOG, *_CACHE, *_WORK, *_LOCKS, *_BACKEND, *_LIMITS
)  # fmt: skip

"""The gauges of a node, for a scrape.

U1  They read memory only.
U2  A running node gives a gauge for each cache, sink and limit that is declared, from its start on.
    A node without workers gives none of theirs, and only the leader gives those of the cluster.
U3  A fill level and its bound are given together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..coordinator.valkey.breaker import Breaker
from .cache.cache import Cache
from .health_checks import sink_delivery_state
from .runtime import Running

if TYPE_CHECKING:
    from .node import Node
    from .workers.group import WorkerGroup

__all__ = ["bring_up_to_date", "gauges"]

Gauge = tuple[str, tuple[str, ...], float]


def gauges(node: Node) -> Iterator[Gauge]:
    """What a scrape shows beside the counters."""
    from .. import __version__

    yield "build_info", (__version__,), 1.0
    ready = all(each.state != "fail" for each in node.checks() if "ready" in each.gates)
    yield "ready", (), float(ready)
    if not node.is_running:
        yield "draining", (), 0.0
        yield "backend_up", (), 0.0
        return
    bring_up_to_date(node)
    parts = node.parts
    yield "draining", (), float(parts.draining)
    caches = list(parts.routes.caches.values())
    yield from _of_backend(parts, caches)
    yield from _of_log(parts)
    yield from _of_caches(parts, caches)
    locks = parts.locks.statistics()
    yield "locks_held", (), float(locks.held)
    yield "lock_waiters", (), float(locks.waiting)
    yield from parts.limiter.gauges()
    if parts.crew is not None:
        yield from _of_work(parts, parts.crew)
        yield from _of_sinks(parts.crew, parts.clock.monotonic())
        yield from _of_cluster(parts, parts.crew)


def bring_up_to_date(node: Node) -> None:
    """Counters that live as plain ints where the counting has to be fast."""
    parts, counts = node.parts, node.instruments.counts
    link = parts.backend.link.statistics()
    counts["backend_timeouts",] = link.timeouts
    counts["backend_reconnects", "primary"] = link.reconnects
    for cached in parts.routes.caches.values():
        negative = cached.near_negative_hits
        counts["cache_requests", cached.name, "near", "hit"] = cached.near_hits - negative
        counts["cache_requests", cached.name, "near", "negative"] = negative
        counts["cache_evictions", cached.name, "space"] = cached.path.near.evictions


def _of_backend(parts: Running, caches: Iterable[Cache[Any]]) -> Iterator[Gauge]:
    link = parts.backend.link
    yield "backend_up", (), float(link.connected)
    yield "link_in_flight", (), float(link.in_flight)
    yield "link_in_flight_max", (), float(parts.settings.valkey.in_flight_max)
    yield from _state_set("breaker_state", "valkey", _STATES, link.breaker.state)
    for cached in caches:
        breaker: Breaker = cached.path.loads.source.breaker
        yield from _state_set("breaker_state", breaker.name, _STATES, breaker.state)


_STATES = ("closed", "open", "half_open")


def _state_set(name: str, of: str, states: Sequence[str], state: str) -> Iterator[Gauge]:
    for each in states:
        yield name, (of, each), float(each == state)


def _of_log(parts: Running) -> Iterator[Gauge]:
    yield "log_suspect_shards", (), float(parts.follower.statistics().suspect)
    staleness_s = parts.follower.staleness_s()
    if staleness_s < float("inf"):
        yield "log_staleness_seconds", (), staleness_s


def _of_caches(parts: Running, caches: Sequence[Cache[Any]]) -> Iterator[Gauge]:
    for cached in caches:
        near = cached.path.near
        statistics, name = near.statistics(), (cached.name,)
        yield "cache_entries", name, float(statistics.entries)
        yield "cache_entries_max", name, float(near.entries_max)
        yield "cache_size_bytes", name, float(statistics.bytes)
        yield "cache_size_bytes_max", name, float(near.bytes_max)
    flights, limits = [cached.path.flights for cached in caches], parts.settings.limits
    yield "loads_running", (), float(max(map(len, flights), default=0))
    yield "loads_running_max", (), float(limits.loads_max)
    yield "load_waiters", (), float(max((each.waiting for each in flights), default=0))
    yield "load_waiters_max", (), float(limits.waiters_max)


def _of_work(parts: Running, crew: WorkerGroup) -> Iterator[Gauge]:
    settings, shards = parts.settings, crew.ownership.statistics().shards
    yield "owned_shards", (), float(shards)
    for state, count in crew.ownership.members().items():
        yield "members", (state,), float(count)
    for kind, age_s in crew.backlog.ages():
        yield "work_oldest_age_seconds", (kind,), age_s
    yield "ingress_id_ahead_seconds", (), crew.ingress.ahead_ms / 1000
    yield "writebehind_queue_entries", (), float(crew.writes.backlog)
    # At least one of each shard is read at a time.
    queue_max = max(settings.workers.flush_rows_max, shards)
    yield "writebehind_queue_entries_max", (), float(queue_max)
    held = crew.writes.held.statistics
    yield "writebehind_held_entries", (), float(held.writes)
    yield "writebehind_held_entries_max", (), float(settings.durable.dead_letters_max * shards)
    yield "writebehind_held_age_seconds", (), held.oldest_age_s


def _of_sinks(crew: WorkerGroup, now: float) -> Iterator[Gauge]:
    for name, delivery in crew.deliveries.items():
        paused = delivery.paused
        state = sink_delivery_state(delivery)
        yield from _state_set("sink_state", name, ("running", "paused", "stopped"), state)
        yield "sink_paused_seconds", (name,), now - paused.since if paused else 0.0
        yield "sink_locked_rows", (name,), float(len(delivery.locked))


def _of_cluster(parts: Running, crew: WorkerGroup) -> Iterator[Gauge]:
    """Of the leader only."""
    yield from crew.leader_metrics.gauges()
    if not crew.leader_metrics.leading:
        return
    durable, shards = parts.settings.durable, parts.names.shards
    bounds: Mapping[str, int] = {
        "events": durable.events_max,
        "writes": durable.writes_max * shards,
        "refreshes": durable.refreshes_max * shards,
    }
    for stream, bound in bounds.items():
        yield "stream_lag_events_max", (stream,), float(bound)
    # There is one stream of dead letters for the ingress stream, and one for each shard.
    yield "dead_letter_entries_max", (), float(durable.dead_letters_max * (shards + 1))

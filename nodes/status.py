"""Node status: health checks for probes, gauges for a scrape, statistics for people.

S1  Health checks and gauges read memory only.
S2  ``stats`` has the same keys at all times. It also asks the server; while the server does not
    answer, the values that only the server knows are null, and ``unavailable`` gives the reason.
    A key of another type is left out of the figures and named there.
S3  A running node has started: a later failure of Valkey fails readiness alone.
S4  Stalled work is a warning: the work moves to other nodes, or waits; it fails no probe. Two
    faults of the work fail readiness: a server that refuses all writes, and a Valkey user without
    a right that all work needs.
S5  A check names the oldest work that this node is responsible for, and the current failure: its
    duration, its number of attempts, and the last error.
S6  A running node has a gauge for each declared cache, sink and limit from its start on. A node
    without workers has no gauges of workers, and only the leader has those of the cluster.
S7  A fill level and its bound are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from ..coordinator.log_once import Failing
from ..coordinator.rights import Missing
from ..coordinator.valkey.breaker import Breaker
from ..coordinator.valkey.link import Arg, Reply
from ..coordinator.valkey.private_server import FIX
from ..coordinator.valkey.scripting import ask_many
from ..schemas.errors import ForebayError, ServerRefused
from ..schemas.keys import EVENTS
from .cache.cache import Cache
from .runtime import Running
from .web.protocols import Check, Gate, State
from .workers.delivery import Delivery, Outage
from .workers.group import WorkerGroup
from .workers.held import HeldStatistics

Gauge = tuple[str, tuple[str, ...], float]

_READY: frozenset[Gate] = frozenset(("ready",))
_START: frozenset[Gate] = frozenset(("ready", "start"))
_SHOWN_ONLY: frozenset[Gate] = frozenset()
_OF_THE_SERVER = ("keys", "memory", "backlog", "dead_letters")
_REFUSED_SHOWN = 3
_SHARDS_SHOWN = 5
_BREAKER_STATES = ("closed", "open", "half_open")


# Health checks


def checks(parts: Running | None) -> Sequence[Check]:
    """The health checks of a node; None: it is not running."""
    if parts is None:
        return [Check(name="node", state="fail", detail="it is not running", gates=_START)]
    link, now = parts.backend.link, parts.clock.monotonic()
    state = link.breaker.state
    views = parts.follower.views
    suspect = sum(view.live_until <= now and not view.refused for view in views)
    found = [
        _check("valkey", link.connected, _connection_detail(parts), _READY),
        _check("breaker", state == "closed", f"the breaker is {state}", _READY),
        _check("log", not suspect, f"{suspect} shards are not known to be current", _READY),
        _check("drain", not parts.draining, "draining", _READY),
    ]
    if refused := [view.refused for view in views if view.refused]:
        found.append(
            _check("logs", False, "; ".join(refused[:_REFUSED_SHOWN]), _SHOWN_ONLY, "warn")
        )
    wrong = parts.scripts.wrong_keys.problems()
    found.append(_check("keys", not wrong, "; ".join(wrong[:_REFUSED_SHOWN]), _SHOWN_ONLY, "warn"))
    if parts.private_server is not None:
        problem = parts.private_server.problem
        found.append(_check("private_server", not problem, f"{problem}; {FIX}", _READY, "warn"))
    found += _work_checks(parts)
    if parts.crew is not None:
        found.append(_held_writes(parts.crew.writes.held.statistics))
    if parts.crew is not None and (ahead_ms := parts.crew.ingress.ahead_ms):
        detail = f"the newest id of {parts.names.events} is {ahead_ms / 1000:.0f} s ahead"
        found.append(_check("ingress_ids", False, detail, _SHOWN_ONLY, "warn"))
    return found


def _connection_detail(parts: Running) -> str:
    failure = parts.backend.link.failure
    return f"not connected: {failure}" if failure else "not connected"


def _held_writes(held: HeldStatistics) -> Check:
    detail = (
        f"{held.writes} writes are held, the oldest ({held.example}) for {held.oldest_age_s:.0f} s:"
        " start a worker that declares their sink"
    )
    return _check("held writes", not held.writes, detail, _SHOWN_ONLY, "warn")


def _check(
    name: str, passed: bool, detail: str, gates: frozenset[Gate], otherwise: str = "fail"
) -> Check:
    state = "pass" if passed else otherwise
    return Check(name=name, state=state, detail="" if passed else detail, gates=gates)  # type: ignore[arg-type]


def _work_checks(parts: Running) -> Iterator[Check]:
    now = parts.clock.monotonic()
    refusal = parts.write_check.refusal
    yield Check(
        name="valkey_writes",
        state="fail" if refusal else "pass",
        detail=_failing("the server refuses writes", refusal, now),
        gates=_READY,
    )
    yield _rights_check(parts.rights.missing)
    problem = parts.metadata.problem
    state: State = "fail" if problem else "pass"
    yield Check(name="namespace", state=state, detail=problem, gates=_READY)
    refreshes = _failing("refresh jobs are not read", parts.refreshes.failing.failing, now)
    if parts.crew is None:
        yield _warning("refreshes", refreshes)
        return
    yield from _worker_checks(parts.crew, refreshes, now)
    for name, delivery in parts.crew.deliveries.items():
        yield _warning(f"sink {name}", sink_state(delivery, now))


def _rights_check(missing: Missing) -> Check:
    state: State = "pass" if not missing else "warn" if missing.is_partial else "fail"
    detail = f"{missing.problem}; {missing.fix}" if missing else ""
    return Check(name="rights", state=state, detail=detail, gates=_READY)


def _worker_checks(crew: WorkerGroup, refreshes: str, now: float) -> Iterator[Check]:
    ownership, late = crew.ownership, crew.backlog.late
    yield _warning(
        "ownership",
        _failing("no beat succeeds", ownership.beats.failing, now),
        _failing("the roster is refused", ownership.roster.failing, now),
        _failing("claims of shards are refused", ownership.claims.failing, now),
        _failing("shards are not handed over", ownership.handovers.failing, now),
    )
    interrupted = _failing("events are not applied", crew.ingress.failing.failing, now)
    yield _warning("ingress", late("events"), interrupted)
    lanes = [
        _failing(f"writes to {lane.name} are not read", lane.failing.failing, now)
        for lane in crew.writes.lanes
    ]
    refused = [
        _failing(f"shard {shard} is refused", once.failing, now)
        for lane in crew.writes.lanes
        for shard, once in list(lane.refused.items())[:_SHARDS_SHOWN]
    ]
    yield _warning("writes", late("writes"), *lanes, *refused)
    yield _warning("refreshes", late("refreshes"), refreshes)


def sink_state(delivery: Delivery, now: float) -> str:
    """Why the sink does not accept all writes; empty: it accepts them."""
    found = []
    if (outage := delivery.paused) is not None:
        state = sink_delivery_state(delivery)
        found.append(f"the sink is {state}: {outage.error} ({_since(outage, now)})")
    if delivery.locked:
        longest = min(delivery.locked.values(), key=lambda each: each.since)
        rows, table = len(delivery.locked), longest.table or "the sink"
        found.append(f"{rows} rows of {table} are locked: {longest.error} ({_since(longest, now)})")
    return "; ".join(found)


def sink_delivery_state(delivery: Delivery) -> Literal["running", "paused", "stopped"]:
    """Whether the sink accepts batches. Stopped: its failure is fatal, and retries are rare."""
    if delivery.paused is None:
        return "running"
    return "stopped" if delivery.stopped else "paused"


def _since(outage: Outage, now: float) -> str:
    return f"for {now - outage.since:.1f} s, attempt {outage.attempt}"


def _failing(what: str, failing: Failing | None, now: float) -> str:
    if failing is None:
        return ""
    return f"{what} for {now - failing.since:.1f} s, {failing.times} times: {failing.error}"


def _warning(name: str, *details: str) -> Check:
    detail = "; ".join(each for each in details if each)
    return Check(name=name, state="warn" if detail else "pass", detail=detail, gates=_SHOWN_ONLY)


# Gauges


def gauges(parts: Running | None) -> Iterator[Gauge]:
    """The gauges of a node; None: it is not running."""
    from .. import __version__

    yield "build_info", (__version__,), 1.0
    ready = all(each.state != "fail" for each in checks(parts) if "ready" in each.gates)
    yield "ready", (), float(ready)
    if parts is None:
        yield "draining", (), 0.0
        yield "backend_up", (), 0.0
        return
    _update_counters(parts)
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


def _update_counters(parts: Running) -> None:
    """Copy the counters that fast code keeps as plain ints."""
    counts = parts.instruments.counts
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
    yield from _state_set("breaker_state", "valkey", _BREAKER_STATES, link.breaker.state)
    for cached in caches:
        breaker: Breaker = cached.path.loads.source.breaker
        yield from _state_set("breaker_state", breaker.name, _BREAKER_STATES, breaker.state)


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
    # A read takes at least one entry of each shard.
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
    """Gauges of the leader."""
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
    # The ingress stream has one stream of dead letters, and so has each shard.
    yield "dead_letter_entries_max", (), float(durable.dead_letters_max * (shards + 1))


# Statistics


async def stats(parts: Running) -> dict[str, object]:
    """The document of ``/stats``; nodes/web/health.py describes its fields."""
    from .. import __version__

    _update_counters(parts)
    crew = parts.crew
    return {
        "version": __version__,
        "uptime_s": round(parts.clock.monotonic() - parts.started_at, 3),
        "backend": {
            "why": parts.backend.choice.why,
            "kind": parts.backend.facts.kind,
            "version": parts.backend.facts.version,
            "run_id": parts.backend.facts.run_id,
        },
        "connection": msgspec.to_builtins(parts.backend.link.statistics()),
        **await _from_server(parts),
        "namespace_keys": msgspec.to_builtins(await parts.key_count.get_count()),
        "log": msgspec.to_builtins(parts.follower.statistics()),
        "caches": {
            cached.name: {
                **msgspec.to_builtins(cached.path.near.statistics()),
                "loading": len(cached.path.flights),
            }
            for cached in parts.routes.caches.values()
        },
        "workers": None
        if crew is None
        else {
            **msgspec.to_builtins(crew.ownership.statistics()),
            "leading": crew.leader_metrics.leading,
            "dead_letters": parts.dead_letters.buried,
            "held": msgspec.to_builtins(crew.writes.held.statistics),
            "sinks": {
                name: sink_state(each, parts.clock.monotonic()) or "ok"
                for name, each in crew.deliveries.items()
            },
        },
        "counters": {" ".join(key): n for key, n in sorted(parts.instruments.counts.items()) if n},
    }


async def _from_server(parts: Running) -> dict[str, object]:
    """The values that only the server knows."""
    names, shards, refused = parts.names, range(parts.names.shards), list[ServerRefused]()
    try:
        keys = await parts.backend.link.call("DBSIZE")
        events = await _waiting(parts, refused)
        writes = await _lengths(parts, [names.part(n, "writes") for n in shards], refused)
        dead = await _lengths(parts, [names.part(n, "dead") for n in (EVENTS, *shards)], refused)
        memory = await _memory(parts)
    except ForebayError as error:
        return {**dict.fromkeys(_OF_THE_SERVER), "unavailable": str(error)}
    found = (keys, memory, {"events": events, "writes": writes}, dead)
    why = "; ".join(map(str, refused[:_REFUSED_SHOWN])) or None
    return {**dict(zip(_OF_THE_SERVER, found, strict=True)), "unavailable": why}


async def _lengths(parts: Running, streams: Sequence[str], refused: list[ServerRefused]) -> int:
    """The number of entries of all these streams."""
    replies = await _replies(parts, [("XLEN", name) for name in streams], refused)
    return sum(int(reply or 0) for reply in replies)


async def _replies(
    parts: Running, commands: Sequence[Sequence[Arg]], refused: list[ServerRefused]
) -> list[Reply]:
    """The replies, None for those that are ``refused``."""
    replies = await ask_many(parts.backend.link, commands)
    refused += [reply for reply in replies if isinstance(reply, ServerRefused)]
    return [None if isinstance(reply, ServerRefused) else reply for reply in replies]


async def _waiting(parts: Running, refused: list[ServerRefused]) -> int:
    """Events after the checkpoint. Applied events are trimmed, so all that remain are waiting."""
    stream = parts.names.events
    length, done, last = await _replies(
        parts,
        [
            ("XLEN", stream),
            ("HGET", parts.names.part(EVENTS, "done"), "events"),
            ("XREVRANGE", stream, "+", "-", "COUNT", 1),
        ],
        refused,
    )
    if _id(done) and last and _id(last[0][0]) == _id(done):
        return 0
    return int(length or 0)


def _id(raw: Reply) -> bytes:
    return b"" if raw is None else bytes(raw)


async def _memory(parts: Running) -> dict[str, object] | None:
    if parts.backend.facts.kind == "fakeredis":
        return None
    text = bytes(await parts.backend.link.call("INFO", "memory")).decode(errors="replace")
    wanted = ("used_memory", "maxmemory", "maxmemory_policy")
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: found.get(name) for name in wanted}

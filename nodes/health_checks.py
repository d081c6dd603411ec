"""The health checks of a node's work: each tells whether its part is stalled, and why.

W1  Stalled work is a warning: the work goes to other nodes, or waits; it fails no probe.
    Only a server that refuses all writes fails readiness, and a user who lacks a right without
    which no work is whole.
W2  A check names the oldest work that this node is responsible for, and the current failure: for
    how long, how often, and the last error.
W3  The checks read memory only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ..coordinator.log_once import Failing
from ..coordinator.rights import Missing
from .web.protocols import Check, Gate, State
from .workers.delivery import Delivery, Outage

if TYPE_CHECKING:
    from .runtime import Running
    from .workers.group import WorkerGroup

__all__ = ["sink_delivery_state", "sink_state", "work_checks"]

_READY: frozenset[Gate] = frozenset(("ready",))
_NONE: frozenset[Gate] = frozenset()
_SHARDS_SHOWN = 5


def work_checks(parts: Running) -> Iterator[Check]:
    now = parts.clock.monotonic()
    refusal = parts.write_check.refusal
    yield Check(
        name="valkey_writes",
        state="fail" if refusal else "pass",
        detail=_failing("the server refuses writes", refusal, now),
        gates=_READY,
    )
    yield _rights(parts.rights.missing)
    problem = parts.record.problem
    state: State = "fail" if problem else "pass"
    yield Check(name="namespace", state=state, detail=problem, gates=_READY)
    refreshes = _failing("refresh jobs are not read", parts.refreshes.failing.failing, now)
    if parts.crew is None:
        yield _warning("refreshes", refreshes)
        return
    yield from _checks_of(parts.crew, refreshes, now)
    for name, delivery in parts.crew.deliveries.items():
        yield _warning(f"sink {name}", sink_state(delivery, now))


def _rights(missing: Missing) -> Check:
    state: State = "pass" if not missing else "warn" if missing.is_partial else "fail"
    detail = f"{missing.problem}; {missing.fix}" if missing else ""
    return Check(name="rights", state=state, detail=detail, gates=_READY)


def _checks_of(crew: WorkerGroup, refreshes: str, now: float) -> Iterator[Check]:
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
    """The reason why a sink does not take all writes; empty if it takes them."""
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
    """Whether a sink takes batches; stopped: its failure is fatal, and it is tried rarely."""
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
    return Check(name=name, state="warn" if detail else "pass", detail=detail, gates=_NONE)

"""How a node is: its checks for probes, its gauges for Prometheus, its numbers for people.

Checks and gauges read memory only; ``stats`` asks the server too, and says so if it does
not answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from ..coordinator.link import Reply
from ..schemas.errors import ForebayError
from ..schemas.keys import EVENTS
from .running import Running
from .web.face import Check, Gate

if TYPE_CHECKING:
    from .node import Node

__all__ = ["checks", "gauges", "stats"]

_READY: frozenset[Gate] = frozenset(("ready",))
_START: frozenset[Gate] = frozenset(("ready", "start"))


def checks(node: Node) -> Sequence[Check]:
    """Readiness fails while Valkey is away, the logs are not current, or a drain runs."""
    if not node.is_running:
        return [Check(name="node", state="fail", detail="it is not running", gates=_START)]
    parts = node.parts
    link, now = parts.backend.link, parts.clock.monotonic()
    state = link.breaker.state
    suspect = sum(view.live_until <= now for view in parts.follower.views)
    found = [
        _check("valkey", link.connected, "not connected", _READY),
        _check("breaker", state == "closed", f"the breaker is {state}", _READY),
        _check("log", not suspect, f"{suspect} shards are not known to be current", _START),
        _check("drain", not parts.draining, "draining", _READY),
    ]
    for name, delivery in parts.crew.deliveries.items() if parts.crew else ():
        detail = f"the sink is stopped: {delivery.stopped}"
        found.append(_check(f"sink {name}", not delivery.stopped, detail, frozenset(), "warn"))
    return found


def _check(
    name: str, well: bool, detail: str, gates: frozenset[Gate], otherwise: str = "fail"
) -> Check:
    state = "pass" if well else otherwise
    return Check(name=name, state=state, detail="" if well else detail, gates=gates)  # type: ignore[arg-type]


def gauges(node: Node) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """What a scrape shows beside the counters."""
    from .. import __version__

    yield "build_info", (__version__,), 1.0
    if not node.is_running:
        yield "backend_up", (), 0.0
        return
    _bring_up_to_date(node)
    parts = node.parts
    link = parts.backend.link.statistics()
    follower = parts.follower.statistics()
    yield "backend_up", (), float(link.connected)
    yield "link_in_flight", (), float(link.in_flight)
    yield "log_suspect_shards", (), float(follower.suspect)
    staleness_s = parts.follower.staleness_s()
    if staleness_s < float("inf"):
        yield "log_staleness_seconds", (), staleness_s
    for state in ("closed", "open", "half_open"):
        yield "breaker_state", ("valkey", state), float(link.breaker == state)
    if parts.crew is not None:
        yield "owned_shards", (), float(parts.crew.ownership.statistics().shards)
        yield "writebehind_queue_entries", (), float(parts.crew.writes.backlog)
    for cached in node.caches:
        near = cached.path.near.statistics()
        yield "cache_entries", (cached.name,), float(near.entries)
        yield "cache_size_bytes", (cached.name,), float(near.bytes)


def _bring_up_to_date(node: Node) -> None:
    """Counters that live as plain ints where the counting has to be fast."""
    parts, counts = node.parts, node.instruments.counts
    link = parts.backend.link.statistics()
    counts["backend_timeouts",] = link.timeouts
    counts["backend_reconnects", "primary"] = link.reconnects
    for cached in node.caches:
        counts["cache_requests", cached.name, "near", "hit"] = cached.near_hits
        counts["cache_evictions", cached.name, "space"] = cached.path.near.evictions


async def stats(node: Node) -> dict[str, object]:
    """One document for people and scripts."""
    _bring_up_to_date(node)
    parts = node.parts
    crew = parts.crew
    return {
        "backend": {
            "why": parts.backend.choice.why,
            "kind": parts.backend.facts.kind,
            "version": parts.backend.facts.version,
            "run_id": parts.backend.facts.run_id,
        },
        "connection": msgspec.to_builtins(parts.backend.link.statistics()),
        **await _asked(parts),
        "log": msgspec.to_builtins(parts.follower.statistics()),
        "caches": {
            cached.name: {
                **msgspec.to_builtins(cached.path.near.statistics()),
                "loading": len(cached.path.flights),
            }
            for cached in node.caches
        },
        "workers": None
        if crew is None
        else {
            **msgspec.to_builtins(crew.ownership.statistics()),
            "dead_letters": parts.dead_letters.buried,
            "sinks": {name: each.stopped or "ok" for name, each in crew.deliveries.items()},
        },
        "counters": {" ".join(key): n for key, n in sorted(node.instruments.counts.items()) if n},
    }


async def _asked(parts: Running) -> dict[str, object]:
    """What only the server knows."""
    link, names = parts.backend.link, parts.names
    try:
        keys = await link.call("DBSIZE")
        backlog = {"events": await _waiting(parts, EVENTS, names.events, "events")}
        lengths = await link.call_many(
            [("XLEN", names.part(shard, "writes")) for shard in range(names.shards)]
        )
        backlog["writes"] = sum(n for n in lengths if isinstance(n, int))
        memory = await _memory(parts)
        dead = await link.call_many(
            [("XLEN", names.part(shard, "dead")) for shard in range(EVENTS, names.shards)]
        )
    except ForebayError as error:
        return {"keys": None, "memory": None, "backlog": None, "unavailable": str(error)}
    dead_letters = sum(n for n in dead if isinstance(n, int))
    return {"keys": keys, "memory": memory, "backlog": backlog, "dead_letters": dead_letters}


async def _waiting(parts: Running, shard: int, stream: str, name: str) -> int:
    """Entries behind the checkpoint; what was done is trimmed, so all that is there waits."""
    length, done, last = await parts.backend.link.call_many(
        [
            ("XLEN", stream),
            ("HGET", parts.names.part(shard, "done"), name),
            ("XREVRANGE", stream, "+", "-", "COUNT", 1),
        ]
    )
    if _id(done) and last and _id(last[0][0]) == _id(done):
        return 0
    return int(length)


def _id(raw: Reply) -> bytes:
    return b"" if raw is None else bytes(raw)


async def _memory(parts: Running) -> dict[str, object] | None:
    if parts.backend.facts.kind == "fakeredis":
        return None
    text = bytes(await parts.backend.link.call("INFO", "memory")).decode()
    wanted = ("used_memory", "maxmemory", "maxmemory_policy")
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: found.get(name) for name in wanted}

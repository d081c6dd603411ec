"""Node status: health checks for probes, statistics for people.

S1  Checks read memory only.
S2  ``stats`` has the same keys at all times. It asks the server too; while that does not
    answer, what only the server knows is null, and ``unavailable`` says why. A key of another
    type is left out of the figures, and named there.
S3  ``health_checks`` tells which work is stalled, and why; it only warns.
S4  A running node has started: a later failure of Valkey fails readiness alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ..coordinator.valkey.link import Arg, Reply
from ..coordinator.valkey.private_server import FIX
from ..coordinator.valkey.scripting import ask_many
from ..schemas.errors import ForebayError, ServerRefused
from ..schemas.keys import EVENTS
from .gauges import bring_up_to_date
from .health_checks import sink_state, work_checks
from .runtime import Running
from .web.protocols import Check, Gate
from .workers.held import HeldStatistics

if TYPE_CHECKING:
    from .node import Node

__all__ = ["checks", "stats"]

_READY: frozenset[Gate] = frozenset(("ready",))
_START: frozenset[Gate] = frozenset(("ready", "start"))
_OF_THE_SERVER = ("keys", "memory", "backlog", "dead_letters")
_REFUSED_SHOWN = 3


def checks(node: Node) -> Sequence[Check]:
    """Readiness fails while Valkey is away, the logs are not current, or a drain runs."""
    if not node.is_running:
        return [Check(name="node", state="fail", detail="it is not running", gates=_START)]
    parts = node.parts
    link, now = parts.backend.link, parts.clock.monotonic()
    state = link.breaker.state
    views = parts.follower.views
    suspect = sum(view.live_until <= now and not view.refused for view in views)
    found = [
        _check("valkey", link.connected, _away(parts), _READY),
        _check("breaker", state == "closed", f"the breaker is {state}", _READY),
        _check("log", not suspect, f"{suspect} shards are not known to be current", _READY),
        _check("drain", not parts.draining, "draining", _READY),
    ]
    if refused := [view.refused for view in views if view.refused]:
        found.append(_check("logs", False, "; ".join(refused[:3]), frozenset(), "warn"))
    wrong = parts.scripts.wrong_keys.problems()
    found.append(_check("keys", not wrong, "; ".join(wrong[:3]), frozenset(), "warn"))
    if parts.private_server is not None:
        problem = parts.private_server.problem
        found.append(_check("private_server", not problem, f"{problem}; {FIX}", _READY, "warn"))
    found += work_checks(parts)
    if parts.crew is not None:
        found.append(_held(parts.crew.writes.held.statistics))
    if parts.crew is not None and (ahead_ms := parts.crew.ingress.ahead_ms):
        detail = f"the newest id of {parts.names.events} is {ahead_ms / 1000:.0f} s ahead"
        found.append(_check("ingress_ids", False, detail, frozenset(), "warn"))
    return found


def _away(parts: Running) -> str:
    failure = parts.backend.link.failure
    return f"not connected: {failure}" if failure else "not connected"


def _held(held: HeldStatistics) -> Check:
    detail = (
        f"{held.writes} writes are held, the oldest ({held.example}) for {held.oldest_age_s:.0f} s:"
        " start a worker that declares their sink"
    )
    return _check("held writes", not held.writes, detail, frozenset(), "warn")


def _check(
    name: str, well: bool, detail: str, gates: frozenset[Gate], otherwise: str = "fail"
) -> Check:
    state = "pass" if well else otherwise
    return Check(name=name, state=state, detail="" if well else detail, gates=gates)  # type: ignore[arg-type]


async def stats(node: Node) -> dict[str, object]:
    """One document for people and scripts; what its fields mean is told by ``web.stats``."""
    from .. import __version__

    bring_up_to_date(node)
    parts = node.parts
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
        **await _asked(parts),
        "namespace_keys": msgspec.to_builtins(await parts.key_count.look()),
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
        "counters": {" ".join(key): n for key, n in sorted(node.instruments.counts.items()) if n},
    }


async def _asked(parts: Running) -> dict[str, object]:
    """What only the server knows."""
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
    """The entries of all of these."""
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
    """Events behind the checkpoint; what was done is trimmed, so all that is there waits."""
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

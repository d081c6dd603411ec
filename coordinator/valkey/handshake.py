"""Getting to know a server before anybody relies on it.

I1  It ends within the startup timeout: with the facts, or with one StartupError.
I2  A server that is not there yet, or not ready, is waited for; a fault that waiting does
    not cure ends the wait at once.
I3  Commands newer than the oldest supported server are probed, never concluded from the
    version.
I4  A primary is not a replica, a sentinel or a member of a cluster.

It asks on the link that will be used, so what worked here works later.
"""

from __future__ import annotations

from typing import Literal

import anyio
from msgspec import Struct

from ...schemas.errors import ForebayError, ServerRefused, StartupError, TimedOut, Unavailable
from ...schemas.replies import integer
from ..clock import Clock, ServerClock
from .dialer import read_info
from .embedded import FLOORS, ServerKind, new_enough
from .link import Commands, Link
from .startup_errors import Target

__all__ = [
    "PROBED",
    "Finding",
    "ServerFacts",
    "findings",
    "handshake",
    "probe",
    "read_clock",
]

Mode = Literal["standalone", "cluster", "sentinel"]
Persistence = Literal["unknown", "none", "everysec", "always"]  #: "none": no append-only file

PROBED = ("delifeq", "hgetdel", "hsetex", "msetex", "spublish", "wait", "waitaof")
_POLL_S = 0.005


class ServerFacts(Struct, frozen=True, kw_only=True):
    version: str
    kind: ServerKind
    run_id: str
    mode: Mode
    maxmemory_policy: str
    has: frozenset[str]  #: those of ``PROBED`` that it knows
    clock: ServerClock
    persistence: Persistence = "unknown"  #: how much a power failure loses


class Finding(Struct, frozen=True, kw_only=True):
    """Something that works and should not be left so."""

    name: str
    problem: str
    fix: str


async def handshake(link: Link, target: Target, *, clock: Clock) -> ServerFacts:
    last: ForebayError | None = None
    with anyio.move_on_after(target.options.startup_timeout_ms / 1000):
        while True:
            try:
                await _connected(link, target)
                return await _facts(link, target, clock=clock)
            except (Unavailable, ServerRefused) as error:
                last = error
            await _raise_if_certain(target, last)
            await anyio.sleep(_POLL_S)
    raise target.given_up(last or link.failure or TimedOut(target.options.startup_timeout_ms))


async def _connected(link: Link, target: Target) -> None:
    """Wait for the connection, unless a failed try shows that it is in vain."""
    judged: ForebayError | None = None
    while not link.connected:
        failure = link.failure
        if failure is not None and failure is not judged:
            judged = failure
            await _raise_if_certain(target, failure)
        await anyio.sleep(_POLL_S)  # a link tells of connections, not of tries


async def _raise_if_certain(target: Target, error: ForebayError) -> None:
    if fault := await target.certain(error):
        raise fault


async def _facts(link: Link, target: Target, *, clock: Clock) -> ServerFacts:
    info = read_info(await link.call("INFO"))
    kind: ServerKind = "valkey" if "valkey_version" in info else "redis"
    version = info.get("valkey_version") or info.get("redis_version", "")
    if fault := _unfit(info, target, kind=kind, version=version):
        raise fault
    if info.get("loading", "0") != "0":
        raise ServerRefused("LOADING", "its data are being loaded", "INFO")
    await link.call("PING")  # tells MISCONF and the like, which INFO does not
    return ServerFacts(
        version=version,
        kind=kind,
        run_id=info.get("run_id", ""),
        mode="standalone",
        maxmemory_policy=info.get("maxmemory_policy", ""),
        has=await probe(link),
        clock=await read_clock(link, clock),
        persistence=await _persistence(link, info),
    )


async def _persistence(commands: Commands, info: dict[str, str]) -> Persistence:
    """How soon accepted writes are on the disk; unknown, if the user may not ask."""
    if info.get("aof_enabled") == "0":
        return "none"
    try:
        _, value = await commands.call("CONFIG", "GET", "appendfsync")
    except (ServerRefused, ValueError):
        return "unknown"
    return "always" if bytes(value) == b"always" else "everysec"


def _unfit(
    info: dict[str, str], target: Target, *, kind: ServerKind, version: str
) -> StartupError | None:
    if not new_enough(kind, version):
        least = " or ".join(f"{name} {a}.{b}" for name, (a, b) in FLOORS.items())
        problem = f"it is {kind} {version or '(no version)'}, which is too old"
        return target.fault(problem, f"use {least}, or later")
    mode = info.get("server_mode") or info.get("redis_mode", "standalone")
    if mode == "sentinel":
        return target.fault("it is a sentinel", "name the server that it watches over")
    if mode == "cluster":
        return target.fault("it is a member of a cluster", "name a server that is not in one")
    if info.get("role") == "slave":
        return target.replica(f"{info.get('master_host')}:{info.get('master_port')}")
    return None


async def probe(commands: Commands) -> frozenset[str]:
    """Which commands there are; none, if the user may not ask."""
    try:
        reply = await commands.call("COMMAND", "INFO", *PROBED)
    except ServerRefused:
        return frozenset()
    return frozenset(name for name, found in zip(PROBED, reply, strict=True) if found)


async def read_clock(commands: Commands, clock: Clock) -> ServerClock:
    server_clock = ServerClock(clock)
    sent_at = clock.monotonic()
    seconds, micros = await commands.call("TIME")
    server_us = integer(seconds, "TIME") * 1_000_000 + integer(micros, "TIME")
    server_clock.observe(server_us, sent_at=sent_at, received_at=clock.monotonic())
    return server_clock


_LOSSES: dict[Persistence, str] = {
    "none": "there is no append-only file: a restart of the server loses what was accepted",
    "everysec": "the append-only file is synced once a second: a loss of power takes accepted "
    "events, writes and invalidations of the last second or two",
}


def findings(facts: ServerFacts, *, tls_insecure: bool, ours: bool = False) -> tuple[Finding, ...]:
    """``ours``: the server is embedded, and reports its persistence itself."""
    found = []
    if not ours and (problem := _LOSSES.get(facts.persistence, "")):
        fix = "set appendonly yes and appendfsync always; or change CACHE_VER after such a loss"
        found.append(Finding(name="persistence", problem=problem, fix=fix))
    if facts.kind == "fakeredis":
        problem = "fakeredis: nothing is kept, and no other process sees it"
        found.append(Finding(name="fake", problem=problem, fix="set valkey.url to a server"))
    if facts.maxmemory_policy.startswith("allkeys-"):
        problem = f"maxmemory-policy {facts.maxmemory_policy} may evict streams: events are lost"
        fix = "CONFIG SET maxmemory-policy volatile-lru, or noeviction"
        found.append(Finding(name="eviction", problem=problem, fix=fix))
    if tls_insecure:
        problem = "certificates and host names are not checked: anybody in between can read"
        fix = "set valkey.tls_ca_file, and valkey.tls_insecure to false"
        found.append(Finding(name="tls", problem=problem, fix=fix))
    return tuple(found)

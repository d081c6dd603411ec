"""Node status over HTTP: probes, the event loop's delay, /stats.

GET /livez, /readyz, /startupz, /healthz, and /readyz/<check> for a single check:

    200  ok                          503  [-]valkey failed: no reply for 3 s
    ?verbose                         [+]event_loop ok    [!]breaker warn: half open
    Accept: application/json         {"status": "warn", "checks": {"breaker": {...}}}

H1  A probe fails exactly when a check that gates it fails; a warning is a 200.
H2  /livez looks at the event loop only: never at Valkey.
H3  /healthz shows all checks, breakers included, and has the status of /readyz.
H4  No probe waits, or asks the server: all checks are read from memory.
H5  ``Heartbeat.lag_max_s`` is the longest delay of a timer on the event loop in the last
    ``WINDOW_S``, or of the timer that is overdue now.

GET /stats, one JSON object for people and scripts:

    instance, namespace  text
    version, uptime_s    of the program; seconds since the node started
    backend, connection  the server and the reason for it; state of the connection, in flight
    keys, memory, backlog, dead_letters
                         known to the server only: null while it does not answer, and
                         ``unavailable`` gives the reason; keys of another type are left out, and
                         named there
    namespace_keys       of those keys, the ones of the namespace; an estimate in a large database,
                         null where they cannot be counted
    log                  how far the node follows the shard logs
    caches               {name: {"entries": n, "bytes": n, "evictions": n, "loading": n, ...}}
    workers              shards owned, dead letters, sinks; null on a node without workers
    counters             every counter above zero, by name and labels

H6  Fields of /stats may be added; an existing field keeps its name and its meaning.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

from ...coordinator.clock import Clock
from .error_responses import answer, refuse
from .protocols import CONTEXT, Check, Gate, State

BEAT_S = 0.25
WINDOW_S = 15.0
STALLED_S = 10.0
ROUTES = frozenset(("/livez", "/readyz", "/readyz/{check}", "/startupz", "/healthz"))
_MARKS: dict[State, str] = {"pass": "[+]{} ok", "warn": "[!]{} warn", "fail": "[-]{} failed"}


def probe(gate: Gate) -> Handler:
    """The handler that shows the checks which gate one probe."""

    async def handle(request: web.Request) -> web.StreamResponse:
        checks = [each for each in _checks(request) if gate in each.gates]
        if only := request.match_info.get("check"):
            checks = [each for each in checks if each.name == only]
            if not checks:
                return refuse(404, "not_found", "this node has no such check", field="check")
        return _show(request, checks, gate)

    return handle


async def health(request: web.Request) -> web.StreamResponse:
    return _show(request, _checks(request), "ready")


def is_probe(request: web.Request) -> bool:
    """Whether this is a request to a probe."""
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical in ROUTES


def verdict(checks: Iterable[Check], gate: Gate) -> State:
    """The worst state; a check that does not gate this probe counts as a warning at most."""
    worst: State = "pass"
    for each in checks:
        if each.state == "fail" and gate in each.gates:
            return "fail"
        if each.state != "pass":
            worst = "warn"
    return worst


def _checks(request: web.Request) -> Sequence[Check]:
    context = request.app[CONTEXT]
    return (context.event_loop_check(), *context.served.checks())


def _show(request: web.Request, checks: Sequence[Check], gate: Gate) -> web.Response:
    state = verdict(checks, gate)
    status = 503 if state == "fail" else 200
    if "json" in request.headers.get("Accept", ""):
        shown = {each.name: {"status": each.state, "detail": each.detail} for each in checks}
        return answer({"status": state, "checks": shown}, status=status)
    if state != "fail" and "verbose" not in request.query:
        return web.Response(text="ok\n", status=status)
    return web.Response(text="".join(map(_line, checks)), status=status)


def _line(check: Check) -> str:
    reason = f": {check.detail}" if check.detail and check.state != "pass" else ""
    return _MARKS[check.state].format(check.name) + reason + "\n"


async def stats(request: web.Request) -> web.StreamResponse:
    served = request.app[CONTEXT].served
    always = {"instance": served.instance, "namespace": served.namespace}
    return answer({**always, **await served.stats()})


class Heartbeat:
    """Schedules a timer every ``BEAT_S``, and measures its delay."""

    __slots__ = ("_clock", "_due", "_handle", "_lags")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: float | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._lags: deque[tuple[float, float]] = deque()  #: time and delay of each beat

    def __repr__(self) -> str:
        return f"<Heartbeat: {self.lag_max_s():.3f} s late>"

    @contextmanager
    def beating(self) -> Iterator[None]:
        self._schedule()
        try:
            yield
        finally:
            if self._handle is not None:
                self._handle.cancel()
            self._due = None

    def lag_max_s(self) -> float:
        self._drop_old()
        return max([*(lag_s for _, lag_s in self._lags), self._overdue_s()])

    def check(self) -> Check:
        overdue_s = self._overdue_s()
        stalled = overdue_s > STALLED_S
        return Check(
            name="event_loop",
            state="fail" if stalled else "pass",
            detail=f"no beat for {overdue_s:.1f} s" if stalled else "",
            gates=frozenset(("live",)),
        )

    def _overdue_s(self) -> float:
        return 0.0 if self._due is None else max(0.0, self._clock.monotonic() - self._due)

    def _beat(self) -> None:
        self._lags.append((self._clock.monotonic(), self._overdue_s()))
        self._drop_old()
        self._schedule()

    def _drop_old(self) -> None:
        since = self._clock.monotonic() - WINDOW_S
        while self._lags and self._lags[0][0] < since:
            self._lags.popleft()

    def _schedule(self) -> None:
        self._due = self._clock.monotonic() + BEAT_S
        self._handle = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

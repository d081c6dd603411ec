"""Probes: /livez, /readyz, /startupz, /healthz, and /readyz/<check> for a single one.

    200  ok                          503  [-]valkey failed: no reply for 3 s
    ?verbose                         [+]event_loop ok    [!]breaker warn: half open
    Accept: application/json         {"status": "warn", "checks": {"breaker": {...}}}

H1  A probe fails exactly when a check that gates it fails; a warning is a 200.
H2  /livez looks at the event loop, and at what the node itself calls vital: never at Valkey.
H3  /healthz shows all there is, breakers too, and has the status of /readyz.
H4  No probe waits for anything, or asks the server: all checks are read from memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler

from .context import CONTEXT
from .error_responses import answer, refuse
from .protocols import Check, Gate, State

__all__ = ["ROUTES", "health", "is_probe", "probe", "verdict"]

ROUTES = frozenset(("/livez", "/readyz", "/readyz/{check}", "/startupz", "/healthz"))
_MARKS: dict[State, str] = {"pass": "[+]{} ok", "warn": "[!]{} warn", "fail": "[-]{} failed"}


def probe(gate: Gate) -> Handler:
    """The handler that shows the checks of one gate."""

    async def handle(request: web.Request) -> web.StreamResponse:
        checks = [each for each in _checks(request) if gate in each.gates]
        if only := request.match_info.get("check"):
            checks = [each for each in checks if each.name == only]
            if not checks:
                return refuse(404, "not_found", "there is no such check", field="check")
        return _show(request, checks, gate)

    return handle


async def health(request: web.Request) -> web.StreamResponse:
    return _show(request, _checks(request), "ready")


def is_probe(request: web.Request) -> bool:
    """Whether a probe answers this request."""
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical in ROUTES


def verdict(checks: Iterable[Check], gate: Gate) -> State:
    """The worst state; what does not gate this probe counts as a warning at most."""
    worst: State = "pass"
    for each in checks:
        if each.state == "fail" and gate in each.gates:
            return "fail"
        if each.state != "pass":
            worst = "warn"
    return worst


def _checks(request: web.Request) -> Sequence[Check]:
    context = request.app[CONTEXT]
    return (context.heartbeat.check(), *context.served.checks())


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

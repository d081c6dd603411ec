"""/v1/limits: what other programs ask of the cluster's rate limits.

    POST /v1/limits/{name}/take     200 a verdict       429 refused
    POST /v1/limits/{name}/reserve  200 a reservation   429 refused
    POST /v1/limits/{name}/settle   200 settled         404 no such reservation
    GET  /v1/limits                 the limits that this node knows

Each answer to the first two has the fields ``RateLimit-Policy`` and ``RateLimit``; a refusal also
``Retry-After``, and the limit that refused. Limits are those of the configuration and of the
application that the node runs; there is no way to make one from here.
"""

from __future__ import annotations

from aiohttp import web

from ...coordinator.limits.limit_set import LimitSet
from ...schemas.errors_limits import RateLimited
from ...schemas.limits import Verdict
from .coordination import (
    Reserve,
    Reserved,
    Settle,
    Settled,
    ShownLimits,
    Take,
    asked,
    decoder,
    serving,
)
from .error_responses import answer, refuse
from .limit_answers import fields_of
from .locks import segment

__all__ = ["list_all", "reserve", "settle", "take"]

_takes, _reserves, _settles = decoder(Take), decoder(Reserve), decoder(Settle)


async def take(request: web.Request) -> web.StreamResponse:
    limit = serving(request).limits.of(segment(request))
    body = await asked(request, _takes)
    verdict = await limit.take(body.subject, body.cost, partial=body.partial)
    if not verdict.allowed:
        return _refused(limit, verdict)
    return answer(verdict, headers=fields_of(limit.limits, verdict))


async def reserve(request: web.Request) -> web.StreamResponse:
    limits = serving(request).limits
    limit = limits.of(segment(request))
    body = await asked(request, _reserves)
    try:
        made = await limits.reservations.reserve(limit, body.subject, body.cost, ttl_s=body.ttl)
    except RateLimited as error:
        wait_ms = error.retry_after_ms
        return _refused(limit, Verdict(False, 0, error.limit, 0, wait_ms, wait_ms, "server"))
    headers = fields_of(limit.limits, made.verdict)
    return answer(Reserved(id=made.id, verdict=made.verdict), headers=headers)


async def settle(request: web.Request) -> web.StreamResponse:
    limits = serving(request).limits
    limit = limits.of(segment(request))
    body = await asked(request, _settles)
    await limits.reservations.settle(limit, body.subject, body.id, body.actual)
    return answer(Settled())


async def list_all(request: web.Request) -> web.StreamResponse:
    known = serving(request).limits.limits
    return answer(ShownLimits(limits=[known[name] for name in sorted(known)]))


def _refused(limit: LimitSet, verdict: Verdict) -> web.Response:
    problem = f"limit {verdict.limit} is reached, try again in {verdict.retry_after_ms} ms"
    fix = "try again after the time in Retry-After"
    headers = fields_of(limit.limits, verdict)
    return refuse(429, "rate_limited", problem, fix=fix, headers=headers, more={"verdict": verdict})

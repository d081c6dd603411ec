"""Middleware for aiohttp applications.

    limit = rate_limit_middleware(node.limit("api"))
    app = web.Application(middlewares=[request_scope_middleware, limit])

Request scope (see nodes/request_scope.py):

M1  Each request has a scope of its own while its handler runs.
M2  A WebSocket has no scope: it lasts, and its reads must see new values.
M3  Answers, errors and cancellation pass unchanged.

Rate limits (see limit_answers.py):

R1  A refused request gets 429 and never reaches the handler.
R2  An answer carries the rate limit fields, unless the handler has set them itself, or has begun
    to send the answer before it returned.
R3  Requests whose ``subject`` is None pass unlimited.

The default subject is ``request.remote``; headers of a proxy are not read.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ..limits import RateLimit
from ..request_scope import request_scope
from .limit_answers import PROBLEM_TYPE, fields_of, problem_of, subject_of


@web.middleware
async def request_scope_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.headers.get("Upgrade", "").lower() == "websocket":
        return await handler(request)
    async with request_scope():
        return await handler(request)


def client_address(request: web.Request) -> str | None:
    return request.remote or ""


def rate_limit_middleware(
    limit: RateLimit,
    *,
    subject: Callable[[web.Request], str | None] = client_address,
    cost: Callable[[web.Request], int] = lambda _: 1,
) -> Middleware:
    @web.middleware
    async def limited(request: web.Request, handler: Handler) -> web.StreamResponse:
        who = subject(request)
        if who is None:
            return await handler(request)
        verdict = await limit.take(subject_of(who), cost(request))
        fields = fields_of(limit.limits, verdict)
        if not verdict.allowed:
            headers = {**fields, "Content-Type": PROBLEM_TYPE, "Cache-Control": "no-store"}
            return web.Response(status=429, body=problem_of(verdict), headers=headers)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            _add(fields, error)
            raise
        if not response.prepared:
            _add(fields, response)
        return response

    return limited


def _add(fields: dict[str, str], response: web.StreamResponse) -> None:
    for name, value in fields.items():
        response.headers.setdefault(name, value)

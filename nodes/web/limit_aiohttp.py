"""Rate limits for aiohttp applications.

    app = web.Application(middlewares=[rate_limit_middleware(node.limit("api"))])

M1  A request that is refused gets 429 and never reaches the handler; see limit_answers.
M2  An answer carries the fields, unless the handler has set them itself, or has begun to send
    it before it returned.
M3  Requests whose ``subject`` is None pass unlimited.

The subject is by default ``request.remote``; headers of a proxy are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ..limits import RateLimit
from .limit_answers import PROBLEM_TYPE, fields_of, problem_of, subject_of

__all__ = ["rate_limit_middleware"]


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

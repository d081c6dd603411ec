"""Request scope for aiohttp applications.

    app = web.Application(middlewares=[request_scope_middleware])

M1  Each request has a scope of its own while its handler runs.
M2  A WebSocket has none: it lasts, and what it reads must not.
M3  Answers, errors and cancellation pass as they are.

See nodes/request_scope.py for what a scope promises.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from ..request_scope import request_scope


@web.middleware
async def request_scope_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.headers.get("Upgrade", "").lower() == "websocket":
        return await handler(request)
    async with request_scope():
        return await handler(request)

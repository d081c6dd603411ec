"""Request scope for ASGI applications: FastAPI, Starlette, Litestar, Quart, Django.

    app.add_middleware(RequestScopeMiddleware)

M1  Each HTTP request has a scope of its own, from its first line of code to the last byte of
    the answer. What runs after the answer, such as background tasks, reads without one.
M2  The lifespan and WebSockets have none: they last, and what they read must not.
M3  Messages, errors and cancellation pass as they are.

Nothing but ASGI itself is needed. See nodes/request_scope.py for what a scope promises.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..request_scope import request_scope

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequestScopeMiddleware:
    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        block = request_scope()

        async def send_on(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                block.close()

        async with block:
            await self._app(scope, receive, send_on)

"""Middleware for ASGI applications: FastAPI, Starlette, Litestar, Quart, Django.

    app.add_middleware(RequestScopeMiddleware)
    app.add_middleware(RateLimitMiddleware, limit=node.limit("api"))

Request scope (see nodes/request_scope.py):

M1  Each HTTP request has a scope of its own, from its first line of code to the last byte of
    the answer. Code that runs after the answer, such as background tasks, reads without a scope.
M2  The lifespan and WebSockets have no scope: they last, and their reads must see new values.
M3  Messages, errors and cancellation pass unchanged.

Rate limits (see limit_answers.py):

R1  A refused request gets 429 and never reaches the application.
R2  An answer of the application carries the rate limit fields, unless it has set them itself.
R3  The lifespan, WebSockets, and requests whose ``subject`` is None pass unlimited.

The default subject is the client's address as reported by the server. Behind a proxy, configure the
server to trust that proxy's headers, or pass ``subject``: the middleware reads no headers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ...schemas.limits import Verdict
from ..limits import RateLimit
from ..request_scope import request_scope
from .limit_answers import PROBLEM_TYPE, fields_of, problem_of, subject_of

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


def client_address(scope: Scope) -> str | None:
    client = scope.get("client")
    return str(client[0]) if client else ""


class RateLimitMiddleware:
    def __init__(
        self,
        app: App,
        *,
        limit: RateLimit,
        subject: Callable[[Scope], str | None] = client_address,
        cost: Callable[[Scope], int] = lambda _: 1,
    ) -> None:
        self._app = app
        self._limit = limit
        self._subject = subject
        self._cost = cost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        subject = self._subject(scope) if scope["type"] == "http" else None
        if subject is None:
            await self._app(scope, receive, send)
            return
        verdict = await self._limit.take(subject_of(subject), self._cost(scope))
        fields = _encoded(fields_of(self._limit.limits, verdict))
        if not verdict.allowed:
            await _refuse(verdict, fields, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                own = {bytes(name).lower() for name, _ in headers}
                headers += [field for field in fields if field[0] not in own]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_on)


def _encoded(fields: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in fields.items()]


async def _refuse(verdict: Verdict, fields: list[tuple[bytes, bytes]], send: Send) -> None:
    body = problem_of(verdict)
    headers = [
        *fields,
        (b"content-type", PROBLEM_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})

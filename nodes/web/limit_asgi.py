"""Rate limits for ASGI applications: FastAPI, Starlette, Litestar, Quart, Django.

    app.add_middleware(RateLimitMiddleware, limit=node.limit("api"))

M1  A request that is refused gets 429 and never reaches the application; see limit_answers.
M2  An answer of the application carries the fields, unless it has set them itself.
M3  The lifespan and WebSockets pass unlimited, as do requests whose ``subject`` is None.

The subject is by default the client's address as the server gives it. Behind a proxy have the
server trust that proxy's headers, or give ``subject``: this does not look at them.
"""

from __future__ import annotations

from collections.abc import Callable

from ...schemas.limits import Verdict
from ..limits import RateLimit
from .asgi import App, Message, Receive, Scope, Send
from .limit_answers import PROBLEM_TYPE, fields_of, problem_of, subject_of

__all__ = ["RateLimitMiddleware"]


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

"""An ASGI application for processes of a web server, without a framework: one node, one cache.

``GET /put/7`` sets product 42, ``GET /`` reads it, and ``GET /readyz`` shows the node's checks.
Each answer names the process.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

import forebay

__all__ = ["app"]

node = forebay.Node("shop")


@node.cached("product:{id}", ttl=60)
async def product(id: int) -> int:
    return 0


async def app(
    scope: Mapping[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] == "lifespan":
        await receive()
        async with node:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = msgspec.json.encode({"pid": os.getpid(), **await answer(scope["path"])})
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def answer(path: str) -> dict[str, Any]:
    if path == "/readyz":
        return {each.name: {"status": each.state, "detail": each.detail} for each in node.checks()}
    if path.startswith("/put/"):
        await product.put(42, int(path.removeprefix("/put/")))
    return {"value": await product(42)}

"""An ASGI application for the worker processes of a web server, without a framework.

``GET /7`` reads product 7, ``GET /put/7/12`` sets it, ``GET /readyz`` returns the node checks.
Each response contains the process id. WEBSHOP_DIR holds one file for each product, and ``loads``: a
line for each load, with the cache version and the product. Another service has stored products too.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

import forebay

LOADS = "loads"

shop = Path(os.environ.get("WEBSHOP_DIR", "."))
node = forebay.Node("shop")


@node.cached("product:{id}", ttl=600, legacy_key="v1:product:{id}")
async def product(id: int) -> int | None:
    with (shop / LOADS).open("a") as loads:  # appended in one piece
        loads.write(f"{node.settings.cache.version} {id}\n")
    found = shop / str(id)
    return int(found.read_text()) if found.exists() else None


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
    *command, last = path.strip("/").split("/")
    if command[:1] == ["put"]:
        await product.put(int(command[1]), int(last))
        last = command[1]
    return {"value": await product(int(last))}

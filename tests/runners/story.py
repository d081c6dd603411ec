"""A service that uses a node, to be run by every way to run a loop.

Two nodes on the server of STORY_URL, in a namespace that begins with STORY_NAMESPACE: batch
loads, a refresh in the background, an explanation by both, a connection that is lost, a write to
a sink, a limit, and locks over HTTP. ``tell`` returns the result of each;
``EXPECTED`` has the expected results.

As a module it is an application for uvicorn (``story:app``) and for aiohttp (``story:make_app``).
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import anyio
import msgspec
from aiohttp import web

import forebay
from forebay.schemas.settings import Http, NodeSettings, Settings, Valkey

_numbers = itertools.count(1)

EXPECTED = {
    "batch": [14, [2, 4, 6]],
    "refresh": ["old", "new"],
    "explain": [2, 0],
    "reconnect": True,
    "sink": [["product:1", 10]],
    "limit": [True, False],
    "locks": [200, 200, 200, 200],
}


class Story:
    """``async with Story() as story: await story.tell()``"""

    def __init__(self) -> None:
        self.source = "old"
        self.sunk: list[list[Any]] = []
        self.url = ""
        self._namespace = f"{os.environ['STORY_NAMESPACE']}-{next(_numbers)}"
        self.nodes = [self._node() for _ in range(2)]

    def _node(self) -> forebay.Node:
        settings = Settings(
            node=NodeSettings(namespace=self._namespace, shards=4),
            valkey=Valkey(url=os.environ["STORY_URL"]),
            http=Http(port=0),
        )
        node = forebay.Node(settings=settings)

        @node.cached("product:{id}", ttl=60)
        async def product(id: int) -> int:
            return id

        @product.batch
        async def products(ids: list[int]) -> dict[int, int]:
            return {each: each * 2 for each in ids}

        @node.cached("page:{name}", ttl=60, stale_for=600)
        async def page(name: str) -> str:
            return self.source

        @node.sink("product:{id}")
        async def save(writes: list[forebay.Write[int]]) -> None:
            self.sunk += [[write.key, write.value] for write in writes]

        self.product, self.page = product, page
        self.limit = node.limit("api", rate=1, per=3600, burst=1)
        return node

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for node in self.nodes:
                await stack.enter_async_context(node)
            self.url = await stack.enter_async_context(node.serving())
            yield

    async def tell(self) -> dict[str, object]:
        with anyio.fail_after(30):
            return {
                "batch": [await self.product(7), await self.product.many([1, 2, 3])],
                "refresh": await self._refreshed(),
                "explain": await self._explained(),
                "reconnect": await self._reconnected(),
                "sink": await self._sunk(),
                "limit": [(await self.limit.take("me")).allowed for _ in range(2)],
                "locks": await self._locked(),
            }

    async def _refreshed(self) -> list[str]:
        first = await self.page("home")
        self.source = "new"
        await self.nodes[-1].invalidate([self.page.key("home")], soft=True)
        while (now := await self.page("home")) == first:
            await anyio.sleep(0.01)
        return [first, now]

    async def _explained(self) -> list[int]:
        told = (await self.nodes[-1].explain("product:7")).nodes
        return [len(told.answers), told.silent]

    async def _reconnected(self) -> bool:
        """Whether the scripts were loaded into the server after the connection was lost."""
        parts = self.nodes[-1]._parts
        link, script = parts.backend.link, parts.scripts["entry_begin"]
        await link.call("SCRIPT", "FLUSH")
        mine = await link.call("CLIENT", "ID")
        killer = self.nodes[0]._parts.backend.link
        await killer.call("CLIENT", "KILL", "ID", mine)
        while True:
            try:
                if (await link.call("SCRIPT", "EXISTS", script.sha))[0] == 1:
                    return True
            except forebay.Unavailable:
                pass
            await anyio.sleep(0.01)

    async def _sunk(self) -> list[list[Any]]:
        await self.product.write_behind(1, 10)
        while not self.sunk:
            await anyio.sleep(0.01)
        return self.sunk

    async def _locked(self) -> list[int]:
        """One client releases a lock to another client that waits."""
        first, second = _nonces_of_one_bucket()
        statuses: list[int] = []
        async with aiohttp.ClientSession(self.url) as session, anyio.create_task_group() as tasks:

            async def ask(method: str, nonce: str) -> None:
                if method == "DELETE":
                    asked = session.delete(f"/v1/locks/job?nonce={nonce}")
                else:
                    body = {"lease": 30, "timeout": 20, "nonce": nonce}
                    asked = session.post("/v1/locks/job", json=body)
                async with asked as response:
                    statuses.append(response.status)

            await ask("POST", first)
            tasks.start_soon(ask, "POST", second)
            while not (await self.nodes[-1].locks.show("job")).queue:
                await anyio.sleep(0.01)
            await ask("DELETE", first)
            while len(statuses) < 3:
                await anyio.sleep(0.01)
            await ask("DELETE", second)
        return statuses


def _nonces_of_one_bucket() -> tuple[str, str]:
    """A node gets a message about the handover between the clients."""
    nonces: dict[int, str] = {}
    for number in range(1_000):
        nonce = f"nonce-of-a-client-{number}"
        before = nonces.setdefault(zlib.crc32(nonce.encode()) % 64, nonce)
        if before != nonce:
            return before, nonce
    raise AssertionError


async def told() -> bytes:
    story = Story()
    async with story.running():
        return msgspec.json.encode(await story.tell())


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI: the nodes are started in the lifespan, and the story is told in a request."""
    if scope["type"] == "lifespan":
        await receive()
        async with _STORY.running():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = msgspec.json.encode(await _STORY.tell())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def make_app(_: Sequence[str] = ()) -> web.Application:
    async def run(_: web.Application) -> AsyncIterator[None]:
        async with _STORY.running():
            yield

    async def tell(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(await _STORY.tell()))

    application = web.Application()
    application.cleanup_ctx.append(run)
    application.router.add_get("/", tell)
    return application


_STORY: Any = Story() if "STORY_URL" in os.environ else None

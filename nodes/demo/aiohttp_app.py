"""A product service on aiohttp that writes to its database directly: copy and change it.

    pip install 'forebay[embedded,sql]'
    python -m aiohttp.web -H 127.0.0.1 -P 8080 forebay.nodes.demo.aiohttp_app:make_app

    curl -X PUT localhost:8080/products/1 --json '{"name": "kettle", "price": 1900}'
    curl localhost:8080/products/1
    curl localhost:8080/catalog

Several processes may run with one FOREBAY_URL and one database: a change through one process is
visible in all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

import aiosqlite
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

import forebay

DATABASE = Path("shop.db").absolute()
TABLE = """CREATE TABLE IF NOT EXISTS products (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, price INTEGER NOT NULL
)"""


class Offer(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    price: Annotated[int, msgspec.Meta(ge=0, le=10**9)]  # in cents


class Product(Offer, frozen=True):
    id: int


node = forebay.Node("shop")
routes = web.RouteTableDef()
PRODUCT = r"/products/{id:\d{1,18}}"


# Fresh for a minute unless a write invalidates it earlier; absent products are cached too.
@node.cached("product:{id}", ttl=60, stale_for=300)
async def product(id: int) -> Product | None:
    async with aiosqlite.connect(DATABASE, timeout=10) as database:
        query = "SELECT name, price, id FROM products WHERE id = ?"
        rows = list(await database.execute_fetchall(query, (id,)))
    return Product(*rows[0]) if rows else None


@node.cached("catalog", ttl=60, tags=["catalog"])
async def catalog() -> list[int]:
    async with aiosqlite.connect(DATABASE, timeout=10) as database:
        query = "SELECT id FROM products ORDER BY id LIMIT 100"
        return [row[0] for row in await database.execute_fetchall(query)]


# Commit first, then invalidate: in the other order a reader could load the old row in between.
# If the invalidation fails, the client gets 503 and repeats the request; if that is not enough,
# use write-behind as fastapi_app.py does.
async def store(id: int, statement: str, values: Sequence[object]) -> None:
    async with aiosqlite.connect(DATABASE, timeout=10) as database:
        await database.execute(statement, values)
        await database.commit()
    await node.invalidate([product.key(id)], tags=["catalog"])


def id_of(request: web.Request) -> int:
    return int(request.match_info["id"])


def answer(value: object, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


@routes.get(PRODUCT)
async def get_product(request: web.Request) -> web.Response:
    found = await product(id_of(request))
    return answer({"error": "product not found"}, 404) if found is None else answer(found)


@routes.put(PRODUCT)
async def put_product(request: web.Request) -> web.Response:
    new = id_of(request)
    offer = msgspec.json.decode(await request.read(), type=Offer)
    statement = "INSERT OR REPLACE INTO products (id, name, price) VALUES (?, ?, ?)"
    await store(new, statement, (new, offer.name, offer.price))
    return answer(await product(new))


@routes.delete(PRODUCT)
async def delete_product(request: web.Request) -> web.Response:
    old = id_of(request)
    await store(old, "DELETE FROM products WHERE id = ?", (old,))
    return web.Response(status=204)


@routes.get("/catalog")
async def get_catalog(request: web.Request) -> web.Response:
    found = [await product(each) for each in await catalog()]
    return answer([each for each in found if each is not None])


@routes.get("/readyz")
async def ready(request: web.Request) -> web.Response:
    failing = [each.name for each in node.checks() if each.state == "fail"]
    return answer({"failing": failing}, 503 if failing else 200)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except msgspec.DecodeError as error:
        return answer({"error": f"{error}"}, 400)
    except (forebay.Backpressure, forebay.Unavailable) as error:
        return answer({"error": f"{error}"}, 503)


async def run_node(_: web.Application) -> AsyncIterator[None]:
    async with aiosqlite.connect(DATABASE, timeout=10) as database:
        await database.execute(TABLE)
    async with node:
        yield


def make_app(_: Sequence[str] = ()) -> web.Application:
    app = web.Application(middlewares=[errors, forebay.request_scope_middleware])
    app.add_routes(routes)
    app.cleanup_ctx.append(run_node)
    return app

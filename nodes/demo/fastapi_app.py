"""A product service on FastAPI with write-behind to SQLite: copy and change it.

    pip install 'forebay[embedded,sql]' fastapi uvicorn
    uvicorn forebay.nodes.demo.fastapi_app:app

    curl -X PUT localhost:8000/products/1 --json '{"name": "kettle", "price": 1900}'
    curl localhost:8000/products/1
    curl localhost:8000/catalog

Several processes may run with one FOREBAY_URL and one database: a change through one process is
visible in all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiosqlite
import fastapi
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import Field

import forebay

DATABASE = Path("shop.db").absolute()
TABLE = """CREATE TABLE IF NOT EXISTS products (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, price INTEGER NOT NULL, version BIGINT
)"""

Id = Annotated[int, fastapi.Path(ge=1, lt=2**63)]


@dataclass(frozen=True)
class Offer:
    name: Annotated[str, Field(min_length=1, max_length=200)]
    price: Annotated[int, Field(ge=0, le=10**9)]  # in cents


@dataclass(frozen=True)
class Product(Offer):
    id: int


node = forebay.Node("shop")


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


# Write-behind writes go to this table: in order, in batches, each exactly once.
node.sink("product:{id}", forebay.SqlSink(f"sqlite+aiosqlite:///{DATABASE}", table="products"))


@node.on_start
async def create_table() -> None:
    async with aiosqlite.connect(DATABASE, timeout=10) as database:
        await database.execute(TABLE)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with node:  # leaving the block drains: accepted writes are then in the database
        yield


app = FastAPI(title="Shop", lifespan=lifespan)
app.add_middleware(forebay.RequestScopeMiddleware)


async def on_sale(id: Id) -> None:
    if await product(id) is None:
        raise HTTPException(404, f"product {id} not found")


# The request scope makes the second read return the value that the check has seen.
@app.get("/products/{id}", dependencies=[Depends(on_sale)])
async def get_product(id: Id) -> Product | None:
    return await product(id)


# Readers see it at once and the database soon; then the catalog is invalidated.
@app.put("/products/{id}", status_code=202)
async def put_product(id: Id, offer: Offer) -> Product | None:
    new = Product(offer.name, offer.price, id)
    await product.write_behind(id, new, invalidates_tags=["catalog"])
    return await product(id)


@app.delete("/products/{id}", status_code=202)
async def delete_product(id: Id) -> None:
    await product.write_behind(id, None, invalidates_tags=["catalog"])


@app.get("/catalog")
async def get_catalog() -> list[Product]:
    found = [await product(each) for each in await catalog()]
    return [each for each in found if each is not None]


@app.get("/readyz")
async def ready() -> JSONResponse:
    failing = [each.name for each in node.checks() if each.state == "fail"]
    return JSONResponse({"failing": failing}, 503 if failing else 200)


# The queue of writes is full, or Valkey is unavailable: the client should retry.
@app.exception_handler(forebay.Backpressure)
@app.exception_handler(forebay.Unavailable)
async def try_later(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"{error}"}, 503, headers={"Retry-After": "1"})

"""A program that prints which modules a running event loop had to wait for: see test_node.py.

usage: python late_imports.py VALKEY_URL SQLITE_FILE
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import threading
import urllib.error
import urllib.request

import pydantic
from msgspec import Struct

import forebay
from forebay.nodes.node import Node
from forebay.schemas.settings import CacheDefaults, Http, NodeSettings, Settings, Valkey

late: list[str] = []


def note(event: str, details: tuple[object, ...]) -> None:
    if event != "import" or threading.current_thread() is not threading.main_thread():
        return
    if asyncio._get_running_loop() is None:
        return
    name = str(details[0])
    if name.partition(".")[0] not in sys.stdlib_module_names:
        late.append(name)


class Review(pydantic.BaseModel):
    text: str


class Product(Struct):
    id: int
    name: str


def declare(url: str, file: str) -> Node:
    with sqlite3.connect(file) as database:
        database.execute(
            "CREATE TABLE product (id INTEGER PRIMARY KEY, name TEXT, version INTEGER)"
        )
    node = Node(
        settings=Settings(
            node=NodeSettings(namespace="late-imports", shards=4),
            valkey=Valkey(url=url),
            cache=CacheDefaults(compression="zstd", compress_over_bytes=10),
            http=Http(port=0),
        )
    )

    @node.cached("product:{id}", ttl=60)
    async def product(id: int) -> Product | None:
        return Product(id=id, name="x" * 1_000)

    @node.cached("review:{id}", ttl=60)
    async def review(id: int) -> Review | None:
        return Review(text="x" * 1_000)

    node.sink("product:{id}", forebay.SqlSink(f"sqlite:///{file}", table="product", key=["id"]))
    return node


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


PATHS = ("/readyz", "/healthz", "/stats", "/metrics", "/openapi.json", "/v1/cache/product:1")


async def main(node: Node) -> None:
    product, review = node.caches
    async with node, node.serving() as url:
        late.clear()
        assert await product(1) is not None
        assert await review(1) is not None
        await product.write_behind(1, Product(id=1, name="y" * 1_000), until="sink")
        statuses = [await asyncio.to_thread(get, url + path) for path in PATHS]
        assert statuses == [200] * len(PATHS), statuses
        async with node.lock("rebuild"):
            await node.limit("api", rate=5).take("tenant")
        await node.explain("product:1")
    print(json.dumps(late))


if __name__ == "__main__":
    made = declare(*sys.argv[1:])
    sys.addaudithook(note)
    asyncio.run(main(made))

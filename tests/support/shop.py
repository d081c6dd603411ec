"""An application for the node processes of tests: products in files, a sink that is a file.

SHOP_DIR holds one file a product, and what the sink got: a line of JSON for each write, in
the order in which they came. SHOP_SINK says how the sink behaves: ``hang`` waits for ever,
``block`` holds up the event loop as well. The file ``reached`` is there once it was called.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import msgspec

import forebay

SHOP = Path(os.environ.get("SHOP_DIR", "."))
SINK = os.environ.get("SHOP_SINK", "")
SUNK, REACHED = "sunk.jsonl", "reached"

node = forebay.Node("shop")


class Product(msgspec.Struct, frozen=True):
    id: int
    price: int


@node.cached("product:{id}", ttl=600, tags=["catalog"])
async def product(id: int) -> Product | None:
    try:
        return Product(id, int((SHOP / f"{id}").read_text()))
    except FileNotFoundError:
        return None


@node.cached("broken:{id}", ttl=600)
async def broken(id: int) -> int:
    raise RuntimeError("no database")


@node.sink("product:{id}")
async def save(writes: list[forebay.Write[Product]]) -> None:
    (SHOP / REACHED).touch()
    if SINK == "hang":
        await anyio.sleep_forever()
    if SINK == "block":
        time.sleep(60)
    lines = [
        msgspec.json.encode({"key": w.key, "version": w.version, "value": w.value}) for w in writes
    ]
    with (SHOP / SUNK).open("ab") as sunk:
        sunk.write(b"\n".join([*lines, b""]))

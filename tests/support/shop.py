"""The application of the tests' node processes: products in files, and a sink that is a file.

SHOP_DIR holds one file for each product, and the sink's file: one line of JSON for each write, in
the order of the writes. SHOP_SINK selects the sink's behaviour: ``hang`` never returns, ``block``
blocks the event loop. The sink creates the file ``reached`` when it is called.
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

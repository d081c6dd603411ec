"""Releases of one application, for node processes that run side by side in a rolling deploy.

``v1`` has the cache and sink ``order:{id}``; ``v2`` adds ``invoice:{id}``; ``v3`` gives that
another type. A process of v2 or v3 writes ``ROLLOUT_WRITES`` invoices when it starts. ``bare``
declares nothing. Each sink appends a line of JSON for each write to a file in ``ROLLOUT_DIR``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import forebay

DIR = Path(os.environ.get("ROLLOUT_DIR", "."))
WRITES = int(os.environ.get("ROLLOUT_WRITES", "0"))


class Invoice(msgspec.Struct, frozen=True):
    id: int
    total: int


def bare() -> forebay.Node:
    return forebay.Node("shop")


def v1() -> forebay.Node:
    node = bare()

    @node.cached("order:{id}", ttl=600)
    async def order(id: int) -> int | None:
        return None

    @node.sink("order:{id}")
    async def save_order(writes: list[forebay.Write[int]]) -> None:
        _append("order", writes)

    return node


def v2() -> forebay.Node:
    return _with_invoices(Invoice, lambda number: Invoice(number, 100 * number))


def v3() -> forebay.Node:
    return _with_invoices(str, lambda number: f"{number}: {100 * number}.00")


def _with_invoices(type_: Any, value_of: Callable[[int], object]) -> forebay.Node:
    node = v1()

    async def load(id: int) -> Any:
        return None

    load.__annotations__["return"] = type_ | None
    invoice = node.cached("invoice:{id}", ttl=600, name="invoice")(load)

    @node.sink("invoice:{id}")
    async def save_invoice(writes: list[forebay.Write[Any]]) -> None:
        _append("invoice", writes)

    @node.on_start
    async def write_invoices() -> None:
        for number in range(WRITES):
            await invoice.write_behind(number, value_of(number))

    return node


def _append(name: str, writes: list[forebay.Write[object]]) -> None:
    lines = [msgspec.json.encode({"key": w.key, "value": w.value}) for w in writes]
    with (DIR / name).open("ab") as file:
        file.write(b"\n".join([*lines, b""]))

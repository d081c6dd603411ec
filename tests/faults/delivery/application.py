"""The application of a run: flights in PostgreSQL; its second version has gates, too.

Workers, the services that call write_behind and the node that reads at the end all make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg
import msgspec

import forebay
from faults.delivery.plants import planted
from faults.delivery.setting import DeliverySetup
from faults.delivery.workload import workload
from forebay.nodes.sinks.base import Sink
from forebay.schemas.settings import Settings

_TTL_S = 3_600


class Flight(msgspec.Struct, frozen=True, kw_only=True):
    event: str
    seq: int
    status: str
    dep_delay: int | None
    tailnum: str | None


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    event: str
    seq: int
    gate: str


class Application:
    """A node that is not started yet, and its caches by the first part of their keys."""

    def __init__(self, setup: DeliverySetup, settings: Settings | None = None) -> None:
        namespace = None if settings else setup.namespace
        self.node = forebay.Node(namespace, settings=settings)
        self._setup = setup
        self._pool: asyncpg.Pool | None = None
        self.node.on_start(self._connect)
        self.node.on_stop(self._disconnect)
        types: dict[str, type] = {"flight": Flight}
        if setup.application > 1:
            types["gate"] = Gate
        self._types = types
        self.caches = {table: self._declare(table, kind) for table, kind in types.items()}

    async def write_behind(self, key: str, value: Mapping[str, Any]) -> None:
        table, _, name = key.partition(":")
        await self.caches[table].write_behind(name, self._types[table](**value))

    async def event_of(self, key: str) -> tuple[str, bool]:
        """The event whose value is read, "" for none; and whether it is flagged as stale."""
        table, _, name = key.partition(":")
        found = await self.caches[table].get_with_info(name)
        return (found.value.event if found.value else "", found.stale)

    def _declare(self, table: str, kind: type) -> Any:
        columns = ", ".join(kind.__struct_fields__)
        words = f"SELECT {columns} FROM {table} WHERE id = $1"

        async def load(id: str) -> Any:
            assert self._pool is not None
            row = await self._pool.fetchrow(words, id)
            return kind(**row) if row else None

        load.__name__ = table
        load.__annotations__ = {"id": str, "return": kind | None}
        sink: Sink = forebay.SqlSink(self._setup.database, table=table)
        if table == "flight" and self._setup.planted:
            made = workload(self._setup.seed, self._setup.events).values()
            events = {(event.key, event.seq): event.event for each in made for event in each}
            sink = planted(sink, self._setup.planted, events)
        self.node.sink(f"{table}:{{id}}", sink)
        return self.node.cached(f"{table}:{{id}}", ttl=_TTL_S)(load)

    async def _connect(self) -> None:
        self._pool = await asyncpg.create_pool(self._setup.database, min_size=0, max_size=2)

    async def _disconnect(self) -> None:
        if self._pool is not None:
            self._pool.terminate()

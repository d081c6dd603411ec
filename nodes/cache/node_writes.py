"""What all writes of one node share: the ways to the sinks, write leases, acknowledgements.

G1  A sink has one outlet in this process: lanes and write-throughs take turns on it. It is opened
    when first used, whether this node runs workers or not, and closed after them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import anyio
import structlog

from ...coordinator.log.replication import Replication
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.link import Reply
from ...coordinator.valkey.scripting import Scripts, run
from ...schemas.keys import Names, dependents_of
from ...schemas.settings import Valkey
from ..sinks.serialized import Outlet
from ..values.packing import Packed
from ..workers.routes import Routes
from .confirmations import Confirmations
from .core import Core
from .shared import TAG_KEEP_MS, Stamp
from .waits import KeyWaits
from .write import WriteParts
from .write_leases import WriteLease, WriteLeases

__all__ = ["Writing"]

log = structlog.get_logger(__name__)

_CLOSE_S = 10.0


class Writing:
    def __init__(
        self,
        backend: Backend,
        names: Names,
        scripts: Scripts,
        routes: Routes,
        core: Core,
        options: Valkey,
    ) -> None:
        self._names = names
        self._scripts = scripts
        self._backend = backend
        self._shared = core.shared
        self._routes = routes
        self.outlets: Mapping[str, Outlet] = routes.outlets(names.namespace)
        self.checkpoints = KeyWaits()
        self.replication = Replication(
            backend.link,
            lambda: backend.blocking_link("replication"),
            names.marker(core.node_id),
            replicas_min=options.replicas_min,
            command_timeout_ms=options.command_timeout_ms,
            clock=core.clock,
            ids=lambda: secrets.token_hex(8),
        )

        self.parts = WriteParts(
            outlet_of=self._outlet_of,
            leases=WriteLeases(
                self._begin,
                core.waits,
                self.checkpoints,
                done_of=lambda key: names.part(names.shard(key), "done"),
                clock=core.clock,
                rng=core.rng,
                ids=core.ids,
            ),
            fill=self._fill,
            confirmations=Confirmations(
                backend.link, names, self.replication, self.checkpoints, clock=core.clock
            ),
        )

    async def _begin(self, key: str, args: list[str | int]) -> Reply:
        keys = self._shared.entry_keys(key)
        return await run(self._backend.link, self._scripts["write_begin"], keys, args)

    async def _fill(self, lease: WriteLease, packed: Packed) -> Stamp | None:
        key = lease.key
        stored, *stamp = await run(
            self._backend.link,
            self._scripts["write_fill"],
            [*self._shared.entry_keys(key), self._names.tag(dependents_of(key))],
            [
                lease.token,
                packed.soft_ms,
                packed.hard_ms,
                packed.tail,
                *self._shared.written(key),
                TAG_KEEP_MS,
            ],
        )
        return Stamp(*map(int, stamp)) if stored else None

    def _outlet_of(self, key: str) -> tuple[Outlet, Mapping[str, str]] | None:
        found = self._routes.sink_of(key)
        return None if found is None else (self.outlets[found[0].name], found[1])

    def checkpoint_moved(self, shard: int) -> None:
        """A bell said so."""
        self.checkpoints.wake(self._names.part(shard, "done"))

    async def aclose(self) -> None:
        for outlet in self.outlets.values():
            try:
                with anyio.move_on_after(_CLOSE_S, shield=True):
                    await outlet.aclose()
            except Exception as error:  # the sink's own; there is nobody who could do more
                log.warning("sink.not_closed", sink=outlet.name, error=repr(error))

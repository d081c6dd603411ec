"""The workers of one node that does the cluster's ordered work, and how they stop.

K1  The workers are cancelled before what they use is closed.
K2  The last worker of a namespace applies the events that exist when its drain begins; the last
    one with sinks brings the writes to them; any other leaves both to the rest. Ingress is
    given up before the writes are brought, so that nothing new arrives. A drain takes at
    most ``drain_ms``, and also hands over unfinished work.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import structlog
from msgspec import Struct

from ...coordinator.background import background_tasks
from ...coordinator.log.ownership import Ownership
from ...coordinator.log.roster import Profile, published
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.link import Commands
from ...coordinator.valkey.scripting import Scripts
from ...schemas.errors import ForebayError
from ...schemas.keys import EVENTS, Names
from ...schemas.settings import Settings
from ..cache.core import Core
from ..leftovers import DrainOutcome
from ..sinks.serialized import Outlet
from .backlog import Backlog
from .dead_letters import DeadLetters
from .delivery import Delivery
from .external import ExternalWriters
from .foreign import ForeignEntries
from .ingress import Ingress
from .leader_metrics import LeaderMetrics, Lockable
from .routes import Routes
from .trimmer import Trimmer
from .write_behind import WriteBehind

__all__ = ["WorkParts", "WorkerGroup", "crew"]

log = structlog.get_logger(__name__)

_FINISHING = 0.8  # of the time for a drain; in the rest, what is unfinished is let go
_BLOCK_MS_MAX = 500  # a connection that is silent for two command timeouts is dropped


class WorkParts(Struct, kw_only=True):
    """What the workers need of their node."""

    backend: Backend
    names: Names
    scripts: Scripts
    routes: Routes
    outlets: Mapping[str, Outlet]  #: of all sinks, by name
    core: Core
    dead_letters: DeadLetters
    locks: Lockable
    settings: Settings


class WorkerGroup:
    def __init__(self, parts: WorkParts, blocking: Commands) -> None:
        core, link = parts.core, parts.backend.link
        self._drain_ms = parts.settings.workers.drain_ms
        self._node_id = core.node_id
        self._shards = parts.names.shards
        self.ownership = Ownership(
            link,
            parts.names,
            parts.scripts,
            node_id=core.node_id,
            options=parts.settings.workers,
            clock=core.clock,
            rng=core.rng,
            instruments=core.instruments,
            profile=_profile(parts.settings, parts.routes),
        )
        self._rejoins = bool(parts.settings.node.id)
        self.deliveries = {
            outlet.name: Delivery(
                outlet,
                beside=outlet.write_beside,
                attempts_max=parts.settings.workers.attempts_max,
                clock=core.clock,
                rng=core.rng,
                instruments=core.instruments,
            )
            for outlet in parts.outlets.values()
        }
        self.writes = self._writes(parts)
        self.ingress = Ingress(
            link,
            blocking,
            parts.names,
            parts.scripts,
            self.ownership,
            parts.routes,
            parts.dead_letters,
            core,
            durable=parts.settings.durable,
            block_ms=min(_BLOCK_MS_MAX, parts.settings.valkey.command_timeout_ms),
        )
        durable = parts.settings.durable
        retain = durable.log_retain
        self.trimmer = Trimmer(
            link,
            parts.names,
            self.ownership,
            core.follower,
            retain=retain,
            dedupe_ms=durable.dedupe_ms,
        )
        self.leader_metrics = LeaderMetrics(
            link, parts.names, parts.locks, core.server_clock, log_retain=retain
        )
        self.external = self._external(parts) if parts.settings.cache.external_writers else None
        self.backlog = self._backlog(parts)
        for successor in (self.writes, self.ingress, self.external):
            if successor is not None:
                self.ownership.add(successor)

    def _writes(self, parts: WorkParts) -> WriteBehind:
        return WriteBehind(
            parts.backend.link,
            parts.names,
            parts.scripts,
            self.ownership,
            parts.routes,
            self.deliveries,
            parts.dead_letters,
            node_id=parts.core.node_id,
            options=parts.settings.workers,
            held_max=parts.settings.durable.dead_letters_max,
            server_clock=parts.core.server_clock,
            instruments=parts.core.instruments,
            invalidate=parts.core.invalidate,
        )

    def _backlog(self, parts: WorkParts) -> Backlog:
        return Backlog(
            parts.backend.link,
            parts.names,
            self.ownership,
            clock=parts.core.clock,
            server_clock=parts.core.server_clock,
            lease_ms=parts.settings.cache.lease_ms,
        )

    def _external(self, parts: WorkParts) -> ExternalWriters:
        core, link = parts.core, parts.backend.link
        foreign = ForeignEntries(
            link,
            parts.names,
            parts.scripts,
            core.follower,
            clock=core.clock,
            server_clock=core.server_clock,
        )
        made = ExternalWriters(
            parts.backend.dialer("tracking"),
            parts.settings.valkey,
            parts.names,
            foreign,
            clock=core.clock,
            rng=core.rng,
            instruments=core.instruments,
        )
        if made.tracking is not None:
            parts.backend.beside(made.tracking.redial)
        return made

    async def drain(self) -> DrainOutcome:
        """Finish the work under way and hand over the rest."""
        ownership, limit_s = self.ownership, self._drain_ms / 1000
        me = {self._node_id}
        others = {"events": set(ownership.nodes) - me, "writes": set(ownership.sinking) - me}
        done = {work: bool(each) for work, each in others.items()}
        finished = False
        try:
            with anyio.move_on_after(limit_s * _FINISHING):
                await self._finish(done)
                await ownership.leave(rejoin=self._rejoins)
                finished = True
            if not finished:
                with anyio.move_on_after(limit_s * (1 - _FINISHING)):
                    await ownership.leave(patient=False, rejoin=self._rejoins)
        except ForebayError as error:
            log.warning("drain.incomplete", error=str(error))
        return DrainOutcome(
            finished=finished,
            events_done=done["events"],
            writes_done=done["writes"],
            held_done=bool(others["writes"]),
        )

    async def _finish(self, done: dict[str, bool]) -> None:
        """Do the work that no other worker does: the events, and then the writes."""
        ownership = self.ownership
        events = ownership.tenures.get(EVENTS)
        if events is not None:
            if not done["events"]:
                await self.ingress.empty()
                done["events"] = EVENTS in ownership.tenures
            await ownership.give_up([events])
        if not done["writes"] and self.deliveries:
            await self.writes.empty()
            done["writes"] = ownership.statistics().shards == self._shards


def _profile(settings: Settings, routes: Routes) -> Profile:
    from ... import __version__

    http = settings.http
    address = f"{http.host}:{http.port}" if http.enabled and http.port else ""
    templates = {route.template.text for route in routes.sinks}
    sinks = published(templates)
    return Profile(
        label=settings.node.id,
        http=address,
        version=__version__,
        sinks=sinks,
        more_sinks=len(sinks) < len(templates),
    )


@asynccontextmanager
async def crew(parts: WorkParts) -> AsyncGenerator[WorkerGroup]:
    """The workers, at work."""
    async with AsyncExitStack() as stack:
        blocking = await stack.enter_async_context(parts.backend.blocking_link("ingress"))
        made = WorkerGroup(parts, blocking)
        if not parts.routes.sinks:
            fix = "run it with an application that declares sinks, if it is to bring writes to them"
            log.warning("workers.without_sinks", work="events only", fix=fix)
        for delivery in made.deliveries.values():
            stack.push_async_callback(delivery.aclose)
        tasks = await stack.enter_async_context(background_tasks())
        if made.external is not None:
            await tasks.start(made.external.run)
        for part in (
            made.writes,
            made.ingress,
            made.ownership,
            made.trimmer,
            made.leader_metrics,
            made.backlog,
        ):
            await tasks.start(part.run)
        yield made

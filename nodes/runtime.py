"""A running node: its parts, created in the order of their dependencies.

Start: the server, the metadata of the namespace, the clock, the log (``running``); then the
``on_start`` hooks, then the workers (``at_work``). The stop is the reverse:

U1  Inside the block every shard was current once, so the first read is already correct.
U2  A notice reaches every cache of this node, in order, before the next notice is applied.
U3  A drain accepts no new work, finishes the current work, hands over the owned shards, and takes
    at most ``drain_ms``; the last worker of a namespace also empties the queues. It is finished
    if all accepted work is done (see ``leftovers``). All calls share one drain, and cancelling a
    caller does not interrupt it. After a failure of a worker there is no drain.
U4  After the drain every ``on_stop`` hook runs, also after a failure (see ``lifespan``).
U5  Until the logs are current, a server that cannot be used raises one StartupError. A server that
    was reached and then does not answer, closes, or is loading is retried until
    ``valkey.startup_timeout_ms`` have passed since the start.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import anyio
import structlog

from ..coordinator.background import BackgroundTasks, background_tasks
from ..coordinator.clock import Clock, ServerClock, SystemClock
from ..coordinator.instruments import Instruments
from ..coordinator.limits.limiter import Limiter
from ..coordinator.limits.member_count import MemberCount
from ..coordinator.log.clock_sync import ClockSync
from ..coordinator.log.follower import Follower
from ..coordinator.log.sink_directory import SinkDirectory
from ..coordinator.log_once import LogOnce
from ..coordinator.rights import RightsCheck
from ..coordinator.valkey.backend import Backend, UseFake, UseUrl
from ..coordinator.valkey.private_server import PrivateServer
from ..coordinator.valkey.scripting import load_scripts
from ..coordinator.valkey.startup_errors import Target
from ..coordinator.write_check import WriteCheck
from ..schemas.errors import ForebayError, ServerRefused, StartupError, Unavailable
from ..schemas.keys import Names, dependents_of
from ..schemas.notices import Extended, Notice
from ..schemas.settings import Settings
from ..schemas.urls import Endpoint
from . import request_scope as scope
from .cache.core import Core
from .cache.legacy import begin_marks
from .cache.node_writes import NodeWrites
from .cache.read import ReadPath
from .cache.shared import SharedTier
from .cache.tags import TagTable
from .cache.waits import KeyWaits
from .explain.node_part import NodePart
from .leftovers import DrainOutcome, count_leftovers, left_of, tell
from .lifespan import Hook, run_hook, stop_hooks_at_end
from .locking import locks_of
from .namespace import NamespaceKeyCount, NamespaceMetadata, check_metadata
from .notice_dispatch import NoticeDispatcher
from .pacing import Pacing
from .publishing import PublishCheck
from .workers.dead_letters import DeadLetters
from .workers.group import WorkerGroup, WorkParts, crew
from .workers.refreshes import Refreshes
from .workers.routes import Routes

log = structlog.get_logger(__name__)

_NO_WORKERS = DrainOutcome(finished=True, events_done=True, writes_done=True, held_done=True)

_PAUSE_S = 0.05  #: between two attempts of a step of the start


class Running:
    """The parts of a running node. ``running`` creates them, and closes them with its block."""

    metadata: NamespaceMetadata

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        routes: Routes,
        instruments: Instruments,
        node_id: str,
        tasks: BackgroundTasks,
    ) -> None:
        node, durable = settings.node, settings.durable
        self.settings = settings
        self.backend = backend
        self.routes = routes
        self.instruments = instruments
        self.node_id = node_id
        self.tasks = tasks
        self.clock = SystemClock()
        self.server_clock = ServerClock(self.clock)
        self.rng = random.Random()
        self.names = Names(node.namespace, node.shards, settings.cache.version, backend.database)
        self.scripts = load_scripts()
        self.started_at = self.clock.monotonic()
        self.draining = False
        self.drained: bool | None = None
        self._drain_once = anyio.Lock()
        self.shared = SharedTier(
            backend.link, backend.link, self.names, self.scripts, origin=node_id, durable=durable
        )
        self.tags = TagTable(self.names, self.shared.capture)
        self.waits = KeyWaits()
        self.notices = NoticeDispatcher(
            self.tags, self.waits, self.clock, self.server_clock, shards=node.shards
        )
        self.follower = self._follower()
        self.member_count = MemberCount(backend.link, self.names)
        self.limiter = self._limiter()
        self.core = self._core()
        self.paths: list[ReadPath[Any]] = [
            cached.bind(self.core, settings.cache, settings.limits)
            for cached in routes.caches.values()
        ]
        self.notices.paths = self.paths
        self.writing = self._writing()
        self.dead_letters = self._dead_letters()
        self.refreshes = self._refreshes()
        self.explaining = NodePart(self.core, routes, backend, settings.cache)
        self.locks = locks_of(self.core, self.names, self.scripts, self.writing.replication)
        self.key_count = NamespaceKeyCount(backend.link, self.names, self.clock)
        self.write_check = WriteCheck(backend.link, self.names.none, clock=self.clock)
        self.private_server = _private_server(backend, node.namespace)
        self.rights = self._rights()
        self.crew: WorkerGroup | None = None

    def _follower(self) -> Follower:
        link = self.backend.link
        return Follower(
            link,
            self.names,
            clock=self.clock,
            staleness_ms=self.routes.staleness_ms(self.settings.cache),
            instruments=self.instruments,
            run_id=self.backend.run_id,
            check=link.check_primary,
            apply=self.apply,
            reset=self._reset,
            scripts=self.scripts,
        )

    def _rights(self) -> RightsCheck:
        unused = set[str]() if self.backend.database else {"select"}
        if not self.settings.cache.external_writers:
            unused |= {"client|id", "client|tracking"}
        if not any(cached.declared.legacy_key for cached in self.routes.caches.values()):
            unused.add("zmscore")
        link, user = self.backend.link, self.backend.user
        return RightsCheck(link, self.names, self.scripts, user=user, unused=unused)

    @cached_property
    def check_events(self) -> PublishCheck:
        return PublishCheck(
            self.routes,
            SinkDirectory(self.backend.link, self.names, clock=self.clock),
            bytes_max=self.settings.durable.event_bytes_max,
            works=lambda: self.crew is not None and not self.draining,
        )

    def _dead_letters(self) -> DeadLetters:
        return DeadLetters(
            self.backend.link,
            self.names,
            self.scripts,
            self.instruments,
            entries_max=self.settings.durable.dead_letters_max,
        )

    def _core(self) -> Core:
        return Core(
            node_id=self.node_id,
            commands=self.backend.link,
            shared=self.shared,
            tags=self.tags,
            follower=self.follower,
            waits=self.waits,
            tasks=self.tasks,
            clock=self.clock,
            server_clock=self.server_clock,
            instruments=self.instruments,
            rng=self.rng,
            ids=lambda: secrets.token_hex(8),
            invalidate=self.invalidate,
            hear=partial(self.apply, 0),
            pace=Pacing(self.limiter).turn,
            behind=self.routes.behind,
        )

    def _limiter(self) -> Limiter:
        return Limiter(
            self.backend.link,
            self.names,
            self.scripts,
            clock=self.clock,
            tasks=self.tasks,
            instruments=self.instruments,
            ids=lambda: secrets.token_hex(16),
            budget_ms=self.settings.limiter.budget_ms,
            members=self.members,
        )

    def _writing(self) -> NodeWrites:
        made = NodeWrites(
            self.backend,
            self.names,
            self.scripts,
            self.core,
            self.settings.valkey,
            sinks=self.routes.outlets(self.names.namespace),
            sink_of=self.routes.sink_of,
        )
        for cached in self.routes.caches.values():
            cached.bind_writes(self.core, made)
            has_sink = self.routes.sink_for(cached) is not None
            ways = {} if has_sink else {"way": ("put",)}
            self.instruments.declare("cache", cached.name, ways)
        return made

    def _refreshes(self) -> Refreshes:
        settings = self.settings
        return Refreshes(
            self.backend.link,
            self.names,
            self.routes,
            node_id=self.node_id,
            lease_ms=settings.cache.lease_ms,
            running_max=settings.limits.loads_max,
            instruments=self.instruments,
        )

    def members(self) -> int:
        """The number of processes that share the limits, as known to this one."""
        working = 0 if self.crew is None else len(self.crew.ownership.nodes)
        return max(working, self.member_count.count)

    async def invalidate(
        self, keys: Sequence[str], tags: Sequence[str], soft: bool = False
    ) -> None:
        """Invalidate everywhere; on this node before it returns."""
        counts = self.instruments.counts
        counts["invalidations", "key"] += len(keys)
        counts["invalidations", "tag"] += len(tags)
        try:
            for notice, version in await self.shared.invalidate(keys=keys, tags=tags, soft=soft):
                self.apply(0, version, notice)
        finally:
            # Also if the outcome is unknown; ``more``: dependents may have changed too.
            more = bool(tags) or any(dependents_of(key) in self.tags for key in keys)
            scope.forget(keys, more=more)

    def apply(self, shard: int, version: int, notice: Notice) -> None:
        """Apply a notice to this node."""
        if self.crew is not None and self.crew.external is not None:
            self.crew.external.noticed(version, notice)
        self.notices.apply(version, notice)
        if not isinstance(notice, Extended) and notice.published_ms:
            delay_ms = max(0, self.server_clock.now_ms() - notice.published_ms)
            self.instruments.observe("event_propagation_seconds", delay_ms / 1000)

    def bell(self, channel: bytes, payload: bytes) -> None:
        """Handle a pub/sub message."""
        if channel == self.names.bell.encode():
            self.follower.bell(payload)
            return
        if channel != self.names.work.encode():
            return
        if payload.startswith(b"x "):
            self.explaining.asked(payload[2:])
            return
        handlers = {b"r": self.refreshes.bell, b"d": self.writing.checkpoint_moved}
        if self.crew is not None:
            handlers[b"w"] = self.crew.writes.bell
        self.notices.dispatch_message(payload, handlers)

    async def follow(self, stack: AsyncExitStack, retries: StartupRetries) -> None:
        """Start the clock and the log, and wait until the log is current."""
        link, pubsub, start = self.backend.link, self.backend.pubsub, self.tasks.start
        await self.load_scripts()
        clock_sync = ClockSync(link, self.server_clock, self.clock, self.instruments)
        await retries.run_step(partial(start, clock_sync.run))
        stack.callback(pubsub.on_message(self.bell))
        stack.callback(pubsub.on_state(self.follower.doorbell_changed))
        stack.callback(pubsub.on_message(self.limiter.heard))
        stack.callback(pubsub.on_state(self.limiter.doorbell_changed))
        channels = (self.names.bell, self.names.work, self.names.limits)
        pubsub.subscribe(*(channel.encode() for channel in channels))
        self.tasks.start_soon(self.limiter.run)
        self.tasks.start_soon(self.member_count.run)
        stack.callback(link.on_state(self._link_changed))
        locks = partial(start, self.locks.run, pubsub, link, self.backend.run_id)
        await retries.run_step(locks)
        await retries.run_step(self.follower.sweep)
        await start(self.write_check.run)
        self.tasks.start_soon(self.scripts.wrong_keys.run, link)
        if self.private_server is not None:
            await start(self.private_server.run)
        self.tasks.start_soon(self.metadata.run)
        self.tasks.start_soon(self.rights.run)
        self.tasks.start_soon(self.follower.run)
        self.tasks.start_soon(self.writing.replication.run)
        if self.routes.caches:
            await start(self.refreshes.run)

    async def begin_legacy(self) -> None:
        """Mark changes of entries that may be loaded from values of another service."""
        caches = self.routes.caches.values()
        entries = {
            each.template.shape: each.path.legacy for each in caches if each.path.legacy is not None
        }
        if entries:
            await begin_marks(self.backend.link, self.names, self.scripts, entries)

    def _reset(self, shard: int) -> None:
        self.notices.reset(shard)
        self.metadata.lost()

    def _link_changed(self, connected: bool) -> None:
        self.follower.connection_changed()
        if connected:
            with suppress(Unavailable):  # the node is stopping
                self.tasks.start_soon(self.load_scripts)

    async def load_scripts(self) -> None:
        """Load the scripts into the server, so that a later call sends only their hash."""
        commands = [("SCRIPT", "LOAD", script.source) for script in self.scripts.values()]
        try:
            await self.backend.link.call_many(commands)
        except ForebayError as error:
            log.debug("scripts.not_loaded", error=str(error))

    @asynccontextmanager
    async def at_work(
        self,
        *,
        workers: bool,
        on_start: Sequence[Hook],
        on_stop: Sequence[Hook],
        cancelled: Callable[[], bool],
    ) -> AsyncGenerator[None]:
        """Run the hooks and the workers, and drain at the end.

        ``cancelled`` returns whether a caller cancelled this task.
        """
        async with stop_hooks_at_end(on_stop, cancelled), AsyncExitStack() as stack:
            for hook in on_start:
                await run_hook("on_start", hook, cancelled)
            if workers:
                self.crew = await stack.enter_async_context(crew(self._work_parts()))
            yield
            await self.drain()  # not after a failure of a worker, or after a cancellation

    def _work_parts(self) -> WorkParts:
        return WorkParts(
            backend=self.backend,
            names=self.names,
            scripts=self.scripts,
            routes=self.routes,
            outlets=self.writing.sinks,
            core=self.core,
            dead_letters=self.dead_letters,
            locks=self.locks,
            settings=self.settings,
        )

    async def drain(self) -> bool:
        """Finish the current work and hand over the rest, once; false if the time ran out."""
        self.draining = True
        with anyio.CancelScope(shield=True):  # ``drain_ms`` bounds it
            async with self._drain_once:
                if self.drained is None:
                    self.drained = await self._drain()
        return bool(self.drained)

    async def _drain(self) -> bool:
        is_temporary = self.backend.is_temporary
        outcome = _NO_WORKERS if self.crew is None else await self.crew.drain()
        if outcome == _NO_WORKERS and not is_temporary:
            return True
        try:
            found = await count_leftovers(self.backend.link, self.names)
        except ForebayError as error:
            log.warning("drain.not_counted", error=str(error))
            return outcome.finished
        left = left_of(found, outcome, is_temporary=is_temporary)
        if left.count:
            tell(left, is_temporary=is_temporary)
        return outcome.finished and not left.count


@asynccontextmanager
async def running(
    settings: Settings,
    routes: Routes,
    instruments: Instruments,
    *,
    node_id: str,
    origins: Mapping[str, str],
) -> AsyncGenerator[Running]:
    """Connect, wait until the log is current, and yield the parts."""
    give_up_at = SystemClock().monotonic() + settings.valkey.startup_timeout_ms / 1000
    async with AsyncExitStack() as stack:
        backend = Backend(settings.valkey, client_name=f"forebay-{node_id}", origins=origins)
        await stack.enter_async_context(backend)
        tasks = await stack.enter_async_context(background_tasks())
        stack.callback(_unbind, routes)
        self = Running(settings, backend, routes, instruments, node_id, tasks)
        self.metadata = NamespaceMetadata(
            backend.link, self.names, self.scripts, origins, self.begin_legacy
        )
        stack.push_async_callback(self.writing.aclose)
        retries = StartupRetries(_target(backend, settings, origins), self.clock, give_up_at)
        with _startup_errors(retries.target):
            await retries.run_step(self.rights.look)
            if (missing := self.rights.missing) and not missing.is_partial:
                raise retries.target.fault(missing.problem, missing.fix, leaf="username")
            check = partial(check_metadata, backend.link, self.names, self.scripts, origins)
            await retries.run_step(check)
            await retries.run_step(self.begin_legacy)
            await self.follow(stack, retries)
        stack.push_async_callback(self.limiter.aclose)
        yield self


def _private_server(backend: Backend, namespace: str) -> PrivateServer | None:
    if isinstance(backend.choice, UseUrl):
        return None
    from .cli.sources import process_environment

    kind = "fake server" if isinstance(backend.choice, UseFake) else "embedded server"
    return PrivateServer(namespace, kind=kind, environ=process_environment())


def _unbind(routes: Routes) -> None:
    for cached in routes.caches.values():
        cached.unbind()


class StartupRetries:
    """Retries the steps of a start while the server may recover."""

    def __init__(self, target: Target, clock: Clock, give_up_at: float) -> None:
        self.target = target
        self._clock = clock
        self._give_up_at = give_up_at
        self._waiting = LogOnce(clock)

    async def run_step(self, step: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await step()
            except (Unavailable, ServerRefused) as error:
                left_s = self._give_up_at - self._clock.monotonic()
                if left_s <= 0 or not self.target.may_pass(error):
                    raise
                self._waiting.say(log, "start.waiting", error, left_s=round(left_s, 1))
            else:
                return
            await anyio.sleep(_PAUSE_S)


def _target(backend: Backend, settings: Settings, origins: Mapping[str, str]) -> Target:
    choice = backend.choice
    if isinstance(choice, UseUrl):
        endpoint = choice.endpoint
    else:
        path = backend.server.socket_path if backend.server else "fake"
        endpoint = Endpoint(scheme="unix", path=path)
    return Target(endpoint=endpoint, setting="valkey.url", options=settings.valkey, origins=origins)


@contextmanager
def _startup_errors(target: Target) -> Iterator[None]:
    """Raise StartupError for a refusal or a missing answer of the server during the start."""
    try:
        yield
    except ServerRefused as error:
        raise target.refused(error) from error
    except Unavailable as error:
        raise _connection_lost(target, error) from error


def _connection_lost(target: Target, error: Unavailable) -> StartupError:
    return target.fault(
        f"the connection was lost during the start: {error.reason}", "see the log of the server"
    )

"""What a service embeds, and what ``forebay run`` runs.

    node = forebay.Node("shop")

    @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
    async def product(id: int) -> Product: ...

    async with node:
        await product(42)

Everything is declared before the node is started; settings come from the environment and
from forebay.toml, unless they are given. A node that has sinks also does the cluster's
ordered work, unless ``workers.enabled`` says otherwise.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import anyio
import msgspec
import structlog
from prometheus_client import CollectorRegistry

from ..coordinator.instruments import Instruments
from ..coordinator.scripting import run
from ..schemas.errors import Backpressure, ConfigError, ForebayError
from ..schemas.events import NewerSchema, read_event
from ..schemas.settings import Settings
from ..schemas.settings_sources import Resolved
from . import status
from .cache.cached import Cached, Declaration
from .running import Hook, Running, running
from .sinks.base import Sink, Write
from .sinks.callables import CallableSink
from .web.face import Check, Read
from .workers.routes import Routes

__all__ = ["Node"]

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Loader = Callable[P, Awaitable[T]]
SinkFunction = Callable[[list[Write[Any]]], Awaitable[None]]


class Node:
    """Declare caches and sinks on it, then use it as ``async with node``.

    ``namespace`` is a default: FOREBAY_NAMESPACE and the like go before it.
    """

    def __init__(self, namespace: str | None = None, *, settings: Settings | None = None) -> None:
        self._namespace = namespace
        self._resolved = None if settings is None else Resolved(settings=settings, origins={})
        self._routes = Routes()
        self._on_start: list[Hook] = []
        self._on_stop: list[Hook] = []
        self._running: Running | None = None
        self._stack = AsyncExitStack()
        self._id = ""
        self.registry = CollectorRegistry()
        self.instruments = Instruments(self.registry)
        self.instruments.add_source(lambda: status.gauges(self))
        self.drained: bool | None = None  #: whether the last drain was finished in time

    def __repr__(self) -> str:
        state = "running" if self._running else "not running"
        return f"<Node {self._namespace or 'default'} {self._id or '-'} {state}>"

    def cached(
        self,
        template: str,
        *,
        ttl: float,
        stale_for: float = 0.0,
        negative_ttl: float | None = None,
        tags: Sequence[str] = (),
        name: str = "",
    ) -> Callable[[Loader[P, T]], Cached[P, T]]:
        """Cache what a loader returns. Times in seconds.

        Args:
            template: the key, with every parameter of the loader as a field.
            ttl: how long a value is fresh.
            stale_for: how much longer it may be served while a new one is loaded.
            negative_ttl: how long None is remembered; by default like ``ttl``, at most 10 s.
            tags: labels by which entries are invalidated together; may have fields too.
            name: in metrics and logs; by default the function's.

        Raises:
            ConfigError, InvalidKey: the declaration cannot work.
        """
        declared = Declaration(
            template=template,
            ttl=ttl,
            stale_for=stale_for,
            negative_ttl=negative_ttl,
            tags=tuple(tags),
            name=name,
        )

        def declare(loader: Loader[P, T]) -> Cached[P, T]:
            self._only_before_start()
            made: Cached[P, T] = Cached(loader, declared)
            made.policy(Settings().cache)  # so that wrong lifetimes are refused here
            self._routes.add_cache(made)
            return made

        return declare

    def sink(
        self, template: str, sink: Sink | None = None
    ) -> Callable[[SinkFunction], SinkFunction]:
        """Where write-behind puts the values of these keys: a sink, or a decorated function."""
        self._only_before_start()
        if sink is not None:
            self._routes.add_sink(template, sink)

        def declare(function: SinkFunction) -> SinkFunction:
            self._routes.add_sink(template, CallableSink(function.__name__, function))
            return function

        return declare

    def on_start(self, hook: Hook) -> Hook:
        """Run before the workers start, when caches can be used already."""
        self._only_before_start()
        self._on_start.append(hook)
        return hook

    def on_stop(self, hook: Hook) -> Hook:
        """Run after the drain, in the reverse order."""
        self._only_before_start()
        self._on_stop.append(hook)
        return hook

    def configure(self, resolved: Resolved) -> None:
        """Take these settings instead of looking for them."""
        self._only_before_start()
        self._resolved = resolved

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        parts = self.parts
        try:
            await self._stack.__aexit__(exc_type, exc, traceback)
        finally:
            self.drained = parts.drained
            log.info("node.stopped", drained=self.drained)

    async def drain(self) -> bool:
        """Take no new work, finish what is under way, hand over the rest; before stopping.

        Returns false if ``workers.drain_ms`` was not enough: others do what was left.
        """
        with anyio.CancelScope(shield=True):
            return await self.parts.drain()

    async def start(self, *, workers: bool | None = None) -> Self:
        """Connect, become current, and start; ``workers`` where the settings do not say.

        Raises:
            StartupError: the server cannot be reached or used. ConfigError: a setting.
        """
        self._only_before_start()
        resolved = self._settings()
        settings = resolved.settings
        self._id = settings.node.id or _made_up_id()
        wanted = settings.workers.enabled
        if wanted is None:
            wanted = bool(self._routes.sinks) if workers is None else workers
        async with AsyncExitStack() as stack:
            stack.callback(self._forget)
            self._running = await stack.enter_async_context(
                running(
                    settings,
                    self._routes,
                    self.instruments,
                    node_id=self._id,
                    origins=dict(resolved.origins),
                    workers=wanted,
                    on_start=self._on_start,
                    on_stop=self._on_stop,
                )
            )
            self._stack = stack.pop_all()
        log.info("node.running", namespace=settings.node.namespace, workers=wanted)
        return self

    @property
    def instance(self) -> str:
        return self._id

    @property
    def namespace(self) -> str:
        return self.parts.settings.node.namespace

    @property
    def settings(self) -> Settings:
        return self.parts.settings

    @property
    def parts(self) -> Running:
        """The parts of the running node.

        Raises:
            ForebayError: it is not running.
        """
        if self._running is None:
            raise ForebayError("the node is not running; use it inside `async with node:`")
        return self._running

    @property
    def is_running(self) -> bool:
        return self._running is not None

    async def invalidate(
        self, keys: Sequence[str] = (), *, tags: Sequence[str] = (), soft: bool = False
    ) -> None:
        """Make every copy of these keys, and whatever carries these tags, old: on this node
        before it returns, elsewhere within ``max_staleness_ms``.

        Raises:
            Unavailable: the outcome may be unknown; repeat it.
        """
        await self.parts.invalidate(tuple(keys), tuple(tags), soft)

    async def publish(self, events: Sequence[bytes]) -> list[str]:
        """Put events, as JSON, into the ingress stream, all or none; returns their ids.

        Raises:
            InvalidEvent, Backpressure, Unavailable: none was stored, or it is unknown.
        """
        parts = self.parts
        bound, bytes_max = parts.settings.durable.events_max, parts.settings.durable.event_bytes_max
        names = [_name_of(event, bytes_max) for event in events]
        script = parts.scripts["event_publish"]
        reply = await run(parts.backend.link, script, [parts.names.events], [bound, *events])
        if reply and reply[0] == 0:
            raise Backpressure(parts.names.events, int(reply[1]), bound)
        for name in names:
            self.instruments.counts["events_published", name] += 1
        return [bytes(each).decode() for each in reply]

    async def read(self, key: str) -> Read | None:
        """The value of a key through the cache that declares it; None if none does."""
        cached = self._routes.cache_of(key)
        if cached is None:
            return None
        hit = await cached.read_key(key)
        return Read(
            json=msgspec.json.encode(hit.value),
            tier=hit.tier,
            age_ms=hit.age_ms,
            stale=hit.stale,
            version=hit.version,
            negative=hit.value is None,
        )

    def checks(self) -> Sequence[Check]:
        """The state of this node, from memory."""
        return status.checks(self)

    async def stats(self) -> dict[str, object]:
        """What ``/stats`` shows."""
        return await status.stats(self)

    @property
    def caches(self) -> Sequence[Cached[Any, Any]]:
        return list(self._routes.caches.values())

    def _settings(self) -> Resolved:
        resolved = self._resolved
        if resolved is None:
            from .cli.sources import load

            resolved = load()
        asked = self._namespace
        origins = {"default"} if resolved.origins else {None}
        if asked and resolved.origins.get("node.namespace") in origins:
            node = msgspec.structs.replace(resolved.settings.node, namespace=asked)
            settings = msgspec.structs.replace(resolved.settings, node=node)
            resolved = Resolved(settings=settings, origins=resolved.origins)
        return resolved

    def _forget(self) -> None:
        self._running = None

    def _only_before_start(self) -> None:
        if self._running is not None:
            raise ConfigError(
                setting="the node",
                value=repr(self),
                origin="the code",
                problem="it is running already",
                fix="declare everything before `async with node:`",
            )


def _name_of(event: bytes, bytes_max: int) -> str:
    try:
        return read_event(event, bytes_max=bytes_max).name
    except NewerSchema:
        return "unknown"  # ingress holds it for a node that knows


def _made_up_id() -> str:
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(2)}"

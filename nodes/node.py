"""The node: a service embeds it, and ``forebay run`` runs it.

    node = forebay.Node("shop")

    @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
    async def product(id: int) -> Product: ...

    async with node:
        await product(42)

I1  Caches, sinks and hooks are declared before the node starts, and checked at the declaration:
    an invalid one raises ConfigError or InvalidKey there.
I2  Settings come from the environment and from forebay.toml, unless code passes them; a namespace
    passed in code is a default for these.
I3  A node runs once at a time, and may be started again after it has stopped.
I4  Each start has an identity of its own in the cluster, also if ``node.id`` is the same: two
    processes are never mistaken for one owner.
I5  Leaving the block drains first, also when the block is cancelled; its exception is raised
    unchanged (see ``lifespan``). ``stop`` drains too. Any task of the loop may do either.

A node with sinks also applies events and writes to its sinks, unless ``workers.enabled`` is set.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Literal, Self

import anyio
import structlog
from msgspec import structs
from prometheus_client import CollectorRegistry, ProcessCollector

from ..coordinator.instruments import Instruments
from ..coordinator.modules import load
from ..coordinator.valkey.scripting import run
from ..schemas.errors import Backpressure, ForebayError, InvalidKey, LoaderError
from ..schemas.keys import EVENTS, check_key, refuse_one_string
from ..schemas.settings import Settings
from ..schemas.settings_sources import Resolved
from . import status
from .cache.cache import Cache
from .cache.cached import Cached
from .cache.core import Hit
from .code_settings import in_code, with_namespace
from .coordinating import coordination_of
from .declarations import Declarations
from .explain.document import Explanation
from .lifespan import Lifespan, refuse_other_loops
from .locking import Locking
from .logs import configure_embedded
from .publishing import Event, as_json
from .runtime import Running, running
from .secret_files import exposed_secrets
from .web.protocols import Check, Read

log = structlog.get_logger(__name__)

State = Literal["not running", "starting", "running", "draining", "drained", "failed"]


class Node(Declarations, Locking):
    """Declare caches and sinks on a node, then use it as ``async with node``."""

    def __init__(self, namespace: str | None = None, *, settings: Settings | None = None) -> None:
        """Create a node; it connects when it is started.

        Args:
            namespace: a default; FOREBAY_NAMESPACE, a flag and forebay.toml override it.
            settings: all settings; nothing is read from the environment or a file then.

        Raises:
            ConfigError: a setting is invalid.
        """
        super().__init__()
        self._in_code = in_code(namespace, settings)
        configure_embedded(self._in_code.settings.log, instance="-")
        self._resolved = self._in_code if settings is not None else None
        self._load_again: Callable[[], Resolved] | None = None
        self._running: Running | None = None
        self._lifespan: Lifespan | None = None
        self._id = ""
        self._origins: Mapping[str, str] = {}
        self.registry = CollectorRegistry()
        self._instruments = Instruments(self.registry)
        ProcessCollector(registry=self.registry)
        self._instruments.add_source(lambda: status.gauges(self._parts_if_running()))
        #: whether the last drain finished all accepted work; None: there was none
        self.drained: bool | None = None

    def __repr__(self) -> str:
        settings = self._running.settings if self._running else self._in_code.settings
        return f"<Node {settings.node.namespace} {self._id or '-'} {self.state}>"

    def _configure(self, resolved: Resolved, again: Callable[[], Resolved] | None = None) -> None:
        """Use these settings instead of loading them; they replace settings passed in code.

        ``again`` loads them once more, for ``reload_limits``.
        """
        self._only_before_start()
        if self._resolved is self._in_code:
            log.warning("node.settings_replaced", reason="the settings passed in code are ignored")
        self._resolved, self._load_again = resolved, again

    async def __aenter__(self) -> Self:
        return await self._enter()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end(exc)

    async def _enter(self, *, workers: bool | None = None) -> Self:
        """The first half of ``async with``: start the node.

        Until ``__aexit__``, a failure of the node cancels the current task.
        """
        await self.start(workers=workers)
        assert self._lifespan is not None
        self._lifespan.hold()
        return self

    async def stop(self) -> None:
        """Drain and stop, from any task of the event loop. Returns when the node has stopped; does
        nothing if it is not running.

        Raises:
            ForebayError: the node runs in another event loop, or a hook of the node called this.
            Any exception of a stop hook, or the failure of the node.
        """
        await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        lifespan = self._lifespan
        if lifespan is None:
            return  # another task has stopped it
        if self._running is not None:
            self._running.tasks.check_loop()
        try:
            await lifespan.end(error)
        finally:
            if lifespan.over and self._lifespan is lifespan:
                self.drained = self._running.drained if self._running else None
                self._forget()
                _log_info("node.stopped", drained=self.drained)

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[str]:
        """Serve HTTP while the block runs, like `forebay run`: probes, stats, metrics, events and
        reads, at ``http.host`` and ``http.port`` of the settings, by default 127.0.0.1:8642.

            async with node, node.serving() as url:
                ...

        Yields the URL. With ``http.enabled`` false it yields an empty string, and serves nothing.

        Raises:
            ConfigError: the address cannot be listened on. ForebayError: the node is not running.
        """
        settings, origins = self._parts.settings, self._origins
        if not settings.http.enabled:
            yield ""
            return
        await load(f"{__package__}.web.server")  # an embedded node does not need it
        from .web.server import serve

        async with serve(
            self,
            settings.http,
            instruments=self._instruments,
            coordination=coordination_of(self._parts),
            event_bytes_max=settings.durable.event_bytes_max,
            clock=self._parts.clock,
            random=self._parts.rng,
            origin_of=lambda setting: origins.get(setting, "default"),
        ) as address:
            yield address.url

    async def drain(self) -> bool:
        """Accept no new work, finish the current work, and hand over the rest; before stopping.

        Cancellation does not interrupt it. Returns false if accepted events or writes remain that
        no other worker will do, or ``workers.drain_ms`` was too short; ``node.undrained`` in the
        log counts them, and says whether they are lost with the server.
        """
        return await self._parts.drain()

    async def start(self, *, workers: bool | None = None) -> Self:
        """Connect, catch up with the logs, and start.

        ``workers``: whether to apply events and write to sinks, if ``workers.enabled`` is unset.
        Any task of the event loop may ``stop`` the node. If the node fails before that, the
        failure is logged, and ``stop`` raises it.

        Raises:
            StartupError: the server cannot be reached or used.
            ConfigError: a setting is invalid, the node is running already, or the event loop is
            not an asyncio loop.
        """
        if self._lifespan is not None and self._lifespan.over:
            self._forget()  # it failed, or its event loop has ended
        self._only_before_start()
        refuse_other_loops()
        resolved = self._settings()
        self._id = resolved.settings.node.id or _generated_id()
        secrets_known = [resolved.settings.valkey.password]
        configure_embedded(resolved.settings.log, instance=self._id, secrets=secrets_known)
        for warning in resolved.warnings:
            log.warning("setting.unused", **structs.asdict(warning))
        for warning in exposed_secrets(resolved):
            log.warning("setting.exposed", **structs.asdict(warning))
        self._begun, self.drained, self._origins = True, None, resolved.origins
        self._lifespan = lifespan = Lifespan(self._living(resolved, workers))
        try:
            await lifespan.begin()
        except BaseException:
            if self._lifespan is lifespan:
                self._forget()
            raise
        _log_info("node.running", namespace=self.namespace, workers=self._parts.crew is not None)
        return self

    @asynccontextmanager
    async def _living(self, resolved: Resolved, otherwise: bool | None) -> AsyncGenerator[None]:
        await load("zstandard", optional=True)  # stored entries may be compressed with it
        settings = resolved.settings
        works = settings.workers.enabled
        if works is None:
            works = bool(self._routes.sinks) if otherwise is None else otherwise
        node_id = _unique(self._id) if settings.node.id else self._id
        async with running(
            settings, self._routes, self._instruments, node_id=node_id, origins=resolved.origins
        ) as parts:
            self._running = parts
            self._limits.bind(parts.limiter, settings.limiter)
            lifespan = self._lifespan
            assert lifespan is not None
            async with parts.at_work(
                workers=works,
                on_start=self._on_start,
                on_stop=self._on_stop,
                cancelled=lambda: lifespan.cancelled,
            ):
                yield

    @property
    def instance(self) -> str:
        return self._id

    @property
    def namespace(self) -> str:
        return self._parts.settings.node.namespace

    @property
    def settings(self) -> Settings:
        return self._parts.settings

    @property
    def _parts(self) -> Running:
        """The parts of the running node.

        Raises:
            ForebayError: the node is not running, has failed, or runs in another event loop.
        """
        if self._running is None:
            raise ForebayError("the node is not running; use it inside `async with node:`")
        if self._lifespan is not None and self._lifespan.failure is not None:
            failure = self._lifespan.failure
            raise ForebayError(f"the node has failed: {failure}; start it again") from failure
        self._running.tasks.check_loop()
        return self._running

    @property
    def is_running(self) -> bool:
        return self._running is not None and not (
            self._lifespan is not None and self._lifespan.over
        )

    @property
    def state(self) -> State:
        """The state of the node; a ``drained`` one serves reads, and accepts no new work."""
        if self._lifespan is None:
            return "not running"
        if self._lifespan.over:
            return "failed"
        if self._running is None or not self._lifespan.begun:
            return "starting"
        if self._running.draining:
            return "draining" if self._running.drained is None else "drained"
        return "running"

    async def invalidate(
        self,
        keys: Sequence[str] | None = None,
        *,
        tags: Sequence[str] | None = None,
        soft: bool = False,
    ) -> None:
        """Invalidate these keys, and every entry with one of these tags: on this node before it
        returns, on other nodes within ``max_staleness_ms``.

        Args:
            keys: the keys of entries.
            tags: the tags of entries.
            soft: keep the entries as stale values, which are refreshed by the next read.

        Raises:
            InvalidKey: a key or tag is invalid; nothing was invalidated.
            Unavailable: the outcome may be unknown; repeat the call.
        """
        if keys is None and tags is None:
            raise InvalidKey("keys", "", "and tags are missing: pass at least one of them")
        refuse_one_string("keys", keys or ())
        refuse_one_string("tags", tags or ())
        checked_keys = [check_key(key) for key in keys or ()]
        checked_tags = [check_key(tag, name="tag") for tag in tags or ()]
        await self._parts.invalidate(checked_keys, checked_tags, soft)

    async def publish(self, events: Sequence[Event]) -> list[str]:
        """Append events, as JSON or dicts, to the ingress stream, all or none; returns their ids.

        Raises:
            InvalidEvent: an event can never be applied; none was stored. Its ``fault`` is
                ``no_sink`` for a write to a key for which no live member declares a sink.
            Backpressure: the stream is full; none was stored.
            Unavailable: none was stored, or the outcome is unknown.
        """
        parts = self._parts
        bound = parts.settings.durable.events_max
        raw = as_json(events)
        names = await parts.check_events(raw)
        script = parts.scripts["event_publish"]
        keys = [parts.names.events, parts.names.part(EVENTS, "before")]
        reply = await run(parts.backend.link, script, keys, [bound, *raw])
        if reply and reply[0] == 0:
            raise Backpressure(parts.names.events, int(reply[1]), bound)
        for name in names:
            self._instruments.counts["events_published", name] += 1
        return [bytes(each).decode() for each in reply]

    def reload_limits(self) -> list[str]:
        """Load the limits from the configuration again; returns the names of the changed ones.
        Tokens that are in use stay counted.

        Raises:
            ConfigError, InvalidLimit: a limit is invalid; none was changed.
        """
        found = self._load_again() if self._load_again else self._settings()
        return self._limits.reload(found.settings.limiter)

    async def read(self, key: str) -> Read | None:
        """The value of a key through the cache that declares it; None if no cache does.

        Raises:
            LoaderError: the loader raised an exception. Unavailable: by the cache's policy.
            NoJsonForm: JSON cannot hold the value.
        """
        cached = self._routes.cache_of(key)
        if cached is None:
            return None
        try:
            hit = await cached.read_key(key)
        except ForebayError:
            raise
        except Exception as error:
            raise _loader_error(cached, key, error) from error
        return _read_of(cached, key, hit)

    async def read_many(self, keys: Sequence[str]) -> list[Read | ForebayError | None]:
        """Like ``read``, for many keys, in their order; a key that failed has its error."""
        found: dict[str, Read | ForebayError | None] = dict.fromkeys(keys)
        of_cache: dict[str, tuple[Cache[Any], list[str]]] = {}
        for key in found:
            if (cached := self._routes.cache_of(key)) is not None:
                of_cache.setdefault(cached.name, (cached, []))[1].append(key)
        async with anyio.create_task_group() as tasks:
            for cached, wanted in of_cache.values():
                tasks.start_soon(_read_all, cached, wanted, found)
        return [found[key] for key in keys]

    async def explain(self, key: str) -> Explanation:
        """Why a read of this key hits or misses, here and on all running nodes.

        Raises:
            InvalidKey: the key is invalid. Backpressure: too many concurrent calls on this node.
            Unavailable: Valkey did not answer.
        """
        return await self._parts.explaining.explain(key)

    def checks(self) -> Sequence[Check]:
        """The health checks of this node; reads memory only."""
        return status.checks(self._parts_if_running())

    async def stats(self) -> dict[str, object]:
        """The document of ``/stats``."""
        return await status.stats(self._parts)

    @property
    def caches(self) -> Sequence[Cached[Any, Any]]:
        return list(self._cached)

    def _parts_if_running(self) -> Running | None:
        return self._parts if self.is_running else None

    def _settings(self) -> Resolved:
        resolved = self._resolved
        if resolved is None:
            from .cli.sources import load

            resolved = load()
        return with_namespace(resolved, self._in_code)

    def _forget(self) -> None:
        self._limits.unbind()
        self._running, self._lifespan, self._begun = None, None, False


def running_parts(node: Node) -> Running:
    """The parts of a running node, for the command line; raises ForebayError: see ``_parts``."""
    return node._parts  # noqa: SLF001  # not for users of a node


def use_settings(
    node: Node, resolved: Resolved, again: Callable[[], Resolved] | None = None
) -> None:
    """Make a node use these settings, for the command line; see ``_configure``."""
    node._configure(resolved, again)  # noqa: SLF001  # as above


async def enter(node: Node, *, workers: bool) -> None:
    """Start a node before an ``async with`` block could, for the command line; see ``_enter``."""
    await node._enter(workers=workers)  # noqa: SLF001  # as above


def _log_info(event: str, **fields: object) -> None:
    """Log a line during a start or stop, which an exception of the logging must not break."""
    with suppress(Exception):
        log.info(event, **fields)


def _generated_id() -> str:
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(2)}"


def _unique(name: str) -> str:
    return f"{name}~{secrets.token_hex(4)}"


async def _read_all(
    cached: Cache[Any], keys: Sequence[str], found: dict[str, Read | ForebayError | None]
) -> None:
    """Add the results of one cache for these keys to ``found``."""
    try:
        hits = await cached.read_keys(keys)
    except ForebayError as error:
        found.update(dict.fromkeys(keys, error))
        return
    for key, hit in zip(keys, hits, strict=True):
        try:
            found[key] = (
                _read_of(cached, key, hit)
                if isinstance(hit, Hit)
                else _as_forebay_error(cached, key, hit)
            )
        except ForebayError as error:
            found[key] = error


def _read_of(cached: Cache[Any], key: str, hit: Hit[Any]) -> Read:
    """Raises NoJsonForm: JSON cannot hold the value."""
    return Read(
        json=cached.json_of(key, hit.value),
        tier=hit.tier,
        age_ms=hit.age_ms,
        stale=hit.stale,
        version=hit.version,
        negative=hit.value is None,
    )


def _as_forebay_error(cached: Cache[Any], key: str, error: Exception) -> ForebayError:
    return error if isinstance(error, ForebayError) else _loader_error(cached, key, error)


def _loader_error(cached: Cache[Any], key: str, error: Exception) -> LoaderError:
    log.error("loader.failed", cache=cached.name, key=key, exc_info=error)
    return LoaderError(cached.name, key, f"{type(error).__name__}: {error}")

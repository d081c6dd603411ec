"""Declarations on a node: caches, sinks, limits, and hooks for its start and stop.

D1  An invalid declaration raises where it is made: lifetimes, templates that do not match their
    function, a name or template that is declared twice.
D2  A decorator keeps the types of the function.
D3  A running node accepts no declarations, except limits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

from ..schemas.errors import ConfigError
from ..schemas.keys import refuse_one_string
from ..schemas.limits import Limit, StoreDown
from ..schemas.settings import LEASE_MS_MAX, CacheDefaults
from ..schemas.settings_limits import DEFAULT_LIMIT
from .cache.cached import Cached, cache_of
from .cache.declaration import Declaration, declaring, exceptions, policy_of
from .cache.policy import OnDisconnected
from .lifespan import Hook
from .limits import LimitBook, RateLimit
from .sinks.base import Sink, Write
from .sinks.callables import CallableSink
from .values.introspection import name_of_function, refuse_sync
from .workers.routes import Routes

P = ParamSpec("P")
T = TypeVar("T")
Loader = Callable[P, Awaitable[T]]
SinkFunction = Callable[[list[Write[Any]]], Awaitable[None]]
S = TypeVar("S", bound=SinkFunction)
H = TypeVar("H", bound=Hook)


class Declarations:
    def __init__(self) -> None:
        self._routes = Routes()
        self._cached: list[Cached[Any, Any]] = []
        self._limits = LimitBook()
        self._on_start: list[Hook] = []
        self._on_stop: list[Hook] = []
        self._begun = False  # true from the beginning of a start to the end of its stop

    def cached(
        self,
        template: str,
        *,
        ttl: float,
        stale_for: float = 0.0,
        stale_if_error: float = 0.0,
        negative_ttl: float | None = None,
        refresh_ahead: float | None = None,
        soft_timeout: float | None = None,
        hard_timeout: float | None = None,
        tags: Sequence[str] = (),
        depends_on: Sequence[str] = (),
        max_staleness: float | None = None,
        on_disconnected: OnDisconnected | None = None,
        harmless: tuple[type[Exception], ...] = (),
        mutable: bool = False,
        legacy_key: str = "",
        name: str = "",
    ) -> Callable[[Loader[P, T]], Cached[P, T]]:
        """Cache the results of a loader. Times in seconds.

        Args:
            template: the key, with every parameter of the loader as a field.
            ttl: how long a value is fresh.
            stale_for: how much longer it may be served while a new one is loaded.
            stale_if_error: how long after ``ttl`` it may be served if the loader fails.
            negative_ttl: how long None is remembered; by default like ``ttl``, at most 10 s.
            refresh_ahead: the fraction of ``ttl`` after which a read reloads the value.
            soft_timeout: how long a caller waits for the loader if a stale value is available.
            hard_timeout: how long any caller waits; the load itself continues.
            tags: labels that invalidate entries together; they may have fields.
            depends_on: keys whose invalidation invalidates the entries, directly or through
                their own dependencies.
            max_staleness: how far this node may lag behind changes elsewhere.
            on_disconnected: behaviour without Valkey: ``bypass``, ``stale`` or ``fail``.
            harmless: exceptions of the loader that do not count as failures of the source.
            mutable: return a separate copy to each caller.
            legacy_key: a key with the same fields under which another service stores the values as
                JSON, such as ``v1:product:{id}``. A value there replaces the first load.
            name: the name in metrics and logs; by default that of the function.

        Raises:
            ConfigError, InvalidKey: the declaration is invalid.
        """
        refuse_one_string(f"tags of {template}:", tags)
        refuse_one_string(f"depends_on of {template}:", depends_on)
        with declaring(template):
            classes = exceptions("harmless", harmless)
        declared = Declaration(
            template=template,
            ttl=ttl,
            stale_for=stale_for,
            stale_if_error=stale_if_error,
            negative_ttl=negative_ttl,
            refresh_ahead=refresh_ahead,
            soft_timeout=soft_timeout,
            hard_timeout=hard_timeout,
            tags=tuple(tags),
            depends_on=tuple(depends_on),
            max_staleness=max_staleness,
            on_disconnected=on_disconnected,
            harmless=classes,
            mutable=mutable,
            legacy_key=legacy_key,
            name=name,
        )
        # Checked with the longest lease here, and with the node's own at its start.
        with declaring(template):
            policy_of(declared, CacheDefaults(lease_ms=LEASE_MS_MAX))

        def declare(loader: Loader[P, T]) -> Cached[P, T]:
            self._only_before_start()
            with declaring(template):
                made: Cached[P, T] = Cached(loader, declared)
            self._routes.add_cache(cache_of(made))
            self._cached.append(made)
            return made

        return declare

    @overload
    def sink(self, template: str, sink: Sink) -> None: ...

    @overload
    def sink(self, template: str) -> Callable[[S], S]: ...

    def sink(self, template: str, sink: Sink | None = None) -> Callable[[S], S] | None:
        """Declare the sink that stores the values of these keys: a Sink, or a function.

        Raises:
            ConfigError, InvalidKey: the declaration is invalid.
        """
        if sink is not None:
            self._add_sink(template, sink)
            return None

        def declare(function: S) -> S:
            refuse_sync("the sink", function)
            self._add_sink(template, CallableSink(name_of_function(function), function))
            return function

        return declare

    def limit(
        self,
        name: str = DEFAULT_LIMIT,
        *,
        rate: float | None = None,
        per: float = 1.0,
        burst: int = 0,
        shadow: bool = False,
        store_down: StoreDown = "local",
        lease: bool = False,
        lease_hold: float = 1.0,
        concurrency: int = 0,
    ) -> RateLimit:
        """A rate limit that all nodes share; also on a running node. Times in seconds.

        The settings define the limit: a table [limits.NAME], or for the default name
        ``limiter.max_tokens`` and ``limiter.window_s``. The arguments are a default for them.

        Args:
            name: the name in settings, metrics, headers and verdicts.
            rate: tokens in every ``per``.
            per: see ``rate``.
            burst: tokens at once; by default as many as ``rate``.
            shadow: charge and count, but never refuse.
            store_down: behaviour without Valkey: allow this node's share (``local``), refuse all
                requests (``closed``), or allow all (``open``).
            lease: fetch tokens in advance, and spend them without a request to Valkey.
            lease_hold: how long such tokens are kept, in seconds.
            concurrency: the number of concurrent slots.

        Raises:
            InvalidLimit, InvalidKey: the limit is invalid.
        """
        if rate is not None:
            self._limits.declare(
                Limit(
                    name=name,
                    rate=rate,
                    per=per,
                    burst=burst,
                    shadow=shadow,
                    store_down=store_down,
                    lease=lease,
                    lease_hold=lease_hold,
                    concurrency=concurrency,
                )
            )
        return self._limits.handle(name)

    def limits(self, *names: str) -> RateLimit:
        """Several limits that are taken together: all of them grant, or none does."""
        return self._limits.handle(*names)

    def on_start(self, hook: H) -> H:
        """Run this hook before the workers start; the node can be used in it."""
        self._only_before_start()
        self._on_start.append(hook)
        return hook

    def on_stop(self, hook: H) -> H:
        """Run this hook after the drain, in reverse order; also if a start hook failed.

        It is cancelled after ten seconds. The block raises its exception, unless the block raised
        another one.
        """
        self._only_before_start()
        self._on_stop.append(hook)
        return hook

    def _add_sink(self, template: str, sink: Sink) -> None:
        self._only_before_start()
        for other in self._routes.all_sinks():
            if other.name == sink.name and other is not sink:
                raise ConfigError(
                    setting="the sink",
                    value=f"{sink.name} of {template}",
                    origin="its declaration",
                    problem="another sink has that name",
                    fix="give each function or sink a name of its own",
                )
        self._routes.add_sink(template, sink)

    def _only_before_start(self) -> None:
        if self._begun:
            raise ConfigError(
                setting="the node",
                value=repr(self),
                origin="the code",
                problem="it is already running",
                fix="declare everything before `async with node:`, and start it once",
            )

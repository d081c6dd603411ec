"""What is declared on a node: caches, sinks, and what runs when it starts and stops.

D1  What cannot work is refused where it is declared: lifetimes, templates that do not fit
    their function, a name or template that is there already.
D2  A decorator leaves the function's types as they were.
D3  Nothing is declared on a node that runs.
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

__all__ = ["Declarations"]

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
        self._begun = False  # from the beginning of a start to the end of its stop

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
        """Cache what a loader returns. Times in seconds.

        Args:
            template: the key, with every parameter of the loader as a field.
            ttl: how long a value is fresh.
            stale_for: how much longer it may be served while a new one is loaded.
            stale_if_error: how long after ``ttl`` it may be served if the loader fails.
            negative_ttl: how long None is remembered; by default like ``ttl``, at most 10 s.
            refresh_ahead: the fraction of ``ttl`` after which a read has it loaded anew.
            soft_timeout: how long a caller waits for the loader who could be served stale.
            hard_timeout: how long any caller waits; the load itself goes on.
            tags: labels by which entries are invalidated together; may have fields too.
            depends_on: keys with which entries are invalidated, and with what these depend on.
            max_staleness: how far this node may lag behind changes elsewhere.
            on_disconnected: what to do without Valkey: ``bypass``, ``stale`` or ``fail``.
            harmless: exceptions of the loader that say nothing of the source's health.
            mutable: give each caller a copy of its own.
            legacy_key: where another service stored its values as JSON, with the same fields, such
                as ``v1:product:{id}``. A value there spares the first load of a key.
            name: in metrics and logs; by default the function's.

        Raises:
            ConfigError, InvalidKey: the declaration cannot work.
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
        # So that what is wrong is refused here; by the longest lease, since the node's own is
        # known only when it starts, and then it is looked at again.
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
        """Where write-behind puts the values of these keys: a sink, or a decorated function.

        Raises:
            ConfigError, InvalidKey: the declaration cannot work.
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
        """A rate limit that all nodes share; also on a node that runs. Times in seconds.

        Without ``rate`` it is what the settings say: a table [limits.NAME], or for the default
        name ``limiter.max_tokens`` and ``limiter.window_s``. With it, that is what holds where
        the settings say nothing.

        Args:
            name: in settings, metrics, headers and verdicts.
            rate: tokens in every ``per``.
            per: see ``rate``.
            burst: tokens at once; by default as many as ``rate``.
            shadow: charge and count, but refuse nothing.
            store_down: what holds without Valkey: a fair share (``local``), nothing is let in
                (``closed``), or all is (``open``).
            lease: fetch tokens ahead, and spend them without asking.
            lease_hold: how long such tokens are kept.
            concurrency: slots at a time.

        Raises:
            InvalidLimit, InvalidKey: it cannot work.
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
        """Several limits that are asked together: all of them grant, or none does."""
        return self._limits.handle(*names)

    def on_start(self, hook: H) -> H:
        """Run before the workers start, when the node can be used already."""
        self._only_before_start()
        self._on_start.append(hook)
        return hook

    def on_stop(self, hook: H) -> H:
        """Run after the drain, the last declared first; also if the start failed at a hook.

        It is cancelled after ten seconds. What it raises is raised by the block, unless
        that has raised something itself.
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
                problem="it is running already",
                fix="declare everything before `async with node:`, and start it once",
            )

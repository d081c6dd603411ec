"""The public face of a cache: what ``@node.cached`` makes of a loader.

    @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
    async def product(id: int) -> Product: ...

    @product.batch
    async def products(ids: list[int]) -> dict[int, Product]: ...

    await product(42)                                   # typed as before
    await product.get_with_info(42)                     # with tier, age, stale, version
    await product.many([1, 2, 3])                       # one round trip, one load for the misses
    await product.put(42, value)                        # a value known to be the newest
    await product.write_through(42, value)              # the sink, then the entry
    await product.write_around(42, value)               # the sink, then an invalidation
    await product.write_behind(42, value)               # the entry now, the sink soon
    await product.invalidate(42)

Values are shared between callers: treat them as immutable, or declare the cache ``mutable``; then
each caller gets its own copy.

The last argument of a write is the value, the ones before are the loader's. ``until`` is the level
that a write has to reach within ``timeout`` seconds; the ``Receipt`` holds the level it reached:

    accepted    the primary has stored it
    replicated  ``valkey.replicas_min`` replicas have it, in memory
    sink        the sink has stored it

A write-through of a key with a pending write-behind waits until the sink has stored that.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

import structlog

from ...coordinator.locks.guards import token_of
from ...coordinator.locks.lease import Lease
from ...schemas.errors import InvalidKey, Level, PartialFailure
from ...schemas.jobs import Invalidates
from ...schemas.keys import check_key, refuse_one_string
from .. import request_scope as scope
from .batches import BatchLoader
from .cache import Cache
from .core import Hit
from .declaration import Declaration, lifetime_ms
from .shared import Receipt
from .warming import How, Items, WarmReport, warm

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
L = TypeVar("L", bound=BatchLoader)
T_co = TypeVar("T_co", covariant=True)
A_contra = TypeVar("A_contra", contravariant=True)
B_contra = TypeVar("B_contra", contravariant=True)
C_contra = TypeVar("C_contra", contravariant=True)
Wide = tuple[Any, Any, Any, Any, *tuple[Any, ...]]  #: the arguments of a loader of more than three

_INVALIDATES_MAX = 1_000  #: keys or tags in a write job
_TIMEOUT_S = 5.0


# A type checker compares a cached function with these protocols to know the arguments of its
# writes. A loader of more than three parameters accepts anything here; calls are still checked.


class Takes0(Protocol[T_co]):
    def __call__(self) -> Coroutine[Any, Any, T_co]: ...


class Takes1(Protocol[A_contra, T_co]):
    def __call__(self, a: A_contra, /) -> Coroutine[Any, Any, T_co]: ...


class Takes2(Protocol[A_contra, B_contra, T_co]):
    def __call__(self, a: A_contra, b: B_contra, /) -> Coroutine[Any, Any, T_co]: ...


class Takes3(Protocol[A_contra, B_contra, C_contra, T_co]):
    def __call__(self, a: A_contra, b: B_contra, c: C_contra, /) -> Coroutine[Any, Any, T_co]: ...


class PutOptions(TypedDict, total=False):
    ttl: float | None
    until: Literal["accepted", "replicated"]
    timeout: float
    token: Lease | int


class SourceOptions(TypedDict, total=False):
    timeout: float


class BehindOptions(TypedDict, total=False):
    invalidates_keys: Sequence[str]
    invalidates_tags: Sequence[str]
    until: Level
    timeout: float


class Cached(Generic[P, T]):
    """Callable like the loader that it wraps; use it while its node runs."""

    def __init__(self, loader: Callable[P, Awaitable[T]], declared: Declaration) -> None:
        self._cache: Cache[T] = Cache(loader, declared)
        functools.update_wrapper(self, loader)
        self.name = self._cache.name
        self.key = self._cache.keying.key
        if not self._cache.keying.annotated:
            fix = "annotate the return type; otherwise callers get dicts, lists and the like"
            log.warning("cache.untyped", cache=self.name, fix=fix)

    def __repr__(self) -> str:
        return f"<Cached {self.name} {self._cache.template.text}>"

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value: from the near cache, the shared tier, or the loader.

        Raises:
            Unavailable, ServerRefused: Valkey does not answer or refuses, and the cache is declared
                with ``on_disconnected="fail"``.
            SourceFailing: no value is stored, and the source is known to fail.
            LoaderError: the loader timed out, waits for its own key, or returned a value of another
                type.
            Backpressure: too many loads or waiting callers.
            Any exception of the loader.
        """
        cache, key = self._cache, self.key(*args, **kwargs)
        if scope.opened and (seen := scope.current()) is not None:
            return cache.own_hit(await cache.read_in_scope(seen, key)).value
        entry = cache.near_get(key)
        if entry is None:
            hit = await cache.path.read(key, functools.partial(cache.call_of, key))
            kept: Any = hit.value
        else:
            kept = entry.value
        value: T = kept if cache.own is None else cache.own(kept)
        return value

    async def get_with_info(self, *args: P.args, **kwargs: P.kwargs) -> Hit[T]:
        """The value with its tier, age, version, and whether it is stale. Raises as a call."""
        cache, key = self._cache, self.key(*args, **kwargs)
        if (seen := scope.current()) is not None:
            return cache.own_hit(await cache.read_in_scope(seen, key))
        return await cache.read_key(key)

    @overload
    async def many(self: Takes1[A, Any], items: Iterable[A]) -> list[T]: ...

    @overload
    async def many(self: Takes2[A, B, Any], items: Iterable[tuple[A, B]]) -> list[T]: ...

    @overload
    async def many(self: Takes3[A, B, C, Any], items: Iterable[tuple[A, B, C]]) -> list[T]: ...

    @overload
    async def many(self, items: Iterable[Wide]) -> list[T]: ...

    async def many(self, items: Iterable[Any]) -> list[T]:
        """The values of many items, in their order: one round trip, and one load for the misses.

        An item is the loader's one argument, or the tuple of its arguments.

        Raises:
            PartialFailure: some reads failed; it holds their errors and the values of the others.
        """
        refuse_one_string("items", items)
        asked = list(items)
        hits = await self.many_with_info(asked)
        pairs = list(zip(asked, hits, strict=True))
        errors = {item: hit for item, hit in pairs if isinstance(hit, Exception)}
        if errors:
            values = {item: hit.value for item, hit in pairs if isinstance(hit, Hit)}
            raise PartialFailure(self.name, values, errors)
        return [hit.value for hit in hits if isinstance(hit, Hit)]

    @overload
    async def many_with_info(
        self: Takes1[A, Any], items: Iterable[A]
    ) -> list[Hit[T] | Exception]: ...

    @overload
    async def many_with_info(
        self: Takes2[A, B, Any], items: Iterable[tuple[A, B]]
    ) -> list[Hit[T] | Exception]: ...

    @overload
    async def many_with_info(
        self: Takes3[A, B, C, Any], items: Iterable[tuple[A, B, C]]
    ) -> list[Hit[T] | Exception]: ...

    @overload
    async def many_with_info(self, items: Iterable[Wide]) -> list[Hit[T] | Exception]: ...

    async def many_with_info(self, items: Iterable[Any]) -> list[Hit[T] | Exception]:
        """As ``many``, with tiers and ages; a failed read is returned as its exception."""
        refuse_one_string("items", items)
        of_item = self._cache.keying.of_item
        return await self._cache.read_keys([of_item(item) for item in items])

    def batch(self, loader: L) -> L:
        """Declare a loader for many items at once: it takes a list and returns a mapping.

        Raises:
            ConfigError: a batch loader is already declared, or the node is already running.
        """
        self._cache.set_batch_loader(loader)
        return loader

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Invalidate the entry on every node; on this node before the call returns."""
        await self._cache.path.invalidate(self.key(*args, **kwargs))

    async def warm(self, items: Items, **how: Unpack[How]) -> WarmReport:
        """Load the items that are not fresh in the shared tier, before readers ask for them.

        An item is the loader's one argument, or the tuple of its arguments.

        Raises:
            ConfigError: ``concurrency`` or ``per_second`` is invalid.
        """
        return await warm(self._cache, items, **how)

    @overload
    async def put(self: Takes0[T], value: T | None, /, **how: Unpack[PutOptions]) -> Receipt: ...

    @overload
    async def put(
        self: Takes1[A, T], a: A, value: T | None, /, **how: Unpack[PutOptions]
    ) -> Receipt: ...

    @overload
    async def put(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **how: Unpack[PutOptions]
    ) -> Receipt: ...

    @overload
    async def put(
        self: Takes3[A, B, C, T], a: A, b: B, c: C, value: T | None, /, **how: Unpack[PutOptions]
    ) -> Receipt: ...

    @overload
    async def put(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **how: Unpack[PutOptions],
    ) -> Receipt: ...

    async def put(
        self,
        *args: Any,
        ttl: float | None = None,
        until: Literal["accepted", "replicated"] = "accepted",
        timeout: float = _TIMEOUT_S,  # noqa: ASYNC109 - part of a bounded wait
        token: Lease | int = 0,
    ) -> Receipt:
        """Store a value that the caller knows to be the newest; the sink is not written.

        None stores a known absence; if the cache keeps none (``negative_ttl=0``), it invalidates.

        Args:
            args: the loader's arguments, then the value.
            ttl: in seconds; by default the cache's.
            until: the level to reach.
            timeout: seconds to wait for that level.
            token: a lock's lease: a holder that lost the lock cannot replace the value of the next.

        Raises:
            StaleToken: the entry was put under a later token. LeaseLost: the lease has expired.
            Unavailable: the value may have been stored. Unconfirmed: it was, but ``until`` is not
                confirmed.
            InvalidValue: no entry can hold it. ConfigError: ``ttl``, ``until`` or ``timeout``.
        """
        key, value = self._key_and_value(args)
        ttl_ms = None if ttl is None else lifetime_ms("ttl", ttl, origin=f"a put of {self.name}")
        return await self._cache.writes.put(
            key,
            value,
            ttl_ms=ttl_ms,
            until=until,
            timeout_ms=self._timeout_ms(timeout),
            token=token_of(token),
        )

    @overload
    async def write_through(
        self: Takes0[T], value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self: Takes1[A, T], a: A, value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self: Takes3[A, B, C, T], a: A, b: B, c: C, value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_through(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **how: Unpack[SourceOptions],
    ) -> Receipt: ...

    async def write_through(self, *args: Any, timeout: float = _TIMEOUT_S) -> Receipt:  # noqa: ASYNC109
        """Store a value in the source, then in the cache; None deletes the row.

        Args:
            args: the loader's arguments, then the value.
            timeout: seconds to wait for other loads and writes of the key.

        Raises:
            SinkError: as the sink raised it; nothing was changed, unless its outcome is unknown.
            KeyBusy: the key was busy for ``timeout``. ConfigError: no sink is declared for the key.
            InvalidValue: no entry can hold the value; the sink was not written.
            Unavailable: Valkey did not answer, perhaps after the source stored it; write it again.
        """
        key, value = self._key_and_value(args)
        return await self._cache.writes.write_through(
            key, value, timeout_ms=self._timeout_ms(timeout)
        )

    @overload
    async def write_around(
        self: Takes0[T], value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self: Takes1[A, T], a: A, value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self: Takes3[A, B, C, T], a: A, b: B, c: C, value: T | None, /, **how: Unpack[SourceOptions]
    ) -> Receipt: ...

    @overload
    async def write_around(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **how: Unpack[SourceOptions],
    ) -> Receipt: ...

    async def write_around(self, *args: Any, timeout: float = _TIMEOUT_S) -> Receipt:  # noqa: ASYNC109
        """Store a value in the source, then invalidate the entry on every node.

        Raises as ``write_through``.
        """
        key, value = self._key_and_value(args)
        return await self._cache.writes.write_around(
            key, value, timeout_ms=self._timeout_ms(timeout)
        )

    @overload
    async def write_behind(
        self: Takes0[T], value: T | None, /, **how: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self: Takes1[A, T], a: A, value: T | None, /, **how: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self: Takes2[A, B, T], a: A, b: B, value: T | None, /, **how: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self: Takes3[A, B, C, T], a: A, b: B, c: C, value: T | None, /, **how: Unpack[BehindOptions]
    ) -> Receipt: ...

    @overload
    async def write_behind(
        self,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        value: T | None,
        /,
        *more: Any,
        **how: Unpack[BehindOptions],
    ) -> Receipt: ...

    async def write_behind(
        self,
        *args: Any,
        invalidates_keys: Sequence[str] = (),
        invalidates_tags: Sequence[str] = (),
        until: Level = "accepted",
        timeout: float = _TIMEOUT_S,  # noqa: ASYNC109
    ) -> Receipt:
        """Store a value now; a worker writes it to the sink soon after. None deletes the row.

        Args:
            args: the loader's arguments, then the value.
            invalidates_keys: keys to invalidate when the sink has stored the value.
            invalidates_tags: tags to invalidate then.
            until: the level to reach.
            timeout: seconds to wait for that level.

        Raises:
            Backpressure: the shard's stream is full. Unavailable: the outcome may be unknown.
            Unconfirmed: accepted, but ``until`` is not confirmed.
            DeadLettered: the sink refused the value.
            InvalidKey: a key or tag to invalidate is invalid, or there are over 1,000.
            InvalidValue: no entry can hold the value. ConfigError: no sink is declared for the key.
        """
        key, value = self._key_and_value(args)
        after = Invalidates(
            keys=_checked("invalidates_keys", invalidates_keys),
            tags=_checked("invalidates_tags", invalidates_tags),
        )
        return await self._cache.writes.write_behind(
            key, value, after, until=until, timeout_ms=self._timeout_ms(timeout)
        )

    def _key_and_value(self, args: Sequence[Any]) -> tuple[str, Any]:
        problem = f"a write of {self.name} takes the loader's arguments, and the value last"
        if not args:
            raise TypeError(problem)
        *arguments, value = args
        try:
            return self.key(*arguments), value
        except TypeError as error:
            raise TypeError(f"{problem}: {error} before the value") from None

    def _timeout_ms(self, timeout_s: float) -> int:
        return lifetime_ms("timeout", timeout_s, zero=True, origin=f"a write of {self.name}")


def cache_of(cached: Cached[..., T]) -> Cache[T]:
    """The cache behind a cached function."""
    return cached._cache  # noqa: SLF001 - users of a cached function see only its public face


def _checked(name: str, keys: Sequence[str]) -> tuple[str, ...]:
    refuse_one_string(name, keys)
    if len(keys) > _INVALIDATES_MAX:
        raise InvalidKey(name, f"{len(keys)} keys", f"are over {_INVALIDATES_MAX}")
    return tuple([check_key(key, name=name) for key in keys])

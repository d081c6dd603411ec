"""Warming: loads keys that are not fresh in the shared tier, before readers ask for them.

M1  At most ``concurrency`` keys are read at a time, or one part if the cache has a batch loader. At
    most ``per_second`` keys start per second, in bursts of a tenth of that; unused starts do not
    accumulate. Nodes that warm the same cache share the rate.
M2  Items are taken in parts of at most ``TOGETHER``, so the source of items may be endless.
M3  A failed key is counted and the others go on; the first ``FAILURES_KEPT`` failures are kept.
    A value that was loaded but could not be stored is a failure: no other reader will find it.
M4  When warming is cancelled, no further key starts. Running loads belong to the node and finish.
M5  A key is loaded as a reader would load it: under the fill lease, at most once in the cluster. A
    stale entry is refreshed by a node that takes the job; warming waits for its notice.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypedDict

import anyio
from msgspec import Struct

from ...coordinator.clock import Clock
from ...schemas.errors import ConfigError, LoaderError
from ..request_scope import outside
from .cache import Cache
from .core import Hit

TOGETHER = 100
FAILURES_KEPT = 10
_CONCURRENCY_MAX = 1_000
_BURSTS_PER_SECOND = 10

Items = Iterable[Any] | AsyncIterable[Any]


class Failure(Struct, frozen=True):
    key: str
    error: Exception


class WarmReport(Struct, frozen=True, kw_only=True):
    """The outcome of a warming. ``asked`` is ``loaded`` + ``fresh`` + ``failed``."""

    asked: int = 0
    loaded: int = 0  #: by this node or another
    fresh: int = 0  #: in the shared tier before
    failed: int = 0
    seconds: float = 0.0
    failures: tuple[Failure, ...] = ()  #: the first ten


Progress = Callable[[WarmReport], object]


class How(TypedDict, total=False):
    """The options of a warming."""

    concurrency: int  #: keys read at a time
    per_second: float | None  #: keys that start per second; None: no limit
    progress: Progress | None  #: called with the report so far after each key


class Pacer:
    """Limits the number of keys that start per second; None: no limit.

    Raises:
        ConfigError: ``per_second`` is not above zero.
    """

    def __init__(
        self,
        per_second: float | None,
        *,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        if per_second is not None and not 0 < per_second < math.inf:
            raise _unusable("per_second", per_second, "must be above zero", "give a rate, or None")
        self._interval_s = 1 / per_second if per_second else 0.0
        self._monotonic = clock.monotonic
        self._sleep = sleep
        self._next_at = float("-inf")

    @property
    def burst(self) -> int:
        """The number of keys that may start at once: a tenth of a second's keys."""
        if not self._interval_s:
            return TOGETHER
        return min(TOGETHER, max(1, int(1 / self._interval_s / _BURSTS_PER_SECOND)))

    async def wait_turn(self, count: int) -> None:
        """Return when ``count`` more keys may start."""
        now = self._monotonic()
        starts_at = max(now, self._next_at)
        self._next_at = starts_at + count * self._interval_s
        await self._sleep(starts_at - now)


class _Tally:
    def __init__(self, clock: Clock, progress: Progress | None) -> None:
        self._monotonic = clock.monotonic
        self._began_at = clock.monotonic()
        self._progress = progress
        self._loaded = self._fresh = self._failed = 0
        self._failures: list[Failure] = []

    def count(self, key: str, found: Hit[Any] | Exception, *, refreshed: bool = False) -> None:
        if isinstance(found, Exception):
            self._failed += 1
            if len(self._failures) < FAILURES_KEPT:
                self._failures.append(Failure(key, found))
        elif refreshed or found.tier == "source":
            self._loaded += 1
        else:
            self._fresh += 1
        if self._progress is not None:
            self._progress(self.report())

    def report(self) -> WarmReport:
        return WarmReport(
            asked=self._loaded + self._fresh + self._failed,
            loaded=self._loaded,
            fresh=self._fresh,
            failed=self._failed,
            seconds=self._monotonic() - self._began_at,
            failures=tuple(self._failures),
        )


async def warm(
    cache: Cache[Any],
    items: Items,
    *,
    by_key: bool = False,
    concurrency: int = 10,
    per_second: float | None = None,
    progress: Progress | None = None,
) -> WarmReport:
    """Load the items that are not fresh in the shared tier.

    An item is the loader's one argument or the tuple of its arguments; with ``by_key``, a key.

    Raises:
        ConfigError: ``concurrency`` or ``per_second`` is invalid. Any exception of ``items``.
    """
    if not 1 <= concurrency <= _CONCURRENCY_MAX:
        problem = f"must be between 1 and {_CONCURRENCY_MAX}"
        raise _unusable("concurrency", concurrency, problem, "give such a number")
    clock = cache.path.loads.clock
    pacer, tally = Pacer(per_second, clock=clock), _Tally(clock, progress)
    limiter = anyio.CapacityLimiter(concurrency)
    async with aclosing(_parts(items, pacer.burst)) as parts:
        async for part in parts:
            await pacer.wait_turn(len(part))
            if per_second is not None:  # the rate that all nodes share
                await cache.path.loads.pace(
                    f"forebay.warm.{cache.name}",
                    len(part),
                    per_second=per_second,
                    burst=pacer.burst,
                )
            with outside():
                await _warm_part(cache, part, by_key, limiter, tally)
    return tally.report()


async def _parts(items: Items, size: int) -> AsyncGenerator[Sequence[Any]]:
    part: list[Any] = []
    async with aclosing(_each(items)) as each:
        async for item in each:
            part.append(item)
            if len(part) == size:
                yield part
                part = []
    if part:
        yield part


async def _each(items: Items) -> AsyncGenerator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _warm_part(
    cache: Cache[Any],
    part: Sequence[Any],
    by_key: bool,
    limiter: anyio.CapacityLimiter,
    tally: _Tally,
) -> None:
    keys = []
    for item in part:
        try:
            keys.append(_key_of(cache, item, by_key))
        except Exception as error:  # arguments without a key
            tally.count(repr(item)[:200], error)
    found = await _read_all(cache, keys, limiter)
    async with anyio.create_task_group() as tasks:
        for key, hit in zip(keys, found, strict=True):
            if isinstance(hit, Hit) and hit.stale:
                tasks.start_soon(_await_refresh, cache, key, limiter, tally)
            else:
                tally.count(key, _check_stored(cache, key, hit))


def _key_of(cache: Cache[Any], item: Any, by_key: bool) -> str:
    if by_key:
        cache.keying.arguments(item)  # raises InvalidKey
        return str(item)
    return cache.keying.key(*(item if isinstance(item, tuple) else (item,)))


async def _read_all(
    cache: Cache[Any], keys: Sequence[str], limiter: anyio.CapacityLimiter
) -> Sequence[Hit[Any] | Exception]:
    """Read each key as a reader would."""
    if cache.batched:
        return await cache.read_keys(keys)
    found: dict[int, Hit[Any] | Exception] = {}

    async def read(place: int, key: str) -> None:
        async with limiter:
            found[place] = await _read(cache, key)

    async with anyio.create_task_group() as tasks:
        for place, key in enumerate(keys):
            tasks.start_soon(read, place, key)
    return [found[place] for place in range(len(keys))]


async def _read(cache: Cache[Any], key: str) -> Hit[Any] | Exception:
    try:
        return await cache.read_key(key)
    except Exception as error:
        return error


async def _await_refresh(
    cache: Cache[Any], key: str, limiter: anyio.CapacityLimiter, tally: _Tally
) -> None:
    """Wait for the refresh that the read has requested, at most for the length of a lease."""
    path = cache.path
    async with limiter:
        with anyio.move_on_after(path.policy.lease_ms / 1000):
            while True:
                with path.loads.waits.watch(key) as noticed:
                    found = await _read(cache, key)
                    if isinstance(found, Exception) or not found.stale:
                        tally.count(key, _check_stored(cache, key, found), refreshed=True)
                        return
                    await noticed.wait()
    problem = "it is still stale: no node has refreshed it in time"
    tally.count(key, LoaderError(cache.name, key, problem))


def _check_stored(cache: Cache[Any], key: str, found: Hit[Any] | Exception) -> Hit[Any] | Exception:
    """A failure for a loaded value that was not stored, unless the cache keeps no absences."""
    if isinstance(found, Exception) or found.tier != "source" or found.version:
        return found
    if found.value is None:
        return found
    return LoaderError(cache.name, key, "its value was loaded, but could not be stored")


def _unusable(name: str, value: float, problem: str, fix: str) -> ConfigError:
    return ConfigError(
        setting=name, value=repr(value), origin="the call of warm", problem=problem, fix=fix
    )

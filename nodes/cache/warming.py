"""Warming: loading what is not fresh in the shared tier, ahead of the readers.

M1  At most ``concurrency`` keys are under way at a time; or one part, where there is a loader
    for many items at once. At most ``per_second`` begin in a second, but for a burst of a
    tenth of them; what was not used is not made up for. Nodes that warm one cache share it.
M2  Items are taken in parts of at most ``TOGETHER``: an endless source of them does no harm.
M3  A failure is counted, the first ``FAILURES_KEPT`` are kept, and the others go on. A value
    that was loaded, but could not be stored, is a failure: no other reader will find it.
M4  Cancelled, nothing further is begun. Loads under way are the node's, and end by themselves.
M5  Loads go the way of a reader's: under the fill lease, at most one of a key in the cluster. A
    stale entry is refreshed by whichever node takes the job; its notice is waited for.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypedDict

import anyio
from msgspec import Struct

from ...coordinator.clock import Clock
from ...schemas.errors import ConfigError, LoaderError
from ..request_scope import outside
from .core import Hit
from .keying import Keying
from .read import ReadPath

__all__ = [
    "FAILURES_KEPT",
    "TOGETHER",
    "Failure",
    "How",
    "Items",
    "Pacer",
    "Progress",
    "WarmReport",
    "Warmed",
    "warm",
]

TOGETHER = 100
FAILURES_KEPT = 10
_CONCURRENCY_MAX = 1_000
_BURSTS_PER_SECOND = 10

Items = Iterable[Any] | AsyncIterable[Any]


class Failure(Struct, frozen=True):
    key: str
    error: Exception


class WarmReport(Struct, frozen=True, kw_only=True):
    """``asked`` is the sum of the three that follow."""

    asked: int = 0
    loaded: int = 0  #: by whichever node had the lease
    fresh: int = 0  #: it was there
    failed: int = 0
    seconds: float = 0.0
    failures: tuple[Failure, ...] = ()  #: the first ones


Progress = Callable[[WarmReport], object]


class How(TypedDict, total=False):
    """The options of a warming."""

    concurrency: int  #: keys under way at a time
    per_second: float | None  #: keys that begin; None: no limit
    progress: Progress | None  #: told the report so far, as each key ends


class Warmed(Protocol):
    """What is asked of a cached function."""

    name: str

    @property
    def key(self) -> Callable[..., str]: ...

    @property
    def keying(self) -> Keying: ...

    @property
    def path(self) -> ReadPath[Any]: ...

    @property
    def batched(self) -> bool: ...

    def get_with_info(self, *args: Any) -> Awaitable[Hit[Any]]: ...

    def many_with_info(self, items: Iterable[Any]) -> Awaitable[Sequence[Hit[Any] | Exception]]: ...

    def read_key(self, key: str) -> Awaitable[Hit[Any]]: ...


class Pacer:
    """Lets at most so many begin in a second; None: as many as will.

    Raises:
        ConfigError: the number is not above zero.
    """

    def __init__(
        self,
        per_second: float | None,
        *,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        if per_second is not None and not 0 < per_second < math.inf:
            raise _unusable("per_second", per_second, "is not above zero", "give a rate, or none")
        self._interval_s = 1 / per_second if per_second else 0.0
        self._monotonic = clock.monotonic
        self._sleep = sleep
        self._next_at = float("-inf")

    @property
    def burst(self) -> int:
        """How many may be asked for at once, so that they are spread over the second."""
        if not self._interval_s:
            return TOGETHER
        return min(TOGETHER, max(1, int(1 / self._interval_s / _BURSTS_PER_SECOND)))

    async def turn(self, count: int) -> None:
        """Return when so many more may begin."""
        now = self._monotonic()
        starts_at = max(now, self._next_at)
        self._next_at = starts_at + count * self._interval_s
        await self._sleep(starts_at - now)


class _Item(Struct, frozen=True):
    key: str
    item: Any  #: as ``many_with_info`` takes it
    read: Callable[[], Awaitable[Hit[Any]]]


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
    cached: Warmed,
    items: Items,
    *,
    by_key: bool = False,
    concurrency: int = 10,
    per_second: float | None = None,
    progress: Progress | None = None,
) -> WarmReport:
    """Load what is not fresh. An item is the loader's one argument or a tuple of them; or,
    ``by_key``, a key of the cache.

    Raises:
        ConfigError: ``concurrency`` or ``per_second`` cannot be used. Whatever ``items`` raises.
    """
    if not 1 <= concurrency <= _CONCURRENCY_MAX:
        fix = f"give a number between 1 and {_CONCURRENCY_MAX}"
        raise _unusable("concurrency", concurrency, "is out of range", fix)
    clock = cached.path.loads.clock
    pacer, tally = Pacer(per_second, clock=clock), _Tally(clock, progress)
    limiter = anyio.CapacityLimiter(concurrency)
    async with aclosing(_parts(items, pacer.burst)) as parts:
        async for part in parts:
            await pacer.turn(len(part))
            if per_second is not None:  # and together with whoever else warms this cache
                await cached.path.loads.pace(
                    f"forebay.warm.{cached.name}",
                    len(part),
                    per_second=per_second,
                    burst=pacer.burst,
                )
            with outside():
                await _warm_part(cached, part, by_key, limiter, tally)
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
    cached: Warmed, part: Sequence[Any], by_key: bool, limiter: anyio.CapacityLimiter, tally: _Tally
) -> None:
    wanted = []
    for item in part:
        try:
            wanted.append(_item_of(cached, item, by_key))
        except Exception as error:  # arguments that make no key
            tally.count(repr(item)[:200], error)
    found = await _hits(cached, wanted, limiter)
    async with anyio.create_task_group() as tasks:
        for item, hit in zip(wanted, found, strict=True):
            if isinstance(hit, Hit) and hit.stale:
                tasks.start_soon(_have_refreshed, cached, item, limiter, tally)
            else:
                tally.count(item.key, _stored(cached, item, hit))


def _item_of(cached: Warmed, item: Any, by_key: bool) -> _Item:
    if by_key:
        arguments = cached.keying.arguments(item)
        return _Item(item, cached.keying.item(arguments), partial(cached.read_key, item))
    args = item if isinstance(item, tuple) else (item,)
    one_or_all = args[0] if len(args) == 1 else args
    return _Item(cached.key(*args), one_or_all, partial(cached.get_with_info, *args))


async def _hits(
    cached: Warmed, wanted: Sequence[_Item], limiter: anyio.CapacityLimiter
) -> Sequence[Hit[Any] | Exception]:
    """What a reader of each gets now."""
    if cached.batched:
        return await cached.many_with_info([each.item for each in wanted])
    found: dict[int, Hit[Any] | Exception] = {}

    async def read(place: int, item: _Item) -> None:
        async with limiter:
            found[place] = await _try_to_read(item)

    async with anyio.create_task_group() as tasks:
        for place, item in enumerate(wanted):
            tasks.start_soon(read, place, item)
    return [found[place] for place in range(len(wanted))]


async def _try_to_read(item: _Item) -> Hit[Any] | Exception:
    try:
        return await item.read()
    except Exception as error:
        return error


async def _have_refreshed(
    cached: Warmed, item: _Item, limiter: anyio.CapacityLimiter, tally: _Tally
) -> None:
    """Wait for the refresh that reading has asked for, at most as long as a lease."""
    path = cached.path
    found: Hit[Any] | Exception
    async with limiter:
        with anyio.move_on_after(path.policy.lease_ms / 1000):
            while True:
                with path.loads.waits.watch(item.key) as said:
                    found = await _try_to_read(item)
                    if isinstance(found, Exception) or not found.stale:
                        tally.count(item.key, _stored(cached, item, found), refreshed=True)
                        return
                    await said.wait()
    problem = "it is still stale: no node has refreshed it in time"
    tally.count(item.key, LoaderError(cached.name, item.key, problem))


def _stored(cached: Warmed, item: _Item, found: Hit[Any] | Exception) -> Hit[Any] | Exception:
    """An absence that the cache is told not to keep needs no storing."""
    if isinstance(found, Exception) or found.tier != "source" or found.version:
        return found
    if found.value is None:
        return found
    return LoaderError(cached.name, item.key, "its value was loaded, but could not be stored")


def _unusable(name: str, value: float, problem: str, fix: str) -> ConfigError:
    return ConfigError(
        setting=name, value=repr(value), origin="the call of warm", problem=problem, fix=fix
    )

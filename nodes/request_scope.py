"""Request scope: within one request, a key that was read keeps its value.

    async with request_scope():
        await product(42)
        ...                     # another node may change it meanwhile
        await product(42)       # the same value again, from a dict

S1  In an open scope, the same key of a cache gives the same value; of two concurrent reads, the
    value of the first that ends. Errors are not kept.
S2  A request sees its own changes at once: after ``forget``, the result of a read that began before
    is not kept either. ``forget`` also applies to the enclosing scopes.
S3  A scope is visible in its block and in the tasks started there only. A closed scope serves and
    holds nothing, also if a task outlives the block.
S4  A scope holds at most ``entries_max`` values of ``bytes_max`` bytes in total; further values are
    returned, but not kept. It closes by itself after ``lasts_s``, so that a response that streams
    for hours does not read values of its first second.
S5  A loader runs ``outside`` of every scope: its value is stored for all readers, so it must not
    depend on values that one request read earlier.
S6  While no scope is open, a read only checks ``scope.opened``.

A scope inside a scope is the same scope, unless ``fresh`` is set. This module fetches, stores and
invalidates nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from ..coordinator.clock import Clock, SystemClock
from ..schemas.errors import ForebayError
from .cache.core import Hit

T = TypeVar("T")
W = TypeVar("W")

_ENTRIES_MAX = 1_000
_BYTES_MAX = 8 * 1024 * 1024
_LASTS_S = 30.0

opened = 0  #: number of open blocks, in all threads
_counting = Lock()


class ScopeStatistics(Struct, frozen=True, kw_only=True):
    entries: int
    bytes: int
    refused: int


class RequestScope:
    """The values that one request has read. Made by ``request_scope``, found by ``current``."""

    def __init__(
        self,
        *,
        around: RequestScope | None = None,
        entries_max: int = _ENTRIES_MAX,
        bytes_max: int = _BYTES_MAX,
        lasts_s: float = _LASTS_S,
        clock: Clock,
    ) -> None:
        self.around = around
        self.closed = False
        self.changes = 0  #: read before a read begins, and passed to ``put`` as ``since``
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._monotonic = clock.monotonic
        self._ends_at = clock.monotonic() + lasts_s
        self._kept: dict[tuple[object, str], tuple[Hit[Any], float]] = {}
        self._caches: set[object] = set()
        self._forgotten: dict[str, int] = {}
        self._all_forgotten = 0
        self._bytes = 0
        self._refused = 0

    def __repr__(self) -> str:
        return f"<RequestScope {'closed' if self.closed else 'open'}, {len(self._kept)} entries>"

    def statistics(self) -> ScopeStatistics:
        return ScopeStatistics(entries=len(self._kept), bytes=self._bytes, refused=self._refused)

    async def read(self, cache: object, key: str, read: Callable[[], Awaitable[Hit[T]]]) -> Hit[T]:
        """The kept value, or the result of ``read``, which is then kept."""
        found = self.get(cache, key)
        if found is not None:
            return found
        since = self.changes
        return self.put(cache, key, await read(), since)

    async def read_many(
        self,
        cache: object,
        wanted: Mapping[str, W],
        read: Callable[[Mapping[str, W]], Awaitable[dict[str, Hit[T] | Exception]]],
    ) -> dict[str, Hit[T] | Exception]:
        """As ``read``, for many keys; errors are not kept."""
        found: dict[str, Hit[T] | Exception] = {}
        for key in wanted:
            if (there := self.get(cache, key)) is not None:
                found[key] = there
        since = self.changes
        results = await read({key: wanted[key] for key in wanted if key not in found})
        for key, hit in results.items():
            kept = hit if isinstance(hit, Exception) else self.put(cache, key, hit, since)
            found[key] = kept
        return found

    def get(self, cache: object, key: str) -> Hit[Any] | None:
        """The kept value, with its present age. ``cache`` distinguishes equal keys."""
        found = self._kept.get((cache, key))
        if found is None:
            return None
        now = self._monotonic()
        if now >= self._ends_at:
            self.close()
            return None
        hit, read_at = found
        since_ms = int((now - read_at) * 1000)
        if not since_ms or hit.age_ms is None:
            return hit
        return replace(hit, age_ms=hit.age_ms + since_ms)

    def put(self, cache: object, key: str, hit: Hit[T], since: int) -> Hit[T]:
        """Keep the result of a read that began at ``since``; returns the value to serve."""
        present: Hit[T] | None = self.get(cache, key)
        if present is not None:
            return present
        now = self._monotonic()
        changed_at = max(self._forgotten.get(key, 0), self._all_forgotten)
        if self.closed or now >= self._ends_at or changed_at > since:
            return hit
        if len(self._kept) >= self._entries_max or self._bytes + hit.size > self._bytes_max:
            self._refused += 1
            return hit
        self._kept[cache, key] = hit, now
        self._caches.add(cache)
        self._bytes += hit.size
        return hit

    def forget(self, key: str) -> None:
        """Drop a key that the request has changed."""
        self.changes += 1
        if len(self._forgotten) >= self._entries_max:
            self._forgotten.clear()
            self._all_forgotten = self.changes  # no running read is kept
        self._forgotten[key] = self.changes
        for cache in self._caches:
            if found := self._kept.pop((cache, key), None):
                self._bytes -= found[0].size
        if self.around is not None:
            self.around.forget(key)

    def forget_all(self) -> None:
        """Drop all keys: the request has changed keys that it cannot name."""
        self.changes += 1
        self._all_forgotten = self.changes
        self._clear()
        if self.around is not None:
            self.around.forget_all()

    def close(self) -> None:
        self.closed = True
        self._clear()

    def _clear(self) -> None:
        self._kept.clear()
        self._caches.clear()
        self._forgotten.clear()
        self._bytes = 0


_current: ContextVar[RequestScope | None] = ContextVar("forebay_request_scope", default=None)


def current() -> RequestScope | None:
    """The innermost open scope of this task."""
    if not opened:
        return None
    scope = _current.get()
    while scope is not None and scope.closed:
        scope = scope.around
    return scope


def forget(keys: Iterable[str], *, more: bool = False) -> None:
    """Drop keys that this task has changed; ``more``: also unknown ones, such as those of a tag."""
    scope = current()
    if scope is None:
        return
    if more:
        scope.forget_all()
    else:
        for key in keys:
            scope.forget(key)


@contextmanager
def outside() -> Iterator[None]:
    """Hide all scopes from a block of code that works for all readers (S5)."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def _count(step: int) -> None:
    global opened  # noqa: PLW0603 - the fastest check, on every read
    with _counting:
        opened += step


class ScopeBlock:
    """A context manager to enter once, with ``with`` or ``async with``."""

    def __init__(self, *, fresh: bool, clock: Clock, **bounds: Any) -> None:
        self._fresh = fresh
        self._clock = clock
        self._bounds = bounds
        self._entered = False
        self._own: RequestScope | None = None
        self._token: Token[RequestScope | None] | None = None

    def __enter__(self) -> RequestScope:
        if self._entered:
            raise ForebayError("a request scope is entered once; call request_scope() again")
        self._entered = True
        around = current()
        if around is not None and not self._fresh:
            return around
        self._own = RequestScope(around=around, clock=self._clock, **self._bounds)
        self._token = _current.set(self._own)
        _count(1)
        return self._own

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        token, self._token = self._token, None
        if token is None:
            return
        self.close()
        _count(-1)
        with suppress(ValueError):  # left in another context, where a closed scope serves nothing
            _current.reset(token)

    async def __aenter__(self) -> RequestScope:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def close(self) -> None:
        """Close the scope before the block ends, unless it belongs to an enclosing block."""
        if self._own is not None:
            self._own.close()


def request_scope(
    *,
    fresh: bool = False,
    entries_max: int = _ENTRIES_MAX,
    bytes_max: int = _BYTES_MAX,
    lasts_s: float = _LASTS_S,
    clock: Clock | None = None,
) -> ScopeBlock:
    """A block in which a key that was read keeps its value.

    The middlewares open one for each request; a job or a message consumer may open its own.

    Args:
        fresh: open a new scope inside an enclosing one; changes apply to both.
        entries_max: number of values to keep.
        bytes_max: total size of these values.
        lasts_s: seconds after which the scope closes by itself.
        clock: for tests.
    """
    return ScopeBlock(
        fresh=fresh,
        clock=clock or SystemClock(),
        entries_max=entries_max,
        bytes_max=bytes_max,
        lasts_s=lasts_s,
    )

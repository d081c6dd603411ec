"""Request scope: within one request, a key that was read keeps its value.

    async with request_scope():
        await product(42)
        ...                     # whatever is changed elsewhere meanwhile
        await product(42)       # the same again, and no further than a dict away

S1  In an open scope the same key of a cache gives the same value; of two reads at once, the
    value of the first that ended. Errors are not kept.
S2  What the request changes itself, it sees at once: ``forget`` also keeps out what a read
    brings that had begun before, and reaches the scopes around.
S3  A scope is seen in its block and by the tasks started there, and nowhere else. Once closed
    it serves nothing and holds nothing, however long a task outlives the block.
S4  It holds at most ``entries_max`` values of ``bytes_max`` bytes together; what goes beyond is
    given, and not kept. After ``lasts_s`` it ends by itself, though the block goes on: what
    streams for hours must not be answered from its first second.
S5  A loader runs ``outside`` of every scope. What it returns is stored for everyone, so it
    must not be made of what one request saw a while ago.
S6  While no scope is open, a reader pays for one look at ``scope.opened``.

A scope inside a scope is the same one, unless ``fresh`` is asked for. No value is fetched,
stored or invalidated here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from ..coordinator.clock import Clock, SystemClock
from ..schemas.errors import ForebayError

if TYPE_CHECKING:
    from .cache.core import Hit  # which imports this module

__all__ = [
    "RequestScope",
    "ScopeBlock",
    "ScopeStatistics",
    "current",
    "forget",
    "outside",
    "request_scope",
]

T = TypeVar("T")
W = TypeVar("W")

_ENTRIES_MAX = 1_000
_BYTES_MAX = 8 * 1024 * 1024
_LASTS_S = 30.0

opened = 0  #: blocks that are entered now, in all threads
_counting = Lock()


class ScopeStatistics(Struct, frozen=True, kw_only=True):
    entries: int
    bytes: int
    refused: int


class RequestScope:
    """What one request has read. Made by ``request_scope``, found by ``current``."""

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
        self.changes = 0  #: what ``put`` wants to know of the moment when the read began
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
        """What the scope has, or else what ``read`` brings, which is kept."""
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
        """As ``read``, for many keys; what failed is not kept."""
        found: dict[str, Hit[T] | Exception] = {}
        for key in wanted:
            if (there := self.get(cache, key)) is not None:
                found[key] = there
        since = self.changes
        brought = await read({key: wanted[key] for key in wanted if key not in found})
        for key, hit in brought.items():
            kept = hit if isinstance(hit, Exception) else self.put(cache, key, hit, since)
            found[key] = kept
        return found

    def get(self, cache: object, key: str) -> Hit[Any] | None:
        """What was read before, older by the time since. ``cache`` tells equal keys apart."""
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
        """Keep what a read brought that began at ``since``; returns what is to be given."""
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
        """The request has changed this key."""
        self.changes += 1
        if len(self._forgotten) >= self._entries_max:
            self._forgotten.clear()
            self._all_forgotten = self.changes  # reads under way of any key are not kept
        self._forgotten[key] = self.changes
        for cache in self._caches:
            if found := self._kept.pop((cache, key), None):
                self._bytes -= found[0].size
        if self.around is not None:
            self.around.forget(key)

    def forget_all(self) -> None:
        """The request has changed more than it can name."""
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
    """The innermost scope that is open here."""
    if not opened:
        return None
    scope = _current.get()
    while scope is not None and scope.closed:
        scope = scope.around
    return scope


def forget(keys: Iterable[str], *, more: bool = False) -> None:
    """The code here has changed these keys; ``more``: and others, such as those with a tag."""
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
    """For work on behalf of everyone, in the middle of a request (S5)."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def _count(step: int) -> None:
    global opened  # noqa: PLW0603 - nothing is read faster, and every read looks at it
    with _counting:
        opened += step


class ScopeBlock:
    """``with`` or ``async with``, once."""

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
        with suppress(ValueError):  # left in another context; what is closed serves nothing there
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
        """End the scope before the block ends; one that is shared is left to its owner."""
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

    The middlewares open one for each request; a job or a consumer of messages may open its own.
    ``fresh``: not the scope around, if there is one, though changes reach that too.
    """
    return ScopeBlock(
        fresh=fresh,
        clock=clock or SystemClock(),
        entries_max=entries_max,
        bytes_max=bytes_max,
        lasts_s=lasts_s,
    )

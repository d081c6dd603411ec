"""One call of a batch loader for many keys.

    @product.batch
    async def products(ids: list[int]) -> dict[int, Product]: ...

G1  Loads that begin in one tick of the loop share a call; those of one bulk read share one,
    however long each takes to get its lease. A load that has to wait for another node leaves
    its group, and holds up nobody.
G2  What the loader does not return is absent; an exception as a value fails that key alone. What
    it raises fails all keys of the call, each with an exception object of its own; so does what it
    returns for a key that nobody asked for: the keys are of another type then, or another's.
G3  A call is for at most ``batch_max`` keys, and lasts no longer than ``limit_s``.
G4  Cancelling one load leaves the call to the others; the call is made in the node's tasks,
    which a loader that is cancelled from inside does not end.
G5  The call is made outside of every request scope, also if it is a member who leaves, in the
    middle of a request, that lets it go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio

from ...coordinator.background import BackgroundTasks
from ...schemas.errors import CancelledInside, LoaderError, Unavailable
from ..cancellation import run_apart
from ..request_scope import outside
from .failures import CallFailed, own_copy
from .flights import flying, flying_with
from .loading import under_way

__all__ = ["BatchLoader", "Batches", "Group"]

BatchLoader = Callable[[list[Any]], Awaitable[Mapping[Any, Any]]]
_Asked = tuple[Any, asyncio.Future[Any], tuple[Any, ...]]  #: with the loads that wait for it

BATCH_MAX = 1_000


class Group:
    """Loads that are expected to share a call. Each either asks, or leaves."""

    def __init__(self, expected: int, flush: Callable[[Sequence[_Asked]], None]) -> None:
        self._outstanding = expected
        self._flush = flush
        self._asked: list[_Asked] = []

    def __repr__(self) -> str:
        return f"<Group of {len(self._asked)}, {self._outstanding} outstanding>"

    def member(self) -> Member:
        return Member(self)

    def settle(self, asked: _Asked | None) -> None:
        if asked is not None:
            self._asked.append(asked)
        self._outstanding -= 1
        if not self._outstanding and self._asked:
            self._flush(self._asked)


class Member:
    """The place of one load in a group."""

    __slots__ = ("_group",)

    def __init__(self, group: Group) -> None:
        self._group: Group | None = group

    def ask(self, asked: _Asked) -> bool:
        """Take part; false if it has left before."""
        group, self._group = self._group, None
        if group is not None:
            group.settle(asked)
        return group is not None

    def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.settle(None)


class Batches:
    """The calls of one batch loader."""

    def __init__(
        self,
        cache: str,
        loader: BatchLoader,
        tasks: BackgroundTasks,
        *,
        limit_s: float,
        batch_max: int = BATCH_MAX,
    ) -> None:
        self._cache = cache
        self._loader = loader
        self._tasks = tasks
        self._limit_s = limit_s
        self._batch_max = batch_max
        self._tick: list[_Asked] = []

    def __repr__(self) -> str:
        return f"<Batches of {self._cache}, {len(self._tick)} asked>"

    def group(self, expected: int) -> Group:
        return Group(expected, self._flush)

    async def load(self, item: Any, member: Member | None = None) -> Any:
        """The value of one item, from a call for several."""
        loop = asyncio.get_running_loop()
        asked: _Asked = item, loop.create_future(), flying()
        if member is None or not member.ask(asked):
            if not self._tick:
                loop.call_soon(self._flush_tick)
            self._tick.append(asked)
        return await asked[1]

    def _flush_tick(self) -> None:
        asked, self._tick = self._tick, []
        self._flush(asked)

    def _flush(self, asked: Sequence[_Asked]) -> None:
        wanted = [each for each in asked if not each[1].done()]
        for start in range(0, len(wanted), self._batch_max):
            part = wanted[start : start + self._batch_max]
            try:
                self._tasks.start_soon(self._call, part, name=f"batch {self._cache}")
            except Unavailable as error:  # the node is stopped
                self._fail(part, error)

    async def _call(self, asked: Sequence[_Asked]) -> None:
        try:
            above = [flight for _, _, flights in asked for flight in flights]
            with flying_with(above), under_way(None), outside():
                with anyio.move_on_after(self._limit_s) as limit:
                    what = f"the batch loader of {self._cache}"
                    found = await run_apart(what, self._loader, [item for item, _, _ in asked])
                    self._share_out(asked, found)
            if limit.cancelled_caught:
                problem = "the batch took longer than its lease"
                self._fail(asked, LoaderError(self._cache, "", problem))
        except CancelledInside:
            self._fail(asked, LoaderError(self._cache, "", "it was cancelled from inside"))
        except Exception as error:
            self._fail(asked, error)
        except BaseException:
            self._fail(asked, Unavailable("the node is stopping"))
            raise

    def _share_out(self, asked: Sequence[_Asked], found: object) -> None:
        if not isinstance(found, Mapping):
            problem = f"the batch loader returned {type(found).__name__}, and no mapping"
            raise LoaderError(self._cache, "", problem)
        known = {item for item, _, _ in asked}
        for key in found:
            if key not in known:
                problem = (
                    f"the batch loader returned {key!r:.80}, of type {type(key).__name__}, which "
                    f"was not asked for; return keys as they were given: {asked[0][0]!r:.80}"
                )
                raise LoaderError(self._cache, "", problem)
        for item, future, _ in asked:
            value = found.get(item)
            if future.done():
                continue
            if isinstance(value, Exception):
                future.set_exception(own_copy(value, self._cache, str(item)))
            else:
                future.set_result(value)

    def _fail(self, asked: Sequence[_Asked], error: Exception) -> None:
        call = CallFailed(f"a call for {len(asked)} keys of {self._cache}")
        for item, future, _ in asked:
            if not future.done():
                twin = self._twin(error, str(item))
                twin.__cause__ = call
                future.set_exception(twin)

    def _twin(self, error: Exception, item: str) -> Exception:
        if isinstance(error, LoaderError) and not error.key:  # ours, of the call as a whole
            return LoaderError(self._cache, item, error.problem)
        return own_copy(error, self._cache, item)

"""Single flight in the process: one load per key, however many callers wait.

F1  The load belongs to the node's task group. Cancelling a waiter, also the first one,
    cancels neither the load nor another waiter.
F2  A caller who comes after a notice for the key never joins a load that began before it.
F3  Each waiter gets an exception object of its own.
F4  At most ``loads_max`` loads run; one more is refused with Backpressure.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from anyio.abc import TaskGroup

from ...schemas.errors import Backpressure, ForebayError, LoaderError, Unavailable

__all__ = ["Flights"]

T = TypeVar("T")


class Flights(Generic[T]):
    def __init__(self, tasks: TaskGroup, *, cache: str, loads_max: int) -> None:
        self._tasks = tasks
        self._cache = cache
        self._loads_max = loads_max
        self._flights: dict[str, asyncio.Future[T]] = {}
        self._running = 0

    def __len__(self) -> int:
        return self._running

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    async def join(self, key: str, load: Callable[[], Awaitable[T]]) -> T:
        """The result of the load of this key: the one under way, or a new one."""
        future = self._flights.get(key)
        if future is None:
            future = self._start(key, load)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.cancelled():
                raise Unavailable("the node is stopping") from None
            raise
        except Exception as error:
            raise _own_copy(error, self._cache, key) from error

    def begin(self, key: str, load: Callable[[], Awaitable[T]]) -> bool:
        """Start a load that nobody waits for; false if one is under way or none may start."""
        if key in self._flights or self._running >= self._loads_max:
            return False
        self._start(key, load)
        return True

    def detach(self, key: str) -> None:
        """Something was said of the key: later callers start anew (F2)."""
        self._flights.pop(key, None)

    def detach_all(self) -> None:
        self._flights.clear()

    def _start(self, key: str, load: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        if self._running >= self._loads_max:
            raise Backpressure(f"loads of {self._cache}", self._running, self._loads_max)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_retrieved)
        self._flights[key] = future
        self._running += 1
        self._tasks.start_soon(self._run, key, future, load, name=f"load {self._cache}")
        return future

    async def _run(
        self, key: str, future: asyncio.Future[T], load: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            result = await load()
        except Exception as error:
            future.set_exception(error)
        except BaseException:
            future.cancel()
            raise
        else:
            future.set_result(result)
        finally:
            self._running -= 1
            if self._flights.get(key) is future:
                del self._flights[key]


def _retrieved(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _own_copy(error: Exception, cache: str, key: str) -> Exception:
    if isinstance(error, ForebayError):
        return error
    try:
        twin = copy.copy(error)
    except Exception:
        twin = LoaderError(cache, key, f"{type(error).__name__}: {error}")
    return twin if type(twin) is type(error) else LoaderError(cache, key, repr(error))

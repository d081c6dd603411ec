"""Single flight in the process: one load per key, in the node's task group.

A caller looks at the shared tier by itself; where there is nothing to serve, it joins the load
of the key that is under way, or starts it.

F1  Cancelling a caller, also the one who came first, cancels neither a load nor another caller.
F2  A caller who comes after a notice for the key never joins a load that began before it;
    nor, where notices may be missing, one for which ``heard_since`` does not vouch.
    Nor does one whose look found something else: between the looks something was said.
F3  Each caller gets an exception object of its own, with the one that was raised as cause.
F4  At most ``loads_max`` loads run and ``waiters_max`` callers wait; one more is refused with
    Backpressure.
F5  A loader that asks for what it is loading gets a LoaderError, instead of waiting for itself;
    so does one that asks for a load which waits, through any number of others, for its own.
F6  A caller waits for a load no longer than its ``patience_s`` allows from when it began; then it
    gets what the look had in hand for that, and the load goes on for those who come later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from msgspec import Struct

from ...coordinator.background import BackgroundTasks
from ...coordinator.clock import Clock
from ...schemas.errors import Backpressure, LoaderError, Unavailable
from .failures import own_copy

__all__ = ["Flights", "Todo", "flying", "flying_with"]

C = TypeVar("C")
R = TypeVar("R")

_flying: ContextVar[tuple[_Flight[Any, Any], ...]] = ContextVar("forebay_flying", default=())


def flying() -> tuple[_Flight[Any, Any], ...]:
    """The loads that the code here runs for."""
    return _flying.get()


@contextmanager
def flying_with(flights: Iterable[_Flight[Any, Any]]) -> Iterator[None]:
    """For a call that several loads share."""
    token = _flying.set(tuple(dict.fromkeys(flights)))
    try:
        yield
    finally:
        _flying.reset(token)


class Todo(Struct, Generic[R], frozen=True):
    """What a look leaves to a load. The fallback is for those whose patience is at its end."""

    seen: int  #: the version that will not do
    fallback: R | None = None
    patience_s: float | None = None


class _Failed:
    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Flight(Generic[C, R]):
    __slots__ = ("awaits", "began_at", "call", "key", "late", "of", "seen", "waiters")

    def __init__(self, of: object, key: str, seen: int, call: C, began_at: float) -> None:
        self.of = of
        self.key = key
        self.seen = seen
        self.call = call
        self.awaits: list[_Flight[Any, Any]] = []  #: what its loader waits for now
        self.began_at = began_at
        self.late: R | _Failed | None = None  #: what callers get who need not wait any more
        self.waiters: dict[asyncio.Future[R | _Failed], None] = {}


class Flights(Generic[C, R]):
    """``load(key, call, todo)`` does what a look has left to do."""

    def __init__(
        self,
        tasks: BackgroundTasks,
        *,
        cache: str,
        load: Callable[[str, C, Todo[R]], Awaitable[R]],
        heard_since: Callable[[float], bool],
        clock: Clock,
        loads_max: int,
        waiters_max: int,
        full: Callable[[str], None] = lambda bound: None,
    ) -> None:
        """``full`` is called with the bound that refuses a caller."""
        self._tasks = tasks
        self._cache = cache
        self._load = load
        self._heard_since = heard_since
        self._monotonic = clock.monotonic
        self._loads_max = loads_max
        self._waiters_max = waiters_max
        self._full = full
        self._flights: dict[str, _Flight[C, R]] = {}
        self._loads = 0
        self._waiting = 0

    def __repr__(self) -> str:
        return f"<Flights of {self._cache}: {self._loads} loads, {self._waiting} waiting>"

    def __len__(self) -> int:
        """Loads that run."""
        return self._loads

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    @property
    def waiting(self) -> int:
        return self._waiting

    async def join(self, key: str, call: C, todo: Todo[R]) -> R:
        """The result of the load of this key: the one under way, or a new one.

        Raises:
            Backpressure: too many loads, or too many who wait.
            LoaderError: it took too long, or waits for itself. Whatever the load raised.
        """
        flight, above = self._flights.get(key), _flying.get()
        if flight is not None and (
            flight.seen != todo.seen or not self._heard_since(flight.began_at)
        ):
            flight = None
        if above and (self._is_asked_by(key, above) or (flight and _leads_to(flight, above))):
            raise LoaderError(self._cache, key, "it asks for what it is loading itself")
        if flight is None:
            flight = self._start(key, call, todo)
        outcome = await self._outcome_of(flight, above) if flight.late is None else flight.late
        if isinstance(outcome, _Failed):
            raise own_copy(outcome.error, self._cache, key) from outcome.error
        return outcome

    def detach(self, key: str) -> None:
        """Something was said of the key: later callers start anew (F2)."""
        self._flights.pop(key, None)

    def detach_where(self, concerned: Callable[[C], bool]) -> None:
        """As ``detach``, for all flights whose call is concerned."""
        for key in [key for key, each in self._flights.items() if concerned(each.call)]:
            del self._flights[key]

    def detach_all(self) -> None:
        self._flights.clear()

    @contextmanager
    def alone(self, key: str, call: C) -> Iterator[None]:
        """For a load that nobody joins: it may not ask for itself either (F5)."""
        with flying_with((*_flying.get(), _Flight(self, key, 0, call, self._monotonic()))):
            yield

    def _is_asked_by(self, key: str, above: tuple[_Flight[Any, Any], ...]) -> bool:
        return any(each.of is self and each.key == key for each in above)

    async def _outcome_of(
        self, flight: _Flight[C, R], above: tuple[_Flight[Any, Any], ...]
    ) -> R | _Failed:
        if self._waiting >= self._waiters_max:
            self._full("waiters")
            raise Backpressure(f"callers of {self._cache}", self._waiting, self._waiters_max)
        future = asyncio.get_running_loop().create_future()
        flight.waiters[future] = None
        self._waiting += 1
        for each in above:
            each.awaits.append(flight)
        try:
            outcome: R | _Failed = await future
        finally:
            self._waiting -= 1
            for each in above:
                each.awaits.remove(flight)
            flight.waiters.pop(future, None)
        return outcome

    def _start(self, key: str, call: C, todo: Todo[R]) -> _Flight[C, R]:
        if self._loads >= self._loads_max:
            self._full("loads")
            raise Backpressure(f"loads of {self._cache}", self._loads, self._loads_max)
        flight: _Flight[C, R] = _Flight(self, key, todo.seen, call, self._monotonic())
        self._tasks.start_soon(self._run, key, flight, todo, name=f"load {self._cache}")
        self._flights[key] = flight
        self._loads += 1
        return flight

    async def _run(self, key: str, flight: _Flight[C, R], todo: Todo[R]) -> None:
        _flying.set((*_flying.get(), flight))
        outcome: R | _Failed = _Failed(Unavailable("the node is stopping"))
        timer = None
        if todo.patience_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(todo.patience_s, self._hurry, key, flight, todo)
        try:
            outcome = await self._load(key, flight.call, todo)
        except Exception as error:
            outcome = _Failed(error)
        finally:
            if timer is not None:
                timer.cancel()
            self._loads -= 1
            self._land(key, flight, outcome)

    def _hurry(self, key: str, flight: _Flight[C, R], todo: Todo[R]) -> None:
        """Nobody waits any longer (F6)."""
        late: R | _Failed
        if todo.fallback is None:
            late = _Failed(LoaderError(self._cache, key, f"not loaded in {todo.patience_s:g} s"))
        else:
            late = todo.fallback
        flight.late = late
        _tell(flight, late)

    def _land(self, key: str, flight: _Flight[C, R], outcome: R | _Failed) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        _tell(flight, outcome)


def _tell(flight: _Flight[C, R], outcome: R | _Failed) -> None:
    for future in flight.waiters:
        if not future.done():
            future.set_result(outcome)


def _leads_to(flight: _Flight[Any, Any], above: tuple[_Flight[Any, Any], ...]) -> bool:
    """Whether a load waits, through any number of others, for one of these."""
    waiting, seen = [flight], set[_Flight[Any, Any]]()
    while waiting:
        each = waiting.pop()
        if each in above:
            return True
        if each not in seen:
            seen.add(each)
            waiting += each.awaits
    return False

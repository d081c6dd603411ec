"""Single flight: one load for all who ask, whatever becomes of them."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from forebay.coordinator.background import BackgroundTasks, background_tasks
from forebay.nodes.cache.flights import Flights, Todo
from forebay.schemas.errors import Backpressure, LoaderError, TimedOut, Unavailable

ABSENT: Todo[Any] = Todo(-1)


class Airport:
    """Flights whose loads end when they are let."""

    def __init__(self, tasks: BackgroundTasks, **options: Any) -> None:
        self.loads: list[tuple[str, str, int]] = []
        self.result: Any = "loaded"
        self.load_gate = anyio.Event()
        self.load_gate.set()
        self.heard = True
        self.now = 0.0
        self.full: list[str] = []
        clock: Any = SimpleNamespace(monotonic=lambda: self.now)
        self.flights: Flights[str, Any] = Flights(
            tasks,
            cache="product",
            load=self.load,
            heard_since=lambda moment: self.heard or moment >= self.now,
            clock=clock,
            full=self.full.append,
            **{"loads_max": 100, "waiters_max": 10_000, **options},
        )

    async def load(self, key: str, call: str, todo: Todo[Any]) -> Any:
        self.loads.append((key, call, todo.seen))
        result, gate = self.result, self.load_gate
        await gate.wait()
        return _given(result)

    async def join(self, key: str, call: str = "", todo: Todo[Any] | None = None) -> Any:
        return await self.flights.join(key, call, todo or ABSENT)


def _given(result: Any) -> Any:
    if isinstance(result, BaseException):
        raise result
    return result


class Callers:
    """Tasks that each join, and what each of them got."""

    def __init__(self, airport: Airport) -> None:
        self.airport = airport
        self.tasks: list[asyncio.Task[Any]] = []

    async def join(self, *keys: str, call: str = "", todo: Todo[Any] | None = None) -> None:
        for key in keys:
            self.tasks.append(asyncio.ensure_future(self.airport.join(key, call, todo)))
            await anyio.sleep(0)
        await anyio.wait_all_tasks_blocked()

    async def got(self) -> list[Any]:
        with anyio.fail_after(20):
            return await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def tasks() -> AsyncIterator[BackgroundTasks]:
    async with background_tasks() as group:
        yield group


@pytest.fixture
async def airport(tasks: BackgroundTasks) -> Airport:
    return Airport(tasks)


@pytest.fixture
async def callers(airport: Airport) -> Callers:
    return Callers(airport)


async def test_a_thousand_callers_make_one_load(airport: Airport, callers: Callers) -> None:
    """However many ask, and all get the same."""
    airport.load_gate = anyio.Event()
    await callers.join(*["a"] * 1_000)
    assert (len(airport.flights), airport.flights.waiting) == (1, 1_000)
    airport.load_gate.set()
    assert await callers.got() == ["loaded"] * 1_000
    assert airport.loads == [("a", "", -1)]
    assert (len(airport.flights), airport.flights.waiting) == (0, 0)
    assert "a" not in airport.flights


async def test_the_next_caller_has_it_loaded_anew(airport: Airport, callers: Callers) -> None:
    """What its own look left to do is what is done, and each key flies for itself."""
    await callers.join("a", "b", call="red", todo=Todo(7))
    assert await airport.join("a", "blue", Todo(8)) == "loaded"
    assert await callers.got() == ["loaded"] * 2
    assert airport.loads == [("a", "red", 7), ("b", "red", 7), ("a", "blue", 8)]


async def test_a_cancelled_leader_takes_nobody_along(airport: Airport, callers: Callers) -> None:
    """F1: its load goes on, for those who wait for it."""
    airport.load_gate = anyio.Event()
    await callers.join(*["a"] * 5)
    callers.tasks[0].cancel()
    await anyio.wait_all_tasks_blocked()
    airport.load_gate.set()
    leader, *others = await callers.got()
    assert isinstance(leader, asyncio.CancelledError)
    assert others == ["loaded"] * 4
    assert len(airport.loads) == 1


async def test_callers_cancelled_one_after_the_other(airport: Airport, callers: Callers) -> None:
    """F1: as long as one caller is left, it gets its value."""
    airport.load_gate = anyio.Event()
    await callers.join(*["a"] * 10)
    for task in callers.tasks[:9]:
        task.cancel()
        await anyio.wait_all_tasks_blocked()
    airport.load_gate.set()
    assert (await callers.got())[9] == "loaded"
    assert len(airport.loads) == 1


async def test_a_cancelled_waiter_disturbs_nobody(airport: Airport, callers: Callers) -> None:
    """F1: nor does it stay on the list of those who wait."""
    airport.load_gate = anyio.Event()
    await callers.join(*["a"] * 100)
    for task in callers.tasks[1:99]:
        task.cancel()
    await anyio.wait_all_tasks_blocked()
    assert airport.flights.waiting == 2
    assert len(airport.flights._flights["a"].waiters) == 2
    airport.load_gate.set()
    got = await callers.got()
    assert (got[0], got[99]) == ("loaded", "loaded")
    assert len(airport.loads) == 1


async def test_a_waiter_with_a_deadline_leaves_and_the_load_goes_on(
    airport: Airport, callers: Callers
) -> None:
    """F1: also with the cancel scopes of anyio, and also if nobody is left to wait."""
    airport.load_gate = anyio.Event()
    with anyio.move_on_after(0.01) as scope:
        await airport.join("a")
    assert scope.cancelled_caught
    assert len(airport.flights) == 1
    await callers.join("a")
    airport.load_gate.set()
    assert await callers.got() == ["loaded"]
    assert len(airport.loads) == 1


@pytest.mark.parametrize("how", ["key", "call", "all"])
async def test_who_comes_after_a_notice_does_not_join(
    airport: Airport, callers: Callers, how: str
) -> None:
    """F2: those who came before get what they asked for, and the flights do not mix."""
    first_gate = airport.load_gate = anyio.Event()
    airport.result = "old"
    await callers.join("a", "a", call="red")
    if how == "key":
        airport.flights.detach("b")
        assert "a" in airport.flights
        airport.flights.detach("a")
    elif how == "call":
        airport.flights.detach_where(lambda call: call == "blue")
        assert "a" in airport.flights
        airport.flights.detach_where(lambda call: call == "red")
    else:
        airport.flights.detach_all()
    assert "a" not in airport.flights
    airport.result, airport.load_gate = "new", anyio.Event()
    await callers.join("a", "a")
    first_gate.set()
    await anyio.wait_all_tasks_blocked()
    assert "a" in airport.flights, "the end of the first must not end the second"
    airport.load_gate.set()
    assert await callers.got() == ["old", "old", "new", "new"]


async def test_an_old_flight_is_not_joined_while_notices_may_be_missing(
    airport: Airport, callers: Callers
) -> None:
    """F2: the promise counts from the caller's coming, not from the flight's beginning."""
    airport.load_gate = anyio.Event()
    await callers.join("a")
    airport.heard = False
    await callers.join("a")
    assert len(airport.loads) == 1
    airport.now += 1
    await callers.join("a", "a")
    airport.load_gate.set()
    await callers.got()
    assert len(airport.loads) == 2


async def test_each_caller_gets_an_exception_of_its_own(airport: Airport, callers: Callers) -> None:
    """F3: equal, with the one that was raised as its cause, which does not grow."""
    error = TimedOut(250)
    airport.result, airport.load_gate = error, anyio.Event()
    await callers.join(*["a"] * 20)
    airport.load_gate.set()
    got = await callers.got()
    assert all(type(each) is TimedOut and each.timeout_ms == 250 for each in got)
    assert len({id(each) for each in got}) == 20
    assert all(each.__cause__ is error for each in got)
    assert len(traceback.extract_tb(error.__traceback__)) < 8
    assert (error.__context__, error.__cause__) == (None, None)


async def test_an_error_is_forgotten_at_once(airport: Airport) -> None:
    """The next caller tries anew."""
    airport.result = ValueError("no")
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            await airport.join("a")
    airport.result = "well"
    assert await airport.join("a") == "well"
    assert len(airport.flights) == 0


async def test_loads_are_bounded(tasks: BackgroundTasks) -> None:
    """F4: one more is refused, joining is not, and nothing of the refused one is left."""
    airport = Airport(tasks, loads_max=2)
    callers = Callers(airport)
    airport.load_gate = anyio.Event()
    await callers.join("a", "b", "c", "c", "b")
    refused = [task.exception() for task in callers.tasks[2:4]]
    assert all(isinstance(each, Backpressure) for each in refused)
    assert refused[0] is not refused[1]
    assert airport.full == ["loads"] * 2
    assert "c" not in airport.flights
    airport.load_gate.set()
    got = await callers.got()
    assert [got[0], got[1], got[4]] == ["loaded"] * 3
    assert await airport.join("c") == "loaded"


async def test_those_who_wait_are_bounded(tasks: BackgroundTasks) -> None:
    """F4: one more is refused, and the load goes on."""
    airport = Airport(tasks, waiters_max=3)
    callers = Callers(airport)
    airport.load_gate = anyio.Event()
    await callers.join("a", "a", "a")
    with pytest.raises(Backpressure):
        await airport.join("a")
    assert airport.full == ["waiters"]
    callers.tasks[2].cancel()
    await callers.join("a")
    airport.load_gate.set()
    assert [each for each in await callers.got() if each == "loaded"] == ["loaded"] * 3


async def test_a_loader_that_asks_for_itself_is_told(airport: Airport) -> None:
    """F5: also by way of another key, or of a task of its own."""

    async def load(key: str, call: str, todo: Todo[Any]) -> Any:
        if key == "c":
            async with anyio.create_task_group() as own:
                own.start_soon(airport.join, "a")
        return await airport.join({"a": "b", "b": "c"}[key])

    airport.flights._load = load
    with anyio.fail_after(20), pytest.raises(Exception) as caught:
        await airport.join("a")
    error: BaseException | None = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, LoaderError)
    assert error.key == "a"
    assert len(airport.flights) == 0


async def test_a_loader_may_ask_for_what_another_loads(airport: Airport, callers: Callers) -> None:
    """F5: waiting for others is no circle."""

    async def load(key: str, call: str, todo: Todo[Any]) -> Any:
        if key == "base":
            await airport.load_gate.wait()
            return "base"
        return key + await airport.join("base")

    airport.flights._load, airport.load_gate = load, anyio.Event()
    await callers.join("base", "a", "b")
    airport.load_gate.set()
    assert await callers.got() == ["base", "abase", "bbase"]


HASTY: Todo[Any] = Todo(5, None, 0.01)
SAFE: Todo[Any] = Todo(5, "fallback", 0.01)


async def test_nobody_waits_longer_than_patience_allows(airport: Airport, callers: Callers) -> None:
    """F6: all get what the look had in hand; the load goes on, for those who come later."""
    airport.load_gate = anyio.Event()
    await callers.join("a", "a", "a", todo=SAFE)
    assert await callers.got() == ["fallback"] * 3
    assert (len(airport.flights), airport.flights.waiting) == (1, 0)
    assert "a" in airport.flights
    assert await airport.join("a", todo=Todo(5, "another", 600)) == "fallback", "at once"
    airport.load_gate.set()
    await anyio.wait_all_tasks_blocked()
    assert len(airport.flights) == 0
    assert await airport.join("a", todo=SAFE) == "loaded"


async def test_patience_without_a_fallback_ends_in_an_error(
    airport: Airport, callers: Callers
) -> None:
    """F3, F6: one of its own for each, and at once for those who come later."""
    airport.load_gate = anyio.Event()
    await callers.join("a", "a", todo=HASTY)
    got = [
        *await callers.got(),
        *await asyncio.gather(airport.join("a", todo=HASTY), return_exceptions=True),
    ]
    assert all(isinstance(each, LoaderError) and each.key == "a" for each in got)
    assert len({id(each) for each in got}) == 3
    assert "not loaded in 0.01 s" in str(got[0])
    assert (len(airport.flights), len(airport.loads)) == (1, 1)


async def test_who_need_not_wait_is_not_refused(tasks: BackgroundTasks) -> None:
    """F4, F6: the bound of those who wait is for those who wait."""
    airport = Airport(tasks, waiters_max=1)
    callers = Callers(airport)
    airport.load_gate = anyio.Event()
    await callers.join("a", todo=SAFE)
    assert await callers.got() == ["fallback"]
    await callers.join("b")
    assert await airport.join("a", todo=SAFE) == "fallback"
    airport.load_gate.set()
    assert await callers.got() == ["fallback", "loaded"]


async def test_who_has_seen_something_else_does_not_join(
    airport: Airport, callers: Callers
) -> None:
    """F2: or it might be given, as a fallback, what was invalidated before it came."""
    airport.load_gate = anyio.Event()
    await callers.join("a", todo=SAFE)
    await callers.join("a", todo=ABSENT)
    assert len(airport.loads) == 2
    airport.load_gate.set()
    assert set(await callers.got()) <= {"fallback", "loaded"}


@pytest.mark.parametrize("result", ["loaded", ValueError("no")])
async def test_a_load_that_ends_in_time_stops_the_clock(
    airport: Airport, callers: Callers, result: Any
) -> None:
    """F6: what would have come afterwards does not; an error is not hidden by the fallback."""
    airport.result = result
    hasty: Todo[Any] = Todo(5, "fallback", 0.05)
    await callers.join("a", todo=hasty)
    (got,) = await callers.got()
    assert got == result or repr(got) == repr(result)
    timers: Any = asyncio.get_running_loop()
    assert not [each for each in timers._scheduled if not each.cancelled() and _hurries(each)]


def _hurries(handle: Any) -> bool:
    return getattr(handle._callback, "__name__", "") == "_hurry"


async def test_cancelling_the_load_stops_the_clock_too() -> None:
    """F6: the node stops; those who wait hear of that, and of nothing else."""
    async with background_tasks() as tasks:
        airport = Airport(tasks)
        callers = Callers(airport)
        airport.load_gate = anyio.Event()
        await callers.join("a", "a", todo=Todo(5, "fallback", 600))
        timers: Any = asyncio.get_running_loop()
        assert [each for each in timers._scheduled if _hurries(each) and not each.cancelled()]
        tasks.close()
    assert all(isinstance(each, Unavailable) for each in await callers.got())
    assert not [each for each in timers._scheduled if _hurries(each) and not each.cancelled()]


async def test_a_cancelled_caller_keeps_nobody_from_the_fallback(
    airport: Airport, callers: Callers
) -> None:
    """F1, F6: also the one whose look it came from."""
    airport.load_gate = anyio.Event()
    await callers.join("a", "a", todo=SAFE)
    callers.tasks[0].cancel()
    leader, other = await callers.got()
    assert isinstance(leader, asyncio.CancelledError)
    assert other == "fallback"


async def test_after_a_notice_the_fallback_is_nobody_s(airport: Airport, callers: Callers) -> None:
    """F2, F6: it may be what the notice spoke of; those who come later have it loaded anew."""
    airport.load_gate = anyio.Event()
    await callers.join("a", todo=SAFE)
    assert await callers.got() == ["fallback"]
    airport.flights.detach("a")
    await callers.join("a")
    airport.load_gate.set()
    assert await callers.got() == ["fallback", "loaded"]
    assert len(airport.loads) == 2


async def test_the_end_of_the_node_ends_the_waiting() -> None:
    """Loads are cancelled, and those who wait for them get Unavailable, not a cancellation."""
    async with background_tasks() as tasks:
        airport = Airport(tasks)
        callers = Callers(airport)
        airport.load_gate = anyio.Event()
        await callers.join("a", "a", "b")
        tasks.close()
    got = await callers.got()
    assert all(isinstance(each, Unavailable) for each in got)
    assert len(airport.flights) == 0
    with pytest.raises(Unavailable):
        await airport.join("c")
    assert "c" not in airport.flights


async def test_a_load_that_never_got_to_run_ends_the_waiting_too() -> None:
    """The node may stop between the start of a task and its first step."""
    async with background_tasks() as tasks:
        airport = Airport(tasks)
        airport.load_gate = anyio.Event()
        task = asyncio.ensure_future(airport.join("a"))
        await asyncio.sleep(0)
        tasks.close()
    with anyio.fail_after(20), pytest.raises(Unavailable):
        await task
    assert len(airport.flights) == 0


async def test_random_cancellation_loses_nobody(airport: Airport) -> None:
    """F1: each caller that was not cancelled gets its own key's value, and nothing is left."""
    import random

    rng, got = random.Random(5), []

    async def load(key: str, call: str, todo: Todo[Any]) -> Any:
        await anyio.sleep(rng.random() / 200)
        return key

    async def caller(key: str) -> None:
        with anyio.move_on_after(rng.choice([0.001, 0.003, 20])):
            assert await airport.join(key) == key
            got.append(key)

    airport.flights._load = load
    async with anyio.create_task_group() as group:
        for number in range(2_000):
            group.start_soon(caller, f"k{rng.randrange(20)}")
            if number % 40 == 0:
                await anyio.sleep(0.001)
            if number % 7 == 0:
                airport.flights.detach(f"k{rng.randrange(20)}")
    assert len(got) > 600
    with anyio.fail_after(20):
        while len(airport.flights):
            await anyio.sleep(0.01)
    assert (airport.flights.waiting, airport.flights._flights) == (0, {})

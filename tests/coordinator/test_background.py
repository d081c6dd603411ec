"""Tasks beside a body: where they are started, and how they and the body end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import anyio
import pytest

from forebay.coordinator.background import BackgroundTasks, background_tasks
from forebay.schemas.errors import ForebayError, Unavailable

Start = Callable[[Callable[[], None]], None]
WHERE = ContextVar("WHERE", default="nowhere")


class Oops(Exception):
    """Raised by a task, or by the body."""


def at_once(call: Callable[[], None]) -> None:
    call()


def from_a_callback(call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(call)


@pytest.fixture(params=[at_once, from_a_callback])
def way(request: pytest.FixtureRequest) -> Start:
    found: Start = request.param
    return found


async def test_a_task_starts_from_wherever_it_is_asked_for(way: Start) -> None:
    """I4: and it runs in the context of the caller."""
    seen: list[str] = []
    told = asyncio.Event()

    async def work(name: str) -> None:
        seen.append(f"{name} {WHERE.get()}")
        async with anyio.create_task_group():  # finds its library
            told.set()

    async with background_tasks() as tasks:
        WHERE.set("here")
        way(lambda: tasks.start_soon(work, "one"))
        WHERE.set("there")
        await asyncio.wait_for(told.wait(), 20)
    assert seen == ["one here"]


async def test_a_task_that_was_accepted_runs_to_its_first_await(way: Start) -> None:
    """I5: also if the tasks are ended before it began; it can notify its waiters."""
    told: list[str] = []

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            told.append("over")

    async with background_tasks() as tasks:
        accepted = asyncio.Event()

        def ask() -> None:
            tasks.start_soon(work)
            accepted.set()

        way(ask)
        await accepted.wait()
    assert told == ["over"]


async def test_nothing_is_started_when_the_tasks_are_being_ended(way: Start) -> None:
    """I5: after the end, and as soon as one has failed: with an error, and no coroutine is left."""
    got: list[BaseException] = []

    def ask(tasks: BackgroundTasks) -> None:
        try:
            tasks.start_soon(anyio.sleep_forever)
        except Unavailable as error:
            got.append(error)

    async with background_tasks() as tasks:
        tasks.close()
        way(lambda: ask(tasks))
        await asyncio.sleep(0)
    way(lambda: ask(tasks))
    await asyncio.sleep(0)
    assert len(got) == 2
    assert tasks.closed


async def test_a_task_that_fails_ends_the_body(way: Start) -> None:
    """I2: its error is in the group that is raised."""

    async def fail() -> None:
        raise Oops

    with pytest.raises(ExceptionGroup) as caught:
        async with background_tasks() as tasks:
            way(lambda: tasks.start_soon(fail))
            await anyio.sleep(20)
    assert caught.group_contains(Oops)


async def _cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await anyio.sleep_forever()


async def _awaits_what_is_cancelled() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize("work", [_cancels_itself, _awaits_what_is_cancelled])
async def test_a_task_cancelled_from_inside_has_failed(work: Callable[[], Awaitable[None]]) -> None:
    """I6: the body does not end without an error, which names the task."""
    with pytest.raises(ExceptionGroup) as caught:
        async with background_tasks() as tasks:
            tasks.start_soon(work)
            await anyio.sleep(20)
    assert caught.group_contains(ForebayError, match=f"the task {work.__name__} was cancelled")


async def test_a_cancelled_body_cancels_its_tasks() -> None:
    """I3: by a scope around it; that does not count as a failure of the tasks."""
    ended: list[str] = []

    async def work(task_status: anyio.abc.TaskStatus[str]) -> None:
        task_status.started("begun")
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    with anyio.CancelScope() as scope:
        async with background_tasks() as tasks:
            assert await tasks.start(work) == "begun"
            scope.cancel()
            await anyio.sleep_forever()
    assert (scope.cancelled_caught, ended) == (True, ["cancelled"])


async def test_the_body_raises_its_own_error() -> None:
    """I1: not in a group."""
    with pytest.raises(Oops):
        async with background_tasks():
            raise Oops

"""Tasks that run beside a body of code and end with it.

I1  The body's own exception comes out as it is, not wrapped in an exception group.
I2  A background task that fails cancels the body, and its error comes out in a group: it is a fault
    of ours, not an outcome that callers handle.
I3  When the body ends, in any way, the tasks are cancelled and awaited.
I4  A task can be started from a task and from a callback of the loop, with every way to run a loop.
    A task started by a callback begins one loop turn later, in the callback's context.
I5  Once the tasks are ending, a further start raises Unavailable. A task accepted before runs at
    least to its first await, so that it can notify its waiters.
I6  A task that is cancelled while the tasks are not ending has failed (I2): it never ends the body
    without an error.

anyio detects the library of the loop by the current task, unless ``anyio.run`` has set it. In a
callback of a loop that ``asyncio.run`` or a web server runs, no task is current, and a task group
refuses to start a task. Therefore a callback hands the start over to a task of the group.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ..schemas.errors import ForebayError, Unavailable

__all__ = ["BackgroundTasks", "background_tasks"]


class BackgroundTasks:
    """Starts tasks of a group. Made by ``background_tasks``."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._handed_over: deque[Callable[[], object]] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def __repr__(self) -> str:
        return f"<BackgroundTasks {'closed' if self._closed else 'open'}>"

    @property
    def closed(self) -> bool:
        """Whether the tasks are being ended, or one has failed."""
        return self._closed

    def check_loop(self) -> None:
        """Raises ForebayError in another event loop than that of the tasks."""
        running = asyncio._get_running_loop()  # noqa: SLF001  # public by name, and never raises
        if running is not None and running is not self._loop:
            raise ForebayError(
                "the node runs in another event loop; use it in the loop that started it, from "
                "another thread by asyncio.run_coroutine_threadsafe, or give this loop a node "
                "of its own"
            )

    def start_soon(
        self, function: Callable[..., Awaitable[object]], *args: Any, name: str | None = None
    ) -> None:
        """Run ``function(*args)`` in a task of the group.

        Raises:
            Unavailable: the tasks are being ended; nothing was started.
        """
        if self._closed:
            raise Unavailable("the node is stopped")
        self.check_loop()
        name = name or getattr(function, "__qualname__", repr(function))
        start = partial(self._group.start_soon, _failing_if_cancelled, function, args, name=name)
        if asyncio.current_task() is not None:
            start()
            return
        self._handed_over.append(partial(copy_context().run, start))
        self._wake.set()

    async def start(self, function: Callable[..., Awaitable[object]], *args: Any) -> Any:
        """Run it until it calls ``task_status.started``; returns the argument of that call."""
        return await self._group.start(
            _failing_if_cancelled, function, args, name=getattr(function, "__qualname__", None)
        )

    async def run(self) -> None:
        """Start the functions that callbacks hand over, until cancelled; then refuse them."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._start_handed_over()
        finally:
            self._closed = True
            self._start_handed_over()

    def close(self) -> None:
        """Cancel the tasks and refuse further ones."""
        self._closed = True
        self._group.cancel_scope.cancel()

    def _start_handed_over(self) -> None:
        while self._handed_over:
            self._handed_over.popleft()()


@asynccontextmanager
async def background_tasks() -> AsyncGenerator[BackgroundTasks]:
    failure: BaseException | None = None
    async with anyio.create_task_group() as group:
        tasks = BackgroundTasks(group)
        group.start_soon(tasks.run)
        try:
            yield tasks
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            failure = error
        finally:
            tasks.close()
    if failure is not None:
        raise failure


async def _failing_if_cancelled(
    function: Callable[..., Awaitable[object]], args: tuple[Any, ...], **options: Any
) -> None:
    """I6: anyio takes a cancelled task for the end of its group."""
    try:
        await function(*args, **options)
    except asyncio.CancelledError as error:
        if anyio.current_effective_deadline() == float("-inf"):
            raise
        name = getattr(function, "__qualname__", repr(function))
        raise ForebayError(f"the task {name} was cancelled from inside") from error

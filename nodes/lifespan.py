"""The lifespan of a node: a task of its own that enters and leaves its context, and its hooks.

L1  Cancelling the block, by a scope around it or as a task, does not cancel the context: the
    context is left in order, then the cancellation propagates. A second cancellation while the
    context is being left cancels the context too.
L2  The context is entered and left in the same task, whichever tasks begin and end it.
L3  If the context fails while a block runs, the block is cancelled and raises the failure.
    Without a block, or if its task has ended, the failure is logged at once, and raised where the
    context is ended.
L4  An exception of the block is raised unchanged; a failure of the context is then logged.
L5  The context has failed if its task is cancelled although no caller ended it.
L6  Several tasks may end the context: the first one gets the failure, all of them wait for the end.

H1  Every stop hook runs, in reverse order of declaration, also if a start hook failed.
H2  A stop hook is cancelled after ``LIMIT_S``.
H3  An earlier exception is raised unchanged, and errors of stop hooks are logged. Without an
    earlier exception the first error of a stop hook is raised, and the others are logged.
H4  A hook that is cancelled from inside has failed. All hooks run in one task and its context, so
    that context variables set by a start hook are visible to the workers and the stop hooks.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.lowlevel
import structlog

from ..schemas.errors import CancelledInside, ConfigError, ForebayError

log = structlog.get_logger(__name__)

Hook = Callable[[], Awaitable[object]]
LIMIT_S = 10.0


def refuse_other_loops() -> None:
    """Raise ConfigError unless an asyncio event loop runs (uvloop included)."""
    if asyncio._get_running_loop() is not None:  # noqa: SLF001  # documented, and never raises
        return
    trio = sys.modules.get("trio")
    is_trio = trio is not None and trio.lowlevel.in_trio_run()
    raise ConfigError(
        setting="the event loop",
        value="trio" if is_trio else "none that asyncio knows",
        origin="the application",
        problem="a node runs on asyncio",
        fix="use asyncio.run(main()), or anyio.run(main, backend='asyncio')",
    )


class Lifespan:
    """``await lifespan.begin()``, then ``await lifespan.end()``; ``hold`` ties it to a block."""

    def __init__(self, context: AbstractAsyncContextManager[object]) -> None:
        self._context = context
        self._begun = asyncio.Event()
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._block: asyncio.Task[object] | None = None
        self._cancellations = 0  #: requests on the block's task before ``hold``
        self._block_cancelled = False
        self._failure_raised = False
        self.cancelled = False  #: whether a caller cancelled the context

    @property
    def failure(self) -> BaseException | None:
        """The error with which the context ended, unless a caller cancelled it."""
        if self._task is None or not self._task.done():
            return None
        if not self._task.cancelled():
            return self._task.exception()
        if self.cancelled:
            return None
        return ForebayError("the node's task was cancelled although nobody stopped the node")

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    @property
    def over(self) -> bool:
        return self._task is not None and self._task.done()

    async def begin(self) -> None:
        """Enter the context.

        Raises:
            Any exception of entering it.
        """
        self._task = task = asyncio.create_task(self._run_context(), name="forebay node")
        task.add_done_callback(self._on_task_done)
        try:
            await self._begun.wait()
        except BaseException:
            self._cancel()
            await self._wait_until_left(task, cancelling=True)
            raise
        if task.done():
            self._failure_raised = True
            if self.failure is not None:
                raise self.failure
            raise ForebayError("the node was stopped while it started")

    def hold(self) -> None:
        """Make the current task the block: until ``end``, a failure cancels it."""
        self._block = block = asyncio.current_task()
        self._cancellations = 0 if block is None else block.cancelling()
        if self.over and block is not None:
            self._block_cancelled = block.cancel()

    async def end(self, error: BaseException | None = None) -> None:
        """Leave the context. Raises its failure unless the block ended with another ``error``."""
        assert self._task is not None
        if asyncio.current_task() is self._task:
            raise ForebayError("a hook of the node cannot stop the node; return from it")
        first = not self._ending.is_set()
        ours = await self._release_block(error)
        self._ending.set()
        if not self._begun.is_set():
            self._cancel()
        await self._wait_until_left(self._task, cancelling=first)
        failure, raised = self.failure, self._failure_raised
        self._failure_raised = True
        if failure is None or (raised and not ours):
            return
        if error is None or ours:
            raise failure
        log.error("node.failed", exc_info=failure)

    async def _release_block(self, error: BaseException | None) -> bool:
        """Return whether ``error`` is the cancellation that a failure caused."""
        block, self._block = self._block, None
        current = asyncio.current_task()
        if block is None or block is not current or not self._block_cancelled:
            return False
        if error is None:  # the cancellation may not have been delivered yet
            try:
                await anyio.lowlevel.checkpoint()
            except asyncio.CancelledError as late:
                error = late
        return current.uncancel() <= self._cancellations and isinstance(
            error, asyncio.CancelledError
        )

    async def _run_context(self) -> None:
        async with self._context:
            self._begun.set()
            await self._ending.wait()

    def _cancel(self) -> None:
        assert self._task is not None
        self.cancelled = True
        self._task.cancel()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        failure, begun = self.failure, self._begun.is_set()
        self._begun.set()
        if not begun or self._ending.is_set():
            return
        if self._block is not None and not self._block.done():
            self._block_cancelled = self._block.cancel()
        else:
            log.error("node.failed", exc_info=failure)

    async def _wait_until_left(self, task: asyncio.Task[None], *, cancelling: bool) -> None:
        """Wait for the end of the task; a cancellation cancels the task if ``cancelling``."""
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as error:
                    cancelled = error
                    if cancelling:
                        self._cancel()
        if cancelled is not None:
            raise cancelled


async def run_hook(what: str, hook: Hook, cancelled: Callable[[], bool]) -> None:
    """Run one hook; ``cancelled`` returns whether a caller cancelled the task of the hooks.

    Raises:
        CancelledInside: see H4. Any exception of the hook.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        await hook()
        if task.cancelling() > before:  # the cancellation has not been delivered yet
            await anyio.lowlevel.checkpoint()
    except asyncio.CancelledError as error:
        if cancelled() or anyio.current_effective_deadline() == float("-inf"):
            raise
        while task.cancelling() > before:
            task.uncancel()
        raise CancelledInside(f"the {what} hook {hook!r}") from error


@asynccontextmanager
async def stop_hooks_at_end(
    hooks: Sequence[Hook], cancelled: Callable[[], bool]
) -> AsyncGenerator[None]:
    """Run these stop hooks when the block ends, also after an exception."""
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        failures = [
            each for hook in reversed(hooks) if (each := await _failure_of(hook, cancelled))
        ]
        raised = failures.pop(0) if failures and succeeded else None
        for failure in failures:
            log.error("hook.failed", exc_info=failure)
        if raised is not None:
            raise raised


async def _failure_of(hook: Hook, cancelled: Callable[[], bool]) -> Exception | None:
    with anyio.move_on_after(LIMIT_S, shield=True):
        try:
            await run_hook("on_stop", hook, cancelled)
        except Exception as error:
            return error
        return None
    return ForebayError(f"the on_stop hook {hook!r} took longer than {LIMIT_S:g} s")

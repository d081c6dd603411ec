"""A context that lives in a task of its own, beside the block that it is for.

L1  Cancelling the block, by a scope around it or as a task, cancels nothing in the context:
    it is left in order, and only then the cancellation goes on. Cancelled once more while
    it is being left, the context is cancelled too.
L2  The context is entered and left in the same task, whichever tasks begin and end it.
L3  If the context fails while a block runs, the block is cancelled, and the failure comes
    out in its place. Without a block, or if its task has ended, the failure is logged at once,
    and raised where the context is ended.
L4  What the block raised comes out as it is; a failure of the context is then logged.
L5  A context has failed if its task is cancelled although no caller ended it.
L6  It can be ended by several tasks: the first gets the failure, all of them wait for the end.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager

import anyio
import anyio.lowlevel
import structlog

from ..schemas.errors import ConfigError, ForebayError

__all__ = ["Life", "refuse_other_loops"]

log = structlog.get_logger(__name__)


def refuse_other_loops() -> None:
    """Raises ConfigError unless an event loop of asyncio runs; uvloop's is one."""
    if asyncio._get_running_loop() is not None:  # noqa: SLF001  # public by name, and never raises
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


class Life:
    """``await life.begin()``, and ``await life.end()``; around a block with ``hold``."""

    def __init__(self, context: AbstractAsyncContextManager[object]) -> None:
        self._context = context
        self._begun = asyncio.Event()
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._block: asyncio.Task[object] | None = None
        self._cancellations = 0  #: of the block's task before it was held
        self._block_cancelled = False
        self._told = False  #: whether somebody got the failure
        self.cancelled = False  #: whether the context is cancelled from outside

    @property
    def failure(self) -> BaseException | None:
        """Why the context has ended by itself."""
        if self._task is None or not self._task.done():
            return None
        if not self._task.cancelled():
            return self._task.exception()
        if self.cancelled:
            return None
        return ForebayError("the node's task was cancelled, though nobody stopped the node")

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    @property
    def over(self) -> bool:
        return self._task is not None and self._task.done()

    async def begin(self) -> None:
        """Enter the context; raises what that raises."""
        self._task = task = asyncio.create_task(self._live(), name="forebay node")
        task.add_done_callback(self._over)
        try:
            await self._begun.wait()
        except BaseException:
            self._cancel()
            await self._left(task, cancelling=True)
            raise
        if task.done():
            self._told = True
            if self.failure is not None:
                raise self.failure
            raise ForebayError("the node was stopped while it started")

    def hold(self) -> None:
        """Until ``end``, the current task is a block that a failure cancels."""
        self._block = block = asyncio.current_task()
        self._cancellations = 0 if block is None else block.cancelling()
        if self.over and block is not None:
            self._block_cancelled = block.cancel()

    async def end(self, error: BaseException | None = None) -> None:
        """Leave the context; raises its failure, unless the block ended with another ``error``."""
        assert self._task is not None
        if asyncio.current_task() is self._task:
            raise ForebayError("a hook of the node cannot stop the node; return from it")
        first = not self._ending.is_set()
        ours = await self._release_block(error)
        self._ending.set()
        if not self._begun.is_set():
            self._cancel()
        await self._left(self._task, cancelling=first)
        failure, told = self.failure, self._told
        self._told = True
        if failure is None or (told and not ours):
            return
        if error is None or ours:
            raise failure
        log.error("node.failed", exc_info=failure)

    async def _release_block(self, error: BaseException | None) -> bool:
        """Whether ``error`` is the cancellation that a failure caused."""
        block, self._block = self._block, None
        current = asyncio.current_task()
        if block is None or block is not current or not self._block_cancelled:
            return False
        if error is None:  # the cancellation may be still to come
            try:
                await anyio.lowlevel.checkpoint()
            except asyncio.CancelledError as late:
                error = late
        return current.uncancel() <= self._cancellations and isinstance(
            error, asyncio.CancelledError
        )

    async def _live(self) -> None:
        async with self._context:
            self._begun.set()
            await self._ending.wait()

    def _cancel(self) -> None:
        assert self._task is not None
        self.cancelled = True
        self._task.cancel()

    def _over(self, task: asyncio.Task[None]) -> None:
        failure, begun = self.failure, self._begun.is_set()
        self._begun.set()
        if not begun or self._ending.is_set():
            return
        if self._block is not None and not self._block.done():
            self._block_cancelled = self._block.cancel()
        else:
            log.error("node.failed", exc_info=failure)

    async def _left(self, task: asyncio.Task[None], *, cancelling: bool) -> None:
        """Wait for the end of the task; if cancelled, and ``cancelling``, cancel it and wait on."""
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

"""A context that lives in a task of its own, beside the block that it is for.

L1  Cancelling the block, by a scope around it or as a task, cancels nothing in the context:
    it is left in order, and only then the cancellation goes on. Cancelled once more while
    it is being left, the context is cancelled too.
L2  The context is entered and left in the same task, whichever tasks begin and end it.
L3  If the context fails while the block runs, the block is cancelled, and the failure comes
    out in its place.
L4  What the block raised comes out as it is; a failure of the context is then logged.

It must be begun and ended by the same task: the block is a cancel scope of that.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import anyio
import structlog

__all__ = ["Life"]

log = structlog.get_logger(__name__)


class Life:
    """``await life.begin()``, the block, ``await life.end(error)`` with what it raised."""

    def __init__(self, context: AbstractAsyncContextManager[object]) -> None:
        self._context = context
        self._begun = asyncio.Event()
        self._ending = asyncio.Event()
        self._block = anyio.CancelScope()
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Enter the context; raises what that raises."""
        self._task = task = asyncio.create_task(self._live(), name="forebay node")
        task.add_done_callback(self._over)
        try:
            await self._begun.wait()
        except BaseException:
            task.cancel()
            await self._left(task)
            raise
        if task.done():
            task.result()
        self._block.__enter__()

    async def end(self, error: BaseException | None) -> bool:
        """Leave the context; true if ``error`` is the cancellation that a failure caused."""
        assert self._task is not None
        try:
            ours = self._block.__exit__(type(error) if error else None, error, None)
        finally:
            self._ending.set()
            await self._left(self._task)
        failure = None if self._task.cancelled() else self._task.exception()
        if failure is not None and (error is None or ours):
            raise failure
        if failure is not None:
            log.error("node.failed", exc_info=failure)
        return bool(ours)

    async def _live(self) -> None:
        async with self._context:
            self._begun.set()
            await self._ending.wait()

    def _over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # looked at, whether or not somebody is left to be told
        self._begun.set()
        if not self._ending.is_set():
            self._block.cancel()

    async def _left(self, task: asyncio.Task[None]) -> None:
        """Wait for the end of the task, whatever happens to this one."""
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as error:
                    cancelled = error
                    task.cancel()
        if cancelled is not None:
            raise cancelled

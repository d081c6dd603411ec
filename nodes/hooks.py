"""What an application runs when its node starts and stops.

H1  Every stop hook runs, the last declared first, also if a start hook failed.
H2  A stop hook is cancelled after ``LIMIT_S``.
H3  What was raised before comes out as it is, and errors of stop hooks are logged; if there
    was nothing, the first of these comes out, and the others are logged.
H4  A hook that is cancelled from inside has failed. All hooks run in one task and its context, so
    that context variables set by a start hook are visible to the workers and the stop hooks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import structlog

from ..schemas.errors import CancelledInside, ForebayError

__all__ = ["LIMIT_S", "Hook", "run_hook", "run_in_the_end"]

log = structlog.get_logger(__name__)

Hook = Callable[[], Awaitable[object]]
LIMIT_S = 10.0


async def run_hook(what: str, hook: Hook, cancelled: Callable[[], bool]) -> None:
    """``cancelled`` tells whether the task of the hooks is cancelled from outside.

    Raises:
        CancelledInside: see H4. Any exception of the hook.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        await hook()
        if task.cancelling() > before:  # it has not come out yet
            await anyio.lowlevel.checkpoint()
    except asyncio.CancelledError as error:
        if cancelled() or anyio.current_effective_deadline() == float("-inf"):
            raise
        while task.cancelling() > before:
            task.uncancel()
        raise CancelledInside(f"the {what} hook {hook!r}") from error


@asynccontextmanager
async def run_in_the_end(
    hooks: Sequence[Hook], cancelled: Callable[[], bool]
) -> AsyncGenerator[None]:
    """Run these stop hooks when the block ends, however it ends."""
    well = False
    try:
        yield
        well = True
    finally:
        failures = [
            each for hook in reversed(hooks) if (each := await _failure_of(hook, cancelled))
        ]
        raised = failures.pop(0) if failures and well else None
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

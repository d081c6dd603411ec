"""What an application runs when its node starts and stops.

H1  Every stop hook runs, the last declared first, also if a start hook failed.
H2  A stop hook is cancelled after ``LIMIT_S``.
H3  What was raised before comes out as it is, and errors of stop hooks are logged; if there
    was nothing, the first of these comes out, and the others are logged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import structlog

from ..schemas.errors import ForebayError

__all__ = ["LIMIT_S", "Hook", "run_in_the_end"]

log = structlog.get_logger(__name__)

Hook = Callable[[], Awaitable[object]]
LIMIT_S = 10.0


@asynccontextmanager
async def run_in_the_end(hooks: Sequence[Hook]) -> AsyncGenerator[None]:
    """Run these stop hooks when the block ends, however it ends."""
    well = False
    try:
        yield
        well = True
    finally:
        failures = [each for hook in reversed(hooks) if (each := await _failure_of(hook))]
        raised = failures.pop(0) if failures and well else None
        for failure in failures:
            log.error("hook.failed", exc_info=failure)
        if raised is not None:
            raise raised


async def _failure_of(hook: Hook) -> Exception | None:
    with anyio.move_on_after(LIMIT_S, shield=True):
        try:
            await hook()
        except Exception as error:
            return error
        return None
    return ForebayError(f"the on_stop hook {hook!r} took longer than {LIMIT_S:g} s")

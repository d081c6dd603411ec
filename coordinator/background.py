"""Tasks that run beside a body of code and end with it.

I1  The body's own exception comes out as it is, not wrapped in an exception group.
I2  A background task that fails cancels the body, and comes out in a group: that is a fault
    of ours, not an outcome that callers handle.
I3  When the body ends, however it ends, the tasks are cancelled and waited for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

__all__ = ["background_tasks"]


@asynccontextmanager
async def background_tasks() -> AsyncGenerator[TaskGroup]:
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        try:
            yield tasks
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            failure = error
        finally:
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure

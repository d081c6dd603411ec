"""Separates a cancellation that application code raises itself from one that stops its caller.

C1  ``run_apart`` runs a call in a task of its own. If that task cancels itself, or awaits a
    cancelled task, CancelledInside is raised; the caller's task is not cancelled.
C2  Cancelling the caller cancels the call, which may clean up. The cancellation then propagates.
C3  An exception of the call is raised as it is, not in a group. The call runs in a copy of the
    context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

from ..schemas.errors import CancelledInside

T = TypeVar("T")


async def run_apart(what: str, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Return the result of ``function(*args)``; ``what`` names the call in the error.

    Raises:
        CancelledInside: see C1. Any exception of the call.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    async def call() -> None:
        try:
            results.append(await function(*args))
        except BaseException as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, name=what)
    if not errors:
        return results[0]
    (error,) = errors
    errors.clear()  # breaks the reference cycle between the error and this frame
    if isinstance(error, asyncio.CancelledError):
        raise CancelledInside(what) from error
    raise error


def asked_to_stop(error: BaseException) -> bool:
    """Whether to re-raise: an exit, or a cancellation that was requested for the current task.

    A loader or sink that awaits a cancelled task raises CancelledError although nobody stopped
    the current task. Re-raising that one would silently end a whole task group.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    return not isinstance(error, Exception)

"""Code of the application, run so that a cancellation from inside it is its own failure.

C1  ``run_apart`` runs a call in a task of its own. If that task cancels itself, or awaits a
    task that somebody else has cancelled, CancelledInside is raised; the caller's task is not
    cancelled.
C2  A cancellation of the caller cancels the call, which may clean up, and stays a cancellation.
C3  An exception of the call is raised as it is, not in a group. The call runs in a copy of the
    context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

from ..schemas.errors import CancelledInside

__all__ = ["run_apart"]

T = TypeVar("T")


async def run_apart(what: str, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """The result of ``function(*args)``; the first argument names the call in the error.

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
    errors.clear()  # or it keeps this frame, and this frame it
    if isinstance(error, asyncio.CancelledError):
        raise CancelledInside(what) from error
    raise error

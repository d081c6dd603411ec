"""A sink that is a function of the application.

I1  The function gets all writes of a batch, at most one per key; what it raises fails the
    whole batch.
I2  A SinkError or ``Fenced`` passes as it is. ValueError, TypeError, KeyError and what
    msgspec refuses are poison; anything else, and running out of time, is transient.
I3  Cancelled from outside, the function is cancelled, and nothing is made of it.

It keeps no progress: a batch may come again after a crash, and the function must bear
that. The version of each write tells old from new.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from ...schemas.errors import (
    FatalSinkError,
    Fenced,
    ForebayError,
    PoisonSinkError,
    SinkError,
    TransientSinkError,
)
from .base import SinkBatch, Write

__all__ = ["CallableSink"]

_POISON = (ValueError, TypeError, KeyError, msgspec.ValidationError)


class CallableSink:
    """Hands each batch to ``fn``, which has ``timeout_ms`` to store it."""

    def __init__(
        self,
        name: str,
        fn: Callable[[list[Write[Any]]], Awaitable[None]],
        *,
        timeout_ms: int = 30_000,
    ) -> None:
        self.name = name
        self._fn = fn
        self._timeout_ms = timeout_ms

    async def open(self, namespace: str = "") -> None:
        """Nothing to open: what the function needs is the application's."""

    async def write(self, batch: SinkBatch) -> None:
        if not batch.writes:
            return
        try:
            with anyio.fail_after(self._timeout_ms / 1_000) as scope:
                await self._call(list(batch.writes))
        except (SinkError, Fenced):
            raise
        except Exception as error:
            if scope.cancelled_caught:
                problem = f"took longer than {self._timeout_ms} ms"
                unknown = TransientSinkError(f"{self.name} {problem}", outcome_unknown=True)
                raise unknown from error
            raise self._translated(error) from error

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        return {}

    async def aclose(self) -> None:
        """Nothing to close."""

    def __repr__(self) -> str:
        return f"<CallableSink {self.name!r}>"

    async def _call(self, writes: list[Write[Any]]) -> None:
        pending: object = self._fn(writes)
        if not inspect.isawaitable(pending):
            raise FatalSinkError(f"{self.name} is no async function; write `async def`")
        await pending

    def _translated(self, error: Exception) -> ForebayError:
        cause = _only_cause(error)
        if isinstance(cause, SinkError | Fenced):
            return cause
        problem = f"{self.name}: {type(cause).__name__}: {cause}"
        if isinstance(cause, _POISON):
            return PoisonSinkError(problem)
        return TransientSinkError(problem, outcome_unknown=True)


def _only_cause(error: BaseException) -> BaseException:
    """The one error inside the groups that task groups put around it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error

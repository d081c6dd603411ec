"""Reading many keys at once: one look for all, and one call of the loader for the misses.

M1  What is near costs a dict look-up; what is not is asked for together, in one round trip for
    200 keys.
M2  Each miss is a flight like any other: single flight, leases, cancellation and fallbacks
    hold as for single reads. Leases are asked for in the order of the keys, and nobody waits for
    one while the loads of others are held up by it.
M3  One key's failure is that key's; broken entries are misses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import anyio

from .batches import Batches, Member
from .core import Hit, LoadCall
from .flights import Todo
from .read import ReadPath

__all__ = ["BulkReads"]

T = TypeVar("T")
CallOf = Callable[[Member | None], LoadCall[T]]

_TOGETHER = 500


class BulkReads(Generic[T]):
    def __init__(self, path: ReadPath[T], batches: Batches | None) -> None:
        self._path = path
        self._batches = batches

    async def read(self, wanted: Mapping[str, CallOf[T]]) -> dict[str, Hit[T] | Exception]:
        """What there is of each key: a hit, or the exception that a single read would raise."""
        path, found = self._path, dict[str, Hit[T] | Exception]()
        far = []
        for key in wanted:
            entry = path.near.get(key)
            if entry is None:
                far.append(key)
            else:
                found[key] = path.hit_of(entry)
        if far:
            await self._read_far(far, wanted, found)
        return found

    async def _read_far(
        self,
        far: Sequence[str],
        wanted: Mapping[str, CallOf[T]],
        found: dict[str, Hit[T] | Exception],
    ) -> None:
        """Read what is not near; each key is counted as one read, also if this is cut short."""
        metrics, began = self._path.metrics, self._path.metrics.now()
        todos: dict[str, Todo[Hit[T]]] = {}
        stopped: BaseException = anyio.get_cancelled_exc_class()()
        try:
            for key, seen in (await self._path.look_at(far)).items():
                if isinstance(seen, Todo):
                    todos[key] = seen
                else:
                    found[key] = seen
            misses = sorted(todos)
            for start in range(0, len(misses), _TOGETHER):
                part = {key: (wanted[key], todos[key]) for key in misses[start : start + _TOGETHER]}
                await self._load_all(part, found)
        finally:
            metrics.took(began)
            for key in far:
                outcome = found.get(key, stopped)
                if isinstance(outcome, Hit):
                    metrics.answered(outcome)
                else:
                    metrics.failed("source" if key in todos else "shared", outcome)

    async def _load_all(
        self,
        wanted: Mapping[str, tuple[CallOf[T], Todo[Hit[T]]]],
        found: dict[str, Hit[T] | Exception],
    ) -> None:
        group = self._batches.group(len(wanted)) if self._batches else None
        async with anyio.create_task_group() as tasks:
            for key, (call, todo) in wanted.items():
                member = group.member() if group else None
                tasks.start_soon(self._load, key, call, todo, member, found)

    async def _load(
        self,
        key: str,
        call: CallOf[T],
        todo: Todo[Hit[T]],
        member: Member | None,
        found: dict[str, Hit[T] | Exception],
    ) -> None:
        if member is not None and key in self._path.flights:
            member.leave()  # another's load brings it, who may take long
        try:
            found[key] = await self._path.load(key, call(member), todo)
        except Exception as error:
            found[key] = error
        finally:
            if member is not None:
                member.leave()

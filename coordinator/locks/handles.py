"""Handles of locks: mutex, semaphore and read-write lock.

Each is one record with a capacity; see ``schemas.locks``. A waiting writer blocks the readers that
arrive after it.
"""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import TypedDict, Unpack

from ...schemas.locks import (
    PERMITS_MAX,
    Kind,
    LockLevel,
    OnLoss,
    Terms,
    about_of,
    check_capacity,
    check_timeout,
    make_terms,
)
from .acquire import Acquisitions
from .lease import Lease
from .store import LockStore

__all__ = ["LockHandle", "LockOptions", "LockSource", "ReadWriteLock", "Semaphore"]


class LockOptions(TypedDict, total=False):
    """Options of a lock; durations in seconds."""

    lease: (
        float  #: time until the lock is free after its process died; renewed while the process runs
    )
    timeout: float | None  #: maximum wait; None: unlimited, 0: no wait
    meta: Mapping[str, object] | None  #: metadata that `forebay locks` shows
    level: LockLevel
    fair: bool
    on_loss: OnLoss


class LockHandle:
    """A lock for ``async with``, which returns the lease; for one block at a time."""

    __slots__ = ("_grants", "_lease", "_timeout_s", "terms")

    def __init__(self, grants: Acquisitions, terms: Terms, timeout_s: float) -> None:
        self._grants = grants
        self._lease: Lease | None = None
        self._timeout_s = timeout_s
        self.terms = terms

    def __repr__(self) -> str:
        return f"<LockHandle {self.terms.name}>"

    async def acquire(self) -> Lease:
        """Acquire a lease, which the caller must release; raises like ``Acquisitions.acquire``."""
        return await self._grants.acquire(self.terms, timeout_s=self._timeout_s)

    async def __aenter__(self) -> Lease:
        self._lease = lease = await self._grants.acquire(self.terms, timeout_s=self._timeout_s)
        lease.enter()
        return lease

    def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Coroutine[None, None, None]:
        assert self._lease is not None
        return self._lease.__aexit__(exc_type, exc, traceback)


class LockSource:
    """Makes handles from names and options, and checks both before any request is sent."""

    def __init__(self, grants: Acquisitions, records: LockStore, node_id: str) -> None:
        self.grants = grants
        self.records = records
        self._node_id = node_id
        self._about = about_of("", node_id, None)

    def want(
        self,
        name: str,
        options: LockOptions,
        kind: Kind = "m",
        capacity: int = 1,
        weight: int = 1,
    ) -> LockHandle:
        if not options:
            terms = make_terms(name, about=self._about, kind=kind, capacity=capacity, weight=weight)
            return LockHandle(self.grants, terms, math.inf)
        chosen = dict(options)
        timeout_s = check_timeout(name, options.get("timeout"))
        meta = options.get("meta")
        chosen.pop("timeout", None)
        chosen.pop("meta", None)
        terms = make_terms(
            name,
            about=about_of(name, self._node_id, meta) if meta else self._about,
            kind=kind,
            capacity=capacity,
            weight=weight,
            **chosen,  # type: ignore[arg-type]
        )
        return LockHandle(self.grants, terms, timeout_s)


class Semaphore:
    """At most ``capacity`` holders. The permits of a dead process are free when its leases end."""

    def __init__(self, source: LockSource, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = check_capacity(name, capacity)
        self._source = source

    def __repr__(self) -> str:
        return f"<Semaphore {self.name} {self.capacity}>"

    def acquire(self, weight: int = 1, **options: Unpack[LockOptions]) -> LockHandle:
        """A handle for ``async with`` that holds ``weight`` permits."""
        return self._source.want(self.name, options, "s", self.capacity, weight)

    async def try_acquire(self, weight: int = 1, **options: Unpack[LockOptions]) -> Lease | None:
        """A lease, or None if there are not enough permits or there are waiters."""
        wanted = self._source.want(self.name, options, "s", self.capacity, weight)
        return await self._source.grants.try_acquire(wanted.terms)

    async def resize(self, capacity: int | None) -> None:
        """Set the capacity for the whole cluster; None restores the declared capacity.

        Raises:
            InvalidLock: the name belongs to another kind of lock.
        """
        if capacity is not None:
            check_capacity(self.name, capacity)
        await self._source.records.resize(self.name, capacity, declared=self.capacity)


class ReadWriteLock:
    """Many readers or one writer."""

    def __init__(self, source: LockSource, name: str) -> None:
        self.name = name
        self._source = source

    def __repr__(self) -> str:
        return f"<ReadWriteLock {self.name}>"

    def reading(self, **options: Unpack[LockOptions]) -> LockHandle:
        return self._source.want(self.name, options, "r", PERMITS_MAX, 1)

    def writing(self, **options: Unpack[LockOptions]) -> LockHandle:
        return self._source.want(self.name, options, "r", PERMITS_MAX, PERMITS_MAX)

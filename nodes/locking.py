"""What a node offers of locks: the names under which a service takes them.

    async with node.lock("rebuild", lease=10) as lease:
        await store(rows, token=lease.token)

The promises are those of ``coordinator.locks``. Everything here needs a running node.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Unpack

from ..coordinator.locks.guards import Guards
from ..coordinator.locks.handles import LockHandle, LockOptions, ReadWriteLock, Semaphore
from ..coordinator.locks.lease import Lease
from ..coordinator.locks.locks import Locks
from ..coordinator.log.replication import Confirms
from ..coordinator.valkey.scripting import Scripts
from ..schemas.keys import Names, refuse_one_string
from .cache.core import Core

__all__ = ["Locking", "locks_of"]


class _Parts(Protocol):
    @property
    def locks(self) -> Locks: ...


def locks_of(core: Core, names: Names, scripts: Scripts, replication: Confirms) -> Locks:
    """The locks of a node that runs; their names begin with what is new at each start."""
    made = Locks(
        core.commands,
        names,
        scripts,
        node_id=core.node_id,
        process=secrets.token_hex(6),
        clock=core.clock,
        rng=core.rng,
        instruments=core.instruments,
    )
    made.replication = replication
    return made


class Locking:
    """A part of ``Node``."""

    @property
    def _parts(self) -> _Parts:
        raise AssertionError("a node says where they are")

    @property
    def locks(self) -> Locks:
        """To look at locks, and to release them from outside: list, show, force_release."""
        return self._parts.locks

    @property
    def guards(self) -> Guards:
        """Keys that refuse writes under an old token: set, delete."""
        return self._parts.locks.guards

    def lock(self, name: str, **options: Unpack[LockOptions]) -> LockHandle:
        """A lock that one in the cluster has at a time; ``async with`` it.

        Args:
            name: what the cluster knows it by; as a key.
            options:
                lease: how long the lock outlives this process, 2 to 30 s; it is renewed.
                timeout: how long to wait; None: as long as it takes.
                meta: shown to those who look, up to 1 kB as JSON.
                level: ``fast``, or ``replicated``: wait until replicas know of it.
                fair: in order; False: pass by those who wait, if it is free.
                on_loss: ``cancel`` the block, or only set the ``event`` ``lease.lost``.

        Raises:
            InvalidKey, InvalidLock: at once. LockNotAcquired: entering the block.
            LeaseLost: leaving it, when others may have had the lock meanwhile.
        """
        return self.locks.lock(name, **options)

    async def try_lock(self, name: str, **options: Unpack[LockOptions]) -> Lease | None:
        """A lease if the lock is free and nobody waits; use it as ``async with``."""
        return await self.locks.try_lock(name, **options)

    def lock_all(
        self, names: Sequence[str], **options: Unpack[LockOptions]
    ) -> AbstractAsyncContextManager[dict[str, Lease]]:
        """All of these locks or none, whatever order they are named in."""
        refuse_one_string("names", names)
        return self.locks.lock_all(names, **options)

    def semaphore(self, name: str, *, capacity: int) -> Semaphore:
        """Room for ``capacity`` at once; ``acquire(weight=1)`` takes some of it."""
        return self.locks.semaphore(name, capacity=capacity)

    def rwlock(self, name: str) -> ReadWriteLock:
        """Many readers or one writer: ``reading()``, ``writing()``."""
        return self.locks.rwlock(name)

"""The waiters of this process, and their wake-ups.

Q1  All waiters of a process share one channel and one subscription.
Q2  A message is a hint: a waiter asks the server when it is woken, and otherwise after at most
    ``BEAT_S``. This request is also its heartbeat: without it the server skips its queue entry.
Q3  A lock handed over by a release of the same process needs no request: the send time of the
    release bounds the lease.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from .store import Grant, Refusal

__all__ = ["BEAT_S", "LockQueue", "QueueEntry"]

BEAT_S = 1.0
_SOONEST_S = 0.005


class QueueEntry:
    """A waiter. ``grant`` is set if a release of this process handed the lock over."""

    __slots__ = ("_woken", "grant")

    def __init__(self) -> None:
        self.grant: Grant | None = None
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, patience_s: float) -> None:
        """Wait for a wake-up, at most ``patience_s``."""
        with anyio.move_on_after(patience_s):
            await self._woken
        if self._woken.done():
            self._woken = asyncio.get_running_loop().create_future()


class LockQueue:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._entries: dict[str, QueueEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<LockQueue: {len(self._entries)} wait>"

    @contextmanager
    def enqueue(self, nonce: str) -> Iterator[QueueEntry]:
        made = self._entries[nonce] = QueueEntry()
        try:
            yield made
        finally:
            del self._entries[nonce]

    def handed(self, nonce: str, token: int, sent_at: float) -> None:
        """Give the lock to this waiter. A waiter that has left is already releasing it."""
        if (place := self._entries.get(nonce)) is not None:
            place.grant = Grant(token, sent_at)
            place.wake()

    def wake(self, nonce: str) -> None:
        """Wake the waiter that a message names."""
        if (place := self._entries.get(nonce)) is not None:
            place.wake()

    def wake_all(self) -> None:
        """Wake all waiters: messages may have been lost."""
        for entry in self._entries.values():
            entry.wake()

    def patience_s(self, refusal: Refusal) -> float:
        """Seconds until the next request; the first waiter asks as soon as a lease ends."""
        beat_s = BEAT_S * self._rng.uniform(0.8, 1.0)
        return min(beat_s, max(_SOONEST_S, refusal.left_s)) if refusal.first else beat_s

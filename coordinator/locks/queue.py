"""Who of this process waits for a lock, and how it learns that it has one.

Q1  All waiters of a process share one channel, which is subscribed to once.
Q2  A message is a hint: whoever is woken asks the server, and whoever is not asks by itself, at the
    latest after ``BEAT_S``. That is also the sign of life without which its place is passed over.
Q3  A lock that was handed over by a release of this same process needs no asking: the time at
    which that release was sent bounds the lease.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from .store import Grant, Refusal

__all__ = ["BEAT_S", "LockQueue", "Place"]

BEAT_S = 1.0
_SOONEST_S = 0.005


class Place:
    """A place in the queue. ``grant`` is what it was handed, if it was."""

    __slots__ = ("_rung", "grant")

    def __init__(self) -> None:
        self.grant: Grant | None = None
        self._rung: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ring(self) -> None:
        if not self._rung.done():
            self._rung.set_result(None)

    async def rung(self, patience_s: float) -> None:
        """Wait for a ring, or for so long."""
        with anyio.move_on_after(patience_s):
            await self._rung
        if self._rung.done():
            self._rung = asyncio.get_running_loop().create_future()


class LockQueue:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._places: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<LockQueue: {len(self._places)} wait>"

    @contextmanager
    def place(self, nonce: str) -> Iterator[Place]:
        made = self._places[nonce] = Place()
        try:
            yield made
        finally:
            del self._places[nonce]

    def handed(self, nonce: str, token: int, sent_at: float) -> None:
        """The lock is this waiter's; if it has left, it is giving it back already."""
        if (place := self._places.get(nonce)) is not None:
            place.grant = Grant(token, sent_at)
            place.ring()

    def ring(self, nonce: str) -> None:
        """A message said that the lock is this waiter's."""
        if (place := self._places.get(nonce)) is not None:
            place.ring()

    def ring_all(self) -> None:
        """Messages may have been missed."""
        for place in self._places.values():
            place.ring()

    def patience_s(self, refusal: Refusal) -> float:
        """When to ask again: the first in line as soon as something ends."""
        beat_s = BEAT_S * self._rng.uniform(0.8, 1.0)
        return min(beat_s, max(_SOONEST_S, refusal.left_s)) if refusal.first else beat_s

"""The right to write a key through to its source, and to fill its entry afterwards.

It is the key's fill lease: while one node writes, none loads the row that is about to be old,
and of two who write through at once one comes after the other.

E1  A lease is granted also where there is an entry, but not while a write-behind is pending:
    the sink has that one first.
E2  Who waits is woken by the notice of the holder's fill, or by the checkpoint of the sink, and
    looks again at least every quarter of a second.
E3  With it comes a version for the row, later than any that the key had before.
E4  Whoever gives up or is cancelled while waiting holds nothing, within a second.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import anyio
from msgspec import Struct

from ...coordinator.clock import Clock
from ...coordinator.valkey.link import Reply
from ...schemas.errors import KeyBusy
from .waits import KeyWaits

__all__ = ["Turn", "WriteLease", "WriteLeases"]

_POLL_MS = 250
_HELD, _GRANTED = 0, 1  # 2: a write-behind is pending


class WriteLease(Struct, frozen=True):
    key: str
    token: str
    version: int  #: for the row
    taken_at: float  #: monotonic; from before it was asked for


class Turn(Struct, frozen=True):
    """What a caller needs to wait for its turn: whose, how long the lease is, how to let go."""

    key: str
    lease_ms: int
    timeout_ms: int
    give_back: Callable[[str, str], Awaitable[object]]


class WriteLeases:
    """``begin(key, args)`` runs write_begin.lua; ``checkpoints`` wakes under ``done_of(key)``."""

    def __init__(
        self,
        begin: Callable[[str, list[str | int]], Awaitable[Reply]],
        waits: KeyWaits,
        checkpoints: KeyWaits,
        *,
        done_of: Callable[[str], str],
        clock: Clock,
        rng: random.Random,
        ids: Callable[[], str],
    ) -> None:
        self._begin = begin
        self._waits = waits
        self._checkpoints = checkpoints
        self._done_of = done_of
        self._clock = clock
        self._rng = rng
        self._ids = ids

    async def take(self, turn: Turn) -> WriteLease:
        """Wait for the lease.

        Raises:
            KeyBusy: not in time. Unavailable, ServerRefused: it is not held.
        """
        token, began = self._ids(), self._clock.monotonic()
        try:
            while True:
                with (
                    self._waits.watch(turn.key) as said,
                    self._checkpoints.watch(self._done_of(turn.key)) as moved,
                ):
                    asked_at = self._clock.monotonic()
                    code, *rest = await self._begin(turn.key, [token, turn.lease_ms])
                    if code == _GRANTED:
                        return WriteLease(turn.key, token, int(rest[0]), asked_at)
                    left_ms = self._left_ms(turn, code, began)
                    if code == _HELD:
                        await self._sleep(said, min(left_ms, max(int(rest[0]), 1)))
                    else:
                        await self._sleep(moved, left_ms)
        except BaseException:
            await turn.give_back(turn.key, token)  # it may have been granted
            raise

    def _left_ms(self, turn: Turn, code: int, began: float) -> int:
        waited_ms = int((self._clock.monotonic() - began) * 1000)
        if waited_ms >= turn.timeout_ms:
            raise KeyBusy(turn.key, "lease" if code == _HELD else "write_behind", waited_ms)
        return turn.timeout_ms - waited_ms

    async def _sleep(self, event: anyio.Event, longest_ms: int) -> None:
        poll_ms = _POLL_MS * (1 - self._rng.random() / 2)
        with anyio.move_on_after(min(longest_ms, poll_ms) / 1000):
            await event.wait()

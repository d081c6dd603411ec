"""Tokens fetched ahead, so that most asks need no round trip.

T1  A token is charged on the server before it is spent here. So in any window of w seconds
    the cluster admits at most ``burst + rate * w`` and the tokens outstanding at its beginning.
T2  One process holds at most ``burst / (2 * members)`` of a subject; ``outstanding`` says how
    many it does hold.
T3  How many are fetched follows the demand of late. Those not spent within ``hold_s`` are
    given back, as are all when the limiter closes; those of a process that dies are lost,
    which admits less, never more.

Nothing here suspends: ``coalescing`` fetches and gives back.
"""

from __future__ import annotations

import math

__all__ = ["LocalTokens"]

_SMOOTHING = 0.5


class LocalTokens:
    """The tokens that this process holds of one subject."""

    __slots__ = (
        "_demand",
        "_demand_per_s",
        "_hold_s",
        "_low",
        "_since",
        "_size",
        "tokens",
        "until",
    )

    def __init__(self, hold_s: float, at: float) -> None:
        self.tokens = 0
        self.until = 0.0
        self._hold_s = hold_s
        self._size = 1
        self._low = 0
        self._demand = 0
        self._demand_per_s = 0.0
        self._since = at

    def __repr__(self) -> str:
        return f"<LocalTokens of {self.tokens} until {self.until}>"

    def spend(self, cost: int) -> bool:
        """Take them, if there are so many."""
        self._demand += cost
        if cost > self.tokens:
            return False
        self.tokens -= cost
        return True

    @property
    def low(self) -> bool:
        return self.tokens <= self._low

    def wanted(self, at: float, most: int) -> int:
        """How many to fetch, of at most ``most`` in all."""
        elapsed = max(at - self._since, 1e-3)
        if elapsed >= self._hold_s / 4 or not self._demand_per_s:
            rate = self._demand / elapsed
            before = self._demand_per_s or rate
            self._demand_per_s = before + _SMOOTHING * (rate - before)
            self._demand, self._since = 0, at
        need = math.ceil(self._demand_per_s * self._hold_s)
        return max(0, min(need, self._size * 2, most) - self.tokens)

    def put(self, granted: int, wanted: int, until: float) -> None:
        """Take in what was fetched; fewer than wanted: ask for less the next time."""
        self.tokens += granted
        self.until = until
        self._size = max(1, self.tokens if granted == wanted else self._size // 2)
        self._low = self.tokens // 2

    def take_all(self) -> int:
        """Empty it, to give them back."""
        tokens, self.tokens, self._low = self.tokens, 0, 0
        return tokens

"""Local tokens, fetched ahead, so that most requests need no round trip.

T1  A token is charged on the server before it is spent locally. So in any window of w seconds the
    cluster admits at most ``burst + rate * w`` plus the tokens outstanding at its start.
T2  A process holds at most ``burst / (2 * members)`` tokens of a subject; ``outstanding`` is the
    number that it holds.
T3  The number of fetched tokens follows the recent demand. Tokens not spent within ``hold_s`` are
    returned, and all tokens when the limiter closes. Tokens of a process that dies are lost, which
    admits fewer requests, never more.

Nothing here suspends: ``subject_queue`` fetches and returns tokens.
"""

from __future__ import annotations

import math

__all__ = ["LocalTokens"]

_SMOOTHING = 0.5


class LocalTokens:
    """The local tokens of one subject."""

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
        """Take this many tokens if they are available."""
        self._demand += cost
        if cost > self.tokens:
            return False
        self.tokens -= cost
        return True

    @property
    def low(self) -> bool:
        return self.tokens <= self._low

    def wanted(self, at: float, most: int) -> int:
        """The number of tokens to fetch; ``most`` is the maximum to hold."""
        elapsed = max(at - self._since, 1e-3)
        if elapsed >= self._hold_s / 4 or not self._demand_per_s:
            rate = self._demand / elapsed
            before = self._demand_per_s or rate
            self._demand_per_s = before + _SMOOTHING * (rate - before)
            self._demand, self._since = 0, at
        need = math.ceil(self._demand_per_s * self._hold_s)
        return max(0, min(need, self._size * 2, most) - self.tokens)

    def put(self, granted: int, wanted: int, until: float) -> None:
        """Store fetched tokens; if fewer than wanted arrived, fetch fewer next time."""
        self.tokens += granted
        self.until = until
        self._size = max(1, self.tokens if granted == wanted else self._size // 2)
        self._low = self.tokens // 2

    def take_all(self) -> int:
        """Remove all tokens, to return them to the server."""
        tokens, self.tokens, self._low = self.tokens, 0, 0
        return tokens

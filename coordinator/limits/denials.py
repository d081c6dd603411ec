"""Caches denials for as long as the server would repeat them.

D1  A cached denial refuses only requests that the server would also refuse: until the wait that
    the server returned has passed, counted from before the request, and for the same cost or more.
D2  A refund or a changed limit clears the cache, and discards a denial in flight (``epoch``). While
    refunds cannot be received, nothing is cached.

One cost is cached per subject, the smallest refused one, for at most ``MEMORY_S``; then the server
is asked again, in case it lost its state.
"""

from __future__ import annotations

import math

from ...schemas.limits import Verdict

__all__ = ["MEMORY_S", "CachedDenial"]

MEMORY_S = 60.0


class CachedDenial:
    """The last denial of a subject; ``cost`` is 0 if there is none."""

    __slots__ = ("cost", "epoch", "limit", "remaining", "reset_at", "retry_at", "until")

    def __init__(self) -> None:
        self.cost = 0
        self.until = 0.0
        self.retry_at = 0.0
        self.reset_at = 0.0
        self.limit = ""
        self.remaining = 0
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<CachedDenial of {self.cost} by {self.limit} until {self.until}>"

    def forget(self) -> None:
        self.cost = 0
        self.epoch += 1

    def learn(self, cost: int, verdict: Verdict, wait_us: int, sent_at: float, epoch: int) -> None:
        if epoch != self.epoch or not wait_us or (self.cost and cost > self.cost):
            return
        self.cost = cost
        self.limit = verdict.limit
        self.remaining = verdict.remaining
        self.retry_at = sent_at + wait_us / 1e6
        self.until = min(self.retry_at, sent_at + MEMORY_S)
        self.reset_at = sent_at + verdict.reset_after_ms / 1e3

    def verdict(self, cost: int, at: float) -> Verdict | None:
        """The cached denial for this cost at this time, or None."""
        if at >= self.until:
            self.cost = 0
            return None
        if cost < self.cost:
            return None
        retry_ms = math.ceil((self.retry_at - at) * 1e3)
        reset_ms = max(retry_ms, math.ceil((self.reset_at - at) * 1e3))
        return Verdict(False, 0, self.limit, self.remaining, retry_ms, reset_ms, "deny_cache")

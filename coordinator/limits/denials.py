"""Remembers a refusal for as long as the server would repeat it.

D1  What is refused from memory the server would have refused at that moment: until the wait
    that it named is over, for asks that cost no less. Counted from before the ask was sent.
D2  A refund or a changed limit makes all of it forgotten, also a refusal that is still under
    way then (``epoch``). While that could not be heard of, nothing is remembered.

A subject is remembered for one cost only, the least that was refused, and for at most
``MEMORY_S``: after that the server is asked again, in case it has forgotten.
"""

from __future__ import annotations

import math

from ...schemas.limits import Verdict

__all__ = ["MEMORY_S", "CachedDenial"]

MEMORY_S = 60.0


class CachedDenial:
    """The last refusal of one subject; ``cost`` is 0 where there is none."""

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
        """A refusal, if this cost is known to be refused at this time."""
        if at >= self.until:
            self.cost = 0
            return None
        if cost < self.cost:
            return None
        retry_ms = math.ceil((self.retry_at - at) * 1e3)
        reset_ms = max(retry_ms, math.ceil((self.reset_at - at) * 1e3))
        return Verdict(False, 0, self.limit, self.remaining, retry_ms, reset_ms, "deny_cache")

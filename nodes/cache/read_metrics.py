"""Counting and timing the reads of one cache.

T1  A read is counted once, by the tier that answered it: ``request`` (its request scope),
    ``near``, ``shared``, or ``source``, which is a miss. Every reader who waits for a load is one.
T2  A read that fails or is cancelled is counted by the tier that it asked last. ``refused``: the
    source was not asked, since it fails, or since too many ask.
T3  Hits of the near cache are counted there, in plain ints, and are not timed.
"""

from __future__ import annotations

from typing import Any, Literal

from ...coordinator.clock import Clock
from ...coordinator.instruments import Instruments
from ...schemas.errors import Backpressure, SourceFailing
from .core import Hit

__all__ = ["Asked", "ReadMetrics"]

Asked = Literal["shared", "source"]

_REFUSALS = (SourceFailing, Backpressure)


class ReadMetrics:
    def __init__(self, instruments: Instruments, cache: str, clock: Clock) -> None:
        self._instruments = instruments
        self._counts = instruments.counts
        self._cache = cache
        self.now = clock.monotonic

    def answered(self, hit: Hit[Any]) -> None:
        """A read got this, from elsewhere than the near cache's fresh entries."""
        result = "miss" if hit.tier == "source" else _result_of(hit)
        self._counts["cache_requests", self._cache, hit.tier, result] += 1

    def repeated(self, hit: Hit[Any]) -> None:
        """A read got what its request had read before."""
        self._counts["cache_requests", self._cache, "request", _result_of(hit)] += 1

    def failed(self, asked: Asked, error: BaseException) -> None:
        """A read ended with this error, after it had asked that tier."""
        if not isinstance(error, Exception):
            result = "cancelled"
        elif asked == "source" and isinstance(error, _REFUSALS):
            result = "refused"
        else:
            result = "error"
        self._counts["cache_requests", self._cache, asked, result] += 1

    def took(self, began: float) -> None:
        """A read, or one of many keys, has taken the time since then."""
        self._instruments.observe("cache_read_seconds", self.now() - began, self._cache)


def _result_of(hit: Hit[Any]) -> str:
    if hit.stale:
        return "stale"
    return "negative" if hit.value is None else "hit"

"""How long to wait before the next try of a connection.

I1  The first try after a loss is spread over ``jitter_ms``: a server that restarts is
    not met by all its clients at once.
I2  Later ones double from ``jitter_ms`` up to ``max_ms``, half of it fixed and half
    random (equal jitter), so that no wait is ever near zero.
I3  Only a connection that lasted for ``max_ms`` starts the sequence anew: a server that
    accepts and hangs up is not asked in a tight loop.
"""

from __future__ import annotations

import random

__all__ = ["Backoff"]

_DOUBLINGS_MAX = 30


class Backoff:
    __slots__ = ("_jitter_s", "_max_s", "_rng", "_tries")

    def __init__(self, rng: random.Random, *, jitter_ms: int, max_ms: int) -> None:
        self._rng = rng
        self._jitter_s = jitter_ms / 1000
        self._max_s = max_ms / 1000
        self._tries = 0

    def next_s(self) -> float:
        """The wait before the next try, which is counted by asking."""
        tries, self._tries = self._tries, self._tries + 1
        if tries == 0:
            return self._rng.uniform(0, self._jitter_s)
        wait = min(self._max_s, self._jitter_s * (1 << min(tries, _DOUBLINGS_MAX)))
        return wait / 2 + self._rng.uniform(0, wait / 2)

    def lasted(self, seconds: float) -> None:
        """Tell how long the connection held that was just lost."""
        if seconds >= self._max_s:
            self._tries = 0

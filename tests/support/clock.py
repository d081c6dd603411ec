"""A clock that a test moves by hand."""

from __future__ import annotations

import anyio


class ManualClock:
    """Stands still until the test sets ``now_s``; ``sleep`` advances it at once.

    With it a deadline does not pass early on a busy machine.
    """

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s
        self.slept: list[float] = []  #: the durations of all calls of ``sleep``, in seconds

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await anyio.lowlevel.checkpoint()

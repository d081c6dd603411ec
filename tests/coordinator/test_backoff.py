"""How reconnects are spread."""

from __future__ import annotations

import random

from forebay.coordinator.valkey.dialer import Backoff


def test_the_first_try_is_spread_from_zero() -> None:
    """I1: over many clients the first waits cover the whole jitter."""
    waits = [
        Backoff(random.Random(seed), jitter_ms=250, max_ms=5_000).next_s() for seed in range(400)
    ]
    assert min(waits) < 0.02
    assert 0.23 < max(waits) <= 0.25


def test_later_tries_double_up_to_the_limit() -> None:
    """I2: each wait lies between half its step and its step; 5 s is never exceeded."""
    for seed in range(50):
        backoff = Backoff(random.Random(seed), jitter_ms=250, max_ms=5_000)
        backoff.next_s()
        for step in (0.5, 1.0, 2.0, 4.0, 5.0, 5.0, *[5.0] * 100):
            assert step / 2 <= backoff.next_s() <= step


def test_only_a_connection_that_lasted_starts_it_anew() -> None:
    """I3: a server that hangs up at once is asked less and less often."""
    backoff = Backoff(random.Random(1), jitter_ms=250, max_ms=5_000)
    for _ in range(10):
        backoff.next_s()
        backoff.lasted(0.1)
    assert backoff.next_s() >= 2.5
    backoff.lasted(5.0)
    assert backoff.next_s() <= 0.25

"""Eight processes at five times the rate: nobody gets more than the limit, nearly all is given."""

from __future__ import annotations

import pytest

from faults.flood import BURST, RATE, Grant, flood, worst_excess


def steady(seconds: float, *, burst: int = BURST, rate: float = RATE) -> list[Grant]:
    """What a limiter admits that is asked without end."""
    at_once = [Grant(0.0, 0.001, 1) for _ in range(burst)]
    return at_once + [Grant(n / rate, n / rate + 0.001, 1) for n in range(1, int(seconds * rate))]


def test_the_checker_accepts_a_limiter_that_keeps_to_it() -> None:
    """All of the burst, then all of the rate."""
    assert worst_excess(steady(3), RATE, BURST) <= 0


@pytest.mark.parametrize(
    "grants",
    [
        steady(3, burst=BURST + 3),
        steady(3, rate=RATE * 1.02),
        [*steady(3), *(Grant(2.0, 2.001, 1) for _ in range(5))],
        [*steady(2), *(each._replace(asked_at=5.0, heard_at=5.001) for each in steady(1)[:103])],
    ],
)
def test_the_checker_finds_tokens_too_many(grants: list[Grant]) -> None:
    """Negative control: a burst too large, a rate too high, a few at once, a second burst."""
    assert worst_excess(grants, RATE, BURST) > 0


@pytest.mark.slow
@pytest.mark.parametrize("lease", [False, True])
def test_eight_processes_get_what_the_limit_admits(lease: bool) -> None:
    """G1 and C1 together: never more in any window, and nearly all of it.

    In a few seconds, beside other tests, processes may not get to ask; ``make soak`` demands 99 %.
    """
    figures = flood(seconds=4, lease=lease)
    assert figures.asked > 2 * figures.possible
    assert figures.worst_excess <= figures.excess_allowed, figures
    assert figures.share >= 0.85, figures

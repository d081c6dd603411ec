"""The plan of the nemesis: the same again for the same seed, and nothing left out."""

from __future__ import annotations

from itertools import pairwise

import pytest

from faults.nemesis import KINDS, plan


@pytest.mark.parametrize("seed", range(30))
def test_every_kind_comes_in_a_short_run(seed: int) -> None:
    """N2: 25 seconds are enough for each kind once, whatever the seed."""
    assert {fault.kind for fault in plan(seed, 25, 3)} == set(KINDS)


def test_same_seed_gives_the_same_plan() -> None:
    """N1: a run can be repeated by its seed."""
    assert plan(5, 60, 3) == plan(5, 60, 3)
    assert plan(5, 60, 3) != plan(6, 60, 3)


def test_faults_come_one_at_a_time_and_leave_time_to_recover() -> None:
    """N2: each ends before the next begins, and the last before the run does."""
    faults = plan(1, 120, 3)
    assert all(one.at_s + one.lasts_s < other.at_s for one, other in pairwise(faults))
    assert faults[-1].at_s + faults[-1].lasts_s <= 118
    assert {fault.node for fault in faults} == {0, 1, 2}

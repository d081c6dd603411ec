"""Shows that locks keep their promises whatever goes wrong, and that the harness would notice:
K1-K3 of coordinator/locks.py, G4 of grants.py, N1 and N6 of renewals.py.

The full run, with a thousand critical sections of each process and its figures, is ``make soak``.
"""

from __future__ import annotations

import pytest

from faults.lock_nemesis import LOCK_FAULTS, order_of
from faults.lock_run import lock_run
from faults.lock_setting import LockSetup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PAIR = ("one", "two")
#: Some sections outlive a lease, so that they are renewed.
LONG = {"tasks": 4, "hold_s": 0.02, "long_hold_s": 5.0}


def test_locks_keep_their_promises_whatever_goes_wrong() -> None:
    """Tokens, no two holders at once, guards, order, and a free lock is taken: with processes that
    stand still, die and lose connections, and a failover that loses what was granted last."""
    kinds = order_of(7, [kind for kind in LOCK_FAULTS if kind != "restart"])
    outcome = lock_run(LockSetup(seed=7, level="replicated"), kinds, sections=100)
    assert outcome.faults == []
    assert {each.kind for each in outcome.plan if each.holder} >= {"stop holder", "kill holder"}
    assert outcome.killed_in_section <= 1
    assert outcome.undisturbed_share > 0.05


def test_fast_locks_keep_theirs_over_a_restart_and_a_failover() -> None:
    """At level ``fast`` the grace does what replication does otherwise, if the primary is dead."""
    outcome = lock_run(LockSetup(seed=8), ["hurry over", "restart"], sections=100)
    assert outcome.faults == []


def test_a_primary_that_goes_on_alone_grants_nothing_that_is_replicated() -> None:
    """Nor does it keep alive what was granted before: who is at its side stops in time."""
    setup = LockSetup(level="replicated", **LONG)
    outcome = lock_run(setup, ["split"], processes=PAIR)
    assert outcome.faults == []
    assert outcome.lost


# Negative controls: the same harness, with a fault that it has to find.


def test_a_primary_that_goes_on_alone_is_found_at_level_fast() -> None:
    """What ``fast`` does not promise: two hold a lock at once, on either side."""
    outcome = lock_run(LockSetup(**LONG), ["split"], processes=PAIR)
    assert "H2" in outcome.kinds


def test_tokens_that_are_counted_are_found() -> None:
    """INCR forgets with its server: tokens come twice after a failover that lost grants."""
    outcome = lock_run(LockSetup(planted="counted"), ["hurry over"], processes=PAIR)
    assert "H1" in outcome.kinds


def test_a_failover_without_grace_is_found() -> None:
    """Another has the lock while its holder sleeps within its lease."""
    outcome = lock_run(LockSetup(planted="no grace"), ["hurry over"], processes=PAIR)
    assert "H2" in outcome.kinds


@pytest.mark.parametrize("planted", ["", "sleepy"])
def test_renewals_that_drift_are_found(planted: str) -> None:
    """A busy event loop loses no lease that is renewed on a schedule, but some where renewals
    begin to sleep when they are done."""
    names = tuple("abcdefgh")
    setup = LockSetup(planted=planted, tasks=8, names=names, hold_s=4.5, long_hold_s=9.0, busy_s=0.1)
    outcome = lock_run(setup, [], processes=("one",), calm_s=10.0)
    assert outcome.kinds == ({"H6"} if planted else set()), outcome

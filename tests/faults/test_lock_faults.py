"""Shows that locks keep their promises whatever goes wrong, and that the harness would notice:
K1-K3 of coordinator/locks.py, G4 of grants.py, N1 and N6 of renewals.py.

The full run, with a thousand critical sections of each process and its figures, is ``make soak``.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from faults.lock_history import Began, Refused
from faults.lock_nemesis import LOCK_FAULTS, order_of
from faults.lock_run import lock_run
from faults.lock_setting import LockSetup, PlantedInLocks
from faults.lock_steps import lock_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PAIR = ("one", "two")


def test_locks_keep_their_promises_whatever_goes_wrong() -> None:
    """Tokens, no two holders at once, guards, order, and a free lock is taken: with processes that
    stand still, die and lose connections, and a failover that loses what was granted last."""
    kinds = order_of(7, ["stop holder", "kill holder", "fail over"])
    outcome = lock_run(LockSetup(seed=7, level="replicated"), kinds, sections=100)
    assert outcome.faults == []
    assert {each.kind for each in outcome.plan if each.holder} >= {"stop holder", "kill holder"}
    assert outcome.undisturbed_share > 0.02, outcome


# The same processes and checker, driven to where a fault has to show, and where a sound build shows
# none.


def test_a_primary_that_goes_on_alone_grants_nothing_that_is_replicated() -> None:
    """Nor does it keep alive what was granted before: who is at its side stops in time."""
    with lock_steps(LockSetup(level="replicated"), *PAIR) as steps:
        steps.take("one", "a")
        steps.part("two")
        refused = steps.take("one", "b")
        assert isinstance(refused, Refused)
        assert refused.why == "not_replicated"
        assert steps.until_lost("one").name == "a"
        assert isinstance(steps.take("two", "a"), Began)
        steps.rejoin()
        assert isinstance(steps.take("one", "b"), Began)
        assert steps.faults() == []


def test_a_primary_that_goes_on_alone_is_found_at_level_fast() -> None:
    """What ``fast`` does not promise: two hold a lock at once, on either side."""
    with lock_steps(LockSetup(level="fast"), *PAIR) as steps:
        steps.take("one", "a")
        steps.part("two")
        assert isinstance(steps.take("two", "a"), Began)
        steps.give("one", "a")
        assert kinds(steps.faults()) == {"H2"}


@pytest.mark.parametrize("planted", ["", "counted"])
def test_tokens_that_are_counted_are_found(planted: PlantedInLocks) -> None:
    """INCR forgets with its server: tokens come twice after a failover that lost grants."""
    with lock_steps(LockSetup(planted=planted), *PAIR) as steps:
        steps.take("one", "a")
        steps.give("one", "a")
        steps.lag()
        steps.take("one", "a")
        steps.give("one", "a")
        steps.fail_over()
        assert isinstance(steps.take("two", "a"), Began)
        assert kinds(steps.faults()) == ({"H1"} if planted else set())


@pytest.mark.parametrize("planted", ["", "no grace"])
def test_a_failover_without_grace_is_found(planted: PlantedInLocks) -> None:
    """Another has the lock while its holder sleeps within its lease."""
    with lock_steps(LockSetup(planted=planted, lease_s=30.0), *PAIR) as steps:
        steps.lag()
        steps.take("one", "a")
        with steps.asleep("one"):
            steps.fail_over()
            answer = steps.take("two", "a", timeout_s=None if planted else 0.5)
        assert isinstance(answer, Began if planted else Refused)
        assert kinds(steps.faults()) == ({"H2"} if planted else set())


def test_renewals_that_drift_are_found() -> None:
    """A busy event loop loses leases that are renewed one by one, with a pause when they are done;
    of ours it loses none: ``test_a_busy_event_loop_loses_no_lease``."""
    with lock_steps(LockSetup(planted="sleepy"), "one") as steps:
        for name in "abcdefgh":
            steps.take("one", name)
        # A renewal takes three passes or more: those of eight locks take longer than a lease.
        steps.be_busy("one", pass_s=0.1)
        steps.until_lost("one")
        steps.kill("one")
        assert kinds(steps.faults()) == {"H6"}


def kinds(faults: Sequence[str]) -> set[str]:
    """The rules that were broken."""
    return {each.partition(" ")[0] for each in faults}


def test_the_same_seed_gives_the_same_order() -> None:
    """N1 of the nemesis, and each kind comes once in a round."""
    assert order_of(3, rounds=2) == order_of(3, rounds=2)
    assert len({tuple(order_of(seed)) for seed in range(20)}) > 5
    assert sorted(order_of(3)) == sorted(LOCK_FAULTS)

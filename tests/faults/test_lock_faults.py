"""Shows that locks keep their promises whatever goes wrong, and that the harness would notice:
K1-K3 of coordinator/locks.py, G4 of grants.py, N1 and N6 of renewals.py.

The full run, with a thousand critical sections of each process and its figures, is ``make soak``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    kinds = order_of(7, ["stop holder", "kill holder", "fail over"])
    outcome = lock_run(LockSetup(seed=7, level="replicated"), kinds, sections=100)
    assert outcome.faults == []
    assert {each.kind for each in outcome.plan if each.holder} >= {"stop holder", "kill holder"}
    assert outcome.undisturbed_share > 0.02, outcome


def test_a_primary_that_goes_on_alone_grants_nothing_that_is_replicated() -> None:
    """Nor does it keep alive what was granted before: who is at its side stops in time."""
    setup = LockSetup(level="replicated", **LONG)
    outcome = lock_run(setup, ["split"], processes=PAIR)
    assert outcome.faults == []
    assert outcome.lost


# Negative controls: the same harness, with a fault that it has to find. Whether it shows is up to
# who held what at that moment, so each gets a few chances; a sound build gets one, and shows none.

CHANCES = 8


def is_found(rule: str, kinds: Sequence[str], *, run: dict[str, Any], **setup: Any) -> bool:
    seeds = range(1, CHANCES + 1)
    return any(
        rule in lock_run(LockSetup(seed=seed, **setup), kinds, **run).kinds for seed in seeds
    )


def test_a_primary_that_goes_on_alone_is_found_at_level_fast() -> None:
    """What ``fast`` does not promise: two hold a lock at once, on either side."""
    run = {"processes": PAIR, "patient": False}
    assert is_found("H2", ["split"], run=run, **LONG)


def test_tokens_that_are_counted_are_found() -> None:
    """INCR forgets with its server: tokens come twice after a failover that lost grants."""
    run = {"processes": PAIR, "patient": False, "calm_s": 3.0}
    assert is_found("H1", ["hurry over"], run=run, planted="counted", names=tuple("abcdef"))


def test_a_failover_without_grace_is_found() -> None:
    """Another has the lock while its holder sleeps within its lease."""
    run = {"processes": PAIR, "patient": False}
    assert is_found("H2", ["hurry over"], run=run, planted="no grace")


def test_renewals_that_drift_are_found() -> None:
    """A busy event loop loses leases that are renewed one by one, with a pause when they are done;
    of ours it loses none: ``test_a_busy_event_loop_loses_no_lease``."""
    names = tuple("abcdefgh")
    busy = {"tasks": 8, "names": names, "hold_s": 4.5, "long_hold_s": 9.0, "busy_s": 0.1}
    run = {"processes": ("one",), "calm_s": 5.0}
    assert is_found("H6", [], run=run, planted="sleepy", **busy)


def test_the_same_seed_gives_the_same_order() -> None:
    """N1 of the nemesis, and each kind comes once in a round."""
    assert order_of(3, rounds=2) == order_of(3, rounds=2)
    assert len({tuple(order_of(seed)) for seed in range(20)}) > 5
    assert sorted(order_of(3)) == sorted(LOCK_FAULTS)

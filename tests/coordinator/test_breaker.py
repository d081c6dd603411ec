"""The breaker, as examples and against a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forebay.coordinator.valkey.breaker import Breaker
from forebay.schemas.errors import BreakerOpen
from support.clock import ManualClock

FAILURES = 3
RECOVERY_MS = 1_000


def make() -> tuple[Breaker, ManualClock]:
    clock = ManualClock()
    return Breaker("db", failures=FAILURES, recovery_ms=RECOVERY_MS, clock=clock), clock


def opened() -> tuple[Breaker, ManualClock]:
    breaker, clock = make()
    for _ in range(FAILURES):
        breaker.failed()
    return breaker, clock


def test_failures_in_a_row_open_it() -> None:
    """I1: the last of ``failures`` failures opens; the error says who and how long."""
    breaker, _ = opened()
    with pytest.raises(BreakerOpen) as caught:
        breaker.check()
    assert breaker.state == "open"
    assert (caught.value.name, caught.value.retry_after_ms) == ("db", RECOVERY_MS)


def test_a_success_in_between_starts_the_count_anew() -> None:
    """Only failures in a row count."""
    breaker, _ = make()
    for _ in range(10):
        for _ in range(FAILURES - 1):
            breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.statistics().failures == 0


def test_exactly_one_probe_passes() -> None:
    """I2: whoever comes while the probe is out is turned away."""
    breaker, clock = opened()
    clock.now_s += RECOVERY_MS / 1000
    assert breaker.state == "half_open"
    assert breaker.check() is True
    with pytest.raises(BreakerOpen):
        breaker.check()


def test_a_successful_probe_closes() -> None:
    """I2: after it, everything passes, and nobody is a probe."""
    breaker, clock = opened()
    clock.now_s += RECOVERY_MS / 1000
    breaker.check()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.check() is False


def test_a_failed_probe_opens_for_a_whole_recovery_time() -> None:
    """I2: the time counts from the failure of the probe."""
    breaker, clock = opened()
    clock.now_s += 5.0
    breaker.check()
    breaker.failed()
    assert breaker.state == "open"
    assert breaker.retry_after_ms == RECOVERY_MS


def test_an_abandoned_probe_lets_the_next_one_pass() -> None:
    """I2: a cancelled probe does not block the breaker for ever."""
    breaker, clock = opened()
    clock.now_s += RECOVERY_MS / 1000
    breaker.check()
    breaker.abandoned()
    assert breaker.check() is True


def test_late_outcomes_change_nothing_while_open() -> None:
    """I3: work begun before the opening neither closes it nor prolongs it."""
    breaker, clock = opened()
    clock.now_s += 0.5
    breaker.succeeded()
    breaker.failed()
    assert breaker.state == "open"
    assert breaker.retry_after_ms == 500


def test_a_tripped_breaker_is_open_from_now_on() -> None:
    """I1: whatever it was; for a whole recovery time, and counted as an opening once."""
    breaker, clock = make()
    breaker.failed()
    breaker.trip()
    assert (breaker.state, breaker.retry_after_ms) == ("open", RECOVERY_MS)
    with pytest.raises(BreakerOpen):
        breaker.check()
    clock.now_s += 0.75
    breaker.trip()
    assert breaker.retry_after_ms == RECOVERY_MS
    assert (breaker.statistics().opened, breaker.statistics().failures) == (1, FAILURES)


def test_a_trip_takes_the_probe_away() -> None:
    """I3: what it brings changes nothing any more."""
    breaker, clock = opened()
    clock.now_s += RECOVERY_MS / 1000
    assert breaker.check() is True
    breaker.trip()
    for outcome in (breaker.succeeded, breaker.failed, breaker.abandoned):
        outcome()
        assert (breaker.state, breaker.retry_after_ms) == ("open", RECOVERY_MS)


def test_a_reset_closes_whatever_it_was() -> None:
    """And the count of failures begins anew."""
    tripped, _ = make()
    tripped.trip()
    probing, clock = opened()
    clock.now_s += RECOVERY_MS / 1000
    probing.check()
    failing, _ = make()
    for _ in range(FAILURES - 1):
        failing.failed()
    for breaker in (tripped, probing, failing, opened()[0]):
        breaker.reset()
        assert breaker.check() is False
        assert breaker.statistics().failures == 0
        for _ in range(FAILURES - 1):
            breaker.failed()
        assert breaker.closed


def test_statistics_count_openings_and_refusals() -> None:
    """What happened can be seen from outside."""
    breaker, _ = opened()
    for _ in range(4):
        with pytest.raises(BreakerOpen):
            breaker.check()
    statistics = breaker.statistics()
    assert (statistics.opened, statistics.refused, statistics.state) == (1, 4, "open")
    assert repr(breaker) == "<Breaker db open failures=3>"


class BreakerMachine(RuleBasedStateMachine):
    """The breaker and the plainest possible account of what it should do."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.clock = make()
        self.failures = 0
        self.open_until: float | None = None
        self.probing = False

    @rule(seconds=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def ask(self) -> None:
        allowed = self.open_until is None or (
            not self.probing and self.clock.now_s >= self.open_until
        )
        try:
            probe = self.breaker.check()
        except BreakerOpen:
            assert not allowed
        else:
            assert allowed
            assert probe is (self.open_until is not None)
            self.probing = probe

    @rule()
    def success(self) -> None:
        self.breaker.succeeded()
        if self.open_until is None or self.probing:
            self.failures, self.open_until, self.probing = 0, None, False

    @rule()
    def failure(self) -> None:
        self.breaker.failed()
        if self.open_until is None:
            self.failures += 1
            if self.failures == FAILURES:
                self.open_until = self.clock.now_s + RECOVERY_MS / 1000
        elif self.probing:
            self.open_until, self.probing = self.clock.now_s + RECOVERY_MS / 1000, False

    @precondition(lambda self: self.probing)
    @rule()
    def abandon(self) -> None:
        self.breaker.abandoned()
        self.probing = False

    @rule()
    def trip(self) -> None:
        self.breaker.trip()
        self.failures = max(self.failures, FAILURES)
        self.open_until, self.probing = self.clock.now_s + RECOVERY_MS / 1000, False

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        self.failures, self.open_until, self.probing = 0, None, False

    @invariant()
    def the_state_is_the_models(self) -> None:
        if self.open_until is None:
            expected = "closed"
        elif self.probing or self.clock.now_s >= self.open_until:
            expected = "half_open"
        else:
            expected = "open"
        assert self.breaker.state == expected
        assert self.breaker.closed is (expected == "closed")


BreakerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class TestBreakerMachine(BreakerMachine.TestCase):  # type: ignore[name-defined,misc]
    """I1 to I3 hold over every sequence of outcomes and times."""

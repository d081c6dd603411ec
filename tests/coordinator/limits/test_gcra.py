"""The whole-number rule of limits, against a bucket of fractions: coordinator/limits/gcra.py."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forebay.coordinator.limits import gcra
from forebay.schemas.limits import UNITS_MAX, Limit, Terms, check_limit, terms_of

START_US = 1_800_000_000_000_000


class Bucket:
    """As a textbook has it: a level that rises by rate and never above the burst."""

    def __init__(self, limit: Limit, now_us: int) -> None:
        self.burst = Fraction(limit.burst)
        self.per_us = Fraction(round(limit.rate * 10**6), 10**6) / Fraction(
            round(limit.per * 10**6)
        )
        self.level = self.burst
        self.now_us = now_us

    def at(self, now_us: int) -> Fraction:
        self.level = min(self.burst, self.level + (now_us - self.now_us) * self.per_us)
        self.now_us = now_us
        return self.level

    def take(self, cost: int, now_us: int) -> bool:
        if self.at(now_us) < cost:
            return False
        self.level -= cost
        return True


@st.composite
def limits(draw: st.DrawFn) -> Limit:
    """Odd rates on purpose: sevenths, millionths, and more than a token in a microsecond."""
    rate = draw(
        st.one_of(
            st.integers(1, 50),
            st.sampled_from([0.1, 0.3, 7, 33.333, 1_000_003, 999_999.5]),
            st.floats(0.001, 10_000).map(lambda value: round(value, 3)),
        )
    )
    per = draw(st.sampled_from([0.000_007, 0.001, 0.7, 1, 3, 60]))
    return check_limit(Limit(name="api", rate=rate, per=per, burst=draw(st.integers(1, 40))))


STEPS = st.lists(
    st.tuples(st.integers(1, 40), st.one_of(st.integers(0, 5), st.integers(0, 3_000_000))),
    max_size=40,
)


@given(limit=limits(), steps=STEPS)
@example(limit=check_limit(Limit(name="x", rate=3, per=1, burst=1)), steps=[(1, 333_333), (1, 1)])
def test_it_grants_what_a_bucket_of_fractions_grants(
    limit: Limit, steps: list[tuple[int, int]]
) -> None:
    """No rounding ever decides: a third of a token is a third of a token."""
    terms, bucket, now_us = terms_of(limit), Bucket(limit, START_US), START_US
    tat: gcra.Tat | None = None
    for cost, wait_us in steps:
        now_us += wait_us
        cost = min(cost, limit.burst)
        debt = gcra.debt_of(tat, now_us, terms)
        assert gcra.fits(debt, terms) == bucket.at(now_us) // 1
        granted = gcra.fits(debt, terms, cost) > 0
        assert granted == bucket.take(cost, now_us)
        if granted:
            tat = gcra.put_debt(debt + cost * terms.weight, now_us, terms)


@given(limit=limits(), steps=STEPS)
def test_no_window_has_more_than_the_burst_and_the_rate(
    limit: Limit, steps: list[tuple[int, int]]
) -> None:
    """G1, for every window between two grants."""
    terms, now_us = terms_of(limit), START_US
    tat: gcra.Tat | None = None
    grants: list[tuple[int, int]] = []
    for cost, wait_us in steps:
        now_us += wait_us
        debt = gcra.debt_of(tat, now_us, terms)
        amount = min(cost, gcra.fits(debt, terms))
        tat = gcra.put_debt(debt + amount * terms.weight, now_us, terms)
        grants.append((now_us, amount))
    for first, (since, _) in enumerate(grants):
        total = 0
        for at, amount in grants[first:]:
            total += amount
            allowed = terms.capacity + (at - since) * terms.drain
            assert total * terms.weight <= allowed


@given(limit=limits(), spent=st.integers(0, 40), cost=st.integers(1, 40))
def test_the_wait_is_exact(limit: Limit, spent: int, cost: int) -> None:
    """G2: granted after the wait, refused a microsecond before."""
    terms, cost = terms_of(limit), min(cost, limit.burst)
    debt = min(spent, limit.burst) * terms.weight
    tat = gcra.put_debt(debt, START_US, terms)
    wait_us = gcra.wait_us(debt, terms, cost)
    assert gcra.fits(gcra.debt_of(tat, START_US + wait_us, terms), terms, cost) > 0
    if wait_us:
        early = gcra.debt_of(tat, START_US + wait_us - 1, terms)
        assert gcra.fits(early, terms, cost) == 0


@given(old=limits(), new=limits(), spent=st.integers(0, 40))
def test_a_changed_limit_keeps_its_arrival_time(old: Limit, new: Limit, spent: int) -> None:
    """G4: to a microsecond, never earlier."""
    before, after = terms_of(old), terms_of(new)
    tat = gcra.put_debt(spent * before.weight, START_US, before)
    owed_us = Fraction(spent * before.weight, before.drain)
    kept_us = Fraction(gcra.debt_of(tat, START_US, after), after.drain)
    assert owed_us <= kept_us < owed_us + 1 or kept_us * after.drain == gcra.DEBT_MAX


@given(limit=limits(), spent=st.integers(1, 40), back_us=st.integers(1, 10**11))
def test_a_clock_set_back_closes_a_limit_for_no_longer_than_it_was(
    limit: Limit, spent: int, back_us: int
) -> None:
    """G5: the debt stays the same, and from then on it is paid off as before."""
    terms = terms_of(limit)
    debt = spent * terms.weight
    tat, now_us = gcra.put_debt(debt, START_US, terms), START_US - back_us
    assert gcra.is_set_back(tat, now_us)
    assert gcra.debt_of(tat, now_us, terms) == min(debt, gcra.DEBT_MAX)
    again = gcra.put_debt(gcra.debt_of(tat, now_us, terms), now_us, terms)
    assert not gcra.is_set_back(again, now_us)
    wait_us = gcra.wait_us(debt, terms, 1)
    assert gcra.fits(gcra.debt_of(again, now_us + wait_us, terms), terms) > 0


@pytest.mark.parametrize("rate, per", [(7e8, 0.000_003), (0.3, 7), (1, 60 * 60 * 24 * 30)])
def test_terms_are_whole_and_small(rate: float, per: float) -> None:
    """The numbers of a limit that is accepted are exact in a double, also when doubled."""
    terms = terms_of(check_limit(Limit(name="api", rate=rate, per=per, burst=20)))
    assert Fraction(terms.drain, terms.weight) == Fraction(round(rate * 10**6), 10**6) / (
        round(per * 10**6)
    )
    assert terms.capacity <= UNITS_MAX
    assert isinstance(terms, Terms)

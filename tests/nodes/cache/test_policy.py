"""What a reader gets who found this: the whole table of ``decide``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.cache.policy import Load, Serve, ServeStale, ahead_ms, decide
from forebay.schemas.entry import Entry, EntryMeta

SOFT, HARD, VERSION = 1_000, 2_000, 77
ERROR = 300
KEPT = HARD - ERROR  #: from here on it is for errors only


def entry(
    *,
    pending: int = 0,
    doomed: bool = False,
    soft_at_ms: int = SOFT,
    error_ms: int = 0,
    soft_ms: int = 0,
) -> Entry:
    return Entry(
        version=VERSION,
        soft_at_ms=soft_at_ms,
        hard_at_ms=HARD,
        kind="v",
        codec="m",
        payload=b"\x01",
        meta=EntryMeta(error_ms=error_ms, soft_ms=soft_ms),
        pending=pending,
        doomed=doomed,
    )


PLAIN, PENDING = entry(), entry(pending=5)
DOOMED, BOTH = entry(doomed=True), entry(pending=5, doomed=True)
SAFE, SAFE_PENDING = entry(error_ms=ERROR), entry(error_ms=ERROR, pending=5)
SAFE_DOOMED = entry(error_ms=ERROR, doomed=True)
BRIEF = entry(error_ms=HARD - SOFT)  #: no stale period, only one for errors
OLD = entry(error_ms=ERROR, soft_at_ms=0)  #: softly invalidated

TABLE = [
    # found, now, tags, decision
    (None, 0, "fresh", Load(-1)),
    (None, 0, "stale", Load(-1)),
    (None, 0, "invalid", Load(-1)),
    (PLAIN, SOFT - 1, "fresh", Serve(PLAIN)),
    (PLAIN, SOFT, "fresh", ServeStale(PLAIN)),
    (PLAIN, HARD - 1, "fresh", ServeStale(PLAIN)),
    (PLAIN, HARD, "fresh", Load(VERSION)),
    (PLAIN, HARD + 10**12, "fresh", Load(VERSION)),
    (PLAIN, 0, "stale", ServeStale(PLAIN)),
    (PLAIN, SOFT - 1, "stale", ServeStale(PLAIN)),
    (PLAIN, SOFT, "stale", ServeStale(PLAIN)),
    (PLAIN, HARD - 1, "stale", ServeStale(PLAIN)),
    (PLAIN, HARD, "stale", Load(VERSION)),
    (PLAIN, 0, "invalid", Load(VERSION)),
    (PLAIN, SOFT, "invalid", Load(VERSION)),
    (DOOMED, 0, "fresh", Load(VERSION)),
    (DOOMED, SOFT, "fresh", Load(VERSION)),
    (DOOMED, 0, "stale", Load(VERSION)),
    (PENDING, 0, "fresh", Serve(PENDING)),
    (PENDING, SOFT, "fresh", Serve(PENDING)),
    (PENDING, HARD + 1, "fresh", Serve(PENDING)),
    (PENDING, HARD + 1, "stale", Serve(PENDING)),
    (PENDING, HARD + 1, "invalid", Serve(PENDING)),
    (BOTH, 0, "fresh", Serve(BOTH, keep=False)),
    (BOTH, HARD + 1, "invalid", Serve(BOTH, keep=False)),
    (SAFE, SOFT - 1, "fresh", Serve(SAFE)),
    (SAFE, SOFT, "fresh", ServeStale(SAFE)),
    (SAFE, KEPT - 1, "fresh", ServeStale(SAFE)),
    (SAFE, KEPT, "fresh", Load(VERSION, fallback=SAFE)),
    (SAFE, HARD - 1, "fresh", Load(VERSION, fallback=SAFE)),
    (SAFE, HARD, "fresh", Load(VERSION)),
    (SAFE, 0, "stale", ServeStale(SAFE)),
    (SAFE, KEPT, "stale", Load(VERSION, fallback=SAFE)),
    (SAFE, 0, "invalid", Load(VERSION)),
    (SAFE, KEPT, "invalid", Load(VERSION)),
    (SAFE_DOOMED, KEPT, "fresh", Load(VERSION)),
    (SAFE_PENDING, KEPT, "fresh", Serve(SAFE_PENDING)),
    (BRIEF, SOFT - 1, "fresh", Serve(BRIEF)),
    (BRIEF, SOFT, "fresh", Load(VERSION, fallback=BRIEF)),
    (BRIEF, SOFT - 1, "stale", ServeStale(BRIEF)),
    (OLD, 0, "fresh", ServeStale(OLD)),
    (OLD, KEPT, "fresh", Load(VERSION, fallback=OLD)),
]


@pytest.mark.parametrize(("found", "now_ms", "tags", "decision"), TABLE)
def test_each_case_has_its_decision(found, now_ms, tags, decision) -> None:
    """D1-D3, at both sides of each limit."""
    assert decide(found, now_ms=now_ms, tags=tags) == decision


def test_an_entry_without_a_stale_period_is_never_served_stale() -> None:
    """D3: soft and hard lifetime are the same then."""
    short = entry(soft_at_ms=HARD)
    assert decide(short, now_ms=HARD - 1) == Serve(short)
    assert decide(short, now_ms=HARD) == Load(VERSION)


RIPENING = entry(soft_ms=400)
RIPENING_PENDING = entry(soft_ms=400, pending=5)


@pytest.mark.parametrize(
    ("found", "now_ms", "tags", "ahead", "decision"),
    [
        (RIPENING, 919, "fresh", 0.8, Serve(RIPENING)),
        (RIPENING, 920, "fresh", 0.8, Serve(RIPENING, refresh=True)),
        (RIPENING, 999, "fresh", 0.8, Serve(RIPENING, refresh=True)),
        (RIPENING, 999, "fresh", 0.0, Serve(RIPENING)),
        (RIPENING, 1_000, "fresh", 0.8, ServeStale(RIPENING)),
        (RIPENING, 920, "stale", 0.8, ServeStale(RIPENING)),
        (RIPENING, 920, "invalid", 0.8, Load(VERSION)),
        (RIPENING_PENDING, 920, "fresh", 0.8, Serve(RIPENING_PENDING)),
        (PLAIN, 999, "fresh", 0.8, Serve(PLAIN)),
    ],
)
def test_what_is_ripe_is_served_and_refreshed(found, now_ms, tags, ahead, decision) -> None:
    """D4: from its fraction of the lifetime on; never what is pending, nor without lifetime."""
    assert decide(found, now_ms=now_ms, tags=tags, refresh_ahead=ahead) == decision


@given(st.integers(0, 10**13), st.integers(0, 10**10), st.floats(0, 1, exclude_max=True))
def test_nothing_is_ripe_before_it_began_nor_after_it_ended(soft_at, lifetime, ahead) -> None:
    """D4: the moment lies within the lifetime; at its end if nothing was asked for."""
    ripe_at = ahead_ms(soft_at, lifetime, ahead)
    assert soft_at - lifetime <= ripe_at <= soft_at
    assert ahead_ms(soft_at, lifetime, 0.0) == soft_at


@given(
    st.integers(0, 3_000),
    st.sampled_from(["fresh", "stale", "invalid"]),
    st.integers(0, 1),
    st.booleans(),
    st.sampled_from([0, ERROR, HARD - SOFT]),
    st.sampled_from([0.0, 0.5]),
)
def test_what_is_loaded_over_is_never_pending(now, tags, pending, doomed, error_ms, ahead) -> None:
    """D1-D4: only what is fresh, or pending, is served as fresh; what is invalid, never at all."""
    found = entry(pending=pending, doomed=doomed, error_ms=error_ms, soft_ms=500)
    decision = decide(found, now_ms=now, tags=tags, refresh_ahead=ahead)
    assert isinstance(decision, Serve) == bool(
        pending or (now < SOFT and tags == "fresh" and not doomed)
    )
    assert not (pending and isinstance(decision, Load))
    if not pending and (tags == "invalid" or doomed or now >= HARD):
        assert decision == Load(VERSION)
    if isinstance(decision, Load) and decision.fallback is not None:
        assert HARD - error_ms <= now < HARD

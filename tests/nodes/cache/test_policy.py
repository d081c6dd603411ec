"""What a reader gets who found this: the whole table of ``decide``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.cache.policy import Load, Serve, ServeStale, decide
from forebay.schemas.entry import Entry, EntryMeta

SOFT, HARD, VERSION = 1_000, 2_000, 77


def entry(*, pending: int = 0, doomed: bool = False, soft_at_ms: int = SOFT) -> Entry:
    return Entry(
        version=VERSION,
        soft_at_ms=soft_at_ms,
        hard_at_ms=HARD,
        kind="v",
        codec="m",
        payload=b"\x01",
        meta=EntryMeta(),
        pending=pending,
        doomed=doomed,
    )


PLAIN, PENDING = entry(), entry(pending=5)
DOOMED, BOTH = entry(doomed=True), entry(pending=5, doomed=True)

TABLE = [
    # found, now, tags hold, decision
    (None, 0, True, Load(-1)),
    (None, 0, False, Load(-1)),
    (PLAIN, SOFT - 1, True, Serve(PLAIN)),
    (PLAIN, SOFT, True, ServeStale(PLAIN)),
    (PLAIN, HARD - 1, True, ServeStale(PLAIN)),
    (PLAIN, HARD, True, Load(VERSION)),
    (PLAIN, HARD + 10**12, True, Load(VERSION)),
    (PLAIN, 0, False, Load(VERSION)),
    (PLAIN, SOFT, False, Load(VERSION)),
    (DOOMED, 0, True, Load(VERSION)),
    (DOOMED, SOFT, True, Load(VERSION)),
    (PENDING, 0, True, Serve(PENDING)),
    (PENDING, SOFT, True, Serve(PENDING)),
    (PENDING, HARD + 1, True, Serve(PENDING)),
    (PENDING, HARD + 1, False, Serve(PENDING)),
    (BOTH, 0, True, Serve(BOTH, keep=False)),
    (BOTH, HARD + 1, False, Serve(BOTH, keep=False)),
]


@pytest.mark.parametrize(("found", "now_ms", "tags_hold", "decision"), TABLE)
def test_each_case_has_its_decision(found, now_ms, tags_hold, decision) -> None:
    """D1-D3, at both sides of each limit."""
    assert decide(found, now_ms=now_ms, tags_hold=tags_hold) == decision


def test_an_entry_without_a_stale_period_is_never_served_stale() -> None:
    """D3: soft and hard lifetime are the same then."""
    short = entry(soft_at_ms=HARD)
    assert decide(short, now_ms=HARD - 1, tags_hold=True) == Serve(short)
    assert decide(short, now_ms=HARD, tags_hold=True) == Load(VERSION)


@given(st.integers(0, 3_000), st.booleans(), st.integers(0, 1), st.booleans())
def test_what_is_loaded_over_is_never_pending(now_ms, tags_hold, pending, doomed) -> None:
    """D1: and only what is fresh, or pending, is served as fresh."""
    found = entry(pending=pending, doomed=doomed)
    decision = decide(found, now_ms=now_ms, tags_hold=tags_hold)
    assert isinstance(decision, Serve) == bool(
        pending or (now_ms < SOFT and tags_hold and not doomed)
    )
    assert not (pending and isinstance(decision, Load))

"""Why a near copy is served or not, compared with the near cache itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.coordinator.log.follower import ShardView
from forebay.nodes.cache.near import NearCache, NearEntry
from forebay.nodes.cache.tags import TagState
from forebay.nodes.explain.near_state import judged
from forebay.schemas.settings import CacheDefaults

NOW = 1_000.0


def kept(
    *, ttl: float = 10.0, resets: int = 0, tag: int | None = 5, live_for: float = 1.0
) -> tuple[NearCache, NearEntry, bool]:
    """A near cache with one entry, which captured version 5 of its tag; and whether it is live."""
    view = ShardView(0)
    follower: Any = SimpleNamespace(views=(view,), live_until=NOW + live_for)
    clock: Any = SimpleNamespace(monotonic=lambda: NOW)
    near = NearCache.from_defaults(follower, CacheDefaults(), slack_s=0.0, clock=clock)
    state = TagState("catalog", 0)
    state.version = state.hard = 5
    entry = NearEntry(
        "a",
        1,
        version=7,
        size=1,
        fresh_until=NOW + ttl,
        gone_at=NOW + 99,
        written_at=NOW,
        view=view,
        tags=((state, 5),),
    )
    assert near.keep(near.reserve("a"), entry)
    view.generation += resets
    state.version = TagState("unknown", 0).version if tag is None else tag
    return near, entry, live_for > 0


@pytest.mark.parametrize(
    "case,state,tag",
    [
        ({}, "fresh", ""),
        ({"ttl": -1.0}, "past", ""),
        ({"tag": 6}, "behind", "catalog"),
        ({"tag": None}, "unknown_tag", "catalog"),
        ({"resets": 1}, "reset", ""),
        ({"live_for": -1.0}, "not_current", ""),
    ],
)
def test_each_reason_has_its_name(case: dict[str, Any], state: str, tag: str) -> None:
    """N1, each of its conditions by itself."""
    _, entry, live = kept(**case)

    assert judged(entry, NOW, live) == (state, tag)


@given(
    ttl=st.sampled_from([-1.0, 0.0, 1.0]),
    resets=st.integers(0, 1),
    tag=st.sampled_from([4, 5, 6, None]),
    live_for=st.sampled_from([-1.0, 1.0]),
)
def test_fresh_means_that_the_near_cache_serves_it(**case: Any) -> None:
    """The words never differ from what a reader gets."""
    near, entry, live = kept(**case)
    told, _ = judged(entry, NOW, live)

    assert (told == "fresh") is (near.get("a") is not None)

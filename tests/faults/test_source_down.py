"""Shows what readers and the source see while the source is down; a minute of it: make soak."""

from __future__ import annotations

import pytest

from faults.outage import KEYS, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

DOWN_S = 6.0


def test_readers_are_served_and_the_source_is_left_alone_while_it_is_down() -> None:
    """Every read is answered, and flagged once the entry has outlived its ttl, also after a
    soft invalidation; the source is asked until the nodes know, and then once in a recovery
    time by all of them; afterwards each key is loaded once, not by everybody."""
    figures = run(DOWN_S)
    assert figures.reads_failed == {}
    assert figures.reads_down > 1_000
    assert figures.unflagged_down == 0
    assert 0 < figures.loads_down <= figures.loads_down_allowed < KEYS * 2
    assert figures.loads_together_max == 1
    assert figures.loads_to_be_new_max == 1
    assert figures.fresh_again_s < 5.0
    assert figures.loads_first_second <= 2 * KEYS
    assert figures.loads_after_per_key_and_s <= 1.5
    assert figures.sound


def test_nodes_that_do_not_leave_the_source_alone_are_found() -> None:
    """The control: without a breaker each key is tried in each throttle time."""
    figures = run(DOWN_S, failures=1_000)
    assert figures.reads_failed == {}
    assert figures.loads_down > figures.loads_down_allowed
    assert not figures.sound

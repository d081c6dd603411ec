"""Waiting for what is said of a key."""

from __future__ import annotations

import anyio
import pytest

from forebay.nodes.cache.waits import KeyWaits


def test_a_wake_up_reaches_all_who_watch_the_key() -> None:
    """W1: those of other keys sleep on."""
    waits = KeyWaits()
    with waits.watch("a") as one, waits.watch("a") as two, waits.watch("b") as other:
        waits.wake("a")
        assert (one.is_set(), two.is_set(), other.is_set()) == (True, True, False)


def test_a_watch_after_the_wake_up_waits_for_the_next() -> None:
    """W2: a hint counts once."""
    waits = KeyWaits()
    with waits.watch("a") as one:
        waits.wake("a")
        with waits.watch("a") as two:
            assert not two.is_set()
            waits.wake("a")
            assert two.is_set()
        assert one.is_set()
    assert len(waits) == 0


def test_nothing_is_left_of_watches_that_ended() -> None:
    """In whatever order they end, woken or not, also by an exception."""
    waits = KeyWaits()
    first, second = waits.watch("a"), waits.watch("a")
    with first:
        second.__enter__()
    assert len(waits) == 1
    waits.wake("a")
    third = waits.watch("a")
    third.__enter__()
    second.__exit__(None, None, None)
    assert len(waits) == 1, "the third has an event of its own"
    third.__exit__(None, None, None)
    assert len(waits) == 0
    waits.wake("a")
    with pytest.raises(KeyError), waits.watch("a"):
        {}["a"]
    assert len(waits) == 0


async def test_a_watch_that_was_begun_before_misses_nothing() -> None:
    """W1: the event may come before anybody waits for it."""
    waits = KeyWaits()
    with waits.watch("a") as said:
        waits.wake("a")
        with anyio.fail_after(20):
            await said.wait()
    assert said.is_set()

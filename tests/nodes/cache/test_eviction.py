"""The two orders, each beside a plain model of it, and bounded as it says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from forebay.nodes.cache.eviction import EvictionOrder, Linked, Lru, Sieve

ORDERS = [Sieve, Lru]
STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "read", "read", "remove"]), st.integers(0, 9)),
    min_size=20,
    max_size=120,
)


class SieveModel:
    """SIEVE as the paper draws it: a list from old to new, a bit each, and a hand."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[list[Any]] = []
        self.hand = 0

    def keys(self) -> list[str]:
        return [key for key, _ in self.items]

    def hit(self, key: str) -> bool:
        for item in self.items:
            if item[0] == key:
                item[1] = True
                return True
        return False

    def add(self, key: str) -> None:
        if len(self.items) >= self.size:
            while self.items[self.hand][1]:
                self.items[self.hand][1] = False
                self.hand = (self.hand + 1) % len(self.items)
            self.remove(self.items[self.hand][0])
        self.items.append([key, False])

    def remove(self, key: str) -> None:
        index = self.keys().index(key)
        del self.items[index]
        if index < self.hand:
            self.hand -= 1
        if self.hand == len(self.items):  # it was the newest: begin again with the oldest
            self.hand = 0


class LruModel:
    """An ordered dict, the least recently used first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: OrderedDict[str, None] = OrderedDict()

    def keys(self) -> list[str]:
        return list(self.items)

    def hit(self, key: str) -> bool:
        if key not in self.items:
            return False
        self.items.move_to_end(key)
        return True

    def add(self, key: str) -> None:
        if len(self.items) >= self.size:
            self.items.popitem(last=False)
        self.items[key] = None

    def remove(self, key: str) -> None:
        del self.items[key]


class Forgetful(Lru):
    """A planted fault: first in, first out."""

    def touch(self, entry: Linked) -> None:
        pass


class Handless(Sieve):
    """A planted fault: the hand begins with the oldest, again and again."""

    def _victim(self, oldest: Linked) -> Linked:
        self._hand = None
        return super()._victim(oldest)


def listed(order: EvictionOrder) -> list[Linked]:
    """From old to new; the links agree in both directions."""
    found: list[Linked] = []
    entry = order._oldest
    while entry is not None:
        assert entry.older is (found[-1] if found else None)
        found.append(entry)
        entry = entry.newer
    assert order._newest is (found[-1] if found else None)
    assert len(order) == len(found)
    assert order.bytes == sum(each.size for each in found)
    return found


def check_beside(
    made: Callable[..., EvictionOrder], model_of: Callable[[int], Any], examples: int = 100
) -> None:
    """The same keys are there, in the same order, after every step."""

    # A control, which has to find something, gets the same examples in every run.
    @settings(
        max_examples=examples,
        derandomize=examples > 100,
        database=None,
        phases=[Phase.generate],
    )
    @given(STEPS, st.integers(1, 6))
    def follow(steps: list[tuple[str, int]], size: int) -> None:
        order, model = made(entries_max=size, bytes_max=10**6), model_of(size)
        there: dict[str, Linked] = {}
        for step, number in steps:
            key = f"k{number}"
            if step == "remove":
                if key in there:
                    order.remove(there.pop(key))
                    model.remove(key)
            elif model.hit(key):
                order.touch(there[key])
            else:
                model.add(key)
                there[key] = Linked(key, 1)
                for each in order.add(there[key]):
                    assert there.pop(each.key) is each
            assert [each.key for each in listed(order)] == model.keys()
            assert set(there) == set(model.keys())

    follow()


@pytest.mark.parametrize(("made", "model_of"), [(Sieve, SieveModel), (Lru, LruModel)])
def test_it_evicts_what_its_model_evicts(made, model_of) -> None:
    """E3, E4: SIEVE as the paper draws it; LRU exactly what was not used for longest."""
    check_beside(made, model_of)


@pytest.mark.parametrize(
    ("made", "model_of"),
    [(Forgetful, LruModel), (Handless, SieveModel), (Sieve, LruModel), (Lru, SieveModel)],
)
def test_the_models_notice_another_order(made, model_of) -> None:
    """The negative control: faults that are planted, and each order beside the other's model."""
    with pytest.raises((AssertionError, KeyError)):
        check_beside(made, model_of, examples=2_000)


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=80), st.integers(1, 8))
def test_sieve_keeps_what_was_hit_on_the_way_of_its_hand(
    steps: list[tuple[int, bool]], size: int
) -> None:
    """E3: it passes entries with a bit only, takes those bits and no others."""
    order = Sieve(entries_max=size, bytes_max=10**6)
    for number, hit in steps:
        before = listed(order)
        bits = [each.visited for each in before]
        start = before.index(order._hand) if order._hand else 0
        entry = Linked(f"k{number}", 1)
        for victim in order.add(entry):
            at = before.index(victim)
            turns = bits.count(False) == 0  # once around, back to where it began
            way = range(start, at if at >= start and not turns else at + len(before))
            passed = {step % len(before) for step in way}
            assert all(bits[step] for step in passed), "it passed one that was not hit"
            assert not bits[at] or turns, "it took one that was hit"
            left = [each.visited for step, each in enumerate(before) if step not in passed]
            assert left == [bit for step, bit in enumerate(bits) if step not in passed]
            assert not any(before[step].visited for step in passed)
        if hit:
            order.touch(entry)


@pytest.mark.parametrize("made", ORDERS)
@given(sizes=st.lists(st.integers(1, 40), max_size=60), hits=st.lists(st.booleans(), min_size=60))
def test_the_bounds_hold_and_nothing_goes_without_need(made, sizes, hits) -> None:
    """E2: what went had to, and was counted by the bound that was reached."""
    order = made(entries_max=5, bytes_max=40)
    went = 0
    for size, hit in zip(sizes, hits, strict=False):
        before = order.evicted_for_entries, order.evicted_for_bytes
        entries, occupied = len(order), order.bytes
        entry = Linked("k", size)
        evicted = order.add(entry)
        went += len(evicted)
        for_entries = order.evicted_for_entries - before[0]
        for_bytes = order.evicted_for_bytes - before[1]
        assert for_entries == (entries == 5)
        assert for_entries + for_bytes == len(evicted)
        if for_bytes:
            room = 40 - occupied + sum(each.size for each in evicted[:-1])
            assert size > room, "one less would have done"
        assert len(order) <= 5
        assert order.bytes <= 40
        if hit:
            order.touch(entry)
    assert len(listed(order)) + went == len(sizes)


@pytest.mark.parametrize("made", ORDERS)
def test_after_clearing_it_begins_anew(made) -> None:
    """Nothing of before is referred to, not even by the hand."""
    order = made(entries_max=3, bytes_max=100)
    for number in range(5):
        entry = Linked(f"k{number}", 10)
        order.add(entry)
        order.touch(entry)
    assert repr(order) == f"<{made.__name__} of 3 entries, 30 bytes>"
    order.clear()
    assert (len(order), order.bytes, listed(order)) == (0, 0, [])
    evicted = [each.key for number in range(4) for each in order.add(Linked(f"n{number}", 10))]
    assert evicted == ["n0"]


@pytest.mark.parametrize("made", ORDERS)
def test_an_evicted_entry_refers_to_nothing(made) -> None:
    """E1: who still holds it does not hold the others by it."""
    order = made(entries_max=2, bytes_max=100)
    entries = [Linked(f"k{number}", 1) for number in range(3)]
    (evicted,) = [each for entry in entries for each in order.add(entry)]
    assert evicted is entries[0]
    assert (evicted.newer, evicted.older) == (None, None)

"""What a node knows of the ends of entries: J1, J2."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.workers.lifetimes import Lifetimes
from forebay.schemas.notices import Bumped, Changed, Dropped, Extended, Notice

NOW_MS = 1_000_000
Said = tuple[int, Notice | int]  # a version; a notice, or when the entry of that version ends

kinds = st.sampled_from(["changed", "entry", "dropped", "soft", "extended"])


def said(version: int, kind: str) -> list[Said]:
    """What can be heard of one change of the key; odd versions end before now."""
    ends = NOW_MS + (-5_000 if version % 2 else 5_000)
    match kind:
        case "dropped":
            return [(version, Dropped(("k",)))]
        case "soft":
            return [(version, Dropped(("k",), soft=True))]
        case "extended":
            return [(version, Extended("k", version - 1, ends, ends)), (version, ends)]
        case "changed":
            return [(version, Changed("k"))]
    return [(version, Changed("k")), (version, ends)]


def explained(history: list[list[Said]]) -> bool:
    """By the newest change that says when the key is gone."""
    for (version, first), *rest in reversed(history):
        if isinstance(first, Dropped) and not first.soft:
            return True
        if isinstance(first, Extended) or rest:
            return version % 2 == 1
        if isinstance(first, Changed):
            return False
    return False


@given(st.lists(kinds, max_size=8), st.data())
def test_the_newest_word_counts_in_whatever_order_it_comes(
    changes: list[str], data: st.DataObject
) -> None:
    """J1: notices and entries, shuffled and repeated, give what the history alone says."""
    history = [said(version, kind) for version, kind in enumerate(changes, start=1)]
    all_of_it = [each for heard in history for each in heard]
    order = data.draw(st.permutations(all_of_it))
    again = data.draw(st.lists(st.sampled_from(all_of_it))) if all_of_it else []
    lifetimes = Lifetimes()
    for version, what in [*order, *again]:
        if isinstance(what, int):
            lifetimes.entry("k", version, what)
        else:
            lifetimes.notice(version, what)
    assert lifetimes.explain("k", NOW_MS) == explained(history)


def test_what_is_not_known_explains_nothing() -> None:
    """J1: neither a key never heard of, nor one that is forgotten."""
    lifetimes = Lifetimes()
    assert not lifetimes.explain("k", NOW_MS)
    lifetimes.notice(1, Dropped(("k",)))
    lifetimes.notice(2, Bumped(("k",)))
    assert lifetimes.explain("k", NOW_MS)
    lifetimes.clear()
    assert not lifetimes.explain("k", NOW_MS)


def test_the_oldest_are_forgotten() -> None:
    """J2: the bound holds, and what was heard of again counts as new."""
    lifetimes = Lifetimes(known_max=3)
    for version, key in enumerate(["a", "b", "c", "a", "d"], start=1):
        lifetimes.notice(version, Dropped((key,)))
    assert [key for key in "abcd" if lifetimes.explain(key, NOW_MS)] == ["a", "c", "d"]
    assert len(lifetimes) == 3

"""Who should own what: coordinator/log/assignment.py."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from forebay.coordinator.log.assignment import Candidate, assign

IDS = tuple("abcdef")
GOLDEN, GOLDEN_WITH_D = "abbacabccccc", "abbacabccdcc"


@st.composite
def situations(
    draw: st.DrawFn, *, ranked: bool = False
) -> tuple[int, list[Candidate], dict[int, str]]:
    """Some shards, members of all kinds, and owners, of which some are not members any more."""
    shards = draw(st.integers(0, 40))
    ids = draw(st.lists(st.sampled_from(IDS[:-1]), unique=True, max_size=5))
    candidates = [
        Candidate(
            name,
            draw(st.sampled_from([1.0, 1.0, 2.0, 0.5])),
            frozen=draw(st.integers(0, 4)) == 0,
            declines=draw(st.frozensets(st.integers(0, 40), max_size=2)),
            avoids=draw(st.frozensets(st.integers(0, 40), max_size=2)) if ranked else frozenset(),
            rank=draw(st.integers(0, 2)) if ranked else 0,
        )
        for name in ids
    ]
    resources = st.integers(0, max(0, shards - 1))
    return shards, candidates, draw(st.dictionaries(resources, st.sampled_from(IDS)))


def share(
    shards: int, candidate: Candidate, candidates: list[Candidate], owners: dict[int, str]
) -> int:
    able = [each for each in candidates if not each.frozen]
    frozen = {each.id for each in candidates if each.frozen}
    left = sum(owners.get(resource) not in frozen for resource in range(shards))
    parts = [shards / sum(each.weight for each in candidates)]
    parts += [left / sum(each.weight for each in able)] if able else []
    return math.ceil(round(max(parts) * candidate.weight, 6))


def load(plan: dict[int, str], id: str) -> int:
    return sum(owner == id for owner in plan.values())


@given(situations(), st.randoms(use_true_random=False))
def test_the_answer_does_not_depend_on_who_asks(
    situation: tuple[int, list[Candidate], dict[int, str]], rng: random.Random
) -> None:
    """A1: in whatever order members and owners are known."""
    shards, candidates, owners = situation
    plan = assign(range(shards), candidates, owners)
    shuffled = rng.sample(candidates, len(candidates))
    items = rng.sample(sorted(owners.items()), len(owners))
    resources = rng.sample(range(shards), shards)
    assert assign(resources, shuffled, dict(items)) == plan


@given(situations())
def test_everything_has_an_owner_that_may_have_it(
    situation: tuple[int, list[Candidate], dict[int, str]],
) -> None:
    """A2: nobody is given what it declines, or anything while it is frozen."""
    shards, candidates, owners = situation
    plan = assign(range(shards), candidates, owners)
    known = {each.id: each for each in candidates}
    for resource in range(shards):
        owner = plan.get(resource)
        able = [c for c in candidates if not c.frozen and resource not in c.declines]
        if owner is None:
            assert not able
        else:
            assert resource not in known[owner].declines
            assert not known[owner].frozen or owners.get(resource) == owner


@given(situations())
def test_nobody_has_more_than_its_share(
    situation: tuple[int, list[Candidate], dict[int, str]],
) -> None:
    """A2: where nobody declines anything; who is frozen keeps what it has."""
    shards, candidates, owners = situation
    candidates = [Candidate(each.id, each.weight, each.frozen) for each in candidates]
    plan = assign(range(shards), candidates, owners)
    for each in candidates:
        if not each.frozen:
            assert load(plan, each.id) <= share(shards, each, candidates, owners)


@given(situations())
def test_only_what_has_to_move_moves(
    situation: tuple[int, list[Candidate], dict[int, str]],
) -> None:
    """A3: what nobody has, and what is above a share."""
    shards, candidates, owners = situation
    plan = assign(range(shards), candidates, owners)
    owners = {each: owner for each, owner in owners.items() if each < shards}
    moved = [each for each, owner in owners.items() if plan.get(each) != owner]
    known = {each.id: each for each in candidates}
    for each in candidates:
        mine = [r for r, owner in owners.items() if owner == each.id and r not in each.declines]
        surplus = 0 if each.frozen else max(0, len(mine) - share(shards, each, candidates, owners))
        assert sum(resource in mine for resource in moved) <= surplus
    for resource in moved:
        owner = owners[resource]
        assert owner not in known or not known[owner].frozen or resource in known[owner].declines


@given(situations(), st.data())
def test_half_of_the_way_the_end_is_the_same(
    situation: tuple[int, list[Candidate], dict[int, str]], data: st.DataObject
) -> None:
    """A4: whatever part of it was carried out already."""
    shards, candidates, owners = situation
    candidates = [Candidate(each.id, each.weight, each.frozen) for each in candidates]
    plan = assign(range(shards), candidates, owners)
    done = data.draw(st.sets(st.sampled_from(sorted(plan)))) if plan else set()
    owners = {**owners, **{resource: plan[resource] for resource in done}}
    assert assign(range(shards), candidates, owners) == plan


def test_the_assignment_is_what_it_was() -> None:
    """A1: two versions of Forebay in one cluster must agree, so these never change."""
    three = [Candidate("a"), Candidate("b"), Candidate("c", 2.0)]
    plan = assign(range(12), three, {})
    assert "".join(plan[each] for each in range(12)) == GOLDEN
    moved = assign(range(12), [*three, Candidate("d")], plan)
    assert "".join(moved[each] for each in range(12)) == GOLDEN_WITH_D


def test_load_is_spread_by_weight() -> None:
    """Without the bound coming in: twice the weight is twice the share."""
    many = [Candidate(f"m{n}", 1.0 + n % 2) for n in range(10)]
    plan = assign(range(1_500), many, {})
    heavy = sum(load(plan, each.id) for each in many if each.weight == 2.0)
    assert abs(heavy - 1_000) < 10


@given(situations(ranked=True), st.randoms(use_true_random=False))
def test_with_ranks_too_the_answer_does_not_depend_on_who_asks(
    situation: tuple[int, list[Candidate], dict[int, str]], rng: random.Random
) -> None:
    """A1 and A5."""
    shards, candidates, owners = situation
    plan = assign(range(shards), candidates, owners)
    shuffled = rng.sample(candidates, len(candidates))
    assert assign(rng.sample(range(shards), shards), shuffled, owners) == plan


@given(situations(ranked=True))
def test_who_owns_is_of_the_highest_rank_that_neither_avoids_nor_declines(
    situation: tuple[int, list[Candidate], dict[int, str]],
) -> None:
    """A5: and a shard that anybody can take has an owner."""
    shards, candidates, owners = situation
    plan = assign(range(shards), candidates, owners)
    known = {each.id: each for each in candidates}
    for resource in range(shards):
        able = [c for c in candidates if not c.frozen and resource not in c.declines]
        willing = [c for c in able if resource not in c.avoids]
        owner = known[plan[resource]] if resource in plan else None
        if owner is None:
            assert not able
        elif not owner.frozen:
            among = willing or able
            assert owner.rank == max(each.rank for each in among)
            assert owner in among


@given(situations(ranked=True), st.data())
def test_with_ranks_too_half_of_the_way_the_end_is_the_same(
    situation: tuple[int, list[Candidate], dict[int, str]], data: st.DataObject
) -> None:
    """A4: where nothing is declined or avoided."""
    shards, candidates, owners = situation
    candidates = [Candidate(c.id, c.weight, c.frozen, rank=c.rank) for c in candidates]
    plan = assign(range(shards), candidates, owners)
    done = data.draw(st.sets(st.sampled_from(sorted(plan)))) if plan else set()
    owners = {**owners, **{resource: plan[resource] for resource in done}}
    assert assign(range(shards), candidates, owners) == plan


def test_what_is_avoided_by_all_stays_where_it_is() -> None:
    """A5: it moves only to a candidate that does not avoid it."""
    shy = [Candidate(name, avoids=frozenset({1})) for name in "ab"]
    assert assign(range(2), shy, {0: "a", 1: "b"}) == {0: "a", 1: "b"}
    assert assign(range(2), [shy[1], Candidate("a")], {0: "a", 1: "b"})[1] == "a"

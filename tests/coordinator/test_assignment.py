"""Who should own what: coordinator/assignment.py, and ``wanted`` of coordinator/roster.py."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from forebay.coordinator.assignment import Candidate, assign
from forebay.coordinator.roster import Member, Profile, Roster, State, pack, unpack, wanted
from forebay.schemas.keys import EVENTS

IDS = tuple("abcdef")
GOLDEN, GOLDEN_WITH_D = "abbacabccccc", "abbacabccdcc"


@st.composite
def situations(draw: st.DrawFn) -> tuple[int, list[Candidate], dict[int, str]]:
    """Some shards, members of all kinds, and owners, of which some are not members any more."""
    shards = draw(st.integers(0, 40))
    ids = draw(st.lists(st.sampled_from(IDS[:-1]), unique=True, max_size=5))
    candidates = [
        Candidate(
            name,
            draw(st.sampled_from([1.0, 1.0, 2.0, 0.5])),
            frozen=draw(st.integers(0, 4)) == 0,
            declines=draw(st.frozensets(st.integers(0, 40), max_size=2)),
        )
        for name in ids
    ]
    resources = st.integers(0, max(0, shards - 1))
    return shards, candidates, draw(st.dictionaries(resources, st.sampled_from(IDS)))


def share(shards: int, candidate: Candidate, candidates: list[Candidate]) -> int:
    return math.ceil(shards * candidate.weight / sum(each.weight for each in candidates))


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
    """A2: where nobody is frozen or declines anything."""
    shards, candidates, owners = situation
    candidates = [Candidate(each.id, each.weight) for each in candidates]
    plan = assign(range(shards), candidates, owners)
    for each in candidates:
        assert load(plan, each.id) <= share(shards, each, candidates)


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
        surplus = 0 if each.frozen else max(0, len(mine) - share(shards, each, candidates))
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


# wanted, pack


def member(id: str, state: State, held: set[int] = frozenset(), label: str = "") -> Member:  # type: ignore[assignment]
    return Member(
        id=id,
        state=state,
        profile=Profile(label=label),
        held=frozenset(held),
        declines=frozenset(),
    )


def plan_of(*members: Member, shards: int = 4) -> dict[int, str]:
    return wanted({each.id: each for each in members}, shards)


def test_what_is_away_keeps_its_shards_but_not_the_ingress_stream() -> None:
    """O6: nothing of it goes to others, who take no more than their share of the rest."""
    plan = plan_of(member("a", "away", {EVENTS, 0, 1}, "one"), member("b", "active", {2, 3}))
    assert plan == {EVENTS: "b", 0: "a", 1: "a", 2: "b", 3: "b"}


def test_who_comes_back_takes_what_was_kept() -> None:
    """O6: by its label, also if the old one has only fallen silent."""
    for state in ("away", "suspect"):
        old = member("old", state, {0, 1}, "one")  # type: ignore[arg-type]
        plan = plan_of(old, member("new", "active", label="one"), member("b", "active", {2, 3}))
        assert {plan[each] for each in (0, 1)} == {"new"}
        assert {plan[each] for each in (2, 3)} == {"b"}


def test_who_is_alive_with_the_same_label_inherits_nothing() -> None:
    """A setting that was copied is no restart."""
    plan = plan_of(member("a", "active", {0, 1}, "one"), member("b", "active", {2, 3}, "one"))
    assert plan[0] == plan[1] == "a"
    assert plan[2] == plan[3] == "b"


def test_who_is_suspect_keeps_all_and_gets_nothing() -> None:
    """R1: it may only be late."""
    plan = plan_of(member("a", "suspect", {EVENTS, 0, 1, 2}), member("b", "active"))
    assert {each for each, owner in plan.items() if owner == "a"} == {EVENTS, 0, 1, 2}
    assert plan[3] == "b"


def test_what_one_who_leaves_has_is_for_others() -> None:
    """O4: they wish for it, and it goes to them directly."""
    plan = plan_of(member("a", "leaving", {EVENTS, 0, 1, 2, 3}), member("b", "active"))
    assert set(plan.values()) == {"b"}


def test_of_two_who_say_they_own_it_the_living_one_does() -> None:
    """A dead one cannot take its word back."""
    plan = plan_of(member("a", "active", {0, 1}), member("z", "suspect", {0, 1, 2}))
    assert plan[0] == plan[1] == "a"


@given(st.frozensets(st.integers(EVENTS, 1_023)))
def test_a_set_of_resources_is_read_as_it_was_written(resources: frozenset[int]) -> None:
    """Also the empty one; it takes a digit for four of them."""
    assert unpack(pack(resources)) == resources
    assert len(pack(resources)) <= 257


def test_a_record_that_cannot_be_read_is_a_member_without_weight() -> None:
    """R3: as is one of a state that later versions have."""
    roster = Roster()
    records = [b"5 active 1000 0 not json", b"garbage", b'6 active 1000 0 {"weight":-1}',
               b'7 dreaming 1000 0 {"new":1}', b'8 active 1000 0 {"held":"xyz"}']  # fmt: skip
    reply = [b"9", 1]
    for number, record in enumerate(records):
        reply += [f"m{number}".encode(), record]
    assert not roster.learn(reply)
    assert len(roster.members) == len(records)
    assert set(wanted(roster.members, 4)) == set()
    assert wanted({**roster.members, "a": member("a", "active")}, 4) == dict.fromkeys(
        range(EVENTS, 4), "a"
    )

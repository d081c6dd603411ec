"""What a member knows of the others, and what follows from it: coordinator/log/roster.py."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from forebay.coordinator.log.roster import (
    SINKS_MAX,
    Member,
    Profile,
    Roster,
    State,
    pack,
    published,
    unpack,
    wanted,
)
from forebay.schemas.keys import EVENTS


def member(
    id: str,
    state: State,
    held: Collection[int] = (),
    label: str = "",
    weight: float = 1.0,
    sinks: tuple[str, ...] | None = None,
    defers: Collection[int] = (),
) -> Member:
    return Member(
        id=id,
        state=state,
        profile=Profile(label=label, weight=weight, sinks=sinks),
        held=frozenset(held),
        declines=frozenset(),
        defers=frozenset(defers),
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


def test_who_has_no_weight_is_seen_and_owns_nothing() -> None:
    """An observer, or a worker whose weight was set to 0: what it had is for others."""
    plan = plan_of(member("a", "active", {EVENTS, 0}, weight=0), member("b", "active"))
    assert set(plan.values()) == {"b"}
    assert plan_of(member("a", "active", weight=0)) == {}


def test_news_is_taken_in_and_a_lost_roster_is_noticed() -> None:
    """ClaimState S4 rests on it: to a newcomer the whole is no loss."""
    roster = Roster()
    one, two = b'3 active 1000 0 {"held":"3"}', b"4 suspect 1000 0 {}"
    assert not roster.learn([b"4", 1, b"a", one, b"b", two])
    assert roster.members["a"].held == {EVENTS, 0}
    assert (roster.count("active"), roster.count("suspect")) == (1, 1)
    assert not roster.learn([b"4", 0])
    assert not roster.learn([b"5", 0, b"b", b"5 gone 1000 0 {}"])
    assert set(roster.members) == {"a"}
    assert roster.learn([b"9", 1, b"c", one])
    assert set(roster.members) == {"c"}


def test_shards_and_ingress_go_to_who_has_most_sinks() -> None:
    """R4: one of the new release takes over from two of the old one; a twin shares with it."""
    olds = [
        member("a", "active", {EVENTS, 0, 1}, sinks=("x",)),
        member("b", "active", {2, 3}, sinks=("x",)),
    ]
    new = member("c", "active", sinks=("x", "y"))
    assert set(plan_of(*olds, new).values()) == {"c"}
    shared = plan_of(*olds, new, member("d", "active", sinks=("x", "y")))
    assert {shared[each] for each in range(4)} == {"c", "d"}


def test_a_sink_declared_twice_counts_once() -> None:
    """R4: published records are input."""
    plan = plan_of(
        member("a", "active", sinks=("x", "x", "x")), member("b", "active", sinks=("x", "y"))
    )
    assert set(plan.values()) == {"b"}


def test_with_a_member_of_an_old_release_sinks_do_not_count() -> None:
    """R4: all compute as it does, or they would take shards from each other for ever."""
    members = [
        member("a", "active"),
        member("b", "active", sinks=("x",)),
        member("c", "active", sinks=()),
    ]
    alike = [member(each.id, "active") for each in members]
    assert plan_of(*members, shards=12) == plan_of(*alike, shards=12)
    spoilt = member("a", "active", weight=0)
    assert set(plan_of(spoilt, *members[1:]).values()) == {"b"}


def test_a_shard_that_its_owner_defers_goes_to_another() -> None:
    """R5: unless there is none, or each of them defers it."""
    one = member("a", "active", {0, 1}, sinks=("x",), defers={0})
    two = member("b", "active", {2, 3}, sinks=("x",))
    assert plan_of(one, two)[0] == "b"
    assert plan_of(one)[0] == "a"
    both = member("b", "active", {2, 3}, sinks=("x",), defers={0})
    assert plan_of(one, both) == {
        EVENTS: plan_of(one, both)[EVENTS],
        0: "a",
        1: "a",
        2: "b",
        3: "b",
    }


def test_what_a_member_publishes_is_bounded_and_read_back() -> None:
    """Templates sorted and each once; a list that is too long, or no list, is unreadable (R3)."""
    sinks = published(["b:{id}", "a:{id}", "b:{id}", "x" * 513])
    assert sinks == ("a:{id}", "b:{id}")
    assert len(published(f"t{n}:{{id}}" for n in range(1_000))) == SINKS_MAX
    roster = Roster()
    bodies = [
        msgspec.json.encode(Profile(sinks=sinks)),
        msgspec.json.encode(Profile(sinks=())),
        msgspec.json.encode({"sinks": ["x"] * (SINKS_MAX + 1)}),
        msgspec.json.encode({"sinks": ["x" * 1_000]}),
        b'{"sinks": "abc"}',
        b"{}",
    ]
    reply: list[object] = [b"9", 1]
    for number, body in enumerate(bodies):
        reply += [f"m{number}".encode(), b"5 active 1000 0 " + body]
    roster.learn(reply)
    found = [roster.members[f"m{n}"].profile for n in range(len(bodies))]
    assert [each.sinks for each in found] == [sinks, (), None, None, None, None]
    assert [each.weight for each in found] == [1, 1, 0, 0, 0, 1]

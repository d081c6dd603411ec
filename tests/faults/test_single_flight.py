"""One load for the whole cluster, however many ask, and whoever of them goes away."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from faults.agent import AgentClient, Crowd, GiveUp
from faults.coherence import Cluster, cluster
from faults.history import Record
from faults.setting import Setup
from faults.source import Source
from support.eventually import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

CALLERS = 1_000
LOAD_S = 0.7
LEASE_MS = 1_500


class Nodes(NamedTuple):
    cluster: Cluster
    agents: Sequence[AgentClient]

    def loads(self, key: int) -> list[Record]:
        """Loads of this key that were begun, on any node."""
        return [
            record
            for record in self.cluster.history()
            if record.op == "load" and record.phase == "invoke" and record.subject == f"cold:{key}"
        ]

    def until_loading(self, key: int) -> None:
        wait_until(lambda: self.loads(key), what="a load")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with (
        cluster(Setup(load_s=LOAD_S), cache__lease_ms=LEASE_MS) as made,
        ExitStack() as stack,
    ):
        agents = [
            stack.enter_context(AgentClient(made.setup.socket(name))) for name in made.setup.nodes
        ]
        yield Nodes(made, agents)


def test_one_cold_key_is_loaded_once_for_all_callers_of_all_nodes(nodes: Nodes) -> None:
    """A thousand callers on each of three nodes ask for what nobody has: one load."""
    for key in range(3):
        for agent in nodes.agents:
            agent.send(Crowd(key, CALLERS))
        for agent in nodes.agents:
            assert agent.crowded().values == {f"cold:{key} 0": CALLERS}
        assert len(nodes.loads(key)) == 1


def test_callers_who_give_up_take_no_load_with_them(nodes: Nodes) -> None:
    """The caller who began the load is cancelled, and then all callers of its node are: those
    who wait, there and elsewhere, get what that one load brings."""
    for key, given_up in enumerate((1, CALLERS)):
        nodes.agents[0].send(Crowd(key, CALLERS))
        nodes.until_loading(key)
        for agent in nodes.agents[1:]:
            agent.send(Crowd(key, CALLERS))
        nodes.agents[0].send(GiveUp(key, given_up))
        answer = nodes.agents[0].crowded()
        assert answer.given_up == given_up
        assert sum(answer.values.values()) == CALLERS - given_up
        for agent in nodes.agents[1:]:
            assert agent.crowded().values == {f"cold:{key} 0": CALLERS}
        assert len(nodes.loads(key)) == 1


def test_leader_that_is_killed_costs_one_more_load(nodes: Nodes) -> None:
    """When the node that loads dies, one other takes over, as soon as the lease is over."""
    nodes.agents[0].send(Crowd(0, CALLERS))
    nodes.until_loading(0)
    for agent in nodes.agents[1:]:
        agent.send(Crowd(0, CALLERS))
    nodes.cluster.nodes[0].close()
    for agent in nodes.agents[1:]:
        assert agent.crowded().values == {"cold:0 0": CALLERS}
    loads = nodes.loads(0)
    assert [load.process == "one" for load in loads] == [True, False]


def test_leader_that_sleeps_past_its_lease_brings_nothing_old_back(nodes: Nodes) -> None:
    """When the node that loads is stopped, one other takes over; what the first one had read
    is not stored when it wakes up, though by then the source has something else."""
    one, source = nodes.cluster.nodes[0], Source(nodes.cluster.setup.source)
    nodes.agents[0].send(Crowd(0, CALLERS))
    nodes.until_loading(0)
    one.signal(signal.SIGSTOP)
    source.write("cold:0", 1)
    for agent in nodes.agents[1:]:
        agent.send(Crowd(0, CALLERS))
    for agent in nodes.agents[1:]:
        assert agent.crowded().values == {"cold:0 1": CALLERS}
    one.signal(signal.SIGCONT)
    nodes.agents[0].crowded()
    assert len(nodes.loads(0)) == 2
    for agent in nodes.agents:
        agent.send(Crowd(0, 10))
        assert agent.crowded().values == {"cold:0 1": 10}
    source.close()

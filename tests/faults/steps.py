"""One node and one writer, driven step by step: the effect of each step is waited for.

T1  The next step begins when the last has had its effect, on however busy a machine.
T2  Histories are those of a run, and are judged by the same checker.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import forebay
from faults.agent import AgentClient, Hold, LetGo, Look, Looked
from faults.checker import Findings, check
from faults.coherence import Cluster, cluster
from faults.history import History
from faults.nemesis import Nemesis
from faults.setting import Planted, Setup
from faults.source import Source
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import wait_until
from support.node_process import stands_still

_NODE = "one"


class Steps:
    """What can be done. Reads are the node's, writes are those of a process beside it."""

    def __init__(self, made: Cluster, agent: AgentClient) -> None:
        self._made = made
        self._agent = agent
        (self._node,) = made.nodes
        self._source = Source(made.setup.source)
        self._history = History(made.setup.path, "writer")
        self._acked_at = 0.0

    def read(self, subject: str) -> Looked:
        self._agent.send(Look(subject))
        return self._agent.looked()

    def begin_to_load(self, subject: str) -> None:
        """Returns when the loader has read the source; what it read is held."""
        self._agent.send(Hold(subject))
        self._agent.send(Look(subject))
        self._agent.held()

    def end_loading(self, subject: str) -> Looked:
        self._agent.send(LetGo(subject))
        return self._agent.looked()

    async def write(self, subject: str, version: int) -> None:
        """Returns when the invalidation is acknowledged."""
        began_ns = self._history.write("bump", "invoke", subject=subject, version=version)
        self._source.write(subject, version)
        async with forebay.Node(settings=_settings_of(self._made)) as writer:
            await writer.invalidate([subject])
        self._history.write("bump", "ok", subject=subject, version=version, began_ns=began_ns)
        self._acked_at = time.monotonic()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The node stands still; what is said meanwhile it never hears, and the log has lost it."""
        self._node.signal(signal.SIGSTOP)
        wait_until(lambda: stands_still(self._node.pid), what="a node that stands still")
        self._made.server.execute("CLIENT", "KILL", "TYPE", "pubsub")
        yield
        Nemesis(self._made.server, self._made.nodes, self._made.names).trim()
        self.pass_bound()
        self._node.signal(signal.SIGCONT)

    def pass_bound(self) -> None:
        """Wait until nobody may return anything older than what was written last."""
        left_s = self._acked_at + self._made.setup.bound_ms / 1000 - time.monotonic()
        time.sleep(max(0.0, left_s))

    def findings(self) -> Findings:
        """Ends the node."""
        assert self._node.stop() == 0, self._node.said()[-2_000:]
        self.close()
        return check(self._made.history(), bound_ms=self._made.setup.bound_ms)

    def close(self) -> None:
        self._history.close()
        self._source.close()


@contextmanager
def step_by_step(planted: Planted) -> Iterator[Steps]:
    with (
        cluster(Setup(nodes=(_NODE,), shards=1, planted=planted)) as made,
        AgentClient(made.setup.socket(_NODE)) as agent,
        closing(Steps(made, agent)) as steps,
    ):
        yield steps


def _settings_of(made: Cluster) -> Settings:
    return Settings(
        node=NodeSettings(namespace=made.setup.namespace, shards=made.setup.shards),
        valkey=Valkey(url=made.server.url),
        workers=Workers(enabled=False),
    )

"""What goes wrong in a run, planned from a seed, and done to the processes.

``kill pubsub``    all pubsubs lose their connections; every two seconds, whatever else happens
``kill normal``    so do all links, with what is under way on them
``stop node``      a node sleeps for five seconds (SIGSTOP), and is not told
``trim asleep``    as above, and meanwhile pubsubs are killed, and the logs trimmed to their end
``freeze server``  Valkey sleeps
``restart kept``   Valkey ends in good order, and comes back with its data
``restart lost``   Valkey is killed, and comes back empty

N1  The same seed and length give the same plan.
N2  Each kind comes once in the first 25 seconds, in an order of the seed's; one at a time, but
    for the pubsubs.
N3  After ``execute`` everything runs again.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from forebay.schemas.keys import Names
from support.valkey_server import ValkeyServer

Kind = Literal[
    "kill pubsub",
    "kill normal",
    "stop node",
    "trim asleep",
    "freeze server",
    "restart kept",
    "restart lost",
]
#: How long each lasts.
LASTS_S: Mapping[Kind, float] = {
    "stop node": 5.0,
    "trim asleep": 2.0,
    "freeze server": 1.2,
    "kill normal": 0.0,
    "restart kept": 0.3,
    "restart lost": 0.3,
}
KINDS: Sequence[Kind] = tuple(LASTS_S)
_PUBSUB_EVERY_S = 2.0
_FIRST_AT_S = 2.0
_LAST_BEFORE_END_S = 2.0


class Fault(Struct, frozen=True, kw_only=True):
    at_s: float
    kind: Kind
    node: int = 0
    lasts_s: float = 0.0


def plan(seed: int, seconds: float, nodes: int) -> list[Fault]:
    """The faults of a run, by time."""
    rng = random.Random(f"nemesis {seed}")
    faults, at_s = [], _FIRST_AT_S
    order: list[Kind] = []
    while True:
        order = order or rng.sample(KINDS, len(KINDS))
        kind = order.pop()
        lasts_s = LASTS_S[kind]
        if at_s + lasts_s > seconds - _LAST_BEFORE_END_S:
            break
        node = rng.randrange(nodes)
        faults.append(Fault(at_s=round(at_s, 3), kind=kind, node=node, lasts_s=lasts_s))
        at_s += lasts_s + rng.uniform(0.8, 1.8)
    return faults


class Victim(Protocol):
    """A node's process."""

    def signal(self, number: signal.Signals) -> None: ...


class Nemesis:
    def __init__(self, server: ValkeyServer, nodes: Sequence[Victim], names: Names) -> None:
        self._server = server
        self._nodes = nodes
        self._names = names
        self._started = 0.0
        self._next_kill = 0.0
        self.done: list[tuple[float, str]] = []  #: when, and what
        self._acts: Mapping[Kind, Callable[[Fault], None]] = {
            "kill pubsub": self._kill_pubsub,
            "kill normal": self._kill_normal,
            "stop node": self._stop_node,
            "trim asleep": self._trim_asleep,
            "freeze server": self._freeze_server,
            "restart kept": self._restart_kept,
            "restart lost": self._restart_lost,
        }

    def execute(self, faults: Sequence[Fault], seconds: float) -> None:
        """Returns when the time is over."""
        self._started = self._next_kill = time.monotonic()
        for fault in faults:
            self._wait_until(self._started + fault.at_s)
            self.done.append((round(time.monotonic() - self._started, 3), fault.kind))
            self._acts[fault.kind](fault)
        self._wait_until(self._started + seconds)

    def _wait_until(self, at: float) -> None:
        """Wait, and kill pubsubs meanwhile."""
        while (left_s := at - time.monotonic()) > 0:
            kill_in_s = self._next_kill - time.monotonic()
            if kill_in_s <= 0:
                self._kill_pubsub()
                self._next_kill += _PUBSUB_EVERY_S
            else:
                time.sleep(min(left_s, kill_in_s))

    def _kill_pubsub(self, fault: Fault | None = None) -> None:
        self._server.execute("CLIENT", "KILL", "TYPE", "pubsub")

    def _kill_normal(self, fault: Fault) -> None:
        self._server.execute("CLIENT", "KILL", "TYPE", "normal")

    def _stop_node(self, fault: Fault) -> None:
        node = self._nodes[fault.node]
        node.signal(signal.SIGSTOP)
        self._wait_until(time.monotonic() + fault.lasts_s)
        node.signal(signal.SIGCONT)

    def _trim_asleep(self, fault: Fault) -> None:
        node = self._nodes[fault.node]
        node.signal(signal.SIGSTOP)
        self._kill_pubsub()  # or bells that it has received already tell it all
        self._wait_until(time.monotonic() + fault.lasts_s)
        self.trim()
        node.signal(signal.SIGCONT)

    def trim(self) -> None:
        """Every log, to its end: nothing is left in it."""
        for shard in range(self._names.shards):
            name = self._names.part(shard, "log")
            last = self._server.execute("XREVRANGE", name, "+", "-", "COUNT", 1)
            if last:
                epoch, seq = bytes(last[0][0]).split(b"-")
                self._server.execute("XTRIM", name, "MINID", b"%s-%d" % (epoch, int(seq) + 1))

    def _freeze_server(self, fault: Fault) -> None:
        self._server.sigstop()
        time.sleep(fault.lasts_s)
        self._server.sigcont()

    def _restart_kept(self, fault: Fault) -> None:
        self._server.stop()
        time.sleep(fault.lasts_s)
        self._server.start()

    def _restart_lost(self, fault: Fault) -> None:
        self._server.kill9()
        shutil.rmtree(self._server.directory / "appendonlydir")
        time.sleep(fault.lasts_s)
        self._server.start()

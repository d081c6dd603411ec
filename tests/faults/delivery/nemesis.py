"""The faults of a run, planned from a seed and injected at steps: at so many accepted events.

``kill workers``        all workers at once, by SIGKILL; then all start again
``lose tail``           Valkey by SIGKILL, and so many bytes of its AOF are cut off
``lose both``           workers and Valkey at once, with the tail of the AOF
``terminate backends``  backends of PostgreSQL, first of all those in a poisoned transaction
``fill memory``         the workers end, Valkey has no memory left, and the workers start again
``deploy``              a service of the next version publishes events without a sink in any
                        worker; then one worker after the other is replaced

N1  The same arguments give the same plan; ``deploy`` comes once in it, if at all.
N2  After each fault, all that was stopped runs again, and one event for each shard is published:
    the time until each reaches the sink is recorded, and so are those that do not.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Literal, Protocol

import valkey
from msgspec import Struct

from faults.delivery.database import Database
from faults.delivery.history import Acted, Answered, Cut, History, Recovered, Sent
from faults.delivery.tail import lose_tail
from faults.delivery.workload import probes
from forebay.schemas.keys import Names
from support.eventually import wait_until
from support.node_process import NodeProcess
from support.valkey_server import ValkeyServer

Kind = Literal[
    "kill workers", "lose tail", "lose both", "terminate backends", "fill memory", "deploy"
]
KINDS: Sequence[Kind] = (
    "kill workers",
    "lose tail",
    "lose both",
    "terminate backends",
    "fill memory",
    "deploy",
)
RECOVERY_BOUND_S = 30.0
_CUT_BYTES = (300, 20_000)
_TERMINATE_S = (0.8, 2.0)
_BACKLOG = 40  #: events that wait before memory is full
_GATES_FIRST = 10  #: events of the next version before the first worker is replaced
_PATIENCE_S = 60.0


class Fault(Struct, frozen=True, kw_only=True):
    at_event: int
    kind: Kind
    amount: float = 0.0  #: bytes to cut, or seconds


def plan(seed: int, events: int, faults: int, kinds: Sequence[Kind] = KINDS) -> list[Fault]:
    """So many faults, spread over the events."""
    rng = random.Random(f"delivery nemesis {seed}")
    order: list[Kind] = []
    while len(order) < faults:
        again = [kind for kind in kinds if kind != "deploy" or "deploy" not in order]
        order += rng.sample(again, len(again))
        if not again:
            break
    step = events / (faults + 1)
    planned = []
    for number, kind in enumerate(order[:faults]):
        at_event = int(step * (number + 0.6 + 0.4 * rng.random()))
        low, high = _TERMINATE_S if kind == "terminate backends" else _CUT_BYTES
        planned.append(Fault(at_event=at_event, kind=kind, amount=round(rng.uniform(low, high), 2)))
    return planned


class Workers(Protocol):
    """The worker processes."""

    running: list[NodeProcess]

    def spawn_all(self) -> None: ...

    def until_ready(self) -> None: ...

    def kill_all(self) -> None: ...

    def replace(self, index: int) -> None: ...


class Nemesis:
    def __init__(
        self,
        server: ValkeyServer,
        database: Database,
        workers: Workers,
        *,
        names: Names,
        history: History,
        seed: int,
        bound_s: float = RECOVERY_BOUND_S,
        accepted: Callable[[], int],
        publish_gates: Callable[[], subprocess.Popen[bytes]],
        gates_accepted: Callable[[], int],
    ) -> None:
        """``accepted``: how many events were, up to now. ``publish_gates`` starts the service of
        the next version."""
        self.done: list[str] = []
        self._server = server
        self._database = database
        self._workers = workers
        self._names = names
        self._history = history
        self._rng = random.Random(f"delivery nemesis acts {seed}")
        self._bound_s = bound_s
        self._accepted = accepted
        self._publish_gates = publish_gates
        self._gates_accepted = gates_accepted
        self._cuts = count(1)
        self._probed = 0
        self._acts: Mapping[Kind, Callable[[Fault], str]] = {
            "kill workers": self._kill_workers,
            "lose tail": self._lose_tail,
            "lose both": self._lose_both,
            "terminate backends": self._terminate_backends,
            "fill memory": self._fill_memory,
            "deploy": self._deploy,
        }

    def execute(self, faults: Sequence[Fault], *, ended: Callable[[], bool]) -> None:
        """Do them all; at once, where the publishers have ``ended``."""
        for fault in faults:
            while self._accepted() < fault.at_event and not ended():
                time.sleep(0.01)
            at, began = self._accepted(), time.monotonic()
            note = self._acts[fault.kind](fault)
            self._history.write(Acted(t_ns=time.monotonic_ns(), kind=fault.kind, note=note))
            took_s = time.monotonic() - began
            recovered_s = self.probe(fault.kind)
            self._workers.until_ready()
            self.done.append(
                f"{at} {fault.kind}: {note}; took {took_s:.1f} s, well after {recovered_s:.1f} s"
            )

    def probe(self, kind: str) -> float:
        """Publish an event for each shard, and wait for their effects; the seconds it took."""
        events = probes(len(self.done), self._keys(), self._probed)
        self._probed += len(events)
        began = time.monotonic()
        for event in events:
            self._history.write(
                Sent(t_ns=time.monotonic_ns(), event=event.event, key=event.key, seq=event.seq)
            )
            wait_until(lambda raw=event.raw: self._add(raw), what="a probe in the stream")
            self._history.write(
                Answered(t_ns=time.monotonic_ns(), event=event.event, outcome="accepted")
            )
        names, missing = [event.event for event in events], len(events)
        while missing and time.monotonic() < began + self._bound_s:
            missing = len(names) - self._database.have_arrived(names)
            time.sleep(0.02)
        seconds = round(time.monotonic() - began, 3)
        self._history.write(Recovered(kind=kind, seconds=seconds, missing=missing))
        return seconds

    def _keys(self) -> list[str]:
        """Fresh ones, one of each shard."""
        found: dict[int, str] = {}
        for number in count():
            key = f"flight:{len(self.done)}-probe-{number}"
            found.setdefault(self._names.shard(key), key)
            if len(found) == self._names.shards:
                return list(found.values())
        raise AssertionError("unreachable")

    def _add(self, raw: str) -> bool:
        try:
            return bool(self._server.execute("XADD", self._names.events, "*", "event", raw))
        except valkey.ValkeyError:
            return False

    def _kill_workers(self, fault: Fault) -> str:
        self._workers.kill_all()
        self._workers.spawn_all()
        return f"{len(self._workers.running)} workers"

    def _lose_tail(self, fault: Fault) -> str:
        number = next(self._cuts)
        self._server.kill9()
        died_ns = time.monotonic_ns()
        self._database.mark(number)
        lost = lose_tail(self._server, int(fault.amount), self._names.events)
        self._history.write(
            Cut(
                t_ns=died_ns,
                number=number,
                bytes=lost.bytes,
                accepted=lost.accepted,
                dead=lost.dead,
                keys=lost.keys,
            )
        )
        return f"{lost.bytes} bytes, {len(lost.accepted)} accepted events, {len(lost.keys)} keys"

    def _lose_both(self, fault: Fault) -> str:
        self._workers.kill_all()
        note = self._lose_tail(fault)
        self._workers.spawn_all()
        return note

    def _terminate_backends(self, fault: Fault) -> str:
        ended: Counter[str] = Counter()
        until_s = time.monotonic() + fault.amount
        while time.monotonic() < until_s:
            poisoned, others = self._database.terminate(anyone=self._rng.random() < 0.2)
            ended += Counter({"poisoned": poisoned, "others": others})
            time.sleep(self._rng.uniform(0.002, 0.02))
        return f"{ended['poisoned']} in a poisoned transaction, {ended['others']} others"

    def _fill_memory(self, fault: Fault) -> str:
        self._workers.kill_all()
        self._wait_for_backlog()
        while not self._is_full():
            info = self._server.execute("INFO", "memory").decode()
            used = int(info.partition("used_memory:")[2].split()[0])
            self._server.execute("CONFIG", "SET", "maxmemory", used)
        waiting = self._server.execute("XLEN", self._names.events)
        self._workers.spawn_all()
        began = time.monotonic()
        idle, left = self._not_started(), self._drained()
        seconds = round(time.monotonic() - began, 3)
        self._server.execute("CONFIG", "SET", "maxmemory", 0)
        at_work = "start and drain at full memory"
        self._history.write(Recovered(kind=at_work, seconds=seconds, missing=idle + bool(left)))
        if idle:
            self._workers.kill_all()
            self._workers.spawn_all()
        return f"{idle} workers did not start; of {waiting} events {left} were left"

    def _drained(self) -> int:
        """Events that are left when none waits at some moment, or the bound is over."""
        give_up_at = time.monotonic() + self._bound_s
        while (left := self._server.execute("XLEN", self._names.events)) and (
            time.monotonic() < give_up_at
        ):
            time.sleep(0.005)
        return int(left)

    def _wait_for_backlog(self) -> None:
        give_up_at = time.monotonic() + 2.0
        while time.monotonic() < give_up_at:
            if self._server.execute("XLEN", self._names.events) >= _BACKLOG:
                return
            time.sleep(0.01)

    def _is_full(self) -> bool:
        try:
            self._server.execute("SET", "full", "x" * 100)
        except valkey.ResponseError as error:
            return str(error).startswith("OOM") or "maxmemory" in str(error)
        return False

    def _not_started(self) -> int:
        """The number of workers not started within the bound. They are not ready, since the server
        refuses all writes."""
        give_up_at = time.monotonic() + self._bound_s
        waiting = list(self._workers.running)
        while waiting and time.monotonic() < give_up_at:
            waiting = [node for node in waiting if not _has_started(node)]
            if any(node.ended() is not None for node in waiting):
                break
            time.sleep(0.02)
        return len(waiting)

    def _deploy(self, fault: Fault) -> str:
        service = self._publish_gates()
        wait_until(
            lambda: self._gates_accepted() >= _GATES_FIRST or service.poll() is not None,
            limit_s=_PATIENCE_S,
            what="the next version's first events",
        )
        for index in range(len(self._workers.running)):
            self._workers.replace(index)
        return f"{self._gates_accepted()} events of the next version so far"


def _has_started(node: NodeProcess) -> bool:
    return node.ended() is None and bool(node.event("node.started"))


def is_ready(node: NodeProcess) -> bool:
    """Whether it runs, listens and says that it is ready."""
    if node.ended() is not None:
        return False
    try:
        node.url = node.url or node.event("node.started").get("url", "")
        return bool(node.url) and node.get("/readyz").status == 200
    except (OSError, AssertionError):
        return False

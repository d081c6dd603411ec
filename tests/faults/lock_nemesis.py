"""What goes wrong in a run of locks, planned from a seed.

``stop holder``    a process that holds a lock sleeps for longer than its lease (SIGSTOP)
``kill holder``    a process that holds a lock is killed, and another begins in its place
``kill clients``   all connections end
``restart``        the server ends in good order, and comes back with its data
``fail over``      the replica lags, a holder sleeps, the primary is killed, and a sentinel
                   promotes the replica, which has not seen the last grants

N1  The same seed gives the same order; each kind comes once in a round.
N2  ``disturbed`` are the times from each act until everything must be right again, for which
    leases, grace and hand-overs are counted; the next act comes after that.
N3  After ``execute`` everything runs again.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from faults.lock_setting import LEASE_S
from faults.relay import Relay
from faults.sentinel import Sentinel
from forebay.schemas.keys import Names
from support.eventually import wait_until
from support.valkey_server import ValkeyServer

LockFault = Literal["stop holder", "kill holder", "kill clients", "restart", "fail over"]
#: How long things may take to be right again after each.
SETTLES_S: Mapping[LockFault, float] = {
    "stop holder": 1.5,
    "kill holder": LEASE_S + 3.0,  # and those who waited in that process are passed over
    "kill clients": LEASE_S + 0.5,
    "restart": 2 * LEASE_S + 1.0,  # the grace, and leases that were given up meanwhile
    "fail over": 2 * LEASE_S + 1.0,
}
LOCK_FAULTS: Sequence[LockFault] = (
    "stop holder",
    "kill holder",
    "kill clients",
    "restart",
    "fail over",
)
_CALM_S = 1.2
_LAG_S = 3.2  #: leases and places in queues that the replica saw have ended when it is promoted
_TRIES = 200


class Workers(Protocol):
    """The processes, by the names that they go by now."""

    def signal(self, name: str, number: signal.Signals) -> None: ...

    def kill(self, name: str) -> None: ...

    def replace(self, name: str) -> None: ...

    def running(self) -> Sequence[str]: ...


def order_of(
    seed: int, kinds: Sequence[LockFault] = LOCK_FAULTS, rounds: int = 1
) -> list[LockFault]:
    rng = random.Random(f"lock nemesis {seed}")
    return [kind for _ in range(rounds) for kind in rng.sample(kinds, len(kinds))]


def in_step(primary: ValkeyServer, replica: ValkeyServer) -> bool:
    """Whether the replica has all that the primary has accepted until now."""
    accepted, applied = _replication(primary), _replication(replica)
    return (
        applied.get("master_link_status") == "up"
        and applied["master_replid"] == accepted["master_replid"]
        and int(applied["slave_repl_offset"]) >= int(accepted["master_repl_offset"])
    )


def _replication(server: ValkeyServer) -> Mapping[str, str]:
    lines = server.execute("INFO", "replication").decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


class Done(msgspec.Struct, frozen=True):
    kind: LockFault
    at_s: float
    holder: str  #: whom it hit; "": nobody held a lock


class LockNemesis:
    def __init__(
        self,
        primary: ValkeyServer,
        replica: ValkeyServer,
        spare: ValkeyServer,
        *,
        relay: Relay,
        sentinel: Sentinel,
        workers: Workers,
        names: Names,
        locks: Sequence[str],
    ) -> None:
        self.primary, self.replica = primary, replica
        self._spare = spare  #: is started when a promoted replica needs one of its own
        self.disturbed: list[tuple[float, float]] = []
        self.done: list[Done] = []
        self._relay = relay
        self._sentinel = sentinel
        self.workers = workers
        self._records = [names.lock(name)[0] for name in locks]
        self._began = time.monotonic()
        self._acts: Mapping[LockFault, Callable[[], str]] = {
            "stop holder": self._stop_holder,
            "kill holder": self._kill_holder,
            "kill clients": self._kill_clients,
            "restart": self._restart,
            "fail over": self._fail_over,
        }

    def execute(self, kinds: Sequence[LockFault]) -> None:
        """Wait after each until everything must be right again."""
        self._began = time.monotonic()
        time.sleep(_CALM_S)
        for kind in kinds:
            began = time.monotonic()
            holder = self._acts[kind]()
            ended = time.monotonic() + SETTLES_S[kind]
            self.disturbed.append((began, ended))
            self.done.append(Done(kind, round(began - self._began, 3), holder))
            time.sleep(max(0.0, ended - time.monotonic()) + _CALM_S)

    def lag(self) -> None:
        """From now on the replica learns of nothing; what was before it knows."""
        wait_until(lambda: in_step(self.primary, self.replica), what="the replica")
        # A replica that sleeps still receives: its connection has to go, too.
        self.replica.sigstop()
        self.primary.execute("CLIENT", "KILL", "TYPE", "replica")

    def lose_primary(self) -> None:
        """It dies, and its replica takes its place at once."""
        self.primary.kill9()
        self.replica.sigcont()
        self.replica.execute("REPLICAOF", "NO", "ONE")
        self._relay.lead(self.replica.port)

    def part(self, processes: Sequence[str]) -> None:
        """The replica is promoted for these processes; the primary goes on for the others."""
        self._spare.start()
        self._spare.execute("REPLICAOF", "127.0.0.1", self.replica.port)
        wait_until(lambda: in_step(self.replica, self._spare), what="the replica of the replica")
        self.replica.execute("REPLICAOF", "NO", "ONE")
        self._relay.lead(self.replica.port, processes)

    def rejoin(self) -> None:
        """The primary becomes a replica of the one that was promoted, for all processes."""
        self._swap()
        self._relay.lead(self.primary.port)

    def _holders(self) -> Mapping[bytes, str]:
        """The nonces of leases, and the processes that have them."""
        found = {}
        for record in self._records:
            raw = self.primary.execute("HGETALL", record)
            fields = dict(zip(raw[::2], raw[1::2], strict=True))
            for field in fields:
                if field.startswith(b"h:"):
                    nonce = field.removeprefix(b"h:")
                    node_id: str = json.loads(fields[b"a:" + nonce])["by"]
                    found[nonce] = node_id.partition("~")[0]
        return found

    def _caught(self) -> str:
        """A process that was stopped while it held a lock; "" if none ever does."""
        for _ in range(_TRIES):
            for nonce, process in self._holders().items():
                if process in self.workers.running():
                    self.workers.signal(process, signal.SIGSTOP)
                    time.sleep(0.02)  # what it had sent has arrived
                    if nonce in self._holders():
                        return process
                    self.workers.signal(process, signal.SIGCONT)
            time.sleep(0.01)
        return ""

    def _stop_holder(self) -> str:
        holder = self._caught()
        time.sleep(1.5 * LEASE_S)
        if holder:
            self.workers.signal(holder, signal.SIGCONT)
        return holder

    def _kill_holder(self) -> str:
        holder = self._caught()
        if holder:
            self.workers.kill(holder)
            self.workers.replace(holder)
        return holder

    def _kill_clients(self) -> str:
        for kind in ("normal", "pubsub"):
            self.primary.execute("CLIENT", "KILL", "TYPE", kind)
        return ""

    def _restart(self) -> str:
        self.primary.stop()
        time.sleep(0.3)
        self.primary.start()
        return ""

    def _fail_over(self) -> str:
        self._sentinel.watch(self.primary)
        holder = self._lose_primary_of_a_holder()
        wait_until(lambda: self._sentinel.primary_port() == self.replica.port, what="the promotion")
        wait_until(self._promoted, what="the promotion")
        self._follow(holder)
        self._sentinel.forget()
        return holder

    def _lose_primary_of_a_holder(self) -> str:
        """Returns a holder whom the replica does not know, and who sleeps."""
        self.lag()
        time.sleep(_LAG_S)
        holder = self._caught()
        self.primary.kill9()
        self.replica.sigcont()
        return holder

    def _follow(self, holder: str) -> None:
        self._relay.lead(self.replica.port)
        if holder:
            self.workers.signal(holder, signal.SIGCONT)
        self.primary.start()
        self._swap()

    def _swap(self) -> None:
        self.primary, self.replica = self.replica, self.primary
        self.replica.execute("REPLICAOF", "127.0.0.1", self.primary.port)

    def _promoted(self) -> bool:
        return b"role:master" in self.replica.execute("INFO", "replication")

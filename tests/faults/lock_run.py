"""Do locks keep what they promise, whatever goes wrong? A run, and its figures as JSON.

usage: cd tests && python -m faults.lock_run [--level replicated] [--sections 1000] [--rounds 1]

Four processes with many tasks each take a few locks again and again, write through a guard and
give back, over a relay, to a primary that has a replica; and the nemesis. What is right is decided
afterwards, by ``lock_checker``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from faults.lock_checker import Granted, faults_of
from faults.lock_history import Began, Line, Refused, Wrote, grants_of, read, writes_of
from faults.lock_nemesis import (
    LOCK_FAULTS,
    Done,
    LockFault,
    LockNemesis,
    in_step,
    order_of,
)
from faults.lock_setting import LockSetup, Order
from faults.relay import Relay
from faults.sentinel import Sentinel
from forebay.coordinator.valkey.embedded import bound_to_owner
from forebay.schemas.keys import Names
from support.eventually import wait_until
from support.node_process import environ
from support.valkey_server import ValkeyServer

SERVER = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "repl-diskless-sync-delay": "0",
    "repl-timeout": "5",
}
#: How much later than it says a process may have been heard, on a machine with more processes
#: than processors.
MARGIN_S = 0.25
BOUND_S = 1.5
_PATIENCE_S = 300.0


class WorkerProcesses:
    """One process for each name; who takes the place of "one" is "one-1"."""

    def __init__(self, setup: LockSetup, relay: Relay) -> None:
        self.setup = setup
        self.died: dict[str, float] = {}
        self._relay = relay
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(self, name: str) -> None:
        url = self._relay.url(name)
        setup = msgspec.structs.replace(self.setup, process=name, url=url)
        with self._log(name).open("ab") as output:
            self._processes[name] = subprocess.Popen(
                bound_to_owner([sys.executable, "-m", "faults.lock_worker"], signal.SIGKILL),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environ(**setup.environ()),
                process_group=0,
            )

    def until_ready(self) -> None:
        for name in self.running():
            wait_until(lambda name=name: self._is_ready(name), what=f"readiness of {name}")

    def running(self) -> Sequence[str]:
        return list(self._processes)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def order(self, name: str, order: Order) -> None:
        orders = self._processes[name].stdin
        assert orders is not None
        orders.write(msgspec.json.encode(order) + b"\n")
        orders.flush()

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        with process:  # closes its input, too
            process.kill()
        self.died[name] = time.monotonic()

    def replace(self, name: str) -> None:
        stem, _, number = name.partition("-")
        self.spawn(f"{stem}-{int(number or 0) + 1}")

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for name, process in self._processes.items():
            assert process.wait(_PATIENCE_S) == 0, self._log(name).read_text()[-3_000:]

    def close(self) -> None:
        for process in self._processes.values():
            with process:
                if process.poll() is None:
                    process.kill()

    def _log(self, name: str) -> Path:
        return self.setup.path / f"{name}.log"

    def _is_ready(self, name: str) -> bool:
        assert self._processes[name].poll() is None, self._log(name).read_text()[-3_000:]
        return "ready" in self._log(name).read_text()


class LockOutcome(msgspec.Struct, frozen=True, kw_only=True):
    level: str
    planted: str
    seed: int
    seconds: float
    plan: Sequence[Done]
    sections: Mapping[str, int]  #: of each process, over all of its starts
    lost: Mapping[str, int]  #: leases, by the reason
    refused: Mapping[str, int]  #: locks that were not had, by the reason
    killed_in_section: int
    writes: int
    late_refused: int  #: writes under a lost lease that a guard refused
    late_let_through: int  #: ... and those where nobody had come after
    wait_ms_p50: float
    wait_ms_p99: float
    undisturbed_share: float  #: of all sections: those whose place in the queue was judged
    faults: Sequence[str]


@contextmanager
def lock_cluster(setup: LockSetup, processes: Sequence[str]) -> Iterator[LockNemesis]:
    """A primary, a replica that follows it, and these processes, which are ready."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="forebay-locks-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        setup = msgspec.structs.replace(setup, directory=str(directory))
        primary = stack.enter_context(ValkeyServer(config=SERVER))
        replica = stack.enter_context(ValkeyServer(config=SERVER))
        replica.execute("REPLICAOF", "127.0.0.1", primary.port)
        spare = ValkeyServer(config=SERVER)
        stack.callback(spare.close)
        relay = stack.enter_context(Relay(primary.port))
        sentinel = stack.enter_context(Sentinel())
        names = Names(setup.namespace, setup.shards)
        _have_short_graces(primary, names, setup.lease_s)
        wait_until(lambda: in_step(primary, replica), what="the replica")
        workers = WorkerProcesses(setup, relay)
        stack.callback(workers.close)
        for name in processes:
            workers.spawn(name)
        workers.until_ready()
        yield LockNemesis(
            primary,
            replica,
            spare,
            relay=relay,
            sentinel=sentinel,
            workers=workers,
            names=names,
            locks=setup.names,
        )


def _have_short_graces(primary: ValkeyServer, names: Names, lease_s: float) -> None:
    """As if no longer leases had been given: that is how long a grace is."""
    run = dict(
        line.split(":", 1)
        for line in primary.execute("INFO", "server").decode().splitlines()
        if ":" in line
    )["run_id"]
    for shard in range(names.shards):
        era = names.part(shard, "era")
        primary.execute("HSET", era, "rid", run, "grace", 0, "max", int(lease_s * 1e6))


def lock_run(
    setup: LockSetup,
    kinds: Sequence[LockFault],
    *,
    processes: Sequence[str] = ("one", "two", "three", "four"),
    sections: int = 0,
    keep: Path | None = None,
) -> LockOutcome:
    """A whole run: these faults, and then on until each process has had so many sections."""
    with lock_cluster(setup, processes) as nemesis:
        workers = nemesis.workers
        began = time.monotonic()
        nemesis.execute(kinds)
        while min(_sections(read(workers.setup.path), processes).values()) < sections:
            assert time.monotonic() < began + _PATIENCE_S, "the sections did not come"
            time.sleep(0.5)
        seconds = time.monotonic() - began
        workers.stop()
        lines = read(workers.setup.path)
        if keep is not None:
            shutil.copytree(workers.setup.path, keep)
        grants = grants_of(lines, workers.died)
        writes = writes_of(lines)
        found = faults_of(
            grants, writes, margin_s=MARGIN_S, bound_s=BOUND_S, disturbed=nemesis.disturbed
        )
    return _outcome(setup, lines, grants, nemesis, processes, seconds, found)


def _sections(lines: Mapping[str, Sequence[Line]], processes: Sequence[str]) -> dict[str, int]:
    counts = dict.fromkeys(processes, 0)
    for name, history in lines.items():
        counts[name.partition("-")[0]] += sum(isinstance(line, Began) for line in history)
    return counts


def _outcome(
    setup: LockSetup,
    lines: Mapping[str, Sequence[Line]],
    grants: Sequence[Granted],
    nemesis: LockNemesis,
    processes: Sequence[str],
    seconds: float,
    found: Sequence[str],
) -> LockOutcome:
    all_lines = [line for history in lines.values() for line in history]
    late = [line for line in all_lines if isinstance(line, Wrote) and line.late]
    waits = sorted(1_000 * (each.granted_at - each.asked_at) for each in grants)
    calm = [
        each
        for each in grants
        if not any(
            each.granted_at > start and each.asked_at < end for start, end in nemesis.disturbed
        )
    ]
    return LockOutcome(
        level=setup.level,
        planted=setup.planted,
        seed=setup.seed,
        seconds=round(seconds, 1),
        plan=nemesis.done,
        sections=_sections(lines, processes),
        lost=Counter(each.lost for each in grants if each.lost),
        refused=Counter(line.why for line in all_lines if isinstance(line, Refused)),
        killed_in_section=sum(
            nemesis.workers.died.get(each.by) == each.believed_until for each in grants
        ),
        writes=sum(isinstance(line, Wrote) and not line.refused for line in all_lines),
        late_refused=sum(line.refused for line in late),
        late_let_through=sum(not line.refused for line in late),
        wait_ms_p50=round(waits[len(waits) // 2], 1) if waits else 0.0,
        wait_ms_p99=round(waits[len(waits) * 99 // 100], 1) if waits else 0.0,
        undisturbed_share=round(len(calm) / max(1, len(grants)), 3),
        faults=found[:20],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--level", choices=["fast", "replicated"], default="replicated")
    parser.add_argument("--sections", type=int, default=1_000, help="of each process, at least")
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault comes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", choices=["", "counted", "no grace", "sleepy"], default="")
    parser.add_argument("--only", action="append", default=[], choices=LOCK_FAULTS)
    parser.add_argument("--keep", type=Path, help="copy histories and logs to this directory")
    given = parser.parse_args(arguments)
    setup = LockSetup(seed=given.seed, level=given.level, planted=given.planted)
    kinds = order_of(given.seed, given.only or LOCK_FAULTS, given.rounds)
    outcome = lock_run(setup, kinds, sections=given.sections, keep=given.keep)
    print(json.dumps(msgspec.to_builtins(outcome), indent=2))
    return 0 if not outcome.faults else 1


if __name__ == "__main__":
    sys.exit(main())

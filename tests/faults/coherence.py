"""Is every node as current as it says, whatever goes wrong? A run, and its figures as JSON.

usage: cd tests && python -m faults.coherence [--seconds 60] [--seed 1] [--planted gaps] [--keep]

Three node processes, writers that raise versions at a thousand a second and invalidate by key
and by tag, probes of every node at X, 2X and 10X after each ack of a watched subject (X is
``max_staleness_ms``), and the nemesis. What is right is decided afterwards, by the checker.

The nodes differ in what they do while Valkey is away: the first asks the source, the second
serves what it has, flagged, the third refuses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from faults.agent import AgentClient, Rest
from faults.checker import Findings, check
from faults.history import Record, read_history
from faults.nemesis import Fault, Nemesis, plan
from faults.setting import Setup
from faults.source import Source
from forebay.coordinator.valkey.embedded import bound_to_owner
from forebay.schemas.keys import Names
from support.eventually import wait_until
from support.node_process import NodeProcess, environ
from support.valkey_server import ValkeyServer

ON_DISCONNECTED = ("bypass", "stale", "fail")
#: Connections come back soon enough for there to be pubsubs to lose every two seconds.
RECONNECT_MAX_MS = 1_000
SERVER = {"appendonly": "yes", "appendfsync": "everysec"}
_PATIENCE_S = 30.0
_WELL_S = 60.0  #: the longest time until everything is well again, on a machine that is busy
_CALM_KEYS = 40


class Cluster:
    """The processes of one run, and their directory."""

    def __init__(self, setup: Setup, server: ValkeyServer, nodes: Sequence[NodeProcess]) -> None:
        self.setup = setup
        self.server = server
        self.nodes = nodes
        self.names = Names(setup.namespace, setup.shards)
        self._stack = ExitStack()

    def writer(self, number: int, seconds: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "faults.writers", str(number), str(seconds)]
        with (self.setup.path / f"writer-{number}.log").open("ab") as output:
            return subprocess.Popen(
                bound_to_owner(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ(**self.setup.environ()),
                process_group=0,
            )

    def history(self) -> list[Record]:
        return read_history(self.setup.path)


@contextmanager
def cluster(setup: Setup, **settings: object) -> Iterator[Cluster]:
    """Start a server and the nodes; the directory is gone afterwards."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="forebay-faults-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        server = stack.enter_context(ValkeyServer(config=SERVER))
        setup = msgspec.structs.replace(setup, directory=str(directory), url=server.url)
        Source(setup.source).close()
        nodes = []
        for index, name in enumerate(setup.nodes):
            node = NodeProcess(
                directory,
                name=name,
                app="faults.app:node",
                environ={**setup.environ(), "FAULTS_NODE": name},
                node__namespace=setup.namespace,
                valkey__url=server.url,
                valkey__reconnect_max_ms=RECONNECT_MAX_MS,
                cache__max_staleness_ms=setup.bound_ms,
                **{
                    "node__shards": setup.shards,
                    "cache__on_disconnected": ON_DISCONNECTED[index % 3],
                    **settings,
                },
            )
            stack.callback(node.close)
            nodes.append(node.spawn())
        for node in nodes:
            node.until_ready()
        yield Cluster(setup, server, nodes)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    commit: str
    seed: int
    seconds: float
    planted: str
    plan: Sequence[Fault]
    bumps_per_s: float
    loads: int
    watched: int  #: acks that probes of all nodes were to follow, at each aim
    probed_by_aim_ms: Mapping[int, int]  #: probes that were made, also those that failed
    calm: dict[str, Mapping[str, int]]  #: reads once all is well again, by node and tier
    findings: Findings


def run(
    setup: Setup,
    *,
    seconds: float,
    keep: Path | None = None,
    **settings: object,
) -> Outcome:
    """A whole run. ``keep`` is where histories and logs are copied to, and ``settings`` are the
    nodes'."""
    faults = plan(setup.seed, seconds, len(setup.nodes))
    with cluster(setup, **settings) as made:
        writers = [made.writer(number, seconds) for number in range(setup.writers)]
        Nemesis(made.server, made.nodes, made.names).execute(faults, seconds)
        for number, writer in enumerate(writers):
            code = writer.wait(_PATIENCE_S)
            assert code == 0, (made.setup.path / f"writer-{number}.log").read_text()
        for name in setup.nodes:  # until the probes that were still due are done
            with AgentClient(made.setup.socket(name), patience_s=_WELL_S) as agent:
                agent.send(Rest())
                agent.rested()
        calm = {node.name: _calm(node) for node in made.nodes}
        for node in made.nodes:
            assert node.stop() == 0, node.said()[-2_000:]
        records = made.history()
        if keep is not None:
            shutil.copytree(made.setup.path, keep, ignore=shutil.ignore_patterns("*.sock"))
    return Outcome(
        commit=_commit(),
        seed=setup.seed,
        seconds=seconds,
        planted=setup.planted,
        plan=faults,
        bumps_per_s=round(sum(r.op == "bump" and r.phase == "ok" for r in records) / seconds, 1),
        loads=sum(r.op == "load" and r.phase == "invoke" for r in records),
        watched=_watched(setup, records),
        probed_by_aim_ms=Counter(r.aim_ms for r in records if r.op == "probe"),
        calm=calm,
        findings=check(records, bound_ms=setup.bound_ms),
    )


def _watched(setup: Setup, records: Sequence[Record]) -> int:
    watched = {str(subject) for subject, is_watched in setup.all_subjects() if is_watched}
    return sum(r.op == "bump" and r.phase == "ok" and r.subject in watched for r in records)


def _commit() -> str:
    """Of the working tree; empty where that cannot be told."""
    here, git = Path(__file__).parent, shutil.which("git")
    command = [git or "git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _calm(node: NodeProcess) -> Mapping[str, int]:
    """Read some keys until all come from the near cache; returns the answers by tier."""
    found: Counter[str] = Counter()

    def read(number: int) -> str:
        answer = node.get(f"/v1/cache/price:{4 * number}")
        stale = answer.headers.get("X-Forebay-Stale") == "true"
        tier = answer.headers.get("X-Forebay-Tier", "") if answer.status == 200 else "failed"
        found["stale" if stale else tier] += 1
        return "stale" if stale else tier

    wait_until(lambda: node.get("/readyz").status == 200, limit_s=_WELL_S, what="readiness")
    for number in range(_CALM_KEYS):
        wait_until(lambda n=number: read(n) == "near", limit_s=_WELL_S, what="a near hit")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1_000.0, help="bumps a second")
    parser.add_argument("--planted", choices=["", "gaps", "blind fill"], default="")
    parser.add_argument("--bound-ms", type=int, default=500, help="X, the promised staleness")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], metavar="cache.lease_ms=200")
    parser.add_argument("--keep", type=Path, help="copy histories and logs to this directory")
    given = parser.parse_args(arguments)
    setup = Setup(seed=given.seed, rate=given.rate, planted=given.planted, bound_ms=given.bound_ms)
    settings = dict(each.replace(".", "__", 1).split("=", 1) for each in given.set)
    outcome = run(setup, seconds=given.seconds, keep=given.keep, **settings)
    print(json.dumps(msgspec.to_builtins(outcome), indent=2))
    return 0 if outcome.findings.sound else 1


if __name__ == "__main__":
    sys.exit(main())

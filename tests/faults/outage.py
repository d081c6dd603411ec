"""What readers and the source get to see while the source is down, and afterwards.

usage: cd tests && python -m faults.outage [--seconds 60] [--keep DIRECTORY]

Three nodes are read from all the time, many reads a second of a few keys that live for one
second, may be served stale for another, and for ten minutes if the source fails. Then it fails
for a while. Half way through, half of the keys are invalidated softly, on top of it. Prints
figures as JSON; the exit code is 1 if a reader was refused, or got something old that was not
flagged; if the source was asked more often than to find out that it fails, and then once in each
recovery time by all nodes together; or if a key was loaded more than once to be new again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
import msgspec
import structlog

import forebay
from faults.agent import AgentClient, Drive
from faults.coherence import Cluster, cluster
from faults.history import Record
from faults.setting import Setup
from faults.source import Source
from forebay.schemas.settings import NodeSettings, Settings, Valkey

KEYS = 20
TTL_S = 1.0  #: of the cache ``flaky`` in app.py
FAILURES, RECOVERY_S = 5, 1.0  #: of the nodes' breakers
_SLACK = 5  #: loads that had begun when the word of another node came
_RATE = 200.0  #: reads a second, of each node
_BEFORE_S, _AFTER_S = 2.0, 5.0
_GRACE_S = 0.5  #: from expiry to flag: a clock that is a little off, a load under way


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """``down`` and ``after``: from when every entry has outlived its ttl to the end of the
    outage, and from then on."""

    nodes: int
    down_s: float
    reads: int
    reads_failed: dict[str, int]
    reads_down: int
    unflagged_down: int
    loads_down: int  #: tried, from the first moment of the outage
    loads_down_allowed: int  #: until each node knows, and then one in each recovery time
    loads_down_per_key_and_s: float
    loads_together_max: int  #: of one key, at any time
    loads_first_second: int  #: after the outage
    loads_to_be_new_max: int  #: of one key, from the end of the outage to its first new answer
    loads_after_per_key_and_s: float
    fresh_again_s: float  #: until each key was answered with what the source has now

    @property
    def sound(self) -> bool:
        return (
            not self.reads_failed
            and not self.unflagged_down
            and self.loads_down <= self.loads_down_allowed
            and self.loads_to_be_new_max <= 1
        )


def run(down_s: float, *, keep: Path | None = None, failures: int = FAILURES) -> Figures:
    """``failures``: after how many the nodes' breakers really open."""
    breaker = {
        "cache__breaker_failures": failures,
        "cache__breaker_recovery_ms": int(RECOVERY_S * 1000),
    }
    with cluster(Setup(load_s=0.02), **breaker) as made, ExitStack() as stack:
        source = Source(made.setup.source)
        stack.callback(source.close)
        for key in range(KEYS):
            source.write(f"flaky:{key}", 1)
        drive = Drive(KEYS, _RATE, _BEFORE_S + down_s + _AFTER_S)
        clients = [
            stack.enter_context(AgentClient(made.setup.socket(name), patience_s=drive.seconds + 30))
            for name in made.setup.nodes
        ]
        for client in clients:
            client.send(drive)
        time.sleep(_BEFORE_S)
        down_ns = time.monotonic_ns()
        source.go_down()
        time.sleep(down_s / 2)
        anyio.run(_invalidate_softly, made)
        time.sleep(max(0.0, down_s - (time.monotonic_ns() - down_ns) / 1e9))
        for key in range(KEYS):
            source.write(f"flaky:{key}", 2)
        source.come_up()
        up_ns = time.monotonic_ns()
        for client in clients:
            client.driven()
        for node in made.nodes:
            node.stop()
        records = made.history()
        if keep is not None:
            shutil.copytree(made.setup.path, keep, ignore=shutil.ignore_patterns("*.sock"))
        return _figures(records, down_ns, up_ns, len(clients))


async def _invalidate_softly(made: Cluster) -> None:
    settings = Settings(
        node=NodeSettings(namespace=made.setup.namespace, shards=made.setup.shards),
        valkey=Valkey(url=made.server.url),
    )
    async with forebay.Node(settings=settings) as node:
        await node.invalidate([f"flaky:{key}" for key in range(0, KEYS, 2)], soft=True)


def _figures(records: Sequence[Record], down_ns: int, up_ns: int, nodes: int) -> Figures:
    reads = [record for record in records if record.op == "read"]
    begun = [record.t_ns for record in records if record.op == "load" and record.phase == "invoke"]
    outlived_ns = down_ns + int((TTL_S + _GRACE_S) * 1e9)
    down = [read for read in reads if outlived_ns <= read.began_ns and read.t_ns <= up_ns]
    fresh_ns = {read.subject: read.t_ns for read in reversed(reads) if read.version == 2}
    tried = sum(down_ns <= t_ns <= up_ns for t_ns in begun)
    after = sum(t_ns > up_ns for t_ns in begun)
    down_s, after_s = (up_ns - down_ns) / 1e9, (reads[-1].t_ns - up_ns) / 1e9
    return Figures(
        nodes=nodes,
        down_s=round(down_s, 3),
        reads=len(reads),
        reads_failed=dict(Counter(read.note for read in reads if read.phase != "ok")),
        reads_down=len(down),
        unflagged_down=sum(not read.stale for read in down if read.phase == "ok"),
        loads_down=tried,
        loads_down_allowed=FAILURES * nodes + int(down_s / RECOVERY_S) + _SLACK,
        loads_down_per_key_and_s=round(tried / KEYS / down_s, 3),
        loads_together_max=_together(records),
        loads_first_second=sum(up_ns < t_ns <= up_ns + 1_000_000_000 for t_ns in begun),
        loads_to_be_new_max=_to_be_new(records, up_ns, fresh_ns),
        loads_after_per_key_and_s=round(after / KEYS / after_s, 3),
        fresh_again_s=round((max(fresh_ns.values()) - up_ns) / 1e9, 3)
        if len(fresh_ns) == KEYS
        else float("inf"),
    )


def _to_be_new(records: Sequence[Record], up_ns: int, fresh_ns: Mapping[str, int]) -> int:
    loads = Counter(
        record.subject
        for record in records
        if record.op == "load"
        and record.phase == "invoke"
        and up_ns < record.t_ns <= fresh_ns.get(record.subject, 0)
    )
    return max(loads.values(), default=0)


def _together(records: Sequence[Record]) -> int:
    """The most loads of one key that ran at one time."""
    running: Counter[str] = Counter()
    most = 0
    for record in records:
        if record.op == "load":
            running[record.subject] += 1 if record.phase == "invoke" else -1
            most = max(most, running[record.subject])
    return most


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the source is down")
    parser.add_argument("--keep", type=Path, help="copy histories and logs to this directory")
    given = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    figures = run(given.seconds, keep=given.keep)
    print(json.dumps(msgspec.to_builtins(figures), indent=2))
    return 0 if figures.sound else 1


if __name__ == "__main__":
    sys.exit(main())

"""Many processes ask for much more than a limit allows: how much do they get together?

usage: cd tests && python -m faults.flood [--seconds 30] [--processes 8] [--over 5] [--lease]

Each process offers its part of ``over`` times the rate, in bursts, and writes down what it was
granted: when it asked and when it heard, on the machine's one monotonic clock. A grant lies
between the two, so what was asked and heard within a window was granted within it. Prints
figures as JSON; the exit code is 1 if a window had more than the limit admits (with
``--lease``: and the tokens that members may hold), or all of it less than 99 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
import msgspec
import structlog

from forebay.schemas.limits import Limit
from support.limiters import house_of
from support.valkey_server import ValkeyServer

RATE, BURST = 400, 100
_TICK_S = 0.01
_READY = "ready\n"
_STARTS = 400  #: of windows that are looked at
_LEASED_MAX = BURST // 2  #: burst / (2 * members), of each member


class Grant(NamedTuple):
    asked_at: float
    heard_at: float
    tokens: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    processes: int
    seconds: float
    asked: int
    admitted: int
    possible: float  #: burst + rate * time
    share: float  #: of the possible
    worst_excess: float  #: tokens of a window above burst + rate * window; at most 0 without leases
    excess_allowed: int
    sources: dict[str, int]

    @property
    def well(self) -> bool:
        return self.worst_excess <= self.excess_allowed and self.share >= 0.99


def worst_excess(grants: Sequence[Grant], rate: float, burst: int) -> float:
    """By how much a window had more than ``burst + rate * window``; negative: none had."""
    asked = sorted(grants)
    worst = float("-inf")
    for first in range(0, len(asked), max(1, len(asked) // _STARTS)):
        since = asked[first].asked_at
        total = 0
        for heard_at, tokens in sorted((each.heard_at, each.tokens) for each in asked[first:]):
            total += tokens
            worst = max(worst, total - burst - rate * (heard_at - since))
    return worst


class Report(msgspec.Struct):
    asked: int
    began_at: float
    ended_at: float
    grants: list[Grant]
    sources: dict[str, int]


async def member(url: str, namespace: str, options: argparse.Namespace) -> Report:
    """One process's part."""
    limit = Limit(name="api", rate=RATE, burst=BURST, lease=options.lease)
    report = Report(0, 0.0, 0.0, [], {})
    rng = random.Random()
    asks_per_s = RATE * options.over / options.processes

    class Server(NamedTuple):
        socket_url: str

    async with house_of(Server(url), namespace) as house:  # type: ignore[arg-type]
        limiter = house.limiter(limit, budget_ms=10_000, members=lambda: options.processes)
        house.tasks.start_soon(limiter.run)
        api = limiter.of("api")
        await api.peek("x")

        async def ask() -> None:
            asked_at = time.monotonic()
            verdict = await api.take("x")
            report.asked += 1
            report.sources[verdict.source] = report.sources.get(verdict.source, 0) + 1
            if verdict.allowed:
                report.grants.append(Grant(asked_at, time.monotonic(), verdict.granted))

        sys.stdout.write(_READY)
        sys.stdout.flush()
        await anyio.to_thread.run_sync(sys.stdin.readline)  # all begin together
        report.began_at = time.monotonic()
        end_at = report.began_at + options.seconds
        while (at := time.monotonic()) < end_at:
            due = round((at - report.began_at) * asks_per_s) - report.asked
            await asyncio.gather(*[ask() for _ in range(due)])
            await anyio.sleep(_TICK_S * rng.uniform(0, 2))
        report.ended_at = time.monotonic()
    return report


def flood(*, seconds: float, processes: int = 8, over: float = 5, lease: bool = False) -> Figures:
    namespace = uuid.uuid4().hex[:12]
    with ValkeyServer("valkey") as server:
        command = [sys.executable, "-m", "faults.flood", "--member", server.socket_url]
        command += ["--namespace", namespace, "--seconds", str(seconds), "--over", str(over)]
        command += ["--processes", str(processes), *(["--lease"] if lease else [])]
        here = Path(__file__).parents[1]
        pipe = subprocess.PIPE
        members = [
            subprocess.Popen(command, cwd=here, stdin=pipe, stdout=pipe) for _ in range(processes)
        ]
        for each in members:
            assert each.stdout is not None
            assert each.stdout.readline() == _READY.encode()
        said = [each.communicate()[0] for each in _told(members)]
    reports = [msgspec.msgpack.decode(each, type=Report) for each in said]
    grants = [grant for report in reports for grant in report.grants]
    # The bucket is full when the first comes. What is asked after the first has ended is less.
    first = min(report.began_at for report in reports)
    end = min(report.ended_at for report in reports)
    possible = BURST + RATE * (end - first)
    admitted = sum(grant.tokens for grant in grants if grant.heard_at <= end)
    sources: dict[str, int] = {}
    for report in reports:
        for source, count in report.sources.items():
            sources[source] = sources.get(source, 0) + count
    return Figures(
        processes=processes,
        seconds=round(end - first, 3),
        asked=sum(report.asked for report in reports),
        admitted=admitted,
        possible=round(possible, 1),
        share=round(admitted / possible, 4),
        worst_excess=round(worst_excess(grants, RATE, BURST), 2),
        excess_allowed=_LEASED_MAX if lease else 0,
        sources=sources,
    )


def _told(members: list[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    for each in members:
        assert each.stdin is not None
        each.stdin.write(b"go\n")
        each.stdin.flush()
    return members


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--over", type=float, default=5.0, help="how much is asked, in rates")
    parser.add_argument("--lease", action="store_true")
    parser.add_argument("--member", default="", help=argparse.SUPPRESS)
    parser.add_argument("--namespace", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    if options.member:
        report = anyio.run(member, options.member, options.namespace, options)
        sys.stdout.buffer.write(msgspec.msgpack.encode(report))
        return 0
    figures = flood(
        seconds=options.seconds,
        processes=options.processes,
        over=options.over,
        lease=options.lease,
    )
    print(json.dumps(msgspec.to_builtins(figures), indent=2))
    return 0 if figures.well else 1


if __name__ == "__main__":
    sys.exit(main())

"""Passengers who read boards: HTTP reads on all nodes, distributed like the real routes.

    python -m forebay.nodes.dev.readers --nodes http://127.0.0.1:8642,http://127.0.0.1:8643

I1  An airport is read in proportion to its flights; the nodes are chosen with equal probability.
I2  At most ``rate`` reads start per second, and at most ``IN_FLIGHT_MAX`` run at a time; missed
    reads are not made up for later.
I3  Reads of a node that is down count as errors and have no other effect.
I4  ``went_back`` counts reads that returned an older board than an earlier read on the same node
    had returned; it must stay 0.

It reports once per second on stdout, one JSON object per line. SIGTERM ends it with exit code 0.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import TextIO

import aiohttp
import anyio
import msgspec
from anyio.abc import TaskGroup
from msgspec import Struct

from ...coordinator.clock import Clock, SystemClock
from ..demo.flights import Flight, read_day

IN_FLIGHT_MAX = 64
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_REPORT_EVERY_S = 1.0
_FAULTS = (aiohttp.ClientError, OSError, TimeoutError)


class ReadReport(Struct, frozen=True, kw_only=True):
    """The last second; ``*_total`` counts from the start."""

    reads: int
    errors: int
    stale: int
    tiers: dict[str, int]  #: reads by tier: near, shared or loader
    p50_ms: float
    p99_ms: float
    reads_total: int
    errors_total: int
    stale_total: int
    went_back: int


class Tally:
    """Counts reads, and checks that no board goes back to an older version."""

    def __init__(self) -> None:
        self._reads_total = self._errors_total = self._stale_total = self._went_back = 0
        self._newest: dict[tuple[str, str], int] = {}
        self._start_interval()

    def _start_interval(self) -> None:
        self._errors = self._stale = 0
        self._tiers: Counter[str] = Counter()
        self._took_ms: list[float] = []

    def newest(self, node: str, airport: str) -> int:
        """The newest version of this board that this node has returned."""
        return self._newest.get((node, airport), 0)

    def count_error(self) -> None:
        self._errors += 1
        self._errors_total += 1

    def count_read(
        self,
        node: str,
        airport: str,
        *,
        tier: str,
        stale: bool,
        version: int,
        floor: int,
        ms: float,
    ) -> None:
        """``floor`` is the value of ``newest`` when the read started."""
        self._reads_total += 1
        self._tiers[tier] += 1
        self._stale += stale
        self._stale_total += stale
        self._went_back += version < floor
        self._took_ms.append(ms)
        self._newest[node, airport] = max(version, self.newest(node, airport))

    def report(self) -> ReadReport:
        """The figures since the last report."""
        took_ms = sorted(self._took_ms)
        report = ReadReport(
            reads=len(took_ms),
            errors=self._errors,
            stale=self._stale,
            tiers=dict(self._tiers),
            p50_ms=_quantile(took_ms, 0.5),
            p99_ms=_quantile(took_ms, 0.99),
            reads_total=self._reads_total,
            errors_total=self._errors_total,
            stale_total=self._stale_total,
            went_back=self._went_back,
        )
        self._start_interval()
        return report


class Readers:
    """Reads until it is cancelled."""

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        rate: float,
        flights: Sequence[Flight],
        choices: random.Random,
        clock: Clock | None = None,
    ) -> None:
        self.tally = Tally()
        self._nodes = nodes
        self._interval_s = 1 / rate
        weights = airport_weights(flights)
        self._airports = list(weights)
        self._cumulated = list(accumulate(weights.values()))
        self._choices = choices
        self._monotonic = (clock or SystemClock()).monotonic
        self._slots = anyio.Semaphore(IN_FLIGHT_MAX)

    async def run(self) -> None:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT) as session,
            anyio.create_task_group() as tasks,
        ):
            due = self._monotonic()
            while True:
                await self._start_one(session, tasks)
                due = max(due + self._interval_s, self._monotonic() - self._interval_s)
                await anyio.sleep(max(0.0, due - self._monotonic()))

    async def _start_one(self, session: aiohttp.ClientSession, tasks: TaskGroup) -> None:
        await self._slots.acquire()
        (airport,) = self._choices.choices(self._airports, cum_weights=self._cumulated)
        tasks.start_soon(self._read, session, self._choices.choice(self._nodes), airport)

    async def _read(self, session: aiohttp.ClientSession, node: str, airport: str) -> None:
        floor, began_at = self.tally.newest(node, airport), self._monotonic()
        try:
            async with session.get(f"{node}/v1/cache/board:{airport}") as response:
                await response.read()
                if response.status != 200:
                    self.tally.count_error()
                    return
                headers = response.headers
            self.tally.count_read(
                node,
                airport,
                tier=headers.get("X-Forebay-Tier", "unknown"),
                stale=headers.get("X-Forebay-Stale", "").lower() in ("true", "1"),
                version=int(headers.get("X-Forebay-Version") or 0),
                floor=floor,
                ms=(self._monotonic() - began_at) * 1000,
            )
        except _FAULTS:
            self.tally.count_error()
        finally:
            self._slots.release()


def airport_weights(flights: Sequence[Flight]) -> dict[str, int]:
    """The number of flights of each airport on the day."""
    return dict(Counter(airport for flight in flights for airport in flight.airports))


async def serve(readers: Readers, out: TextIO) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(readers.run)
        tasks.start_soon(_report, readers.tally, out)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                tasks.cancel_scope.cancel()
                return


async def _report(tally: Tally, out: TextIO) -> None:
    while True:
        await anyio.sleep(_REPORT_EVERY_S)
        out.write(msgspec.json.encode(tally.report()).decode() + "\n")
        out.flush()


def main(arguments: Sequence[str] | None = None, stdout: TextIO | None = None) -> int:
    options = _parser().parse_args(arguments)
    readers = Readers(
        options.nodes.split(","),
        rate=options.rate,
        flights=read_day(),
        choices=random.Random(options.seed),
    )
    try:
        anyio.run(serve, readers, stdout or sys.stdout)
    except BrokenPipeError:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="readers", description="Reads departure boards.")
    add = parser.add_argument
    add("--nodes", default="http://127.0.0.1:8642", help="URLs of the nodes, separated by commas")
    add("--rate", type=float, default=150.0, help="reads per second, over all nodes")
    add("--seed", type=int, default=None, help="seed of the random choices")
    return parser


def _quantile(ascending: Sequence[float], part: float) -> float:
    if not ascending:
        return 0.0
    return round(ascending[min(len(ascending) - 1, int(part * len(ascending)))], 3)


if __name__ == "__main__":
    sys.exit(main())

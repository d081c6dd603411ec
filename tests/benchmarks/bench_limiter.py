"""Rate limit decisions beside other limiters, on one server, in one run.

usage: python tests/benchmarks/bench_limiter.py [--tasks 1,64] [--rounds 5] [--uvloop] [--json]

Every client has the same work: n tasks that each ask, one call after the other, whether one
more token of one hot key may be taken; the limit is so high that all may. Over TCP on this
machine. Clients take turns, round by round, so that whatever else the machine does falls on
all of them; the rate is the median of the rounds, and the ratio that to the faster of the
peers with the same number of tasks. Latencies come from a pass of their own. Peers take part
if they are installed: ``pip install limits throttled-py redis hiredis``.

``forebay`` asks the server for every decision, coalesced; ``forebay, leased`` has fetched
tokens ahead, the error that makes is exported; ``forebay, refused`` has been refused before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/support

from forebay.schemas.limits import Limit
from support.limiters import House, house_of
from support.valkey_server import ValkeyServer

Ask = Callable[[], Awaitable[Any]]
PER_S = 10_000_000
OURS = "forebay"


async def run_tasks(ask: Ask, calls: int, tasks: int) -> float:
    """Decisions per second."""
    left = iter(range(calls))

    async def work() -> None:
        for _ in left:
            await ask()

    started = time.perf_counter()
    await asyncio.gather(*[work() for _ in range(tasks)])
    return calls / (time.perf_counter() - started)


async def latencies_us(ask: Ask, calls: int, tasks: int) -> list[float]:
    taken: list[float] = []

    async def timed() -> None:
        started = time.perf_counter()
        await ask()
        taken.append((time.perf_counter() - started) * 1e6)

    await run_tasks(timed, calls, tasks)
    return sorted(taken)


class Over(ValkeyServer):
    """Not started: the other server, reached over TCP like the peers reach it."""

    def __init__(self, server: ValkeyServer) -> None:
        self._url = server.url

    @property
    def socket_url(self) -> str:
        return self._url

    def close(self) -> None:
        """There is nothing to end."""


def ours(lease: bool = False) -> Callable[[ValkeyServer, int], Any]:
    @asynccontextmanager
    async def opened(server: ValkeyServer, _: int) -> AsyncIterator[Ask]:
        async with house_of(Over(server), "bench") as house:
            limit = Limit(name="api", rate=PER_S, burst=PER_S, lease=lease)
            api = house.limiter(limit).of("api")
            subject = f"hot-{lease}"
            yield lambda: api.take(subject)

    return opened


@asynccontextmanager
async def refused(server: ValkeyServer, _: int) -> AsyncIterator[Ask]:
    async with house_of(Over(server), "bench") as house:
        yield await _refused(house)


async def _refused(house: House) -> Ask:
    api = house.limiter(Limit(name="full", rate=1, per=3_600, burst=1)).of("full")
    await api.take("hot")
    await api.take("hot")
    return lambda: api.take("hot")


def limits_py(strategy: str) -> Callable[[ValkeyServer, int], Any]:
    @asynccontextmanager
    async def opened(server: ValkeyServer, tasks: int) -> AsyncIterator[Ask]:
        from limits import RateLimitItemPerSecond
        from limits.aio import storage, strategies

        store = storage.RedisStorage(
            f"async+redis://127.0.0.1:{server.port}",
            implementation="redispy",
            max_connections=tasks + 1,
        )
        item = RateLimitItemPerSecond(PER_S)
        limiter = getattr(strategies, strategy)(store)
        yield lambda: limiter.hit(item, "hot")

    return opened


def throttled_py(using: str) -> Callable[[ValkeyServer, int], Any]:
    @asynccontextmanager
    async def opened(server: ValkeyServer, _: int) -> AsyncIterator[Ask]:
        from throttled.asyncio import RedisStore, Throttled, rate_limiter

        throttle = Throttled(
            key=f"hot-{using}",
            using=using,
            quota=rate_limiter.per_sec(PER_S, burst=PER_S),
            store=RedisStore(server=f"redis://127.0.0.1:{server.port}/0"),
        )
        yield throttle.limit

    return opened


CLIENTS: dict[str, tuple[Callable[[ValkeyServer, int], Any], str]] = {
    OURS: (ours(), "valkey"),
    "forebay, leased": (ours(lease=True), "valkey"),
    "forebay, refused": (refused, "valkey"),
    "limits, moving window": (limits_py("MovingWindowRateLimiter"), "limits"),
    "limits, sliding counter": (limits_py("SlidingWindowCounterRateLimiter"), "limits"),
    "throttled, gcra": (throttled_py("gcra"), "throttled-py"),
    "throttled, token bucket": (throttled_py("token_bucket"), "throttled-py"),
}


def versions() -> dict[str, str]:
    found = {}
    for package in ("valkey", "libvalkey", "limits", "throttled-py", "redis", "uvloop"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


async def compare(server: ValkeyServer, tasks: int, rounds: int) -> list[dict[str, Any]]:
    installed = versions()
    names = [name for name, (_, package) in CLIENTS.items() if package in installed]
    rates: dict[str, list[float]] = {name: [] for name in names}
    taken: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        asks = {
            name: await stack.enter_async_context(CLIENTS[name][0](server, tasks)) for name in names
        }
        calls = {}
        for name, ask in asks.items():  # as many as take about 0.4 s
            rate = await run_tasks(ask, 100 + 20 * tasks, tasks)
            calls[name] = max(200, int(rate * 0.4))
        for _ in range(rounds):
            for name, ask in asks.items():
                rates[name].append(await run_tasks(ask, calls[name], tasks))
        for name, ask in asks.items():
            taken[name] = await latencies_us(ask, calls[name] // 2, tasks)
    medians = {name: statistics.median(rates[name]) for name in names}
    peers = [rate for name, rate in medians.items() if not name.startswith(OURS)]
    base = max(peers, default=medians[OURS])
    return [
        {
            "tasks": tasks,
            "client": name,
            "decisions_per_s": round(medians[name]),
            "ratio": round(medians[name] / base, 2),
            "p50_us": round(taken[name][len(taken[name]) // 2], 1),
            "p99_us": round(taken[name][len(taken[name]) * 99 // 100], 1),
        }
        for name in names
    ]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with ValkeyServer("valkey") as server:
        info = server.execute("INFO", "server").decode()
        for tasks in options.tasks:
            rows += await compare(server, tasks, options.rounds)
    found = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return {
        "work": "one token of one hot key",
        "server": f"{found.get('server_name', 'redis')} {found.get('valkey_version', '')}".strip(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "loop": type(asyncio.get_running_loop()).__module__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    print(f"{report['work']}; {report['server']}; {report['python']}; {report['loop']}")
    print(f"{report['machine']}; {report['versions']}\n")
    print(f"{'tasks':>5}  {'client':<26}{'per s':>10}{'ratio':>8}{'p50 us':>10}{'p99 us':>10}")
    for row in report["rows"]:
        print(
            f"{row['tasks']:>5}  {row['client']:<26}{row['decisions_per_s']:>10,}"
            f"{row['ratio']:>8.2f}{row['p50_us']:>10,.1f}{row['p99_us']:>10,.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tasks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 64]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    if options.uvloop:
        import uvloop

        report = uvloop.run(measure(options))
    else:
        report = asyncio.run(measure(options))
    print(json.dumps(report, indent=2)) if options.json else show(report)


if __name__ == "__main__":
    main()

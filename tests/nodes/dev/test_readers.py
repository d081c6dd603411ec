"""The readers: counts, and reads of a node that is down."""

from __future__ import annotations

import random
from collections import Counter

import anyio
from aiohttp import web

from forebay.nodes.demo.flights import read_day
from forebay.nodes.dev.readers import Readers, Tally, airport_weights
from support.valkey_server import free_port

DAY = read_day()


def read(
    tally: Tally, version: int, floor: int, *, stale: bool = False, tier: str = "near"
) -> None:
    tally.count_read(
        "n", "JFK", tier=tier, stale=stale, version=version, floor=floor, ms=float(version)
    )


def test_airports_are_as_uneven_as_the_routes() -> None:
    """I1: the weight of an airport is its number of flights."""
    weights = airport_weights(DAY)

    assert sum(weights.values()) == 2 * len(DAY)
    assert (weights["EWR"], weights["ORD"]) == (305, 47)


def test_a_report_is_of_the_time_since_the_last() -> None:
    """A report resets the counts of the last second and keeps the totals."""
    tally = Tally()
    read(tally, 1, 0)
    read(tally, 2, 1, stale=True, tier="shared")
    tally.count_error()
    first = tally.report()
    read(tally, 3, 2)
    second = tally.report()

    assert (first.reads, first.errors, first.stale) == (2, 1, 1)
    assert first.tiers == {"near": 1, "shared": 1}
    assert (second.reads, second.errors, second.stale) == (1, 0, 0)
    assert (second.reads_total, second.errors_total, second.stale_total) == (3, 1, 1)


def test_a_board_that_goes_back_is_counted() -> None:
    """I4: a read is counted if it is older than one that ended before it started."""
    tally = Tally()
    floor_before = tally.newest("n", "JFK")
    read(tally, 5, floor_before)
    read(tally, 4, floor_before)  # began before the newer one had ended
    assert tally.report().went_back == 0

    read(tally, 4, tally.newest("n", "JFK"))
    assert tally.report().went_back == 1


async def test_reads_go_to_all_nodes_and_errors_are_only_counted() -> None:
    """I2, I3: reads continue on both nodes within the rate, although one is down."""
    asked: Counter[str] = Counter()

    async def board(request: web.Request) -> web.Response:
        asked[request.match_info["key"]] += 1
        headers = {"X-Forebay-Tier": "near", "X-Forebay-Stale": "true", "X-Forebay-Version": "7"}
        return web.json_response({}, headers=headers)

    app = web.Application()
    app.router.add_get("/v1/cache/{key}", board)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", up := free_port()).start()
    nodes = [f"http://127.0.0.1:{up}", f"http://127.0.0.1:{free_port()}"]
    readers = Readers(nodes, rate=500, flights=DAY, choices=random.Random(1))
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(readers.run)
            while readers.tally.newest(nodes[0], "EWR") == 0 or asked.total() < 50:
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    finally:
        await runner.cleanup()

    report = readers.tally.report()
    assert report.reads == report.stale == report.tiers["near"] >= 49
    assert report.errors > 10
    assert asked["board:EWR"] > asked["board:ORD"]

"""Invalidating a tag costs the same whatever hangs on it, in time and in memory."""

from __future__ import annotations

import statistics

import pytest

import forebay
from forebay.schemas.entry import EntryMeta
from forebay.schemas.settings import CacheDefaults, Http, NodeSettings, Settings, Valkey
from support.valkey_server import ValkeyServer

FEW, MANY = 10, 1_000_000
TOGETHER = 5_000
ROUNDS, BUMPS = 15, 100


def spent_us(server: ValkeyServer) -> tuple[int, int]:
    """Calls of scripts so far, and microseconds that the server spent in them."""
    calls = usec = 0
    for line in server.execute("INFO", "commandstats").decode().splitlines():
        if line.startswith("cmdstat_evalsha:"):
            fields = dict(each.split("=") for each in line.split(":")[1].split(","))
            calls, usec = int(fields["calls"]), int(fields["usec"])
    return calls, usec


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_million_entries_cost_a_tag_nothing(namespace: str) -> None:
    """Within 1.5 times the server's time for ten entries; not a byte more; and all are gone."""
    with ValkeyServer("valkey") as server:
        settings = Settings(
            node=NodeSettings(namespace=namespace),
            valkey=Valkey(url=server.socket_url, command_timeout_ms=30_000),
            http=Http(enabled=False),
            cache=CacheDefaults(near_entries_max=100),
        )
        node = forebay.Node(settings=settings)
        loads: list[str] = []

        @node.cached("row:{tag}:{number}", ttl=600, tags=["{tag}"])
        async def row(tag: str, number: int) -> int:
            loads.append(tag)
            return number

        async with node:
            link, names = node._parts.backend.link, node._parts.names
            for tag, count in (("few", FEW), ("many", MANY)):
                versions = await row._cache.path.loads.tags_of([tag])
                codec = row._cache.path.codec
                tail = codec.tail(codec.pack(1), EntryMeta(tags=dict(versions), soft_ms=600_000))
                raw = b"\xfbE1c%016d%013d%013d%016d%b" % (*versions.values(), *_ends(node), 0, tail)
                for start in range(0, count, TOGETHER):
                    keys = range(start, min(start + TOGETHER, count))
                    await link.call_many(
                        [("SET", names.entry(f"row:{tag}:{n}"), raw) for n in keys]
                    )
                assert await row(tag, count - 1) == 1
            assert loads == []  # so these are entries, and valid

            taken: dict[str, list[float]] = {"few": [], "many": []}
            for _ in range(ROUNDS):
                for tag, figures in taken.items():
                    calls, before = spent_us(server)
                    for _ in range(BUMPS):
                        await node.invalidate(tags=[tag])
                    after_calls, after = spent_us(server)
                    figures.append((after - before) / (after_calls - calls))
            few, many = (statistics.median(each) for each in taken.values())
            assert many <= 1.5 * few

            sizes = [await link.call("STRLEN", names.tag(tag)) for tag in taken]
            assert sizes[0] == sizes[1]
            tagged = [key for key in server.execute("KEYS", "*:t:*") if b":t:" in key]
            assert len(tagged) == 2
            assert len(node._parts.tags) == 2
            for number in (0, MANY // 2, MANY - 1):
                await row("many", number)
            assert loads == ["many"] * 3


def _ends(node: forebay.Node) -> tuple[int, int]:
    now_ms = node._parts.server_clock.now_ms()
    return now_ms + 600_000, now_ms + 600_000

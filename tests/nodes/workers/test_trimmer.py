"""The shard logs are kept short, and never too short: X1."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from forebay.nodes.workers.trimmer import Trimmer
from forebay.schemas.keys import EVENTS
from support.eventually import until
from support.workers import SHARDS, Workshop

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]


async def fill(shop: Workshop, shard: int, notices: int) -> None:
    """So many notices in the log of a shard, and all of them applied here."""
    key = shop.key(shard)
    for _ in range(notices):
        await shop.node.invalidate([key])
    view = shop.parts.follower.views[shard]
    await until(lambda: view.seq >= notices - 1)


async def trimmer_of(shop: Workshop, retain: int, *, owns: bool = True) -> Trimmer:
    owner = await shop.ownership()
    if not owns:
        await owner.leave()
    return Trimmer(
        shop.link, shop.names, owner, shop.parts.follower, retain=retain, dedupe_ms=1_000
    )


async def length(shop: Workshop, shard: int) -> int:
    return int(await shop.link.call("XLEN", shop.names.part(shard, "log")))


@pytest.mark.parametrize("retain", [1, 99, 100, 101, 250, 350, 400])
async def test_the_newest_notices_stay(open_shop: OpenShop, retain: int) -> None:
    """X1: never fewer than set, whatever the server rounds to; and the newest."""
    async with open_shop() as shop:
        await fill(shop, 1, 350)
        before = await shop.entries(1, "log")
        await (await trimmer_of(shop, retain)).trim()
        after = await shop.entries(1, "log")
        assert len(after) >= min(retain, len(before))
        assert after == before[-len(after) :]
        assert len(after) <= retain + 200 or len(after) == len(before)


async def test_only_the_owner_trims(open_shop: OpenShop) -> None:
    """Shards that this node does not own are left to their owners."""
    async with open_shop() as shop:
        await fill(shop, 1, 350)
        before = await length(shop, 1)
        await (await trimmer_of(shop, 1, owns=False)).trim()
        assert await length(shop, 1) == before
        trimmer = await trimmer_of(shop, 1)
        assert EVENTS in trimmer._ownership.tenures
        await trimmer.trim()
        assert await length(shop, 1) < before


async def test_what_was_not_applied_here_is_not_trimmed(open_shop: OpenShop) -> None:
    """X1: a node that lags behind trims by what it knows, which is less."""
    async with open_shop() as shop:
        await fill(shop, 1, 350)
        view = shop.parts.follower.views[1]
        trimmer = await trimmer_of(shop, 100)
        known, view.seq = view.seq, 120
        await trimmer.trim()
        view.seq = known
        assert await length(shop, 1) >= 350 - 20 - 100


async def test_an_empty_log_stays_empty(open_shop: OpenShop) -> None:
    """Trimming what is not there makes nothing."""
    async with open_shop() as shop:
        before = [await length(shop, shard) for shard in range(SHARDS)]
        await (await trimmer_of(shop, 1)).trim()
        assert [await length(shop, shard) for shard in range(SHARDS)] == before


async def test_event_ids_are_forgotten_when_ingress_is_past_them(open_shop: OpenShop) -> None:
    """X2: ids are kept while an event waits that may be a repetition."""
    async with open_shop() as shop:
        trimmer = await trimmer_of(shop, 1)
        seen = [shop.names.part(shard, "seen") for shard in range(SHARDS)]
        seconds, _ = await shop.link.call("TIME")
        now_ms = int(seconds) * 1_000

        async def left() -> list[int]:
            return [int(n) for n in await shop.link.call_many([("ZCARD", key) for key in seen])]

        for key in seen:
            await shop.link.call("ZADD", key, now_ms - 5_000, "old", now_ms - 2_500, "e1")
        await shop.link.call("XADD", shop.names.events, f"{now_ms - 3_000}-0", "event", "waits")
        await trimmer.forget()
        assert await left() == [1] * SHARDS
        await shop.link.call("DEL", shop.names.events)
        await trimmer.forget()
        assert await left() == [0] * SHARDS

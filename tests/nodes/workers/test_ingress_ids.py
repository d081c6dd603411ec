"""Ids of the ingress stream: ahead, the last of all, gone back (G6, G7); the times they tell."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

import anyio
import pytest

import forebay
from forebay.nodes.status import gauges
from forebay.nodes.workers.ingress import read_mark
from forebay.nodes.workers.plan import mark_of
from forebay.schemas.entry import read_entry
from forebay.schemas.errors import Backpressure, ServerRefused
from forebay.schemas.keys import EVENTS
from forebay.schemas.replies import LAST_ID
from forebay.schemas.settings import Durable, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.valkey_server import ValkeyServer
from support.workers import Cut, Table, Workshop, at_work, invalidate, write

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]
SINKS = {"flight:{id}": Table()}
HOUR_MS = 3_600_000


def writes(numbers: Sequence[int]) -> list[bytes]:
    """One for each number, over eleven keys."""
    return [write(f"flight:{n % 11}", n) for n in numbers]


async def add(shop: Workshop, entry_id: str, event: bytes) -> None:
    await shop.link.call("XADD", shop.names.events, entry_id, "event", event)


async def hour_ahead(shop: Workshop) -> str:
    seconds, _ = await shop.link.call("TIME")
    return f"{int(seconds) * 1_000 + HOUR_MS}-0"


async def values(shop: Workshop) -> list[int]:
    return [value for _, value in await shop.jobs()]


async def applied(shop: Workshop, count: int) -> None:
    """Wait until so many writes were applied, and nothing waits any more."""

    async def are() -> bool:
        names = (shop.names.events, shop.names.part(EVENTS, "before"))
        waiting = await shop.link.call_many([("XLEN", name) for name in names])
        return not any(waiting) and len(await shop.jobs()) >= count

    await until(are)


async def in_order(shop: Workshop) -> None:
    """The writes of a key stand in the order published."""
    jobs = await shop.jobs()
    for key in {key for key, _ in jobs}:
        of_key = [value for of, value in jobs if of == key]
        assert of_key == sorted(of_key)


@pytest.mark.parametrize("which", ["an hour ahead", "the last"])
async def test_all_events_after_such_an_id_are_applied_once_also_after_a_del(
    open_shop: OpenShop, which: str
) -> None:
    """G6: the id, then 1,000 normal events, then DEL of the stream, then 1,000 more."""
    async with open_shop(sinks=SINKS) as shop:
        owner = await shop.ownership()
        async with at_work(shop.ingress(owner)):
            last = which == "the last"
            await add(shop, LAST_ID if last else await hour_ahead(shop), writes([0])[0])

            async def accepted() -> bool:
                return bool(await shop.node.publish(writes([1])))

            await until(accepted)
            await shop.publish(*writes(range(2, 1_001)))
            expected = range(1, 1_001) if last else range(1_001)
            await applied(shop, len(expected))
            await shop.link.call("DEL", shop.names.events)
            await shop.publish(*writes(range(1_001, 2_001)))
            await applied(shop, len(expected) + 1_000)
        assert sorted(await values(shop)) == [*expected, *range(1_001, 2_001)]
        await in_order(shop)
        assert [each["reason"] for each in await shop.dead()] == ([b"last_id"] if last else [])
        assert shop.counts["events_processed", "write", "duplicate"] == 0


async def test_an_owner_killed_between_applying_and_committing_an_id_ahead(
    open_shop: OpenShop,
) -> None:
    """G6: marks of an id that was never committed do not discard events after a DEL."""
    at = 0
    while True:
        at += 1
        async with open_shop(sinks=SINKS) as shop:
            await shop.link.call("FLUSHDB")
            await shop.parts.follower.sweep()
            dying = await shop.ownership("dying")
            cut = Cut(shop.link, at=at, answered=at % 2 == 0)
            ingress = shop.ingress(dying, cut)
            await shop.publish(*writes(range(5)))
            await add(shop, await hour_ahead(shop), writes([5])[0])
            async with at_work(ingress), anyio.create_task_group() as tasks:
                tasks.start_soon(_drained, shop, cut)
            if not cut.reached.is_set():
                break
            await shop.link.call("DEL", shop.names.events)
            before = await values(shop)
            await shop.forget_owners()
            await shop.publish(*writes(range(100, 150)))
            async with at_work(shop.ingress(await shop.ownership("next"))):
                await applied(shop, len(before) + 50)
            assert sorted(await values(shop)) == [*sorted(before), *range(100, 150)]
            await in_order(shop)
    assert at > 4


async def test_a_batch_that_is_repeated_after_a_crash_keeps_its_generation(
    open_shop: OpenShop,
) -> None:
    """G2 with ids ahead: a new owner applies nothing twice."""
    async with open_shop(sinks=SINKS) as shop:
        dying = await shop.ownership("dying")
        await add(shop, await hour_ahead(shop), writes([0])[0])
        await shop.publish(*writes(range(1, 60)))
        cut = Cut(shop.link, at=6)
        async with at_work(shop.ingress(dying, cut)):
            await cut.reached.wait()
        assert await values(shop)
        await shop.forget_owners()
        async with at_work(shop.ingress(await shop.ownership("next"))):
            await applied(shop, 60)
        assert sorted(await values(shop)) == [*range(60)]
        await in_order(shop)


async def test_a_drained_stream_begins_anew_with_its_checkpoint(open_shop: OpenShop) -> None:
    """G6, ingress_commit I2: the ids are the server's again, and nothing is ahead any more."""
    async with open_shop(sinks=SINKS) as shop:
        async with at_work(shop.ingress(await shop.ownership())):
            await add(shop, await hour_ahead(shop), writes([0])[0])
            await applied(shop, 1)
            (entry_id,) = await shop.publish(*writes([1]))
            seconds, _ = await shop.link.call("TIME")
            assert int(entry_id.partition("-")[0]) // 1_000 <= int(seconds)
            await shop.applied(entry_id)
        assert shop.counts["ingress_generations", "drained"] == 1


async def test_an_id_ahead_whose_entry_is_gone_is_forgotten_while_idle(
    open_shop: OpenShop,
) -> None:
    """G7: somebody deleted the entry; the stream would go on from its id."""
    async with open_shop(sinks=SINKS) as shop:
        await add(shop, LAST_ID, b"")
        await shop.link.call("XDEL", shop.names.events, LAST_ID)
        with pytest.raises(ServerRefused):
            await add(shop, "*", invalidate("a"))
        async with at_work(shop.ingress(await shop.ownership())):
            await until(lambda: shop.counts["ingress_generations", "drained"] == 1)
            await shop.publish(*writes([0]))
            await applied(shop, 1)


async def test_publishers_can_continue_while_what_stands_before_the_last_id_waits(
    open_shop: OpenShop,
) -> None:
    """event_publish I2: without any worker; a second exhausted stream is refused as full."""
    async with open_shop(sinks=SINKS) as shop:
        await shop.publish(*writes(range(3)))
        await add(shop, LAST_ID, writes([99])[0])
        await shop.node.publish(writes([3, 4]))
        await add(shop, LAST_ID, writes([98])[0])
        with pytest.raises(Backpressure):
            await shop.node.publish(writes([97]))
        async with at_work(shop.ingress(await shop.ownership())):
            await applied(shop, 5)
        assert sorted(await values(shop)) == [*range(5)]
        await in_order(shop)
        assert [each["reason"] for each in await shop.dead()] == [b"last_id"] * 2


async def test_the_last_id_is_never_given_to_an_accepted_event(open_shop: OpenShop) -> None:
    """event_publish I2: all or none, also where the ids end in the middle of a batch."""
    async with open_shop(sinks=SINKS) as shop:
        near = LAST_ID[:-1] + "2"
        await add(shop, near, writes([0])[0])
        ids = await shop.node.publish(writes(range(1, 5)))
        assert len(ids) == 4
        assert LAST_ID not in ids
        async with at_work(shop.ingress(await shop.ownership())):
            await applied(shop, 5)
        assert sorted(await values(shop)) == [*range(5)]
        assert await shop.dead() == []


async def test_an_id_ahead_is_reported_until_the_stream_is_drained(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """G7: a warning in health that fails nothing, and a gauge, while the events wait for room."""
    table = Table()
    table.hang_at = 1
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace, shards=1),
            valkey=Valkey(url=valkey_server.socket_url),
            workers=Workers(enabled=True, flush_delay_ms=0),
            durable=Durable(writes_max=1),
        )
    )
    node.sink("flight:{id}", table)

    def warned() -> list[str]:
        return [each.detail for each in node.checks() if each.name == "ingress_ids"]

    def gauge() -> float:
        return next(
            n
            for name, _, n in gauges(node._parts_if_running())
            if name == "ingress_id_ahead_seconds"
        )

    async with node:
        link, names = node._parts.backend.link, node._parts.names
        assert (warned(), gauge()) == ([], 0)
        await node.publish(writes([0]))
        await table.hanging.wait()
        seconds, _ = await link.call("TIME")
        at = f"{int(seconds) * 1_000 + HOUR_MS}-0"
        await link.call("XADD", names.events, at, "event", writes([1])[0])
        await until(lambda: gauge() > 3_500)
        (detail,) = warned()
        assert names.events in detail
        assert next(each for each in node.checks() if each.name == "ingress_ids").state == "warn"
        table.go_on.set()
        await until(lambda: gauge() == 0)
        assert warned() == []


async def test_a_restored_shard_with_newer_marks_discards_nothing(open_shop: OpenShop) -> None:
    """G6: the stream's own state is lost, or older than the shards' marks."""
    async with open_shop(sinks=SINKS) as shop:
        async with at_work(shop.ingress(await shop.ownership("one"))):
            await shop.publish(*writes(range(20)))
            await applied(shop, 20)
            done = shop.names.part(EVENTS, "done")
            old = await shop.link.call("HGET", done, "g")
        later = int(old) + 10**13
        for shard in range(shop.names.shards):
            mark = mark_of("5-5", 0, later)
            await shop.link.call("HSET", shop.names.part(shard, "head"), "i", mark)
        await shop.forget_owners()
        async with at_work(shop.ingress(await shop.ownership("two"))):
            await shop.publish(*writes(range(20, 40)))
            await applied(shop, 40)
        assert int(await shop.link.call("HGET", done, "g")) == later + 1
        assert shop.counts["ingress_generations", "restored"] == 1


@pytest.mark.parametrize(
    "mark", [b"\xff" * 65, b"9" * 65, b"z" * 65, b"9" * 16 + mark_of("1-1", 0)[16:].encode(), b""]
)
async def test_what_is_no_mark_discards_nothing(open_shop: OpenShop, mark: bytes) -> None:
    """_change C5: somebody wrote it by hand."""
    async with open_shop(sinks=SINKS) as shop:
        for shard in range(shop.names.shards):
            await shop.link.call("HSET", shop.names.part(shard, "head"), "i", mark)
        async with at_work(shop.ingress(await shop.ownership())):
            await shop.publish(*writes(range(20)))
            await applied(shop, 20)
        assert read_mark(mark) == (0, (0, 0))


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_becomes_of_ids_and_owners_each_accepted_event_is_applied_once(
    open_shop: OpenShop, seed: int
) -> None:
    """G2, G6: a seeded story of ids ahead, last ids, deleted streams and killed owners."""
    rng = random.Random(seed)
    async with open_shop(sinks=SINKS) as shop:
        accepted, deleted = list[int](), set[int]()
        for turn in range(8):
            story = rng.choice(["normal", "ahead", "last", "kill", "kill"])
            if story == "last":
                await add(shop, LAST_ID, writes([-1])[0])
            elif story == "ahead" or rng.random() < 0.3:
                accepted.append(len(accepted))
                await add(shop, await _ahead(shop), writes(accepted[-1:])[0])
            batch = range(len(accepted), len(accepted) + rng.randrange(1, 40))
            accepted += batch
            await shop.node.publish(writes(batch))
            cut = Cut(shop.link, at=rng.randrange(2, 9) if story == "kill" else 0)
            owner = await shop.ownership(f"owner-{turn}")
            async with at_work(shop.ingress(owner, cut)), anyio.create_task_group() as tasks:
                tasks.start_soon(_drained, shop, cut)
            if rng.random() < 0.4:
                deleted |= await _waiting(shop)
                await shop.link.call("DEL", shop.names.events)
            await shop.forget_owners()
        async with at_work(shop.ingress(await shop.ownership("last"))):
            await applied(shop, 0)
        counted = Counter(await values(shop))
        assert set(accepted) - set(counted) <= deleted
        assert set(counted) <= set(accepted)
        assert set(counted.values()) == {1}
        await in_order(shop)


async def _ahead(shop: Workshop) -> str:
    """An id ahead of all in the stream, and of the clock."""
    found = await shop.link.call("XREVRANGE", shop.names.events, "+", "-", "COUNT", 1)
    newest = int(found[0][0].partition(b"-")[0]) if found else 0
    seconds, _ = await shop.link.call("TIME")
    return f"{max(newest, int(seconds) * 1_000) + HOUR_MS}-0"


async def _waiting(shop: Workshop) -> set[int]:
    return {json.loads(each["event"])["value"] for each in await shop.stream(shop.names.events)}


async def _drained(shop: Workshop, cut: Cut) -> None:
    """Until the owner hangs, or nothing waits any more."""
    names = (shop.names.events, shop.names.part(EVENTS, "before"))

    async def is_over() -> bool:
        waiting = await shop.link.call_many([("XLEN", name) for name in names])
        return cut.reached.is_set() or not any(waiting)

    await until(is_over)


async def test_the_last_id_in_the_dead_letters_does_not_stop_ingress(open_shop: OpenShop) -> None:
    """Dead letters D5: the old letters are kept in another stream, and one more can be added."""
    async with open_shop(sinks=SINKS) as shop:
        dead = shop.names.part(EVENTS, "dead")
        await shop.link.call("XADD", dead, LAST_ID, "reason", "planted")
        await shop.publish(b"[]", *writes([1]))
        async with at_work(shop.ingress(await shop.ownership())):
            await applied(shop, 1)
        assert [each["reason"] for each in await shop.dead()] == [b"wrong_field"]
        (kept,) = await shop.stream(f"{dead}:before")
        assert kept["reason"] == b"planted"


@pytest.mark.parametrize("which", ["an hour ahead", "the last"])
async def test_an_event_is_held_behind_one_whose_id_is_ahead(
    open_shop: OpenShop, which: str
) -> None:
    """G3: it keeps its id as a field; without room it becomes a dead letter."""
    newer = b'{"type":"dev.forebay.cache.x.v2"}'
    async with open_shop(sinks=SINKS) as shop:
        held = shop.names.part(EVENTS, "held")
        at = LAST_ID if which == "the last" else await hour_ahead(shop)
        await shop.link.call("XADD", held, at, "event", newer)
        entry_id, *_ = await shop.publish(newer, *writes([1]))
        async with at_work(shop.ingress(await shop.ownership())):
            await applied(shop, 1)
        if which == "the last":
            assert [each["event"] for each in await shop.dead()] == [newer]
        else:
            assert [each.get("held") for each in await shop.stream(held)] == [
                None,
                entry_id.encode(),
            ]


@pytest.mark.parametrize("sinks", [1, 2])
async def test_the_last_id_in_a_stream_of_writes_stops_no_write(
    open_shop: OpenShop, sinks: int
) -> None:
    """A write waits as for a full stream until the workers have drained and restarted it."""
    table, other = Table(), Table("other")
    declared = {"flight:{id}": table} | ({"crew:{id}": other} if sinks == 2 else {})
    async with open_shop(sinks=declared) as shop:
        key = shop.key(1)
        await shop.publish(write(key, 1))
        owner = await shop.ownership()
        async with at_work(shop.ingress(owner)):
            await applied(shop, 1)
            await shop.link.call("XADD", shop.names.part(1, "writes"), LAST_ID, "v", "1", "j", "x")
            await shop.publish(write(key, 2))
            await until(lambda: shop.counts["limit_reached", "writes"] > 0)
            async with at_work(shop.write_behind(owner)):
                await until(lambda: table.values().get(key) == 2)
                await shop.publish(write(key, 3))
                await until(lambda: table.values().get(key) == 3)
        assert await shop.dead() == []
        assert [each["reason"] for each in await shop.dead(1)] == [b"undecodable"]


def event(number: int, event_id: str) -> bytes:
    return write("flight:1", number, id=event_id, source="s")


async def now_ms(shop: Workshop) -> int:
    seconds, micros = await shop.link.call("TIME")
    return int(seconds) * 1_000 + int(micros) // 1_000


async def test_a_repetition_that_is_applied_late_is_one_all_the_same(open_shop: OpenShop) -> None:
    """entry_write I1: e1, e2, a stopped node, e1 again within the window, applied after it."""
    async with open_shop(sinks=SINKS, durable=Durable(dedupe_ms=300)) as shop:
        start = await now_ms(shop)
        owner = await shop.ownership()
        await add(shop, f"{start}-0", event(1, "e1"))
        await add(shop, f"{start}-1", event(2, "e2"))
        async with at_work(shop.ingress(owner)):
            await applied(shop, 2)
        await add(shop, f"{start + 299}-0", event(1, "e1"))
        while await now_ms(shop) < start + 700:
            await anyio.sleep(0.05)
        async with at_work(shop.ingress(owner)):
            await until(lambda: shop.counts["events_processed", "write", "duplicate"] == 1)
        assert await values(shop) == [1, 2]


async def test_the_same_id_after_the_window_counts_though_both_are_applied_at_once(
    open_shop: OpenShop,
) -> None:
    """entry_write I1: the window is of publishing."""
    async with open_shop(sinks=SINKS, durable=Durable(dedupe_ms=6_000)) as shop:
        start = await now_ms(shop) - 60_000
        for after_ms, number in ((0, 1), (5_999, 2), (6_000, 3), (13_000, 4)):
            await add(shop, f"{start + after_ms}-0", event(number, "e1"))
        async with at_work(shop.ingress(await shop.ownership())):
            await applied(shop, 3)
        assert await values(shop) == [1, 3, 4]


async def test_a_held_event_keeps_the_time_of_its_publication(open_shop: OpenShop) -> None:
    """G3: when it is published again for a newer node, its age stays the same."""
    async with open_shop(sinks=SINKS, durable=Durable(dedupe_ms=6_000)) as shop:
        start = await now_ms(shop) - 60_000
        held = shop.names.part(EVENTS, "held")
        await add(shop, f"{start}-0", event(1, "e1"))
        await shop.link.call("XADD", held, f"{start + 5_000}-0", "event", event(2, "e1"))
        async with at_work(shop.ingress(await shop.ownership())):
            await until(lambda: shop.counts["events_processed", "write", "duplicate"] == 1)
        assert await values(shop) == [1]


@pytest.mark.parametrize("entry_id", ["1-1", "an hour ahead"])
async def test_an_id_that_tells_no_time_counts_as_published_now(
    open_shop: OpenShop, entry_id: str
) -> None:
    """plan: ids made up by a publisher make an event neither old nor young for ever."""
    async with open_shop(sinks=SINKS) as shop:
        at = await hour_ahead(shop) if entry_id == "an hour ahead" else entry_id
        before = await now_ms(shop)
        await add(shop, at, write("flight:1", 1, ttl=60))
        async with at_work(shop.ingress(await shop.ownership())):
            await applied(shop, 1)
        raw = await shop.link.call("GET", shop.names.entry("flight:1"))
        soft_at_ms = read_entry(raw, bytes_max=1_000).soft_at_ms
        assert before + 60_000 <= soft_at_ms <= await now_ms(shop) + 60_000

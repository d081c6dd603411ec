"""Writes that their owner has no sink for, or cannot decode: ``Held`` H1-H4, ``Lane`` W5 and W6."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import msgspec
import pytest

import forebay
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.log.ownership import Ownership
from forebay.coordinator.log.roster import Profile
from forebay.nodes.workers import held as held_module
from forebay.nodes.workers.write_behind import WriteBehind
from forebay.schemas.jobs import WriteJob, write_job
from forebay.schemas.settings import Workers
from support.eventually import until
from support.workers import SHARDS, Cut, Table, Workshop, at_work, write

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]
ORDER, INVOICE = "order:{id}", "invoice:{id}"


async def member(shop: Workshop, name: str, *templates: str) -> Ownership:
    """A member that publishes these sinks, independent of the workshop's node."""
    made = Ownership(
        shop.link,
        shop.names,
        shop.parts.scripts,
        node_id=name,
        options=Workers(ownership_ttl_ms=60_000, beat_ms=100),
        clock=SystemClock(),
        rng=random.Random(name),
        instruments=shop.node._instruments,
        profile=Profile(sinks=templates),
    )
    await made.beat()
    return made


async def queue(shop: Workshop, *keys: str, value: object = 1, version: int = 7) -> list[str]:
    """Writes as ``entry_write.lua`` makes them, without the entry."""
    ids = []
    for number, key in enumerate(keys):
        job = WriteJob(key=key, value=msgspec.msgpack.encode(value))
        stream = shop.names.part(shop.names.shard(key), "writes")
        ids.append(
            bytes(
                await shop.link.call(
                    "XADD", stream, "*", "v", version + number, "j", write_job(job)
                )
            ).decode()
        )
    return ids


async def held(shop: Workshop) -> list[str]:
    """The keys of all that is held, shard by shard in order."""
    found = []
    for shard in range(SHARDS):
        for entry in await shop.entries(shard, "held"):
            found.append(msgspec.msgpack.decode(entry["j"])["key"])
    return found


async def letters(shop: Workshop) -> list[dict[str, bytes]]:
    return [each for shard in range(SHARDS) for each in await shop.dead(shard)]


async def empty(shop: Workshop, *names: str) -> None:
    """Wait until nothing is left in these streams of any shard."""

    async def gone() -> bool:
        streams = [shop.names.part(n, name) for n in range(SHARDS) for name in names]
        return not any(await shop.link.call_many([("XLEN", each) for each in streams]))

    await until(gone)


def ends(shop: Workshop, owner: Ownership, sinks: dict[str, Any], **options: int) -> WriteBehind:
    """The write-behind of a member that declares these sinks."""
    routes = shop.parts.routes
    before, routes.sinks = routes.sinks, []
    try:
        for template, sink in sinks.items():
            routes.add_sink(template, sink)
        declared = routes.sinks
    finally:
        routes.sinks = before
    shop.parts.routes = type(routes)()
    shop.parts.routes.caches, shop.parts.routes.sinks = routes.caches, declared
    try:
        return shop.write_behind(owner, **options)
    finally:
        shop.parts.routes = routes


async def test_what_no_sink_takes_is_held_and_the_others_are_stored(open_shop: OpenShop) -> None:
    """W5: it is out of the stream, so it neither stops others nor fills the stream's bound."""
    table = Table()
    async with open_shop(sinks={ORDER: table}) as shop:
        owner = await shop.ownership()
        (first, *_) = await queue(shop, "invoice:1", "order:1", "invoice:2", "order:2")
        async with at_work(behind := shop.write_behind(owner)):
            await shop.sunk()
            await until(lambda: behind.held.statistics.writes == 2)
        assert table.values() == {"order:1": 1, "order:2": 1}
        assert sorted(await held(shop)) == ["invoice:1", "invoice:2"]
        assert await letters(shop) == []
        assert shop.counts["writebehind_held", "no_sink"] == 2
        (entry,) = [
            each
            for each in await shop.entries(shop.names.shard("invoice:1"), "held")
            if each["f"].decode() == first
        ]
        assert entry["v"] == b"7"


async def test_what_is_held_reaches_the_sink_of_the_next_owner_before_newer_writes(
    open_shop: OpenShop,
) -> None:
    """W5: in the order of acceptance; a sink that keeps no versions sees none go back."""
    invoices, seen = Table("invoices"), list[int]()
    invoices.fences = False
    async with open_shop(sinks={ORDER: Table()}) as shop:
        old = await shop.ownership("old")
        for value in range(3):
            await queue(shop, "invoice:1", value=value, version=10 + value)
            async with at_work(shop.write_behind(old)):
                await shop.sunk()
        assert await held(shop) == ["invoice:1"] * 3
        await queue(shop, "invoice:1", value=3, version=13)
        await shop.forget_owners()
        new = await shop.ownership("new")
        async with at_work(ends(shop, new, {INVOICE: invoices, ORDER: Table()})):
            await empty(shop, "writes", "held")
        seen += [each.value for batch in invoices.batches for each in batch.writes]
        assert seen == sorted(seen)
        assert invoices.values() == {"invoice:1": 3}
        assert await letters(shop) == []


async def test_a_write_behind_a_sink_that_stood_still_is_not_trimmed_by_an_owner_without_it(
    open_shop: OpenShop,
) -> None:
    """W5: the checkpoint of the other sink is past it already."""
    orders, invoices = Table("orders"), Table("invoices")
    invoices.hang_at = 1
    async with open_shop(sinks={ORDER: orders, INVOICE: invoices}) as shop:
        shard = shop.names.shard("invoice:1")
        later = shop.key(shard, "order:")
        old = await shop.ownership("old")
        async with at_work(shop.write_behind(old)):
            await queue(shop, "invoice:1")
            await invoices.hanging.wait()
            await queue(shop, later)
            await until(lambda: later in orders.values())
        await shop.forget_owners()
        lacking = await shop.ownership("lacking")
        async with at_work(ends(shop, lacking, {ORDER: orders})):
            await empty(shop, "writes")
        assert await held(shop) == ["invoice:1"]
        await shop.forget_owners()
        again = Table("invoices")
        new = await shop.ownership("new")
        async with at_work(ends(shop, new, {ORDER: orders, INVOICE: again})):
            await until(lambda: again.values() == {"invoice:1": 1})


async def test_the_entry_of_a_held_write_waits_for_it(open_shop: OpenShop) -> None:
    """It is pending, and without a lifetime, until its sink has it."""
    invoices = Table("invoices")
    async with open_shop(sinks={ORDER: Table()}) as shop:
        owner = await shop.ownership("old")
        ids = await shop.publish(write("invoice:1", 5))
        async with at_work(shop.ingress(owner), shop.write_behind(owner)):
            await shop.applied(ids[-1])
            await shop.sunk()
        entry = shop.names.entry("invoice:1")
        assert await held(shop) == ["invoice:1"]
        assert await shop.dead() == []
        assert await shop.link.call("PTTL", entry) == -1
        await shop.forget_owners()
        new = await shop.ownership("new")
        async with at_work(ends(shop, new, {INVOICE: invoices})):
            await until(lambda: invoices.values() == {"invoice:1": 5})
            await empty(shop, "held")
        assert await shop.link.call("PTTL", entry) > 0


async def test_after_hold_ms_a_held_write_is_a_dead_letter(open_shop: OpenShop) -> None:
    """H2: it keeps its id, its key is invalidated, and its entry is not pinned any more."""
    async with open_shop(sinks={ORDER: Table()}) as shop:
        owner = await shop.ownership()
        ids = await shop.publish(write("invoice:1", 5))
        async with at_work(shop.ingress(owner)):
            await shop.applied(ids[-1])
        shard = shop.names.shard("invoice:1")
        (job,) = await shop.entries(shard, "writes")
        async with at_work(behind := shop.write_behind(owner)):
            await shop.sunk()
            await until(lambda: behind.held.statistics.writes == 1)
            assert await letters(shop) == []
        async with at_work(behind := shop.write_behind(owner, hold_ms=100)):
            await empty(shop, "held")
            await until(lambda: behind.held.statistics.writes == 0)
        (letter,) = await letters(shop)
        assert (letter["reason"], letter["from"].decode()) == (b"no_sink", job["id"].decode())
        assert letter["event"] == job["j"]
        assert await shop.link.call("EXISTS", shop.names.entry("invoice:1")) == 0


async def test_a_paused_sink_loses_nothing_that_was_held(open_shop: OpenShop) -> None:
    """H2: the owner has the sink, so the time limit does not apply."""
    invoices = Table("invoices")
    invoices.hang_at = 1
    async with open_shop(sinks={ORDER: Table()}) as shop:
        await queue(shop, "invoice:1")
        async with at_work(shop.write_behind(await shop.ownership("old"))):
            await shop.sunk()
        await shop.forget_owners()
        new = await shop.ownership("new")
        behind = ends(shop, new, {INVOICE: invoices}, hold_ms=100)
        async with at_work(behind):
            await invoices.hanging.wait()
            await until(lambda: behind.held.statistics.oldest_age_s > 0.3)
            assert await letters(shop) == []
            invoices.go_on.set()
            await empty(shop, "held")
        assert invoices.values() == {"invoice:1": 1}


async def test_too_many_held_are_dead_letters_and_counted(open_shop: OpenShop) -> None:
    """Held writes have a bound of their own, other than the stream's."""
    async with open_shop(sinks={ORDER: Table()}) as shop:
        owner = await shop.ownership()
        keys = [shop.key(0, "invoice:", number) for number in range(5)]
        await queue(shop, *keys)
        behind = shop.write_behind(owner)
        for lane in behind.lanes:
            lane._held_max = 3
        async with at_work(behind):
            await shop.sunk()
        assert await held(shop) == keys[:3]
        assert [each["reason"] for each in await letters(shop)] == [b"no_sink"] * 2
        assert shop.counts["limit_reached", "held"] == 2


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
async def test_a_crash_anywhere_while_holding_loses_and_doubles_nothing(
    open_shop: OpenShop, answered: bool
) -> None:
    """writes_hold I1, W1: stopped at every call, with its effect or without."""
    async with open_shop(sinks={ORDER: Table()}) as shop:
        for at in range(1, 40):
            orders, invoices = Table("orders"), Table("invoices")
            await queue(shop, "invoice:1", "order:1", version=at * 10)
            owner = await shop.ownership(f"cut-{at}")
            cut = Cut(shop.link, at=at, answered=answered)
            chosen, shop.link = shop.link, cut
            try:
                behind = ends(shop, owner, {ORDER: orders})
            finally:
                shop.link = chosen
            for part in (behind.held, *behind.lanes):
                part._commands = cut
            async with at_work(behind):
                with anyio.move_on_after(0.3):
                    await cut.reached.wait()
            await shop.forget_owners()
            new = await shop.ownership(f"new-{at}")
            async with at_work(ends(shop, new, {ORDER: orders, INVOICE: invoices})):
                await empty(shop, "writes", "held")
            assert invoices.values() == {"invoice:1": 1}
            assert orders.values() == {"order:1": 1}
            assert sum(len(each.writes) for each in invoices.batches) == 1
            await shop.forget_owners()
            if not cut.reached.is_set():
                break
        else:
            pytest.fail("there are more calls than were tried")
        assert await letters(shop) == []


class Strict(msgspec.Struct, frozen=True):
    id: int


def declares(type_: Any) -> Callable[[forebay.Node], None]:
    def declare(node: forebay.Node) -> None:
        async def invoice(id: int) -> Any:
            return None

        invoice.__annotations__["return"] = type_ | None
        node.cached(INVOICE, ttl=600)(invoice)

    return declare


async def test_what_this_member_cannot_decode_is_held_for_one_that_may(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W6, H1: the shard is deferred; the member that decodes the write stores it."""
    mine = Table()
    async with open_shop(sinks={INVOICE: mine}, declare=declares(Strict)) as shop:
        old = await member(shop, "old", INVOICE)
        other = await member(shop, "other", INVOICE)
        await old.beat()
        key = next(k for n in range(SHARDS) if (k := shop.key(n, "invoice:")) and n in old.tenures)
        await queue(shop, key, value="text")
        async with at_work(shop.write_behind(old), old, other):
            await shop.sunk()
            await until(lambda: shop.names.shard(key) in other.tenures)
            assert await held(shop) == [key]
            assert await letters(shop) == []
            assert shop.counts["writebehind_held", "undecodable"] == 1
            monkeypatch.setattr(shop.parts.routes, "caches", {})  # its application has no type
            theirs = Table()
            async with at_work(ends(shop, other, {INVOICE: theirs})):
                await until(lambda: theirs.values() == {key: "text"})
                await empty(shop, "held")


async def test_what_no_live_member_can_decode_is_a_dead_letter(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H2: when all that have the sink have tried, and not only after ``hold_ms``."""
    table = Table()
    monkeypatch.setattr(held_module, "_NEWS_MS", 500)
    async with open_shop(sinks={INVOICE: table}, declare=declares(Strict)) as shop:
        owner = await member(shop, "one", INVOICE)
        other = await member(shop, "two", INVOICE)
        await owner.beat()
        key = next(
            k for n in range(SHARDS) if (k := shop.key(n, "invoice:")) and n in owner.tenures
        )
        await queue(shop, key, value="text")
        async with at_work(shop.write_behind(owner)):
            await shop.sunk()
            assert await held(shop) == [key]
            (entry,) = await shop.entries(shop.names.shard(key), "held")
            tried = shop.names.part(shop.names.shard(key), "tried")
            await shop.link.call("HSET", tried, entry["id"], f"{owner.token} {other.token}")
            await empty(shop, "held")
        (letter,) = await letters(shop)
        assert (letter["reason"], letter["from"]) == (b"undecodable", entry["f"])


async def test_a_newer_write_takes_the_place_of_one_that_is_held(open_shop: OpenShop) -> None:
    """W6: no member is asked to decode the older write any more."""
    table = Table()
    async with open_shop(sinks={INVOICE: table}, declare=declares(Strict)) as shop:
        owner = await member(shop, "one", INVOICE)
        await member(shop, "two", INVOICE)
        await owner.beat()
        key = next(
            k for n in range(SHARDS) if (k := shop.key(n, "invoice:")) and n in owner.tenures
        )
        async with at_work(shop.write_behind(owner)):
            await queue(shop, key, value="text", version=7)
            await shop.sunk()
            assert await held(shop) == [key]
            await queue(shop, key, value={"id": 3}, version=8)
            await until(lambda: table.values() == {key: Strict(3)})
            await empty(shop, "held")
        assert await letters(shop) == []


def test_templates_that_may_take_a_key() -> None:
    """Templates match by prefix and suffix; a key without a template has no taker."""
    profile = Profile(sinks=("invoice:{id}", "a:{x}:b"))
    found: Sequence[str] = ["invoice:1", "invoices", "a:1:b", "a:1:c", "order:1"]
    assert [profile.may_take(key) for key in found] == [True, False, True, False, False]
    assert not Profile().may_take("invoice:1")

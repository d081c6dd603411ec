"""Ingress on a real server: G1-G5, and A1-A4 of the applier, with a stop at every await."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import msgspec
import pytest

import forebay
from forebay.nodes.cancellation import asked_to_stop
from forebay.nodes.workers import ingress as module
from forebay.nodes.workers.ingress import _BATCH
from forebay.schemas.errors import Unavailable
from forebay.schemas.keys import EVENTS
from forebay.schemas.notices import Dropped, read_notice
from forebay.schemas.settings import Durable, NodeSettings, Settings, Valkey
from support.eventually import until
from support.workers import SHARDS, Cut, Table, Workshop, at_work, invalidate, workshop, write

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]
SINKS = {"flight:{id}": Table()}


async def apply(shop: Workshop, *events: bytes) -> list[str]:
    """Publish these, and have them applied by an owner of their own."""
    owner = await shop.ownership()
    ids = await shop.publish(*events)
    async with at_work(shop.ingress(owner)):
        await shop.applied(ids[-1])
    return ids


async def dropped(shop: Workshop) -> list[str]:
    """Keys that the logs say were invalidated, in order by shard."""
    found: list[str] = []
    for shard in range(SHARDS):
        notices = [read_notice(entry["n"]) for entry in await shop.entries(shard, "log")]
        found += [key for each in notices if isinstance(each, Dropped) for key in each.keys]
    return found


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "undecodable"),
    "bytes": (b"\xff\xfe\x00", "undecodable"),
    "pickle": (b"\x80\x04N.", "undecodable"),
    "bom": (b"\xef\xbb\xbf" + invalidate("a"), "undecodable"),
    "nan": (b'{"type":"write","key":"flight:1","value":NaN}', "undecodable"),
    "no object": (b"[]", "wrong_field"),
    "unknown type": (b'{"type":"explode","keys":["a"]}', "unknown_type"),
    "wrong field": (b'{"type":"invalidate","keys":"a"}', "wrong_field"),
    "nul": (invalidate("a\x00b"), "wrong_field"),
    "command": (invalidate("a\r\nFLUSHALL"), "wrong_field"),
    "hash tag": (invalidate("{t}x"), "wrong_field"),
    "glob": (invalidate("*"), "wrong_field"),
    "oversized": (invalidate("a" * 70_000), "oversized"),
    "deep": (b'{"type":"invalidate","keys":' + b"[" * 30_000, "undecodable"),
    "ttl": (write("flight:1", 1, ttl=-1), "wrong_field"),
    "surrogate": (b'{"type":"write","key":"flight:1","value":"\\ud800"}', "undecodable"),
    # These pass for events, but their values cannot be read:
    "value of bad utf-8": (b'{"type":"write","key":"flight:1","value":"\xff"}', "wrong_field"),
    "value 1e999": (b'{"type":"write","key":"flight:1","value":1e999}', "wrong_field"),
    "value of many digits": (
        b'{"type":"write","key":"flight:1","value":' + b"9" * 10_000 + b"}",
        "wrong_field",
    ),
    "value too deep": (
        b'{"type":"write","key":"flight:1","value":' + b"[" * 900 + b"]" * 900 + b"}",
        "any",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_event_is_a_dead_letter_and_the_next_one_works(
    open_shop: OpenShop, name: str
) -> None:
    """G3: the reason, the original bytes, a metric; and the events around it are applied."""
    raw, fault = BAD[name]
    async with open_shop(sinks=SINKS) as shop:
        ids = await apply(shop, invalidate("before"), raw, invalidate("after"))
        assert sorted(await dropped(shop)) == ["after", "before"]
        letters = await shop.dead()
        if fault == "any":
            return  # how deep is too deep depends on the stack; it must only not stop the rest
        (letter,) = letters
        assert letter["event"] == raw
        assert letter["reason"].decode() == fault
        assert letter["from"].decode() == ids[1]
        assert letter["problem"]
        assert letter["field"]
        assert shop.counts["dead_letters", fault] == 1
        assert shop.counts["events_processed", "invalidate", "applied"] == 2


async def test_an_entry_without_the_field_is_a_dead_letter_with_all_its_bytes(
    open_shop: OpenShop,
) -> None:
    """G3: whoever used another name for the field finds what was sent."""
    async with open_shop() as shop:
        await shop.link.call("XADD", shop.names.events, "*", "data", b"\xff\x00", "n", "1")
        await apply(shop, invalidate("after"))
        (letter,) = await shop.dead()
        assert letter["event"] == b"data \xff\x00 n 1"
        assert letter["field"] == b"event"
        assert await dropped(shop) == ["after"]


async def test_the_field_may_stand_among_others(open_shop: OpenShop) -> None:
    """A publisher may add fields of its own to the entry."""
    async with open_shop() as shop:
        entry = ["app", "x", "event", invalidate("a"), "n", "1"]
        await shop.link.call("XADD", shop.names.events, "*", *entry)
        await apply(shop, invalidate("b"))
        assert sorted(await dropped(shop)) == ["a", "b"]


class Seat(msgspec.Struct):
    row: int
    letter: str

    def __post_init__(self) -> None:
        if self.row == 13:
            raise LookupError("there is no row 13")


def declare_seats(node: forebay.Node) -> None:
    async def seat(id: str) -> Seat | None:
        return None

    node.cached("seat:{id}", ttl=60, tags=["plane:" + "x" * 480 + ":{id}"], name="seats")(seat)
    node.sink("seat:{id}", Table("seats"))


@pytest.mark.parametrize(
    "value", [7, {"row": "1", "letter": "A"}, {"letter": "A"}, {"row": 13, "letter": "A"}]
)
async def test_value_of_a_wrong_type_is_a_dead_letter(open_shop: OpenShop, value: Any) -> None:
    """G3, A4: whatever the application's type raises, it is that event's fault alone."""
    bad, good = write("seat:1", value), write("seat:2", {"row": 2, "letter": "B"})
    async with open_shop(declare=declare_seats) as shop:
        await apply(shop, bad, good)
        (letter,) = await shop.dead()
        assert (letter["event"], letter["reason"]) == (bad, b"wrong_field")
        assert await shop.jobs() == [("seat:2", Seat(2, "B"))]
        assert shop.counts["events_processed", "write", "dead"] == 1


async def test_a_key_whose_tag_cannot_be_made_is_a_dead_letter(open_shop: OpenShop) -> None:
    """A4: a key may be allowed and the tag made from it too long; that stops nobody."""
    bad = write("seat:" + "y" * 60, {"row": 1, "letter": "A"})
    async with open_shop(declare=declare_seats) as shop:
        await apply(shop, bad, write("seat:2", {"row": 2, "letter": "B"}))
        (letter,) = await shop.dead()
        assert letter["event"] == bad
        assert [key for key, _ in await shop.jobs()] == ["seat:2"]


async def test_a_stream_that_is_something_else_stops_only_its_writes(open_shop: OpenShop) -> None:
    """A4: a foreign program put a string where a shard's writes should be; others go on."""
    async with open_shop(sinks=SINKS) as shop:
        here, there = shop.key(1), shop.key(2)
        await shop.link.call("SET", shop.names.part(1, "writes"), "x")
        bad = [write(here, 1), write(here, 2)]
        await apply(shop, bad[0], write(there, 3), invalidate(here), bad[1], write(there, 4))
        letters = await shop.dead()
        assert [letter["event"] for letter in letters] == bad
        assert {letter["reason"] for letter in letters} == {b"server_refused"}
        assert here in await dropped(shop)
        await shop.link.call("DEL", shop.names.part(1, "writes"))
        assert await shop.jobs() == [(there, 3), (there, 4)]


async def test_a_log_that_is_something_else_stops_only_its_writes(open_shop: OpenShop) -> None:
    """A4: where even the log is something else, invalidations take effect, unannounced."""
    async with open_shop() as shop:
        here, too, there = shop.key(1), shop.key(1, number=1), shop.key(2)
        await shop.link.call("SET", shop.names.part(1, "log"), "x")
        await shop.link.call("SET", shop.names.entry(here), "old")
        bad = write(here, 1)
        await apply(shop, invalidate(here), invalidate(too, there), invalidate(there), bad)
        assert [letter["event"] for letter in await shop.dead()] == [bad]
        assert await shop.link.call("EXISTS", shop.names.entry(here)) == 0
        await shop.link.call("DEL", shop.names.part(1, "log"))
        assert await dropped(shop) == [there]


async def test_each_event_is_counted_once_also_if_shards_refuse_it(open_shop: OpenShop) -> None:
    """Applied or dead, however many shards it names; an unreadable one is counted as well."""
    async with open_shop() as shop:
        for shard in (1, 2):
            await shop.link.call("SET", shop.names.part(shard, "log"), "x")
        wide = invalidate(shop.key(1), shop.key(2), shop.key(3))
        await apply(shop, wide, invalidate(shop.key(3)), write(shop.key(1), 1), b"no event")
        counted = {key[1:]: n for key, n in shop.counts.items() if key[0] == "events_processed"}
        assert {labels: n for labels, n in counted.items() if n} == {
            ("invalidate", "applied"): 2,
            ("write", "dead"): 1,
            ("unknown", "dead"): 1,
        }


async def test_the_delay_of_an_event_needs_a_time_of_publication(open_shop: OpenShop) -> None:
    """An id that its publisher made up tells no time: the delay would be of fifty years."""
    async with open_shop() as shop:
        stream, event = shop.names.events, invalidate(shop.key(1))
        await shop.link.call("XADD", stream, "1-1", "event", event)
        await apply(shop, event)
        value = shop.node.registry.get_sample_value
        assert shop.counts["events_processed", "invalidate", "applied"] == 2
        for name, labels in {
            "event_delay": {"type": "invalidate"},
            "event_propagation": {},
        }.items():
            await until(
                lambda name=name, labels=labels: value(f"forebay_{name}_seconds_count", labels) == 1  # type: ignore[misc]
            )
            assert (value(f"forebay_{name}_seconds_sum", labels) or 0) < 3_600


async def test_faults_of_the_server_are_waited_out(open_shop: OpenShop, make_server: Any) -> None:
    """A4: while every write is refused nothing is thrown away; afterwards it goes on by itself."""
    server = make_server()
    async with workshop(server, "full", sinks={"flight:{id}": (table := Table())}) as shop:
        owner = await shop.ownership()
        ids = await shop.publish(write("flight:1", 1), invalidate("flight:2"))
        server.execute("CONFIG", "SET", "min-replicas-to-write", 1)
        ingress, behind = shop.ingress(owner), shop.write_behind(owner)
        async with at_work(ingress, behind):
            await until(lambda: ingress.failing.failing is not None)
            server.execute("CONFIG", "SET", "min-replicas-to-write", 0)
            await shop.applied(ids[-1])
            await until(lambda: table.values() == {"flight:1": 1})
        assert await shop.dead() == []


async def test_events_of_a_key_are_applied_in_the_order_published(open_shop: OpenShop) -> None:
    """Jobs of a key stand in its stream as its events did in theirs, over many batches."""
    keys = [f"flight:{n}" for n in range(20)]
    events = [write(keys[n * 7 % 20], n) for n in range(_BATCH + 300)]
    async with open_shop(sinks=SINKS) as shop:
        await apply(shop, *events)
        jobs = await shop.jobs()
        assert len(jobs) == len(events)
        for key in keys:
            values = [value for of, value in jobs if of == key]
            assert values == sorted(values)


async def test_a_ttl_below_a_millisecond_is_not_taken_for_none(open_shop: OpenShop) -> None:
    """A lifetime that was asked for is never replaced by the cache's own."""
    async with open_shop(declare=declare_seats) as shop:
        await apply(shop, write("seat:1", {"row": 1, "letter": "A"}, ttl=0.0001))
        raw = await shop.link.call("GET", shop.names.entry("seat:1"))
        soft_at_ms, version_us = int(raw[20:33]), int(raw[4:20])
        assert soft_at_ms - version_us // 1000 <= 1


async def test_a_repeated_event_id_is_applied_once(open_shop: OpenShop) -> None:
    """A publisher that is not sure publishes again with the same id."""
    again = write("flight:1", 1, id="e1", source="/s")
    async with open_shop(sinks=SINKS) as shop:
        await apply(shop, again, write("flight:1", 2), again)
        assert await shop.jobs() == [("flight:1", 1), ("flight:1", 2)]
        assert shop.counts["events_processed", "write", "duplicate"] == 1


async def crash(shop: Workshop, owner: Any, at: int, *, answered: bool) -> bool:
    """Run ingress up to its ``at``-th call and stop it there; false if it never made so many."""
    cut = Cut(shop.link, at=at, answered=answered)
    ingress = shop.ingress(owner, cut)
    async with at_work(ingress):
        with anyio.move_on_after(0.3):
            await cut.reached.wait()
    return cut.reached.is_set()


@pytest.mark.parametrize("answered", [False, True], ids=["not sent", "no reply"])
async def test_a_crash_at_any_await_has_no_second_effect(
    open_shop: OpenShop, answered: bool
) -> None:
    """G1, G2: stopped at every call in turn, then applied by the next; each write once."""
    newer = b'{"type":"dev.forebay.cache.write.v2","key":"flight:1"}'
    async with open_shop(sinks=SINKS) as shop:
        owner = await shop.ownership()
        expected: list[tuple[str, Any]] = []
        held = []
        for at in range(1, 30):
            keys = [f"flight:{at}-{n}" for n in range(5)]
            writes = [(key, at * 100 + n) for n in range(3) for key in keys[:2]]
            events = [write(*each) for each in writes]
            events[2:2] = [invalidate(*keys), b"\xff", newer]
            ids = await shop.publish(*events)
            expected += writes
            held.append(ids[4])
            stopped = await crash(shop, owner, at, answered=answered)
            async with at_work(shop.ingress(owner)):
                await shop.applied(ids[-1])
            assert Counter(await shop.jobs()) == Counter(expected)
            if not stopped:
                break
        else:
            pytest.fail("ingress makes more calls than were tried")
        assert at > 5
        for shard in range(SHARDS):
            versions = [int(entry["v"]) for entry in await shop.entries(shard, "log")]
            assert versions == sorted(set(versions))
        letters = {letter["from"] for letter in await shop.dead()}
        assert len(letters) == at
        again = await shop.stream(shop.names.part(EVENTS, "held"))
        assert [entry["id"].decode() for entry in again] == held


async def test_another_node_takes_over_in_the_middle_of_a_batch(open_shop: OpenShop) -> None:
    """G2: the old owner wakes up when the new one is done; it changes nothing, and is fenced."""
    async with open_shop(sinks=SINKS) as shop:
        old = await shop.ownership("old")
        events = [write(f"flight:{n % 9}", n) for n in range(60)]
        ids = await shop.publish(*events)
        cut = Cut(shop.link, at=6)
        async with at_work(shop.ingress(old, cut)):
            await cut.reached.wait()
            await shop.forget_owners()
            new = await shop.ownership("new")
            assert new.in_force(EVENTS) is not None
            async with at_work(shop.ingress(new)):
                await shop.applied(ids[-1])
                later = await shop.publish(write("flight:0", 99))
                await shop.applied(later[-1])
        jobs = await shop.jobs()
        assert sorted(value for _, value in jobs) == [*range(60), 99]
        late = shop.ingress(old)
        await shop.link.call("HDEL", shop.names.part(EVENTS, "done"), "events")
        await shop.publish(write("flight:1", 100))
        async with at_work(late):
            await until(lambda: old.in_force(EVENTS) is None)
        assert Counter(await shop.jobs()) == Counter(jobs)
        assert await shop.link.call("HGET", shop.names.part(EVENTS, "done"), "events") is None
        assert shop.counts["fenced",] == 1


async def test_held_events_are_published_again_when_a_newer_node_takes_over(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: what this node cannot read waits; what it can by now goes back into the stream."""
    newer = [
        json.dumps({"type": f"dev.forebay.cache.invalidate.v{v}", "keys": [f"v{v}"]}).encode()
        for v in (2, 3, 2)
    ]
    async with open_shop() as shop:
        await apply(shop, *newer, invalidate("a"))
        held = shop.names.part(EVENTS, "held")
        assert [entry["event"] for entry in await shop.stream(held)] == newer
        assert await dropped(shop) == ["a"]
        assert shop.counts["events_processed", "unknown", "held"] == 3

        old_read = module.read_event

        def read_v2(raw: bytes, *, bytes_max: int) -> Any:
            return old_read(raw.replace(b".v2", b".v1"), bytes_max=bytes_max)

        monkeypatch.setattr(module, "read_event", read_v2)
        await apply(shop, invalidate("b"))
        await until(lambda: shop.counts["events_processed", "invalidate", "applied"] == 4)
        assert Counter(await dropped(shop)) == Counter(["a", "b", "v2"])
        assert [entry["event"] for entry in await shop.stream(held)] == [newer[1]]


async def test_there_is_a_bound_for_what_is_held(open_shop: OpenShop) -> None:
    """G3: a flood of events from the future ends among the dead letters."""
    newer = b'{"type":"dev.forebay.cache.x.v2"}'
    async with open_shop(durable=Durable(dead_letters_max=3)) as shop:
        await apply(shop, *[newer] * 5, invalidate("a"))
        assert len(await shop.stream(shop.names.part(EVENTS, "held"))) == 3
        assert [letter["event"] for letter in await shop.dead()] == [newer] * 2
        assert shop.counts["limit_reached", "held"] == 2
        assert await dropped(shop) == ["a"]


async def test_what_the_dead_letters_drop_is_counted(open_shop: OpenShop) -> None:
    """The newest are kept, about as many as set, and the others do not vanish unseen."""
    async with open_shop(durable=Durable(dead_letters_max=100)) as shop:
        await apply(shop, *[b"%d" % n for n in range(450)])
        kept = [letter["event"] for letter in await shop.dead()]
        assert kept[-1] == b"449"
        assert 100 <= len(kept) < 450
        assert shop.counts["limit_reached", "dead_letters"] == 450 - len(kept)


async def test_a_full_stream_holds_ingress_back_and_nothing_is_lost_or_overtaken(
    open_shop: OpenShop,
) -> None:
    """G4, A1, A3: with room for three, sixty writes of two keys arrive whole and in order."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}, durable=Durable(writes_max=3)) as shop:
        owner = await shop.ownership()
        keys = [shop.key(2), shop.key(2, number=1)]
        elsewhere = shop.key(0)
        events = [write(keys[n % 2], n) for n in range(60)]
        ids = await shop.publish(*events, write(elsewhere, "there"))
        ingress = shop.ingress(owner)
        behind = shop.write_behind(owner, flush_rows_max=1)
        async with at_work(ingress):
            await until(lambda: shop.counts["limit_reached", "writes"] > 0)
            waiting = await shop.jobs()
            assert len(waiting) == 4  # three here, and the shard that has room was served
            assert (elsewhere, "there") in waiting
            async with at_work(behind):
                await shop.applied(ids[-1])
                await shop.sunk()
        values = [each.value for each in table.stored if each.key in keys]
        assert values == list(range(60))
        versions = [each.version for each in table.stored if each.key in keys]
        assert versions == sorted(set(versions))
        assert shop.counts["events_processed", "write", "applied"] == 61


async def test_a_write_that_found_the_stream_full_survives_a_crash(open_shop: OpenShop) -> None:
    """G4, A2: waiting, stopped, applied by the next owner: every write once, in order."""
    async with open_shop(sinks=SINKS, durable=Durable(writes_max=3)) as shop:
        key, owner = shop.key(1), await shop.ownership()
        ids = await shop.publish(*[write(key, n) for n in range(6)], invalidate(key))
        async with at_work(shop.ingress(owner)):
            await until(lambda: shop.counts["limit_reached", "writes"] > 0)
        assert await shop.jobs() == [(key, 0), (key, 1), (key, 2)]
        await shop.link.call("XTRIM", shop.names.part(1, "writes"), "MAXLEN", 0)
        async with at_work(shop.ingress(owner)):
            await shop.applied(ids[-1])
        assert await shop.jobs() == [(key, 3), (key, 4), (key, 5)]


async def test_of_a_shard_one_step_is_under_way_at_a_time(open_shop: OpenShop) -> None:
    """A1: whatever goes out together is for different shards."""
    events = []
    for n in range(200):
        events.append(write(f"flight:{n % 17}", n))
        events.append(invalidate(f"flight:{n % 11}", tags=[f"t{n % 5}"]))
    async with open_shop(sinks=SINKS) as shop:
        owner, cut = await shop.ownership(), Cut(shop.link)
        ids = await shop.publish(*events)
        async with at_work(shop.ingress(owner, cut)):
            await shop.applied(ids[-1])
        scripts = [[args for args in call if args[0] in ("EVALSHA", "EVAL")] for call in cut.calls]
        together = [call for call in scripts if len(call) > 1]
        assert together
        for call in together:
            heads = [str(args[3]).partition("}")[0] for args in call]
            assert len(set(heads)) == len(heads)


async def test_forgotten_scripts_lose_and_reorder_nothing(open_shop: OpenShop) -> None:
    """A2: SCRIPT FLUSH again and again, in the middle of everything."""
    keys = [f"flight:{n}" for n in range(6)]
    events = []
    for n in range(600):
        events += [write(keys[n * 5 % 6], n), invalidate(keys[n % 6])]
    async with open_shop(sinks=SINKS) as shop:
        owner = await shop.ownership()

        async def flush() -> None:
            while True:
                await shop.link.call("SCRIPT", "FLUSH")
                await anyio.sleep(0.001)

        ids = await shop.publish(*events)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flush)
            async with at_work(shop.ingress(owner)):
                await shop.applied(ids[-1])
            tasks.cancel_scope.cancel()
        jobs = await shop.jobs()
        assert sorted(value for _, value in jobs) == list(range(600))
        for key in keys:
            values = [value for of, value in jobs if of == key]
            assert values == sorted(values)
        assert set(await dropped(shop)) == set(keys)


async def test_a_lost_connection_in_the_middle_loses_and_repeats_nothing(
    open_shop: OpenShop,
) -> None:
    """G2: cut off again and again by the server; each write once, in order."""
    async with open_shop(sinks=SINKS) as shop:
        owner = await shop.ownership()
        ids = await shop.publish(*[write(f"flight:{n % 7}", n) for n in range(1_500)])

        async def cut_off() -> None:
            for _ in range(5):
                try:
                    await shop.link.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
                except Unavailable:
                    await anyio.sleep(0.05)

        async with at_work(shop.ingress(owner)), anyio.create_task_group() as tasks:
            tasks.start_soon(cut_off)

            async def done() -> bool:
                try:
                    await shop.link.call("PING")
                    done = await shop.link.call("HGET", shop.names.part(EVENTS, "done"), "events")
                except Unavailable:
                    return False
                return done is not None and done.decode() == ids[-1]

            await until(done)
        values = [value for _, value in await shop.jobs()]
        assert sorted(values) == list(range(1_500))


async def test_yielding_waits_for_the_batch_under_way(open_shop: OpenShop) -> None:
    """When it returns, nothing is under way, and nothing more is taken."""
    async with open_shop(sinks=SINKS) as shop:
        owner = await shop.ownership()
        ingress = shop.ingress(owner)
        ids = await shop.publish(*[write(f"flight:{n}", n) for n in range(_BATCH)])
        async with at_work(ingress):
            await until(lambda: ingress._busy)
            await ingress.yielding([owner.tenures[EVENTS]])
            assert not ingress._busy
            await shop.applied(ids[0])
            later = await shop.publish(write("flight:0", "later"))
            await anyio.wait_all_tasks_blocked()
        assert "yielding" in repr(ingress)
        done = await shop.link.call("HGET", shop.names.part(EVENTS, "done"), "events")
        assert done.decode() != later[0]


async def test_yielding_ends_the_wait_for_a_full_stream(open_shop: OpenShop) -> None:
    """G4: a drain does not wait for a sink that is away."""
    async with open_shop(sinks=SINKS, durable=Durable(writes_max=1)) as shop:
        owner = await shop.ownership()
        ingress = shop.ingress(owner)
        await shop.publish(write("flight:1", 1), write("flight:1", 2))
        async with at_work(ingress):
            await until(lambda: shop.counts["limit_reached", "writes"] > 0)
            with anyio.fail_after(1.5):
                await ingress.yielding([owner.tenures[EVENTS]])
            assert not ingress._busy


async def test_refreshes_become_one_job_for_each_key(open_shop: OpenShop) -> None:
    """G5: keys that no cache knows are passed over; repeated ones are refreshed once."""

    def declare(node: forebay.Node) -> None:
        async def seat(id: str) -> int:
            await anyio.sleep_forever()
            raise AssertionError

        node.cached("seat:{id}", ttl=60)(seat)

    event = json.dumps({"type": "refresh", "keys": ["seat:1", "seat:2", "other:1"]}).encode()
    async with open_shop(declare=declare) as shop:
        await apply(shop, event, event, invalidate("a"))
        pending = [await shop.entries(shard, "refreshes") for shard in range(SHARDS)]
        assert sum(map(len, pending)) == 2
        assert shop.counts["events_processed", "refresh", "applied"] == 2


async def test_refreshes_are_shed_where_a_shard_has_no_room(open_shop: OpenShop) -> None:
    """G5: hints never hold up what follows."""

    def declare(node: forebay.Node) -> None:
        async def seat(id: str) -> int:
            await anyio.sleep_forever()
            raise AssertionError

        node.cached("seat:{id}", ttl=60)(seat)

    keys = [f"seat:{n}" for n in range(1_000)]
    events = [json.dumps({"type": "refresh", "keys": keys}).encode(), invalidate("a")]
    async with open_shop(declare=declare, durable=Durable(refreshes_max=5)) as shop:
        await apply(shop, *events)
        pending = [await shop.entries(shard, "refreshes") for shard in range(SHARDS)]
        assert all(len(each) <= 5 for each in pending)
        assert shop.counts["limit_reached", "refreshes"] >= SHARDS
        assert await dropped(shop) == ["a"]


async def test_an_event_of_the_largest_size_is_applied(open_shop: OpenShop) -> None:
    """A thousand keys and a thousand tags, ten times over, take no more than a moment."""
    events = [
        json.dumps(
            {
                "type": "invalidate",
                "keys": [f"k{batch}:{n}" for n in range(1_000)],
                "tags": [f"t{batch}:{n}" for n in range(1_000)],
            }
        ).encode()
        for batch in range(10)
    ]
    async with open_shop() as shop:
        await apply(shop, *events)
        assert len(await dropped(shop)) == 10_000
        assert await shop.dead() == []


async def test_the_effect_is_seen_by_a_whole_node(valkey_server: Any, namespace: str) -> None:
    """From XADD to the near cache and the sink, by a node as a service embeds it."""
    settings = Settings(
        node=NodeSettings(namespace=namespace), valkey=Valkey(url=valkey_server.socket_url)
    )
    node, table, loads = forebay.Node(settings=settings), Table(), []
    node.sink("flight:{id}", table)

    @node.cached("flight:{id}", ttl=60)
    async def flight(id: str) -> str:
        loads.append(id)
        return f"loaded {len(loads)}"

    async with node:
        assert await flight("1") == "loaded 1"
        valkey_server.execute("XADD", f"forebay:{namespace}:events", "*", "event", b"{")
        for raw in (write("flight:2", "new"), invalidate("flight:1")):
            valkey_server.execute("XADD", f"forebay:{namespace}:events", "*", "event", raw)
        await until(lambda: table.values() == {"flight:2": "new"})
        assert await flight("2") == "new"

        async def loaded_again() -> bool:
            return await flight("1") == "loaded 2"

        await until(loaded_again)
        assert loads == ["1", "1"]
    assert node.drained is True


async def test_a_stray_cancellation_is_told_from_one_that_was_asked_for() -> None:
    """What foreign code lets out is not ours; an exit always is."""
    assert not asked_to_stop(asyncio.CancelledError())
    assert not asked_to_stop(ValueError())
    assert asked_to_stop(SystemExit())
    seen = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError as error:
            seen.append(asked_to_stop(error))
            raise
    assert seen == [True]
    assert not asked_to_stop(asyncio.CancelledError())

"""Write-behind on a real server: W1-W5 and B1-B2, with a stop at every await."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import msgspec
import pytest

import forebay
from forebay.nodes.sinks.base import SinkBatch
from forebay.nodes.workers import sink_worker as lane_module
from forebay.nodes.workers.owned_shards import OwnedShard
from forebay.schemas.errors import FatalSinkError, Fenced, PoisonSinkError, TransientSinkError
from forebay.schemas.jobs import WriteJob, write_job
from forebay.schemas.notices import Bumped, Dropped, read_notice
from forebay.schemas.replies import following
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.eventually import until
from support.workers import SHARDS, Cut, Table, Workshop, at_work, write

OpenShop = Callable[..., AbstractAsyncContextManager[Workshop]]


async def ingest(shop: Workshop, owner: Any, *events: bytes) -> None:
    """Bring these into the writes streams, by way of ingress."""
    ids = await shop.publish(*events)
    async with at_work(shop.ingress(owner)):
        await shop.applied(ids[-1])


async def sink_all(shop: Workshop, owner: Any, **options: int) -> None:
    async with at_work(shop.write_behind(owner, **options)):
        await shop.sunk()


async def checkpoints(shop: Workshop, name: str = "table") -> dict[int, bytes]:
    parts = [shop.names.part(shard, "done") for shard in range(SHARDS)]
    found = await shop.link.call_many([("HGET", part, f"writes:{name}") for part in parts])
    return {shard: each for shard, each in enumerate(found) if each is not None}


async def pending(shop: Workshop, key: str) -> bool | None:
    """Whether the entry waits for its sink; None if there is no entry."""
    raw = await shop.link.call("GET", shop.names.entry(key))
    return None if raw is None else int(raw[46:62]) > 0


async def test_writes_reach_the_sink_with_key_fields_value_and_version(
    open_shop: OpenShop,
) -> None:
    """The sink gets all it needs, and the version is the one of the entry."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", {"gate": "B4"}), write("flight:2", None))
        entry = await shop.link.call("GET", shop.names.entry("flight:1"))
        await sink_all(shop, owner)
        one, two = sorted(table.stored, key=lambda each: each.key)
        assert (one.params, one.value) == ({"id": "1"}, {"gate": "B4"})
        assert one.version == int(entry[4:20])
        assert (two.key, two.value) == ("flight:2", None)


async def test_of_each_key_only_the_newest_write_is_sent(open_shop: OpenShop) -> None:
    """W2: a stretch of sixty writes of three keys is three rows in one batch."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, *[write(f"flight:{n % 3}", n) for n in range(60)])
        await sink_all(shop, owner)
        assert [len(batch.writes) for batch in table.batches] == [3]
        assert table.values() == {"flight:0": 57, "flight:1": 58, "flight:2": 59}


async def test_the_checkpoint_moves_only_after_the_sink(open_shop: OpenShop) -> None:
    """W1: while the sink is at it, nothing is taken as done and nothing is trimmed."""
    table = Table()
    table.hang_at = 1
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", 1))
        async with at_work(shop.write_behind(owner)):
            await table.hanging.wait()
            assert await checkpoints(shop) == {}
            assert await shop.jobs() == [("flight:1", 1)]
            assert await pending(shop, "flight:1")
            table.go_on.set()
            await shop.sunk()
        assert len(await checkpoints(shop)) == 1
        assert await pending(shop, "flight:1") is False
        assert 0 < await shop.link.call("PTTL", shop.names.entry("flight:1")) <= 60_000


async def test_all_positions_of_the_batch_go_to_the_sink(open_shop: OpenShop) -> None:
    """W1: the progress that a sink may store is that of the checkpoints after it."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, *[write(f"flight:{n}", n) for n in range(20)])
        await sink_all(shop, owner)
        (batch,) = table.batches
        assert {each.shard: each.position.encode() for each in batch.progress} == (
            await checkpoints(shop)
        )
        for each in batch.progress:
            assert each.epoch == owner.tenures[each.shard].epoch


@pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
async def test_a_crash_in_the_sink_has_no_second_effect(open_shop: OpenShop, stored: bool) -> None:
    """W1: before or after its commit, the next owner brings it to the same end."""
    table = Table()
    table.hang_at, table.hang_stored = 2, stored
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", 1), write("flight:2", 2))
        await sink_all(shop, owner)
        await ingest(shop, owner, write("flight:1", 3), write("flight:3", 4))
        async with at_work(shop.write_behind(owner)):
            await table.hanging.wait()
        await shop.forget_owners()
        await sink_all(shop, await shop.ownership("next"))
        assert table.values() == {"flight:1": 3, "flight:2": 2, "flight:3": 4}
        assert [each.value for each in table.stored if each.key == "flight:1"] == [1, 3]
        assert len(table.stored) == 4


@pytest.mark.parametrize("answered", [False, True], ids=["not sent", "no reply"])
async def test_a_crash_at_any_await_has_no_second_effect(
    open_shop: OpenShop, answered: bool
) -> None:
    """W1, W3: stopped at every call in turn; rows, dead letters and entries end the same."""
    table = Table()
    table.poison = {"bad"}
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        for at in range(1, 20):
            keys = [f"flight:{at}-{n}" for n in range(6)]
            after = {"keys": ["board:1"], "tags": ["airport:EWR"]}
            events = [write(key, f"{at} {n}", invalidates=after) for n in (1, 2) for key in keys]
            await ingest(shop, owner, *events, write(f"flight:bad-{at}", "bad"))
            cut = Cut(shop.link, at=at, answered=answered)
            async with at_work(shop.write_behind(owner, cut)):
                with anyio.move_on_after(0.5):
                    await cut.reached.wait()
            await sink_all(shop, owner)
            for key in keys:
                assert table.rows[key][1] == f"{at} 2"
                assert await pending(shop, key) is False
            assert await pending(shop, f"flight:bad-{at}") is None
            if not cut.reached.is_set():
                break
        else:
            pytest.fail("write-behind makes more calls than were tried")
        assert at > 4
        keys_stored = [each.key for each in table.stored]
        assert len(keys_stored) == len(set(keys_stored)) == 6 * at
        letters = [entry for shard in range(SHARDS) for entry in await shop.dead(shard)]
        assert len({entry["from"] for entry in letters}) == at


async def test_writes_of_a_shard_arrive_in_their_order(open_shop: OpenShop) -> None:
    """Two keys of one shard: a reader of the table never sees the later without the earlier."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        first, second = shop.key(1), shop.key(1, number=1)
        await ingest(shop, owner, *[write((first, second)[n % 2], n) for n in range(40)])
        await sink_all(shop, owner, flush_rows_max=1)
        assert [each.value for each in table.stored] == list(range(40))
        versions = [each.version for each in table.stored]
        assert versions == sorted(set(versions))


async def test_invalidations_come_after_the_sink_and_before_the_checkpoint(
    open_shop: OpenShop,
) -> None:
    """W3: who loads because of them finds the new row; a crash in between repeats them."""
    table = Table()
    story: list[str] = []

    class Telling(Cut):
        async def _pass(self, calls: Any, send: Any) -> Any:
            for args in calls:
                if args[0] == "PING":
                    story.append("invalidate")
                elif args[0] == "EVALSHA" and "writes:table" in args:
                    story.append("checkpoint")
            return await super()._pass(calls, send)

    store = table._store
    table._store = lambda batch: (story.append("sink"), store(batch))[1]  # type: ignore[method-assign]
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        after = {"keys": ["board:1"], "tags": ["airport:EWR"]}
        await ingest(shop, owner, write("flight:1", 1, invalidates=after))
        async with at_work(shop.write_behind(owner, Telling(shop.link))):
            await shop.sunk()
        assert story == ["sink", "invalidate", "checkpoint"]
        told = []
        for shard in range(SHARDS):
            told += [read_notice(entry["n"]) for entry in await shop.entries(shard, "log")]
        dropped = [each.keys for each in told if isinstance(each, Dropped) and each.keys]
        assert dropped == [("board:1",)]
        assert [each.tags for each in told if isinstance(each, Bumped)] == [("airport:EWR",)]


async def test_what_superseded_writes_invalidate_is_invalidated_too(open_shop: OpenShop) -> None:
    """W3: the row came by way of all of them, though only the last was sent."""
    async with open_shop(sinks={"flight:{id}": Table()}) as shop:
        owner = await shop.ownership()
        events = [write("flight:1", n, invalidates={"keys": [f"board:{n}"]}) for n in range(3)]
        await ingest(shop, owner, *events)
        await sink_all(shop, owner)
        told: list[str] = []
        for shard in range(SHARDS):
            notices = [read_notice(entry["n"]) for entry in await shop.entries(shard, "log")]
            told += [key for each in notices if isinstance(each, Dropped) for key in each.keys]
        assert sorted(told) == ["board:0", "board:1", "board:2"]


async def test_very_many_invalidations_are_carried_out(open_shop: OpenShop) -> None:
    """W3: sixty writes that name a thousand keys each end, and in parts."""
    async with open_shop(sinks={"flight:{id}": Table()}) as shop:
        owner, cut = await shop.ownership(), Cut(shop.link)
        events = [
            write(f"flight:{n}", n, invalidates={"keys": [f"b{n}:{i}" for i in range(1_000)]})
            for n in range(60)
        ]
        await ingest(shop, owner, *events)
        async with at_work(shop.write_behind(owner, cut)):
            await shop.sunk()
        parts = sum(args[0] == "PING" for call in cut.calls for args in call)
        assert parts >= 60


@pytest.mark.parametrize("error", [TransientSinkError("away"), FatalSinkError("no such table")])
async def test_a_sink_that_is_away_holds_up_no_other(open_shop: OpenShop, error: Exception) -> None:
    """B1: the other goes on for many rounds; what the first missed waits in the streams."""
    away, well = Table("away"), Table("well")
    away.faults = [error] * 10_000
    sinks = {"flight:{id}": away, "crew:{id}": well}
    async with open_shop(sinks=sinks) as shop:
        owner = await shop.ownership()
        behind = shop.write_behind(owner)
        async with at_work(behind):
            for n in range(5):
                await ingest(shop, owner, write("flight:1", n), write("crew:1", n))
                await until(lambda n=n: well.values() == {"crew:1": n})
            assert away.values() == {}
            waiting = [value for key, value in await shop.jobs() if key == "flight:1"]
            assert waiting == list(range(5))
            away.faults.clear()
            await shop.sunk()
        assert away.values() == {"flight:1": 4}
        assert await checkpoints(shop, "away") == await checkpoints(shop, "well")


async def test_with_two_sinks_the_slower_one_decides_what_is_trimmed(open_shop: OpenShop) -> None:
    """W1, B1: after a restart each sink goes on where it was itself."""
    slow, fast = Table("slow"), Table("fast")
    slow.hang_at = 1
    async with open_shop(sinks={"flight:{id}": slow, "crew:{id}": fast}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, *[write(f"{kind}:1", 1) for kind in ("flight", "crew")])
        async with at_work(shop.write_behind(owner)):
            await slow.hanging.wait()
            await until(lambda: fast.values() == {"crew:1": 1})
            shard = shop.names.shard("crew:1")

            async def committed() -> bool:
                return shard in await checkpoints(shop, "fast")

            await until(committed)
            assert ("flight:1", 1) in await shop.jobs()
        await sink_all(shop, owner)
        assert slow.values() == {"flight:1": 1}
        assert len(fast.stored) == 1


async def test_poison_is_a_dead_letter_and_its_neighbours_are_stored(open_shop: OpenShop) -> None:
    """The original bytes, the reason, and the key is not served any more as if it were so."""
    table = Table()
    table.poison = {"bad"}
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        keys = [shop.key(1, number=n) for n in range(5)]
        await ingest(
            shop, owner, *[write(key, "bad" if n == 2 else n) for n, key in enumerate(keys)]
        )
        raw = (await shop.entries(1, "writes"))[2]["j"]
        await sink_all(shop, owner)
        assert set(table.values().values()) == {0, 1, 3, 4}
        (letter,) = await shop.dead(1)
        assert (letter["event"], letter["reason"]) == (raw, b"sink_refused")
        assert letter["problem"].decode() == f"will not take {keys[2]}"
        assert await pending(shop, keys[2]) is None
        assert await pending(shop, keys[3]) is False
        alone = [b for b in table.batches if [each.key for each in b.writes] == [keys[2]]]
        assert len(alone) == 2  # attempts_max


async def test_the_write_before_a_refused_one_is_not_lost(open_shop: OpenShop) -> None:
    """W2: coalescing must not make a good write share the fate of a bad one."""
    table = Table()
    table.poison = {"bad", "worse"}
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        values = ["old", "good", "bad", "worse"]
        await ingest(shop, owner, *[write("flight:1", value) for value in values])
        await sink_all(shop, owner)
        assert table.values() == {"flight:1": "good"}
        assert len(await shop.dead(shop.names.shard("flight:1"))) == 2
        assert await pending(shop, "flight:1") is None


GOOD = write_job(WriteJob(key="flight:9", value=msgspec.msgpack.encode("good")))
UNREADABLE: dict[str, tuple[list[bytes], str, bytes]] = {
    "no job": ([b"j", b"\xc1", b"v", b"1"], "undecodable", b"\xc1"),
    "empty": ([b"j", b"", b"v", b"1"], "undecodable", b""),
    "deep": ([b"j", b"\x91" * 50_000, b"v", b"1"], "undecodable", b"\x91" * 50_000),
    "no field": ([b"x", b"\xff"], "undecodable", b"x \xff"),
    "version": ([b"j", GOOD, b"v", b"one"], "undecodable", GOOD),
    "no version": ([b"j", GOOD], "undecodable", GOOD),
    "version of many digits": ([b"j", GOOD, b"v", b"9" * 5_000], "undecodable", GOOD),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_what_is_no_job_is_a_dead_letter(open_shop: OpenShop, name: str) -> None:
    """Whatever stands in the stream, its bytes are kept and the next write is stored."""
    fields, reason, raw = UNREADABLE[name]
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner, stream = await shop.ownership(), shop.names.part(0, "writes")
        await shop.link.call("XADD", stream, "*", *fields)
        await shop.link.call("XADD", stream, "*", "v", 7, "j", GOOD)
        await sink_all(shop, owner)
        assert table.values() == {"flight:9": "good"}
        (letter,) = await shop.dead(0)
        assert (letter["reason"].decode(), letter["event"]) == (reason, raw)


@pytest.mark.parametrize(
    "job,reason",
    [
        (WriteJob(key="flight:1", value=b"\xc1"), "undecodable"),
        (WriteJob(key="flight:1", value=b"\x91" * 50_000), "undecodable"),
        (WriteJob(key="flight:1", value=b"\xa1\xff"), "undecodable"),
        (WriteJob(key="flight:1", value=b""), "undecodable"),
    ],
)
async def test_a_job_that_no_sink_can_take_is_a_dead_letter(
    open_shop: OpenShop, job: WriteJob, reason: str
) -> None:
    """With one sink or none, and the next write is stored."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner, stream = await shop.ownership(), shop.names.part(0, "writes")
        await shop.link.call("XADD", stream, "*", "v", 6, "j", write_job(job))
        await shop.link.call("XADD", stream, "*", "v", 7, "j", GOOD)
        await sink_all(shop, owner)
        (letter,) = await shop.dead(0)
        assert letter["reason"].decode() == reason
        assert table.values() == {"flight:9": "good"}


async def test_a_late_owner_changes_nothing(open_shop: OpenShop) -> None:
    """W4: it wakes up in its sink after another took over; sink and checkpoint refuse it."""
    table = Table()
    table.hang_at = 1
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        old = await shop.ownership("old")
        await ingest(shop, old, write("flight:1", "first"))
        async with at_work(shop.write_behind(old)):
            await table.hanging.wait()
            await shop.forget_owners()
            new = await shop.ownership("new")
            async with at_work(shop.write_behind(new)):
                await shop.sunk()
                await ingest(shop, new, write("flight:1", "second"))
                await shop.sunk()
                done = await checkpoints(shop)
                shard = shop.names.shard("flight:1")
                table.go_on.set()
                await until(lambda: shard not in old.tenures)
                assert await checkpoints(shop) == done
        assert table.values() == {"flight:1": "second"}
        assert [each.value for each in table.stored] == ["first", "second"]


async def test_the_checkpoint_refuses_a_late_owner_whose_sink_does_not(
    open_shop: OpenShop,
) -> None:
    """W4: a sink without fences stores twice what is the same; the checkpoint stays put."""
    table = Table()
    table.hang_at, table.hang_stored, table.fences = 1, True, False
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        old = await shop.ownership("old")
        await ingest(shop, old, write("flight:1", "first"))
        async with at_work(shop.write_behind(old)):
            await table.hanging.wait()
            await shop.forget_owners()
            new = await shop.ownership("new")
            await sink_all(shop, new)
            await ingest(shop, new, write("flight:1", "second"))
            await sink_all(shop, new)
            done = await checkpoints(shop)
            table.go_on.set()
            await until(lambda: shop.counts["fenced",] == 1)
            assert await checkpoints(shop) == done
        assert table.values() == {"flight:1": "second"}
        assert await pending(shop, "flight:1") is False


async def test_what_a_sink_fences_holds_up_its_own_shard_only(open_shop: OpenShop) -> None:
    """W4: a progress row from a later epoch stops one shard; it is given up, not retried."""
    table = Table()
    table.epochs[1] = 1 << 60
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        keys = [shop.key(shard) for shard in range(SHARDS)]
        await ingest(shop, owner, *[write(key, n) for n, key in enumerate(keys)])
        async with at_work(shop.write_behind(owner)):
            await until(lambda: len(table.stored) == SHARDS - 1)
            await until(lambda: 1 not in owner.tenures)
        assert set(table.values()) == {*keys} - {keys[1]}
        assert await shop.jobs() == [(keys[1], 1)]


async def test_yielding_waits_for_the_flush_under_way(open_shop: OpenShop) -> None:
    """B2: when it returns, nothing of these shards is under way, and no more is begun."""
    table = Table()
    table.hang_at = 1
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", 1))
        behind, tenures = shop.write_behind(owner), list(owner.tenures.values())
        async with at_work(behind), anyio.create_task_group() as tasks:
            await table.hanging.wait()
            tasks.start_soon(behind.yielding, tenures)
            await anyio.wait_all_tasks_blocked()
            await ingest_only(shop, "flight:2")
            table.go_on.set()
        assert len(await checkpoints(shop)) == 1
        assert table.values() == {"flight:1": 1}


async def ingest_only(shop: Workshop, key: str) -> None:
    shard, job = shop.names.shard(key), WriteJob(key=key, value=msgspec.msgpack.encode(1))
    await shop.link.call("XADD", shop.names.part(shard, "writes"), "*", "v", 9, "j", write_job(job))


async def test_yielding_does_not_wait_for_a_sink_that_is_away(open_shop: OpenShop) -> None:
    """B2: trying again ends when the shard is yielded; others do the work."""
    table = Table()
    table.faults = [TransientSinkError("away")] * 10_000
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", 1))
        behind = shop.write_behind(owner)
        async with at_work(behind):
            await until(lambda: len(table.batches) > 2)
            with anyio.fail_after(2):
                await behind.yielding(list(owner.tenures.values()))
            assert not any(holding.busy for holding in behind._holdings.values())
            tried = len(table.batches)
            await anyio.sleep(0.3)
            assert len(table.batches) == tried
        await shop.forget_owners()
        table.faults.clear()
        await sink_all(shop, await shop.ownership("next"))
        assert table.values() == {"flight:1": 1}


@pytest.mark.parametrize("rows_max", [1, 3, 1_000])
async def test_a_round_takes_no_more_rows_than_set(open_shop: OpenShop, rows_max: int) -> None:
    """W5: and every shard gets its turn, also when a round has room for fewer shards."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, *[write(f"flight:{n}", n) for n in range(60)])
        behind = shop.write_behind(owner, flush_rows_max=rows_max)
        async with at_work(behind):
            with anyio.fail_after(10):
                await behind.empty()
            assert await shop.jobs() == []
        assert len(table.rows) == 60
        assert max(len(batch.writes) for batch in table.batches) <= rows_max
        if rows_max == 1:
            first = [shop.names.shard(batch.writes[0].key) for batch in table.batches[:SHARDS]]
            assert len(set(first)) == SHARDS


async def test_large_values_make_the_next_rounds_smaller(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W5: a round reads about so many bytes, whatever the number of rows allowed."""
    monkeypatch.setattr(lane_module, "_BYTES_MAX", 40_960)
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        keys = [shop.key(1, number=n) for n in range(40)]
        await ingest(shop, owner, *[write(key, "x" * 20_000) for key in keys])
        await sink_all(shop, owner)
        assert len(table.rows) == 40
        assert max(len(batch.writes) for batch in table.batches[1:]) <= 2


async def test_empty_ends_when_nothing_is_left(open_shop: OpenShop) -> None:
    """A drain of the last worker: also what arrives while it waits, if it was before."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        behind = shop.write_behind(owner)
        async with at_work(behind):
            for n in range(5):
                await ingest_only(shop, f"flight:{n}")
                await behind.empty()
                assert len(table.rows) == n + 1
                assert await shop.jobs() == []
            assert behind.backlog == 0


async def test_work_goes_on_after_the_connection_was_lost(open_shop: OpenShop) -> None:
    """W1: whatever a round had done, it is done again, and nothing is lost."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, *[write(f"flight:{n}", n) for n in range(30)])
        table.hang_at, table.hang_stored = 1, True
        async with at_work(shop.write_behind(owner)):
            await table.hanging.wait()
            connects = shop.link.connects
            shop.node._parts.backend.link._wire.drop("by the test")
            table.go_on.set()
            await until(lambda: shop.link.connects > connects)
            await shop.sunk()
        assert len(table.rows) == len(table.stored) == 30


async def test_a_write_refused_for_a_moment_is_not_a_dead_letter(open_shop: OpenShop) -> None:
    """Attempts are counted, so what recovers within them is stored."""
    table = Table()
    table.faults = [PoisonSinkError("constraint")]
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", 1))
        await sink_all(shop, owner)
        assert table.values() == {"flight:1": 1}
        assert await shop.dead(shop.names.shard("flight:1")) == []


async def test_a_sink_that_was_cancelled_from_within_ends_nobodys_work(
    open_shop: OpenShop,
) -> None:
    """A future cancelled elsewhere gets out of the sink; the lane stays."""
    table, calls = Table(), 0
    store = table.write

    async def leak(batch: SinkBatch) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        await store(batch)

    table.write = leak  # type: ignore[method-assign]
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write("flight:1", 1))
        await sink_all(shop, owner)
        assert table.values() == {"flight:1": 1}


def test_the_slowest_lane_decides_what_was_passed() -> None:
    """An entry is trimmed when every lane is past it; one that has not begun is past nothing."""
    holding = OwnedShard(object(), ["a", "b", "c"])  # type: ignore[arg-type]
    holding.places[0].position, holding.places[1].position = "10-9", "9-30"
    assert holding.passed == "0-0"
    holding.places[2].position = "10-10"
    assert holding.passed == "9-30"
    assert following(holding.passed) == "9-31"


async def test_a_fenced_error_of_ours_is_not_taken_for_the_sinks(open_shop: OpenShop) -> None:
    """W4: a lease that ran out in a pause is not reported as if the sink had refused."""
    table = Table()
    table.faults = [Fenced("x", 1, 2)]
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        await ingest(shop, owner, write(shop.key(0), 1), write(shop.key(1), 2))
        await sink_all(shop, owner)
        assert len(table.rows) == 2
        assert len(owner.tenures) == SHARDS + 1


async def test_write_behind_of_a_whole_node(valkey_server: Any, namespace: str) -> None:
    """From ``write_behind`` to the sink, and back into the cache after an invalidation."""
    node = forebay.Node(
        settings=Settings(
            node=NodeSettings(namespace=namespace), valkey=Valkey(url=valkey_server.socket_url)
        )
    )
    table = Table()
    node.sink("seat:{id}", table)

    @node.cached("seat:{id}", ttl=60)
    async def seat(id: int) -> str | None:
        return table.values().get(f"seat:{id}")

    async with node:
        for n in range(30):
            await seat.write_behind(n % 10, f"row {n}")
        assert await seat(9) == "row 29"
        await until(lambda: len(table.rows) == 10 and table.rows["seat:9"][1] == "row 29")
        await seat.invalidate(9)
        assert await seat(9) == "row 29"
    assert node.drained is True


async def test_a_locked_row_holds_up_its_own_shard_only(open_shop: OpenShop) -> None:
    """W6: before, during and after; its shard's other keys are stored, the checkpoint waits."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        locked, beside = shop.key(1), shop.key(1, number=1)
        others = [shop.key(shard) for shard in (0, 2, 3)]
        table.locked = {locked}
        await ingest(shop, owner, *[write(key, 1) for key in (locked, beside, *others)])
        async with at_work(shop.write_behind(owner)):
            await until(lambda: set(table.rows) == {beside, *others})
            await until(_committed(shop, {0, 2, 3}))
            await ingest(shop, owner, *[write(key, 2) for key in (locked, beside, *others)])
            await until(_committed(shop, {0, 2, 3}))
            assert {key: table.values()[key] for key in others} == dict.fromkeys(others, 2)
            assert await pending(shop, locked)
            table.locked.clear()
            await shop.sunk()
        assert table.values() == dict.fromkeys((locked, beside, *others), 2)
        assert [each.value for each in table.stored if each.key == locked] == [1, 2]


def _committed(shop: Workshop, shards: set[int]) -> Callable[[], Any]:
    async def empty() -> bool:
        streams = [shop.names.part(shard, "writes") for shard in range(SHARDS)]
        lengths = await shop.link.call_many([("XLEN", name) for name in streams])
        return not any(length for shard, length in enumerate(lengths) if shard in shards)

    return empty


async def test_a_shard_that_waits_for_a_locked_row_is_handed_over(open_shop: OpenShop) -> None:
    """W4, W6: yielding ends the waiting at once, and the next owner stores the write."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        one = await shop.ownership("one")
        table.locked = {shop.key(1)}
        await ingest(shop, one, write(shop.key(1), 1))
        lanes = shop.write_behind(one)
        async with at_work(lanes):
            await until(lambda: any(lane._place(lanes._holdings[1]).parked for lane in lanes.lanes))
            await one.leave()
            assert one.tenures == {}
            two = await shop.ownership("two")
            table.locked.clear()
            await sink_all(shop, two)
        assert table.values() == {shop.key(1): 1}
        assert shop.counts["fenced",] == 0


async def test_many_locked_rows_are_stored_once_they_are_free(open_shop: OpenShop) -> None:
    """W6: a table that is locked as a whole stops all shards, loses nothing, and comes back."""
    table = Table()
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        keys = [shop.key(shard, number=number) for shard in range(SHARDS) for number in range(5)]
        table.locked = set(keys)
        await ingest(shop, owner, *[write(key, 1) for key in keys])
        async with at_work(shop.write_behind(owner)):
            await until(lambda: len({b.writes[0].key for b in table.batches if b.writes}) >= SHARDS)
            assert table.rows == {}
            table.locked.clear()
            await shop.sunk()
        assert table.values() == dict.fromkeys(keys, 1)


@pytest.mark.parametrize("part", ["writes", "done", "dead"])
async def test_one_key_of_another_type_costs_its_shard_only(open_shop: OpenShop, part: str) -> None:
    """W8: the others are sunk, the key is named, and the shard continues after the repair."""
    table = Table()
    table.poison = {1}  # of the shard at fault: a dead letter is to be kept
    async with open_shop(sinks={"flight:{id}": table}) as shop:
        owner = await shop.ownership()
        name = shop.names.part(1, part)
        keys = [shop.key(shard) for shard in range(SHARDS)]
        await ingest(shop, owner, *[write(key, n) for n, key in enumerate(keys)])
        await shop.link.call("RENAMENX", name, "aside") if part == "writes" else None
        await shop.link.call("SET", name, "not ours")
        worker = shop.write_behind(owner)
        lane = worker.lanes[0]
        async with at_work(worker):
            await until(lambda: len(table.rows) == SHARDS - 1)
            await until(lambda: 1 in lane.refused)
            failing = lane.refused[1].failing
            assert failing is not None
            assert name in failing.error or (part == "dead" and "{" in failing.error)
            await shop.link.call("DEL", name)
            await until(lambda: not lane.refused)
        assert set(table.rows) == {key for n, key in enumerate(keys) if n != 1}

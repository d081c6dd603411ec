"""Writing through, on every kind of backend: write_begin, what a commit tells, and two nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

import forebay
from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.errors import Unconfirmed
from forebay.schemas.keys import dependents_of
from forebay.schemas.notices import Changed
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.scripts import MINUTE_MS, Desk
from support.workers import Table

# write_begin


async def test_a_write_gets_the_lease_though_there_is_an_entry(desk: Desk) -> None:
    """write_begin I3, I5: with a version after the entry's; entry and log are as they were."""
    before, log = await desk.put("old"), await desk.log()
    code, version = await desk.begin_write("mine")
    assert code == 1
    assert int(version) > before
    assert (await desk.entry()).payload == b"old"
    assert await desk.log() == log
    assert await desk.lease() == b"mine"
    assert 0 < await desk.commands.call("PTTL", desk.names.lease("k")) <= MINUTE_MS
    assert (await desk.fill_write("mine", "new"))[0] == 1
    assert (await desk.entry()).version > int(version)


async def test_a_write_waits_for_whoever_has_the_lease(desk: Desk) -> None:
    """write_begin I1, I2: be it a load or a write; asked again, the same is granted later."""
    await desk.begin("load")
    code, left_ms = await desk.begin_write("mine")
    assert (code, await desk.lease()) == (0, b"load")
    assert 0 < int(left_ms) <= MINUTE_MS
    await desk.release("load")
    _, first = await desk.begin_write("mine")
    _, again = await desk.begin_write("mine")
    assert int(again) > int(first)
    assert (await desk.begin_write("other"))[0] == 0
    assert (await desk.begin("load", seen=1 << 62))[0] == 0


async def test_a_write_waits_for_a_pending_write_behind(desk: Desk) -> None:
    """write_begin I4: also if it was invalidated meanwhile."""
    _, epoch, *_ = await desk.claim("a")
    _, version, _, _, job_id, _ = await desk.write("behind")
    assert await desk.begin_write("mine") == [2]
    await desk.invalidate()
    assert await desk.begin_write("mine") == [2]
    assert await desk.lease() is None
    await desk.commit("a", int(epoch), bytes(job_id).decode(), [("k", int(version))])
    assert (await desk.begin_write("mine"))[0] == 1


@pytest.mark.parametrize("lost", ["nothing", "head", "log", "both"])
async def test_a_version_of_a_write_is_not_given_again(desk: Desk, lost: str) -> None:
    """write_begin I3: nor is an id of the log, though it has none for the write."""
    await desk.put("old")
    positions = [each.position for each in await desk.log()]
    _, version = await desk.begin_write("mine")
    if lost in ("head", "both"):
        await desk.commands.call("DEL", desk.part("head"))
    if lost in ("log", "both"):
        await desk.commands.call("DEL", desk.part("log"))
    assert await desk.put("new") > int(version)
    assert (await desk.log())[-1].position > positions[-1]


async def test_versions_of_writes_grow_though_the_clock_goes_back(desk: Desk) -> None:
    """write_begin I3: also over an hour, and in a shard that had no change yet."""
    _, first = await desk.begin_write("mine")
    future = int(first) + 3_600_000_000
    await desk.commands.call("HSET", desk.part("head"), "v", future)
    _, second = await desk.begin_write("mine")
    assert int(second) == future + 1
    assert await desk.put() == future + 2


async def test_a_source_that_failed_lately_is_written_all_the_same(desk: Desk) -> None:
    """write_begin I1: what keeps loads away is no holder."""
    await desk.put("old")
    await desk.commands.call("SET", desk.names.lease("k"), "!", "PX", MINUTE_MS)
    assert (await desk.begin_write("mine"))[0] == 1
    assert await desk.lease() == b"mine"


# write_fill


async def test_only_the_holder_of_the_lease_fills(desk: Desk) -> None:
    """write_fill I1, I2: once; a notice says what it says of a write."""
    await desk.begin_write("mine")
    assert await desk.fill_write("other") == [0]
    code, version, soft_at_ms, hard_at_ms = await desk.fill_write("mine", "new")
    entry = await desk.entry()
    assert (code, entry.version, entry.payload) == (1, int(version), b"new")
    assert (entry.soft_at_ms, entry.hard_at_ms) == (int(soft_at_ms), int(hard_at_ms))
    assert await desk.lease() is None
    assert await desk.fill_write("mine") == [0]
    logged = (await desk.log())[-1]
    assert (logged.version, logged.notice) == (int(version), Changed("k", outdates=True))


async def test_a_write_behind_in_between_is_not_overwritten(desk: Desk) -> None:
    """write_fill I1: it has taken the lease away; nor where it is pending."""
    await desk.begin_write("mine")
    await desk.write("behind")
    assert await desk.fill_write("mine") == [0]
    await desk.commands.call("SET", desk.names.lease("k"), "mine")
    assert await desk.fill_write("mine") == [0]
    assert (await desk.entry()).payload == b"behind"


async def test_what_depends_on_a_key_is_outdated_by_its_write(desk: Desk) -> None:
    """write_fill I3: the tag named after the key has the version of the write."""
    await desk.capture(dependents_of("k"))
    await desk.begin_write("mine")
    _, version, *_ = await desk.fill_write("mine")
    assert await desk.capture(dependents_of("k")) == [int(version)]


# checkpoint_commit


async def test_a_commit_is_told_on_the_channel_of_jobs(desk: Desk, backend: Backend) -> None:
    """checkpoint_commit I4: to whoever waits for it; one that is fenced off tells nothing."""
    heard: list[tuple[bytes, bytes]] = []
    pubsub = backend.pubsub
    pubsub.on_message(lambda channel, payload: heard.append((channel, payload)))
    pubsub.subscribe(desk.names.work.encode())
    with anyio.fail_after(20):
        while not await desk.commands.call("PUBLISH", desk.names.work, "hello"):
            await anyio.sleep(0.005)
    _, epoch, *_ = await desk.claim("a")
    await desk.commit("b", int(epoch), "5-0")
    await desk.commit("a", int(epoch), "6-0")
    told = (desk.names.work.encode(), f"d {desk.shard}".encode())
    await until(lambda: told in heard)
    assert heard.count(told) == 1


# Two nodes


class Shop:
    def __init__(self, name: str, namespace: str, valkey: Valkey, table: Table) -> None:
        self.loads = 0
        self.node = forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=namespace, id=name, shards=4),
                valkey=valkey,
                workers=Workers(enabled=name == "a", beat_ms=100, flush_delay_ms=0),
            )
        )

        @self.node.cached("row:{id}", ttl=60, tags=["rows"])
        async def row(id: int) -> str | None:
            self.loads += 1
            return table.values().get(f"row:{id}")

        self.row = row
        self.node.sink("row:{id}", table)


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
async def shops(
    backend_settings: Valkey, namespace: str, table: Table
) -> AsyncIterator[tuple[Shop, Shop]]:
    """One that works, and one that does not."""
    async with AsyncExitStack() as stack:
        made = [Shop(name, namespace, backend_settings, table) for name in ("a", "b")]
        for shop in made:
            await stack.enter_async_context(shop.node)
        yield made[0], made[1]


@pytest.mark.parametrize("way", ["put", "write_through", "write_around", "write_behind"])
async def test_all_nodes_read_what_one_wrote(
    shops: tuple[Shop, Shop], table: Table, way: str
) -> None:
    """Whichever way it was written, and whatever was known of the row before."""
    a, b = shops
    assert await a.row(1) is None
    assert await b.row(1) is None
    options: dict[str, Any] = {"until": "sink", "timeout": 20} if way == "write_behind" else {}
    receipt = await getattr(b.row, way)(1, "new", **options)
    if way != "put":
        assert (receipt.reached, table.values()) == ("sink", {"row:1": "new"})
        assert await b.row(1) == "new"

    async def read() -> bool:
        return await a.row(1) == "new" == await b.row(1)

    await until(read)
    await b.node.invalidate(tags=["rows"])
    assert await b.row(1) == table.values().get("row:1")


async def test_nobody_has_replicas_here(shops: tuple[Shop, Shop]) -> None:
    """Where there are none, and where the server knows none, it is said in time."""
    with pytest.raises(Unconfirmed):
        await shops[1].row.put(1, "new", until="replicated", timeout=0.05)
    assert await shops[1].row(1) == "new"

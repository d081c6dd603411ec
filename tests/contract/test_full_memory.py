"""When the server's memory is full (maxmemory, noeviction): nothing half done.

The server refuses only a script's first write, and only if it is one that may need memory.
So a change is refused as a whole. A script that frees memory, keeps the order of those that do, or
lets a node start, begins with a write that is never refused. Every script is in one of the tables
here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.errors import ServerRefused
from forebay.schemas.keys import EVENTS
from support.scripts import SCRIPTS, Desk

Full = Callable[[], "asynccontextmanager[None]"]
Act = Callable[[Desk], Awaitable[object]]


@pytest.fixture
async def full(backend: Backend, not_on_fake: Callable[[str], None]) -> AsyncIterator[object]:
    """``async with full():`` the server's memory is full."""
    not_on_fake("has no maxmemory")

    @asynccontextmanager
    async def while_full() -> AsyncIterator[None]:
        await backend.link.call("CONFIG", "SET", "maxmemory", 1)
        try:
            yield
        finally:
            await backend.link.call("CONFIG", "SET", "maxmemory", 0)

    yield while_full
    await backend.link.call("CONFIG", "SET", "maxmemory", 0)


async def some_state(desk: Desk) -> None:
    """An entry, a lease, a pending write, an owner, a tag and events are there."""
    await desk.put("value")
    await desk.write("pending", key="pending")
    await desk.begin("mine", key="absent")
    await desk.claim("a")
    await desk.put("value", key="stale")
    await desk.begin("mine", key="stale", seen=1 << 62)
    await desk.put("value", key="failed")
    await desk.begin("mine", key="failed", seen=1 << 62)
    await desk.fail("mine", key="failed")
    await desk.capture("known")
    await desk.capture("base")
    await desk.publish("event")
    await desk.beat("a")
    await desk.commands.call("SET", desk.names.entry("foreign"), "of others")
    await desk.commands.call("SET", own(desk, "reservation")[0], "1")
    await desk.claim_ingress("a")
    await begin_locks(desk, "held")
    await acquire(desk, "held", "p.1")


async def extend(desk: Desk) -> None:
    since = (await desk.entry("stale")).version
    await desk.extend("mine", since, key="stale")


REFUSED: dict[str, Act] = {
    "entry_begin": lambda desk: desk.begin("mine", seen=1 << 62),
    "entry_fill": lambda desk: desk.fill("mine", key="absent"),
    "entry_begin of one left alone": lambda desk: desk.begin("next", key="failed", seen=1 << 62),
    "entry_extend": extend,
    "lease_fail": lambda desk: desk.fail("mine", key="stale"),
    "entry_put": lambda desk: desk.put("newer"),
    "entry_put with a tag": lambda desk: desk.put("newer", key="base"),
    "entry_put over pending": lambda desk: desk.put("newer", key="pending"),
    "entry_write": lambda desk: desk.write("newer", mark="005", event_id="e1"),
    "write_fill": lambda desk: desk.fill_write("mine", key="absent"),
    "write_begin": lambda desk: desk.begin_write("mine"),
    "refresh_publish": lambda desk: desk.refresh("mine", seen=1 << 62),
    "event_publish": lambda desk: desk.publish("one", "two"),
    "limit_take": lambda desk: desk.run("limit_take", own(desk, "limit"), *LIMIT, "t", 1, 1),
    "lock_acquire": lambda desk: acquire(desk, "held", "p.2"),
    "lock_resize": lambda desk: desk.run("lock_resize", desk.names.lock("new"), "new", 5, 1),
    "guard_set": lambda desk: desk.run("guard_set", own(desk, "value", "fence"), 7, "value", 0),
}

#: These work: they free memory, keep the order of those that do, or let a node start.
WORKS: dict[str, Act] = {
    "entries_invalidate": lambda desk: desk.invalidate(mark="005"),
    "entries_invalidate softly": lambda desk: desk.invalidate(soft=True),
    "entries_invalidate pending": lambda desk: desk.invalidate("pending"),
    "entries_invalidate with a tag": lambda desk: desk.invalidate("base"),
    "entry_touch": lambda desk: desk.touch("foreign"),
    "tags_bump": lambda desk: desk.bump("known", mark="005"),
    "tags_bump softly": lambda desk: desk.bump("known", soft=True),
    "tags_capture of a new one": lambda desk: desk.capture("new"),
    "entry_write of ingress": lambda desk: desk.write("newer", mark="005", at_full=True),
    "log_begin": lambda desk: desk.log_begin(empty_shard(desk)),
    "lease_release": lambda desk: desk.release("mine", key="stale"),
    "legacy_begin": lambda desk: desk.run("legacy_begin", [desk.part("head")], 1 << 42),
    "owner_claim": lambda desk: desk.claim("a"),
    "owner_release": lambda desk: of_owner(desk, lambda epoch: desk.give_up("a", epoch)),
    "checkpoint_commit": lambda desk: of_owner(desk, lambda epoch: desk.commit("a", epoch, "5-0")),
    "writes_hold": lambda desk: of_owner(
        desk, lambda epoch: desk.hold("a", epoch, "5-0", source="held", token="t")
    ),
    "ingress_take": lambda desk: of_ingress(
        desk, lambda epoch: desk.take_batch("a", epoch, "5-0", "6-0")
    ),
    "ingress_commit": lambda desk: of_ingress(
        desk, lambda epoch: desk.commit_batch("a", epoch, "5-0")
    ),
    "writes_trim": lambda desk: desk.run(
        "writes_trim",
        [desk.names.part(desk.names.shard("pending"), name) for name in ("done", "writes")],
        *(f"{1 << 63}-0", "nobody", "0-0"),
    ),
    "roster_beat": lambda desk: desk.beat("b"),
    "meta_set": lambda desk: desk.run("meta_set", [desk.names.meta], "shards", 4),
    "stream_append": lambda desk: desk.append("dead", "a", "b", bound=5),
    "lock_begin": lambda desk: begin_locks(desk, "elsewhere"),
    "lock_renew": lambda desk: renew(desk, "held", "p.1"),
    "lock_reclaim": lambda desk: reclaim(desk, "elsewhere", "p.1"),
    "lock_release": lambda desk: desk.run(
        "lock_release", desk.names.lock("held"), "p.1", "", "held"
    ),
    "lock_force": lambda desk: desk.run("lock_force", desk.names.lock("held"), "held"),
    "limit_settle": lambda desk: desk.run(
        "limit_settle", own(desk, "reservation", "limit"), *LIMIT, 3
    ),
    "slot_take": lambda desk: desk.run("slot_take", own(desk, "slots"), "p.1", 60_000, 5, 0),
    "guard_delete": lambda desk: desk.run("guard_delete", own(desk, "value", "fence"), 7),
}

LIMIT = ("", "channel", "word", 1, 60_000_000, 5, 0)  #: 5 in a burst, and one a minute


def own(desk: Desk, *names: str) -> list[str]:
    return [f"{{{desk.names.namespace}}}:{name}" for name in names]


async def of_owner(desk: Desk, act: Callable[[int], Awaitable[object]]) -> object:
    return await act(int(await desk.commands.call("HGET", desk.part("own"), "e")))


async def of_ingress(desk: Desk, act: Callable[[int], Awaitable[object]]) -> object:
    name = desk.names.part(EVENTS, "own")
    return await act(int(await desk.commands.call("HGET", name, "e")))


async def begin_locks(desk: Desk, name: str) -> object:
    *_, index, era = desk.names.lock(name)
    return await desk.run("lock_begin", [era, index], 1, 1_000_000)


async def acquire(desk: Desk, name: str, nonce: str) -> object:
    terms = ("m", 1, 1, 10_000_000, "wait", 0, "", "a test", name)
    return await desk.run("lock_acquire", desk.names.lock(name), nonce, *terms)


async def renew(desk: Desk, name: str, nonce: str) -> None:
    record, _, _, index, era = desk.names.lock(name)
    token = await desk.commands.call("HGET", record, "t")
    _, status = await desk.run("lock_renew", [era, index, record], name, nonce, token, 60_000_000)
    assert status == 1


async def reclaim(desk: Desk, name: str, nonce: str) -> None:
    """Its shard has no era yet, as after a restart of the server."""
    record, queue, _, index, era = desk.names.lock(name)
    terms = (name, nonce, "m", 1, 1, 5, 1_000_000, "a test")
    assert (await desk.run("lock_reclaim", [record, index, era, queue], *terms))[0] == 1


def test_every_script_is_tried_when_memory_is_full() -> None:
    """A new script must be added to one of the two tables."""
    tried = {name.split(" ")[0] for name in (*REFUSED, *WORKS)}
    assert tried == set(SCRIPTS) - {"lock_show", "rights_check"}  # these never write


async def test_rights_are_checked_when_memory_is_full(desk: Desk, full: Full) -> None:
    """A node that starts then is not taken for one without rights."""
    async with full():
        assert await desk.run("rights_check", [], 3, "SET", desk.part("head"), "x") == []


@pytest.mark.parametrize("what", WORKS)
async def test_who_needs_it_to_empty_the_streams_or_to_start_is_served(
    desk: Desk, full: Full, what: str
) -> None:
    """The same answer and the same keys as with memory to spare."""
    desk = Desk(desk.commands, desk.names.namespace, shards=16)
    await some_state(desk)
    before = await desk.everything()
    async with full():
        await WORKS[what](desk)
    assert await desk.everything() != before


async def test_what_invalidations_add_is_bounded(desk: Desk, full: Full) -> None:
    """C7: the log keeps its newest 100 notices then, and its ids stay dense."""
    for _ in range(300):
        await desk.invalidate()
    async with full():
        for _ in range(150):
            await desk.invalidate()
        logged = await desk.log()
    assert [each.position.seq for each in logged] == list(range(349, 450))


def empty_shard(desk: Desk) -> int:
    keys = ("k", "pending", "absent", "known", "stale", "failed", "base")
    used = {desk.names.shard(key) for key in keys}
    return next(shard for shard in range(desk.names.shards) if shard not in used)


@pytest.mark.parametrize("what", REFUSED)
async def test_a_change_is_refused_as_a_whole(desk: Desk, full: Full, what: str) -> None:
    """C3: entry, notice, lease, mark and job are all as they were; afterwards it works."""
    desk = Desk(desk.commands, desk.names.namespace, shards=16)
    await some_state(desk)
    before = await desk.everything()
    async with full():
        with pytest.raises(ServerRefused) as caught:
            await REFUSED[what](desk)
    assert caught.value.code == "OOM"
    assert await desk.everything() == before
    await REFUSED[what](desk)
    assert await desk.everything() != before


async def test_whoever_empties_the_streams_is_not_held_up(desk: Desk, full: Full) -> None:
    """The lease is renewed, the checkpoint moves, the stream is trimmed, the entry makes room."""
    _, epoch, *_ = await desk.claim("a", ttl_ms=1_000)
    *_, other_id, _ = await desk.write("older")
    _, version, _, _, job_id, _ = await desk.write("value")
    async with full():
        assert (await desk.beat("a"))[2] == {"a": "active"}
        assert (await desk.claim("a"))[:2] == [1, epoch]
        (_, held) = await desk.hold("a", int(epoch), bytes(other_id).decode(), token="t")
        assert held not in (b"", b"-")
        assert await desk.length("held") == 1
        position = bytes(job_id).decode()
        assert await desk.commit("a", int(epoch), position, [("k", int(version))]) == [1]
        assert await desk.length("writes") == 0
        assert await desk.trim("99-0", "writes", position) == 1
        assert await desk.raw() is None  # as if it had expired: the source has it
        assert await desk.give_up("a", int(epoch)) == 1
        assert (await desk.claim("b", token="b"))[0] == 1
        assert (await desk.beat("a", "gone"))[2] == {"a": "gone"}


async def test_what_changes_nothing_is_answered(desk: Desk, full: Full) -> None:
    """Readers, those who are refused anyway, and those who give something back."""
    await some_state(desk)
    epoch = int(await desk.commands.call("HGET", desk.part("own"), "e"))
    (known,) = await desk.capture("known")
    async with full():
        assert await desk.begin("mine", seen=-1) == [0, await desk.raw(), 0]
        assert await desk.fill("other") == [0]
        assert await desk.extend("other", 5) == [0]
        assert await desk.extend("mine", 5, key="stale") == [2]
        assert await desk.fail("other", key="stale") == 0
        assert await desk.fail("mine", key="absent") == 0
        assert (await desk.begin("other", key="failed", seen=1 << 62, patient=True))[0] == 0
        assert await desk.touch() == [0]
        assert await desk.capture("known") == [known]
        assert (await desk.claim("b", token="b"))[0] == 0
        assert await desk.commit("a", epoch - 1, "5-0") == [0, str(epoch).encode()]
        assert await desk.log_begin() == str((await desk.log())[-1].position).encode()
        assert await desk.write(bound=0) == [0, await desk.length("writes")]
        assert await desk.release("mine", key="stale") == 1


@pytest.mark.parametrize(
    "first, refused", [("SET", True), ("HSET", True), ("XADD", True), ("DEL", False)]
)
async def test_only_a_first_write_is_refused(
    backend: Backend, namespace: str, full: Full, first: str, refused: bool
) -> None:
    """What all of the above rests on: the servers' own rule, for scripts without flags."""
    begin = {
        "SET": "redis.call('SET', KEYS[1], 1)",
        "HSET": "redis.call('HSET', KEYS[1], 'a', 1)",
        "XADD": "redis.call('XADD', KEYS[1], '*', 'a', 1)",
        "DEL": "redis.call('DEL', KEYS[1])",
    }[first]
    script = f"{begin} redis.call('SET', KEYS[2], 1) return 1"
    keys = (f"{{{namespace}}}:1", f"{{{namespace}}}:2")
    async with full():
        if refused:
            with pytest.raises(ServerRefused):
                await backend.link.call("EVAL", script, 2, *keys)
        else:
            assert await backend.link.call("EVAL", script, 2, *keys) == 1
    assert await backend.link.call("EXISTS", *keys) == (0 if refused else 1)

"""When the server's memory is full (maxmemory, noeviction): nothing half done.

The server refuses only a script's first write, and only if it is one that may need memory.
So a change is refused as a whole; and what frees memory, or keeps the order of those who do,
begins with a write that is never refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from forebay.coordinator.backend import Backend
from forebay.schemas.errors import ServerRefused
from scriptdesk import Desk

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
    "entries_invalidate": lambda desk: desk.invalidate(mark="005"),
    "entries_invalidate softly": lambda desk: desk.invalidate(soft=True),
    "entries_invalidate pending": lambda desk: desk.invalidate("pending"),
    "write_fill": lambda desk: desk.fill_write("mine", key="absent"),
    "write_begin": lambda desk: desk.begin_write("mine"),
    "entries_invalidate with a tag": lambda desk: desk.invalidate("base"),
    "entry_touch": lambda desk: desk.touch("base"),
    "tags_bump": lambda desk: desk.bump("known", mark="005"),
    "tags_bump softly": lambda desk: desk.bump("known", soft=True),
    "tags_capture of a new one": lambda desk: desk.capture("new"),
    "refresh_publish": lambda desk: desk.refresh("mine", seen=1 << 62),
    "event_publish": lambda desk: desk.publish("one", "two"),
    "log_begin": lambda desk: desk.log_begin(empty_shard(desk)),
}


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
    """The lease is renewed, the checkpoint moves, the stream is trimmed, entries may expire."""
    _, epoch, *_ = await desk.claim("a", ttl_ms=1_000)
    *_, other_id, _ = await desk.write("not here", key="pending")
    _, version, _, _, job_id, _ = await desk.write("value")
    async with full():
        assert (await desk.beat("a"))[2] == {"a": "active"}
        assert (await desk.claim("a"))[:2] == [1, epoch]
        (_, held) = await desk.hold("a", int(epoch), bytes(other_id).decode(), token="t")
        assert held
        position = bytes(job_id).decode()
        assert await desk.commit("a", int(epoch), position, [("k", int(version))]) == [1]
        assert await desk.length("writes") == 0
        assert (await desk.entry()).pending == 0
        assert await desk.ttl_ms() > 0
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

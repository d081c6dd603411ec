"""The scripts of ingress on every kind of backend: generations, the last id, full memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.keys import EVENTS
from forebay.schemas.replies import LAST_ID
from support.scripts import Desk


async def add(desk: Desk, entry_id: str, event: str = "x") -> str:
    reply = await desk.commands.call("XADD", desk.names.events, entry_id, "event", event)
    return bytes(reply).decode()


async def length(desk: Desk, name: str) -> int:
    key = desk.names.events if name == "events" else desk.names.part(EVENTS, name)
    return int(await desk.commands.call("XLEN", key))


async def ahead(desk: Desk) -> str:
    return f"{await desk.now_us() // 1_000 + 3_600_000}-0"


async def test_the_first_batch_begins_a_generation_and_others_keep_it(desk: Desk) -> None:
    """ingress_take I1, I2: also when it is taken again, by another owner."""
    epoch = await desk.claim_ingress("a")
    first, last = await add(desk, "*"), await add(desk, "*")
    done, generation, ahead_ms, why = await desk.take_batch("a", epoch, first, last)
    assert (done, ahead_ms, why) == (1, b"0", b"begun")
    assert await desk.take_batch("a", epoch, first, last) == [1, generation, b"0", b""]
    assert await desk.commit_batch("a", epoch, last) == [1, b""]
    third = await add(desk, "*")
    assert await desk.take_batch("a", epoch, third, third) == [1, generation, b"0", b""]


@pytest.mark.parametrize("committed", [True, False])
async def test_ids_that_went_back_begin_a_generation(desk: Desk, committed: bool) -> None:
    """ingress_take I1: the stream was deleted, after the batch was committed or before."""
    epoch = await desk.claim_ingress("a")
    first, last = await add(desk, await ahead(desk)), await add(desk, "*")
    _, old, ahead_ms, _ = await desk.take_batch("a", epoch, first, last)
    assert 3_000_000 < int(ahead_ms) <= 3_600_000
    later = await add(desk, "*")
    if committed:
        assert await desk.commit_batch("a", epoch, last) == [1, b""]
    await desk.commands.call("DEL", desk.names.events)
    first = await add(desk, "*")
    assert first < later
    done, generation, _, why = await desk.take_batch("a", epoch, first, first)
    assert (done, why) == (1, b"replaced")
    assert int(generation) > int(old)
    assert await desk.take_batch("a", epoch, first, first) == [1, generation, b"0", b""]


async def test_an_id_given_twice_is_told_by_the_entry(desk: Desk) -> None:
    """ingress_take I1: the same id by hand, after a DEL, for another event."""
    epoch = await desk.claim_ingress("a")
    at = await add(desk, await ahead(desk), "one")
    _, generation, *_ = await desk.take_batch("a", epoch, at, at)
    assert (await desk.take_batch("a", epoch, at, at))[1] == generation
    await desk.commands.call("DEL", desk.names.events)
    await add(desk, at, "two")
    assert (await desk.take_batch("a", epoch, at, at, digest="0b"))[3] == b"replaced"


async def test_marks_that_are_newer_than_the_stream_begin_a_generation(desk: Desk) -> None:
    """ingress_take I1: the stream's slot was restored, or failed over to a replica behind."""
    epoch = await desk.claim_ingress("a")
    at = await add(desk, "*")
    _, generation, *_ = await desk.take_batch("a", epoch, at, at)
    mark = f"{int(generation) + 5} 1-1"
    _, restored, _, why = await desk.take_batch("a", epoch, at, at, mark=mark)
    assert why == b"restored"
    assert int(restored) > int(generation) + 5
    lost = f"{int(restored)} {await ahead(desk)}"
    _, after, _, why = await desk.take_batch("a", epoch, at, at, mark=lost)
    assert why == b"lost"
    assert int(after) > int(restored)
    known = f"{int(after)} 1-1"
    assert (await desk.take_batch("a", epoch, at, at, mark=known))[3] == b""


async def test_a_drained_stream_that_was_ahead_begins_anew(desk: Desk) -> None:
    """ingress_commit I2: stream, checkpoint and generation at once; not while entries wait."""
    epoch = await desk.claim_ingress("a")
    first, last = await add(desk, await ahead(desk)), await add(desk, "*")
    _, generation, *_ = await desk.take_batch("a", epoch, first, last)
    assert await desk.commit_batch("a", epoch, first) == [1, b""]
    assert await desk.commit_batch("a", epoch, last) == [1, b"drained"]
    assert await desk.commands.call("EXISTS", desk.names.events) == 0
    done = desk.names.part(EVENTS, "done")
    checkpoint, renewed = await desk.commands.call("HMGET", done, "events", "g")
    assert checkpoint == b"0-0"
    assert int(renewed) > int(generation)
    assert await add(desk, "*") < last


async def test_an_exhausted_stream_is_set_aside_and_drained_first(desk: Desk) -> None:
    """ingress_take I3, ingress_commit I2, event_publish I2."""
    epoch = await desk.claim_ingress("a")
    first = await add(desk, "*")
    await add(desk, LAST_ID)
    _, generation, *_ = await desk.take_batch("a", epoch, first, LAST_ID)
    assert (await length(desk, "events"), await length(desk, "before")) == (0, 2)
    await add(desk, "*")
    assert await desk.commit_batch("a", epoch, LAST_ID) == [1, b"drained"]
    assert (await length(desk, "events"), await length(desk, "before")) == (1, 0)
    done = await desk.commands.call("HGET", desk.names.part(EVENTS, "done"), "g")
    assert int(done) > int(generation)


async def test_publishing_goes_on_behind_the_last_id(desk: Desk) -> None:
    """event_publish I2: once; the bound counts both streams."""
    await add(desk, LAST_ID)
    assert len(await desk.publish("one", "two")) == 2
    assert (await length(desk, "events"), await length(desk, "before")) == (2, 1)
    assert await desk.publish("three", bound=3) == [0, 3]
    await add(desk, LAST_ID)
    assert await desk.publish("three") == [0, 4]
    assert (await length(desk, "events"), await length(desk, "before")) == (3, 1)


async def test_an_empty_stream_that_was_ahead_is_renewed_while_idle(desk: Desk) -> None:
    """ingress_take: the entry was deleted by hand; without renewal the stream stays exhausted."""
    epoch = await desk.claim_ingress("a")
    assert (await desk.take_batch("a", epoch))[3] == b""
    await add(desk, LAST_ID)
    await desk.commands.call("XDEL", desk.names.events, LAST_ID)
    assert (await desk.take_batch("a", epoch))[3] == b"drained"
    await add(desk, "*")


async def test_only_the_owner_takes_and_commits(desk: Desk) -> None:
    """ingress_commit I1: another epoch changes nothing, not even of an exhausted stream."""
    epoch = await desk.claim_ingress("a")
    await add(desk, LAST_ID)
    before = await desk.everything()
    refused = [0, str(epoch).encode()]
    assert await desk.take_batch("b", epoch, LAST_ID, LAST_ID) == refused
    assert await desk.take_batch("a", epoch - 1, LAST_ID, LAST_ID) == refused
    assert await desk.commit_batch("a", epoch - 1, LAST_ID) == refused
    assert await desk.everything() == before


async def test_ingress_goes_on_when_memory_is_full(
    desk: Desk, backend: Backend, not_on_fake: Callable[[str], None]
) -> None:
    """ingress_take I4, ingress_commit I3: also where the stream is renewed."""
    not_on_fake("has no maxmemory")
    epoch = await desk.claim_ingress("a")
    first = await add(desk, "*")
    await add(desk, LAST_ID)
    await backend.link.call("CONFIG", "SET", "maxmemory", 1)
    try:
        assert (await desk.take_batch("a", epoch, first, LAST_ID))[0] == 1
        assert await desk.commit_batch("a", epoch, first) == [1, b""]
        assert await desk.commit_batch("a", epoch, LAST_ID) == [1, b"drained"]
    finally:
        await backend.link.call("CONFIG", "SET", "maxmemory", 0)

"""The scripts of entries, on every kind of backend: what they return, and their invariants."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.entry import EntryMeta, read_entry
from forebay.schemas.keys import dependents_of
from forebay.schemas.notices import Changed, Dropped, Extended, read_notification
from support.scripts import MINUTE_MS, Desk

# entry_begin, entry_fill, lease_release


async def test_a_load_takes_the_lease_fills_and_gives_it_back(desk: Desk) -> None:
    """The whole of a cold miss: granted, stored with its lifetimes, announced, lease used up."""
    assert await desk.begin("mine") == [1, None]
    assert await desk.lease() == b"mine"
    before = await desk.now_us()
    done, version, soft_at_ms, hard_at_ms = await desk.fill("mine", "value")
    after = await desk.now_us()

    assert done == 1
    assert before <= int(version) <= after
    entry = await desk.entry()
    assert (entry.version, entry.payload) == (int(version), b"value")
    assert (entry.soft_at_ms, entry.hard_at_ms) == (int(soft_at_ms), int(hard_at_ms))
    assert before // 1000 + MINUTE_MS <= entry.soft_at_ms <= after // 1000 + MINUTE_MS
    assert entry.hard_at_ms - entry.soft_at_ms == MINUTE_MS
    assert (entry.pending, entry.doomed) == (0, False)
    assert MINUTE_MS < await desk.ttl_ms() <= 2 * MINUTE_MS
    assert await desk.lease() is None
    (logged,) = await desk.log()
    assert (logged.version, logged.notice) == (int(version), Changed("k"))


async def test_only_one_gets_the_lease(desk: Desk) -> None:
    """entry_begin I1: everybody else learns how long it may still take."""
    await desk.begin("mine")
    refused, entry, left_ms = await desk.begin("other")
    assert (refused, entry) == (0, None)
    assert 0 < int(left_ms) <= MINUTE_MS
    assert await desk.lease() == b"mine"


async def test_asking_again_for_the_same_lease_is_granted_again(desk: Desk) -> None:
    """entry_begin I2: the reply was lost, not the lease."""
    assert await desk.begin("mine", lease_ms=1_000) == [1, None]
    assert await desk.begin("mine", lease_ms=MINUTE_MS) == [1, None]
    assert await desk.commands.call("PTTL", desk.names.lease("k")) > 1_000


async def test_a_lease_ends_by_itself(desk: Desk) -> None:
    """A loader that died holds nobody up for longer."""
    await desk.begin("mine", lease_ms=20)
    with anyio.fail_after(10):
        while (await desk.begin("other"))[0] != 1:
            await anyio.sleep(0.005)
    assert await desk.fill("mine") == [0]


async def test_nobody_loads_what_is_there_already(desk: Desk) -> None:
    """entry_begin: an entry newer than the one found unusable is handed out instead."""
    version = await desk.put("new")
    assert await desk.begin("mine", seen=-1) == [0, await desk.raw(), 0]
    assert await desk.begin("mine", seen=version - 1) == [0, await desk.raw(), 0]
    assert await desk.lease() is None
    assert await desk.begin("mine", seen=version) == [1, await desk.raw()]


async def test_no_lease_while_a_write_is_pending(desk: Desk) -> None:
    """entry_begin I3: the source is older than the entry."""
    await desk.write("new")
    assert await desk.begin("mine", seen=1 << 62) == [0, await desk.raw(), 0]
    assert await desk.lease() is None


@pytest.mark.parametrize("old", [b'{"a": 1}', b'{"value": 1, "stale_at": 5}', b"\xfbE2?", b"x"])
async def test_any_other_value_can_be_loaded_over(desk: Desk, old: bytes) -> None:
    """Older forms, and what nobody can read, have version 0."""
    await desk.commands.call("SET", desk.names.entry("k"), old)
    assert await desk.begin("mine", seen=0) == [1, old]
    assert (await desk.fill("mine", "value"))[0] == 1
    assert (await desk.entry()).payload == b"value"


@pytest.mark.parametrize("lease", [None, "other"])
async def test_no_fill_without_the_lease(desk: Desk, lease: str | None) -> None:
    """entry_fill I1: not when it is over, nor when another has it; nothing is changed."""
    await desk.put("old")
    if lease is not None:
        await desk.commands.call("SET", desk.names.lease("k"), lease)
    before = await desk.everything()
    assert await desk.fill("mine") == [0]
    assert await desk.everything() == before


async def test_a_fill_sent_twice_is_stored_once(desk: Desk) -> None:
    """entry_fill I2: the lease is used up by the first."""
    await desk.begin("mine")
    assert (await desk.fill("mine", "once"))[0] == 1
    before = await desk.everything()
    assert await desk.fill("mine", "twice") == [0]
    assert await desk.everything() == before


async def test_only_its_holder_gives_a_lease_back(desk: Desk) -> None:
    """lease_release I1: and only once."""
    await desk.begin("mine")
    assert await desk.release("other") == 0
    assert await desk.lease() == b"mine"
    assert await desk.release("mine") == 1
    assert await desk.release("mine") == 0
    assert await desk.lease() is None


async def test_who_begins_learns_the_time_before_the_load(desk: Desk) -> None:
    """entry_begin: by the server's clock, in microseconds, by which versions are given."""
    before = await desk.now_us()
    await desk.begin("mine")
    after = await desk.now_us()
    assert before <= int(desk.begun[0]) <= after


# entry_extend

META = EntryMeta(tags={"red": 5}, etag="e2", soft_ms=3_000, error_ms=7)


async def test_a_value_that_is_there_already_lives_on(desk: Desk) -> None:
    """entry_extend: its payload is kept; version, lifetimes and meta part are new."""
    since = await desk.put("value")
    await desk.begin("mine", seen=since)
    before = await desk.now_us()
    done, version, soft_at_ms, hard_at_ms = await desk.extend(
        "mine", since, soft_ms=3_000, hard_ms=4_000, meta=META
    )
    after = await desk.now_us()
    assert done == 1
    assert max(before, since + 1) <= int(version) <= after
    entry = await desk.entry()
    assert (entry.version, entry.payload, entry.meta) == (int(version), b"value", META)
    assert (entry.soft_at_ms, entry.hard_at_ms) == (int(soft_at_ms), int(hard_at_ms))
    assert before // 1000 + 3_000 <= entry.soft_at_ms <= after // 1000 + 3_000
    assert entry.hard_at_ms - entry.soft_at_ms == 1_000
    assert (entry.kind, entry.codec, entry.pending, entry.doomed) == ("v", "m", 0, False)
    assert 0 < await desk.ttl_ms() <= 4_000
    assert await desk.lease() is None
    logged = (await desk.log())[-1]
    assert (logged.version, logged.notice) == (int(version), Extended("k", since, 3_000, 4_000))


@pytest.mark.parametrize("size", [0, 1, 255, 256, 5_000])
async def test_the_payload_stays_where_meta_parts_differ_in_length(desk: Desk, size: int) -> None:
    """entry_extend: the length of the old one has two bytes."""
    value, since = "x" * 300, await desk.put("value")
    for etag in ("e" * size, "", "e" * (size + 1)):
        await desk.begin("mine", seen=1 << 62)
        if etag == "e" * size:
            since = int((await desk.fill("mine", value))[1])
            await desk.begin("mine", seen=since)
        reply = await desk.extend("mine", since, meta=EntryMeta(etag=etag))
        since = int(reply[1])
        raw = await desk.raw() or b""
        entry = read_entry(raw, bytes_max=1_000)
        assert (entry.payload, entry.meta.etag) == (value.encode(), etag)


@pytest.mark.parametrize("lease", [None, "other", "!"])
async def test_nothing_lives_on_without_the_lease(desk: Desk, lease: str | None) -> None:
    """entry_extend I1: not when it is over, nor when another has it; nothing is changed."""
    since = await desk.put("old")
    if lease is not None:
        await desk.commands.call("SET", desk.names.lease("k"), lease)
    before = await desk.everything()
    assert await desk.extend("mine", since) == [0]
    assert await desk.everything() == before


async def test_another_entry_is_filled_and_not_extended(desk: Desk) -> None:
    """entry_extend I2: the lease is still there for that."""
    since = await desk.put("old")
    await desk.begin("mine", seen=since)
    for other in (since - 1, since + 1):
        before = await desk.everything()
        assert await desk.extend("mine", other) == [2]
        assert await desk.everything() == before
    await desk.commands.call("DEL", desk.names.entry("k"))
    assert await desk.extend("mine", since) == [2]
    assert (await desk.fill("mine", "whole"))[0] == 1
    assert (await desk.entry()).payload == b"whole"


@pytest.mark.parametrize("old", [b'{"a": 1}', b"\xfbE2?", b"x", b"\xfbE1"])
async def test_what_is_no_entry_is_not_extended(desk: Desk, old: bytes) -> None:
    """entry_extend I2: older forms have no lifetimes, and no payload that could be kept."""
    await desk.commands.call("SET", desk.names.entry("k"), old)
    assert (await desk.begin("mine", seen=0))[0] == 1
    assert await desk.extend("mine", 0) == [2]
    assert await desk.raw() == old
    assert await desk.lease() == b"mine"


async def test_an_extension_sent_twice_is_carried_out_once(desk: Desk) -> None:
    """entry_extend I2: the lease is used up by the first."""
    since = await desk.put("old")
    await desk.begin("mine", seen=since)
    assert (await desk.extend("mine", since))[0] == 1
    before = await desk.everything()
    assert await desk.extend("mine", since) == [0]
    assert await desk.everything() == before


async def test_a_pending_write_is_not_extended(desk: Desk) -> None:
    """entry_extend: it is newer than the source, and does not expire; its lease is void anyway."""
    _, version, *_ = await desk.write("written")
    await desk.commands.call("SET", desk.names.lease("k"), "mine")
    before = await desk.everything()
    assert await desk.extend("mine", int(version)) == [0]
    assert await desk.everything() == before
    await desk.invalidate()
    await desk.commands.call("SET", desk.names.lease("k"), "mine")
    assert (await desk.entry()).doomed
    before = await desk.everything()
    assert (await desk.extend("mine", int(version)))[0] != 1
    assert (await desk.fill("mine"))[0] == 0
    assert await desk.everything() == before


@pytest.mark.parametrize("soft", [True, False])
async def test_what_was_invalidated_meanwhile_does_not_live_on(desk: Desk, soft: bool) -> None:
    """entry_extend I1: a loader of before may have read what was there before."""
    since = await desk.put("old")
    await desk.begin("mine", seen=since)
    await desk.invalidate(soft=soft)
    before = await desk.everything()
    assert await desk.extend("mine", since) == [0]
    assert await desk.everything() == before


async def test_a_stale_entry_lives_on_when_it_was_asked_for_afterwards(desk: Desk) -> None:
    """entry_extend: softly invalidated, and the source says that it is right."""
    since = await desk.put("old")
    await desk.invalidate(soft=True)
    await desk.begin("mine", seen=since)
    done, _, soft_at_ms, _ = await desk.extend("mine", since)
    assert done == 1
    assert (await desk.entry()).soft_at_ms == int(soft_at_ms) > 0


# lease_fail, and who is patient


async def test_a_source_that_failed_is_left_alone(desk: Desk) -> None:
    """By those who have something to serve; the others ask it."""
    version = await desk.put("old")
    await desk.begin("mine", seen=version)
    assert await desk.fail("mine") == 1
    assert await desk.lease() == b"!"
    refused, entry, left_ms = await desk.begin("next", seen=version, patient=True)
    assert (refused, entry, desk.begun[1]) == (0, None, 1)
    assert 0 < int(left_ms) <= MINUTE_MS
    assert await desk.fill("mine") == [0]
    assert await desk.begin("next", seen=version) == [1, await desk.raw()]
    assert await desk.lease() == b"next"
    refused, entry, _ = await desk.begin("third", seen=version, patient=True)
    assert (refused, entry, desk.begun[1]) == (0, None, 0)


async def test_a_source_is_asked_again_after_a_while(desk: Desk) -> None:
    """Also by the patient."""
    version = await desk.put("old")
    await desk.begin("mine", seen=version)
    assert await desk.fail("mine", throttle_ms=20) == 1
    with anyio.fail_after(10):
        while (await desk.begin("next", seen=version, patient=True))[0] != 1:
            await anyio.sleep(0.005)


async def test_a_failure_where_nothing_can_be_served_holds_up_nobody(desk: Desk) -> None:
    """Its lease is given back."""
    await desk.begin("mine")
    assert await desk.fail("mine") == 0
    assert await desk.lease() is None
    assert await desk.begin("next", patient=True) == [1, None]


@pytest.mark.parametrize("lease", [None, "other"])
async def test_only_its_holder_says_that_a_load_failed(desk: Desk, lease: str | None) -> None:
    """lease_fail I1: and nothing is changed."""
    await desk.put("old")
    if lease is not None:
        await desk.commands.call("SET", desk.names.lease("k"), lease)
    before = await desk.everything()
    assert await desk.fail("mine") == 0
    assert await desk.everything() == before


async def test_what_is_new_is_served_though_the_source_failed(desk: Desk) -> None:
    """entry_begin: it is handed out before the lease is looked at."""
    version = await desk.put("old")
    await desk.begin("mine", seen=version)
    await desk.fail("mine")
    await desk.put("new")
    assert await desk.lease() is None, "it has a value now"
    await desk.commands.call("SET", desk.names.lease("k"), "!")
    assert await desk.begin("next", seen=version, patient=True) == [0, await desk.raw(), 0]


async def test_no_refresh_while_the_source_is_left_alone(desk: Desk) -> None:
    """Whoever asks for one has something to serve."""
    version = await desk.put("old")
    await desk.begin("mine", seen=version)
    await desk.fail("mine")
    assert await desk.refresh("token", seen=version) == 0
    assert await desk.length("refreshes") == 0


async def test_an_invalidation_ends_the_throttling(desk: Desk) -> None:
    """What failed was the load of another value; and there may be nothing to serve now."""
    version = await desk.put("old")
    await desk.begin("mine", seen=version)
    await desk.fail("mine")
    await desk.invalidate(soft=True)
    assert (await desk.begin("next", seen=version, patient=True))[0] == 1


# What depends on a key

Outdate = Callable[[Desk], Awaitable[object]]
OUTDATING: dict[str, tuple[Outdate, bool]] = {
    "invalidate": (lambda desk: desk.invalidate(), False),
    "invalidate softly": (lambda desk: desk.invalidate(soft=True), True),
    "put": (lambda desk: desk.put("new"), False),
    "write": (lambda desk: desk.write("new"), False),
    "touch": (lambda desk: desk.touch(), False),
}


async def prepared(desk: Desk, how: str) -> None:
    await desk.put("old")
    if how == "touch":
        await desk.commands.call("SET", desk.names.entry("k"), "a foreign value")


@pytest.mark.parametrize("how", OUTDATING)
async def test_what_depends_on_a_key_is_outdated_with_it(desk: Desk, how: str) -> None:
    """entries_invalidate I3, entry_put I3, entry_write I3: the version is the change's own."""
    await prepared(desk, how)
    outdate, soft = OUTDATING[how]
    ((before, _, made),) = await desk.captured(dependents_of("k"))
    assert made == 1
    await outdate(desk)
    version = (await desk.log())[-1].version
    assert await desk.captured(dependents_of("k")) == [(version, before if soft else version, 0)]
    assert 0 < await desk.commands.call("PTTL", desk.names.tag(dependents_of("k"))) <= MINUTE_MS
    await outdate(desk)
    later = (await desk.log())[-1].version
    assert await desk.captured(dependents_of("k")) == [(later, before if soft else later, 0)]


@pytest.mark.parametrize("how", OUTDATING)
async def test_where_nothing_depends_on_a_key_no_tag_is_made(desk: Desk, how: str) -> None:
    """Or there would be one more key for each that was ever written."""
    await prepared(desk, how)
    await OUTDATING[how][0](desk)
    assert await desk.commands.call("EXISTS", desk.names.tag(dependents_of("k"))) == 0
    version = (await desk.log())[-1].version
    assert (await desk.captured(dependents_of("k")))[0][2] == 1
    assert desk.changed == [version], "whoever makes the tag is told of it"


async def test_what_is_loaded_outdates_nothing(desk: Desk) -> None:
    """It only replaces what has ended: neither a fill nor an extension touches the tag."""
    before = await desk.captured(dependents_of("k"))
    assert before[0][2] == 1
    await desk.begin("mine")
    version = int((await desk.fill("mine"))[1])
    await desk.begin("mine", seen=version)
    await desk.extend("mine", version)
    assert await desk.captured(dependents_of("k")) == [(*before[0][:2], 0)]


async def test_a_pending_write_that_is_invalidated_outdates_too(desk: Desk) -> None:
    """entries_invalidate I3: what depends on the key cannot wait for the sink."""
    await desk.write("written")
    await desk.captured(dependents_of("k"))
    await desk.invalidate()
    version = (await desk.log())[-1].version
    assert await desk.captured(dependents_of("k")) == [(version, version, 0)]


async def test_each_key_outdates_what_depends_on_it_alone(desk: Desk) -> None:
    """entries_invalidate I3: of many keys, those that have a tag."""
    first, second, third = desk.keys_of(0, 3)
    before = await desk.captured(*map(dependents_of, (first, third)))
    await desk.invalidate(first, second, soft=True)
    version = (await desk.log(0))[-1].version
    after = await desk.captured(*map(dependents_of, (first, second, third)))
    assert after[0] == (version, before[0][1], 0)
    assert after[1][2] == 1
    assert after[2] == (*before[1][:2], 0)


async def test_a_repetition_outdates_nothing(desk: Desk) -> None:
    """entry_write I1: as it changes nothing else."""
    await desk.captured(dependents_of("k"))
    await desk.write("first", mark="005")
    before = await desk.captured(dependents_of("k"))
    await desk.write("again", mark="005")
    await desk.invalidate(mark="004")
    await desk.write("no room", bound=0)
    assert await desk.captured(dependents_of("k")) == before


# entry_touch


async def test_foreign_values_are_told_of_and_ours_are_not(desk: Desk) -> None:
    """entry_touch I1, I2: no entry is changed; a load under way of a foreign one is over."""
    ours, foreign, absent = desk.keys_of(0, 3)
    await desk.put("ours", key=ours)
    await desk.commands.call("SET", desk.names.entry(foreign), "not ours")
    for key in (ours, foreign, absent):
        await desk.commands.call("SET", desk.names.lease(key), "mine")
    done, version = await desk.touch(ours, foreign, absent)
    assert done == 2
    assert await desk.raw(foreign) == b"not ours"
    assert await desk.lease(ours) == b"mine"
    assert await desk.lease(foreign) is None
    assert await desk.lease(absent) is None
    logged = (await desk.log(0))[-1]
    expected = Dropped((ours, foreign, absent), soft=True)
    assert (logged.version, logged.notice) == (int(version), expected)
    before = await desk.everything()
    assert await desk.touch(ours) == [0]
    assert await desk.everything() == before


# entry_put


async def test_a_put_ends_every_load_under_way(desk: Desk) -> None:
    """entry_put I1: the loader's value is older than the one put."""
    await desk.begin("mine")
    version = await desk.put("new")
    assert await desk.fill("mine", "old") == [0]
    entry = await desk.entry()
    assert (entry.version, entry.payload) == (version, b"new")
    assert 0 < await desk.ttl_ms() <= 2 * MINUTE_MS


async def test_a_put_over_a_pending_write_keeps_it_pending(desk: Desk) -> None:
    """entry_put I2: so the entry neither expires nor is loaded over before the sink has it."""
    _, version, *_ = await desk.write("written")
    newer = await desk.put("put")
    entry = await desk.entry()
    assert (entry.version, entry.pending, entry.payload) == (newer, int(version), b"put")
    assert await desk.ttl_ms() == -1


async def test_a_put_under_an_old_token_changes_nothing(desk: Desk) -> None:
    """entry_put I4: the same token may put again, and one without a token is not asked."""
    assert await desk.put("first", token=7) > 0
    assert await desk.put("again", token=7) > 0
    before = await desk.everything()
    assert await desk.put("late", token=6) == -7
    assert await desk.everything() == before
    assert await desk.put("later", token=8) > 0
    assert await desk.put("free") > 0
    assert await desk.put("late", token=7) == -8


async def test_a_put_sent_twice_is_two_changes_of_one_value(desk: Desk) -> None:
    """Repeating is harmless: the second is newer, and says the same."""
    first, second = await desk.put("same"), await desk.put("same")
    assert first < second
    assert (await desk.entry()).payload == b"same"
    assert [logged.version for logged in await desk.log()] == [first, second]


# entry_write


async def test_a_write_is_entry_notice_and_job_at_once(desk: Desk) -> None:
    """The entry does not expire before the write was sunk; loads under way are over."""
    await desk.begin("mine")
    done, version, soft_at_ms, hard_at_ms, job_id, length = await desk.write("value")
    assert (done, length) == (1, 1)
    entry = await desk.entry()
    assert (entry.version, entry.pending) == (int(version), int(version))
    assert (entry.soft_at_ms, entry.hard_at_ms) == (int(soft_at_ms), int(hard_at_ms))
    assert await desk.ttl_ms() == -1
    assert await desk.fill("mine") == [0]
    (job,) = await desk.commands.call("XRANGE", desk.part("writes"), "-", "+")
    assert job == [job_id, [b"v", version, b"j", b"job of value"]]
    (logged,) = await desk.log()
    assert (logged.version, logged.notice) == (int(version), Changed("k", outdates=True))


async def test_writes_stop_at_their_bound(desk: Desk) -> None:
    """entry_write I2: nothing is changed, and nothing is trimmed to make room."""
    for length in (1, 2, 3):
        assert (await desk.write(bound=3))[5] == length
    before = await desk.everything()
    assert await desk.write(bound=3) == [0, 3]
    assert await desk.write(bound=2) == [0, 3]
    assert await desk.everything() == before


async def test_a_mark_is_taken_once(desk: Desk) -> None:
    """entry_write I1: what is not later than the newest mark of its shard is a repetition."""
    assert (await desk.write("first", mark="005"))[0] == 1
    before = await desk.everything()
    for mark in ("005", "004"):
        assert await desk.write("again", mark=mark) == [2]
        assert await desk.invalidate(mark=mark) == [2]
    assert await desk.everything() == before
    assert (await desk.write("next", mark="006"))[0] == 1
    assert (await desk.write("not from there"))[0] == 1
    assert (await desk.invalidate(mark="007"))[0] == 1
    assert await desk.write("late", mark="007") == [2]


async def test_a_mark_that_was_refused_for_lack_of_room_is_not_taken(desk: Desk) -> None:
    """entry_write: the same event can be tried again later."""
    await desk.write()
    assert (await desk.write(mark="005", bound=1))[0] == 0
    assert (await desk.write(mark="005", bound=2))[0] == 1


async def test_an_event_id_is_taken_once(desk: Desk) -> None:
    """entry_write I1: for as long as it is remembered."""
    assert (await desk.write("first", event_id="e1"))[0] == 1
    before = await desk.everything()
    assert await desk.write("again", event_id="e1") == [2]
    assert await desk.everything() == before
    assert (await desk.write("other", event_id="e2"))[0] == 1
    assert set(await desk.commands.call("ZRANGE", desk.part("seen"), 0, -1)) == {b"e1", b"e2"}


async def test_whether_an_event_id_was_seen_lately_is_told_by_publication(desk: Desk) -> None:
    """entry_write I1: however late it is applied; an id ahead of the clock counts from now."""
    now_ms = await desk.now_us() // 1_000
    first = now_ms - 50_000

    async def write(event_id: str, published_ms: int) -> int:
        reply = await desk.write(event_id=event_id, published_ms=published_ms, seen_ms=6_000)
        return int(reply[0])

    assert await write("e1", first) == 1
    assert await write("e1", first + 5_999) == 2
    assert await write("other", first + 5_999) == 1
    assert await write("e1", first + 6_000) == 1
    assert await write("e1", first + 6_001) == 2
    assert await write("e1", now_ms + 3_600_000) == 1
    assert await write("e1", now_ms + 7_200_000) == 2
    assert await write("e1", 0) == 2


async def test_event_ids_are_remembered_up_to_a_bound(desk: Desk) -> None:
    """entry_write: the oldest id is dropped and counted; expired ids are dropped, too."""
    now_ms = await desk.now_us() // 1_000
    replies = [
        await desk.write(event_id=f"e{n}", published_ms=now_ms - 100 + n, seen_max=3)
        for n in range(5)
    ]
    assert [reply[6:] for reply in replies] == [[], [], [], [1], [1]]
    seen = await desk.commands.call("ZRANGE", desk.part("seen"), 0, -1)
    assert seen == [b"e2", b"e3", b"e4"]
    await desk.write(event_id="e5", seen_ms=1)
    assert await desk.commands.call("ZRANGE", desk.part("seen"), 0, -1) == [b"e5"]


async def test_lifetimes_of_a_write_count_from_its_publication(desk: Desk) -> None:
    """entry_write I4: a write applied a minute late is a minute older."""
    published_ms = await desk.now_us() // 1_000 - MINUTE_MS
    reply = await desk.write(published_ms=published_ms, soft_ms=10, hard_ms=MINUTE_MS + 20)
    assert (int(reply[2]), int(reply[3])) == (published_ms + 10, published_ms + MINUTE_MS + 20)
    assert (await desk.entry()).soft_at_ms == published_ms + 10


async def test_a_write_without_mark_or_id_sent_twice_is_two_writes(desk: Desk) -> None:
    """Only what can be recognised can be a repetition; the newer one wins everywhere."""
    _, first, *_ = await desk.write("same")
    _, second, *_ = await desk.write("same")
    assert int(first) < int(second)
    assert (await desk.entry()).pending == int(second)
    assert await desk.length("writes") == 2


# entries_invalidate


async def test_an_invalidation_deletes_entries_and_leases(desk: Desk) -> None:
    """entries_invalidate I1: of all keys named, whether they are there or not."""
    there, absent = desk.keys_of(0, 2)
    await desk.put(key=there)
    await desk.begin("mine", key=there, seen=1 << 62)
    await desk.begin("mine", key=absent)
    done, version = await desk.invalidate(there, absent)
    assert done == 1
    for key in (there, absent):
        assert await desk.raw(key) is None
        assert await desk.fill("mine", key=key) == [0]
    logged = (await desk.log(0))[-1]
    assert (logged.version, logged.notice) == (int(version), Dropped((there, absent)))


async def test_a_soft_invalidation_leaves_a_stale_entry(desk: Desk) -> None:
    """It is stale by any clock, keeps its hard lifetime, and can be refreshed."""
    version = await desk.put("old")
    before = await desk.entry()
    await desk.begin("mine", seen=version)
    assert (await desk.invalidate(soft=True))[0] == 1
    entry = await desk.entry()
    assert entry.soft_at_ms == 0
    assert (entry.hard_at_ms, entry.version, entry.payload) == (before.hard_at_ms, version, b"old")
    assert 0 < await desk.ttl_ms() <= 2 * MINUTE_MS
    assert await desk.fill("mine") == [0]
    assert (await desk.begin("next", seen=version))[0] == 1


@pytest.mark.parametrize("soft", [True, False])
async def test_an_invalidation_spares_an_entry_whose_write_is_pending(
    desk: Desk, soft: bool
) -> None:
    """entries_invalidate I2: it is newer than the source; it is marked, to be dropped later."""
    _, version, *_ = await desk.write("new")
    for _ in range(2):
        await desk.invalidate(soft=soft)
        entry = await desk.entry()
        assert (entry.doomed, entry.pending, entry.payload) == (True, int(version), b"new")
        assert await desk.ttl_ms() == -1


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("old", [b'{"a": 1}', b"\xfbE2?", b""])
async def test_an_invalidation_deletes_what_is_no_entry(desk: Desk, old: bytes, soft: bool) -> None:
    """What has no lifetimes cannot be made stale."""
    await desk.commands.call("SET", desk.names.entry("k"), old)
    assert (await desk.invalidate(soft=soft))[0] == 1
    assert await desk.commands.call("EXISTS", desk.names.entry("k")) == 0


async def test_an_invalidation_deletes_what_is_no_string(desk: Desk) -> None:
    """What others put in the place of an entry must not hold up the ones after it."""
    first, second = desk.keys_of(0, 2)
    await desk.commands.call("HSET", desk.names.entry(first), "not", "ours")
    await desk.put(key=second)
    assert (await desk.invalidate(first, second))[0] == 1
    assert await desk.commands.call("EXISTS", desk.names.entry(first)) == 0
    assert await desk.raw(second) is None


async def test_an_invalidation_sent_twice_is_announced_twice(desk: Desk) -> None:
    """Repeating is harmless."""
    first, second = await desk.invalidate(), await desk.invalidate()
    assert int(first[1]) < int(second[1])
    assert len(await desk.log()) == 2


# refresh_publish


async def test_a_refresh_hands_the_lease_to_the_job(desk: Desk) -> None:
    """Who has the job can fill; nobody else can, nor is it published again meanwhile."""
    version = await desk.put("old")
    assert await desk.refresh("token", seen=version) == 1
    assert await desk.lease() == b"token"
    ((_, fields),) = await desk.commands.call("XRANGE", desk.part("refreshes"), "-", "+")
    assert fields == [b"j", b"job token"]
    for token in ("token", "another"):
        assert await desk.refresh(token, seen=version) == 0
    assert await desk.length("refreshes") == 1
    assert (await desk.fill("token", "new"))[0] == 1
    assert (await desk.entry()).payload == b"new"


async def test_what_was_refreshed_meanwhile_is_not_refreshed_again(desk: Desk) -> None:
    """refresh_publish I1: by version; nor is what a write-behind made newer than the source."""
    version = await desk.put("old")
    await desk.put("new")
    assert await desk.refresh("token", seen=version) == 0
    await desk.write("written")
    assert await desk.refresh("token", seen=1 << 62) == 0
    assert await desk.length("refreshes") == 0
    assert await desk.lease() is None


async def test_a_refresh_is_shed_by_a_full_stream(desk: Desk) -> None:
    """It takes no lease then, so that somebody else may load."""
    first, second = desk.keys_of(desk.shard, 2)
    assert await desk.refresh("a", key=first, bound=1) == 1
    assert await desk.refresh("b", key=second, bound=1) == -1
    assert await desk.lease(second) is None
    assert await desk.length("refreshes") == 1


# What all changes have in common


async def test_every_change_is_announced_with_its_place_in_the_log(
    desk: Desk, backend: Backend
) -> None:
    """C2: dense ids, versions that grow; the bell says what the log says, in its order."""
    heard: list[bytes] = []
    backend.pubsub.on_message(lambda _, payload: heard.append(payload))
    backend.pubsub.subscribe(desk.names.bell.encode())
    await backend.pubsub.ready()
    tag = next(t for n in range(99) if desk.names.shard(t := f"t{n}") == desk.shard)
    await desk.log_begin()
    await desk.begin("mine")
    await desk.fill("mine")
    await desk.capture(tag)
    await desk.put()
    await desk.write()
    await desk.invalidate()
    await desk.bump(tag)

    logged = await desk.log()
    assert [each.position.seq for each in logged] == list(range(6))
    assert len({each.position.epoch for each in logged}) == 1
    versions = [each.version for each in logged]
    assert versions == sorted(set(versions))
    with anyio.fail_after(10):
        while len(heard) < 6:
            await anyio.sleep(0.002)
    bells = [bell for payload in heard if (bell := read_notification(payload)) is not None]
    assert [bell.shard for bell in bells] == [desk.shard] * 6
    assert [(bell.position, bell.version) for bell in bells] == [
        (each.position, each.version) for each in logged
    ]


async def test_versions_grow_though_the_server_s_clock_goes_back(desk: Desk) -> None:
    """C1: max(previous + 1, clock); the head is in the future, as after a failover."""
    await desk.put()
    future = await desk.now_us() + 3_600_000_000
    await desk.commands.call("HSET", desk.part("head"), "v", future)
    versions = [await desk.put(), int((await desk.write())[1]), int((await desk.invalidate())[1])]
    assert versions == [future + 1, future + 2, future + 3]
    assert (await desk.entry()).version == future + 2


async def test_a_log_that_is_lost_begins_a_later_epoch(desk: Desk) -> None:
    """C2: also when it is lost again at once, or the server's clock went back."""
    epochs = []
    for _ in range(3):
        await desk.put()
        epochs.append((await desk.log())[-1].position)
        await desk.commands.call("DEL", desk.part("log"))
    future = await desk.now_us() + 3_600_000_000
    await desk.commands.call("HSET", desk.part("head"), "e", future)
    await desk.put()
    epochs.append((await desk.log())[-1].position)
    assert [position.seq for position in epochs] == [0, 0, 0, 0]
    assert len({position.epoch for position in epochs}) == 4
    assert epochs == sorted(epochs)
    assert epochs[-1].epoch == future + 1


async def test_a_head_that_is_lost_is_made_anew_from_the_log(desk: Desk) -> None:
    """C1, C2: the same epoch, the next number, and no version a second time."""
    future = await desk.now_us() + 3_600_000_000
    await desk.log_begin()
    await desk.commands.call("HSET", desk.part("head"), "v", future)
    await desk.put()
    await desk.commands.call("DEL", desk.part("head"))
    assert await desk.put() == future + 2
    logged = await desk.log()
    assert [each.position.seq for each in logged] == [0, 1, 2]
    assert len({each.position.epoch for each in logged}) == 1


async def test_a_tag_that_is_made_without_a_head_uses_up_its_version(desk: Desk) -> None:
    """C1: the log's end is not all that was given since."""
    await desk.put()
    future = await desk.now_us() + 3_600_000_000
    await desk.commands.call("DEL", desk.part("head"))
    await desk.commands.call("HSET", desk.part("head"), "v", future)
    assert await desk.put() == future + 1


async def test_epochs_are_distinct_though_everything_was_lost(desk: Desk) -> None:
    """C2: head and log are gone, as after a FLUSHALL, within the same millisecond."""
    positions = []
    for _ in range(20):
        await desk.put()
        positions.append((await desk.log())[-1].position)
        await desk.commands.call("DEL", desk.part("log"), desk.part("head"))
    assert positions == sorted(set(positions))

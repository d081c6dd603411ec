"""The scripts of entries, on every kind of backend: what they return, and their invariants."""

from __future__ import annotations

import anyio
import pytest

from forebay.coordinator.backend import Backend
from forebay.schemas.notices import Changed, Dropped, read_bell
from scriptdesk import MINUTE_MS, Desk

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
    assert (logged.version, logged.notice) == (int(version), Changed("k", outdates=True))


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
    seen = desk.names.seen(desk.shard, "e1")
    assert 0 < await desk.commands.call("PTTL", seen) <= MINUTE_MS


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
    backend.doorbell.on_message(lambda _, payload: heard.append(payload))
    backend.doorbell.subscribe(desk.names.bell.encode())
    await backend.doorbell.ready()
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
    bells = [bell for payload in heard if (bell := read_bell(payload)) is not None]
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


async def test_epochs_are_distinct_though_everything_was_lost(desk: Desk) -> None:
    """C2: head and log are gone, as after a FLUSHALL, within the same millisecond."""
    positions = []
    for _ in range(20):
        await desk.put()
        positions.append((await desk.log())[-1].position)
        await desk.commands.call("DEL", desk.part("log"), desk.part("head"))
    assert positions == sorted(set(positions))

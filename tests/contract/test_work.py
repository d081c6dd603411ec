"""The scripts of tags, logs, owners and streams, on every kind of backend."""

from __future__ import annotations

import anyio
import pytest

from forebay.schemas.notices import Bumped, Dropped
from support.scripts import MINUTE_MS, Desk

# tags_bump, tags_capture


def tags_of_a_shard(desk: Desk) -> tuple[str, str]:
    first, second = desk.keys_of(desk.shard, 2)
    return first, second


async def test_tags_are_captured_made_and_kept(desk: Desk) -> None:
    """A tag that has a version keeps it; one that has none gets one, the same for all asking."""
    one, two = tags_of_a_shard(desk)
    (first,) = await desk.capture(one)
    again, second = await desk.capture(one, two)
    assert again == first
    assert second > first
    assert await desk.capture(two, one) == [second, first]
    assert await desk.log() == []
    for tag in (one, two):
        assert 0 < await desk.commands.call("PTTL", desk.names.tag(tag)) <= MINUTE_MS


async def test_capturing_keeps_a_version_alive(desk: Desk) -> None:
    """What is used is not forgotten."""
    one, _ = tags_of_a_shard(desk)
    version = await desk.capture(one, keep_ms=1_000)
    assert await desk.capture(one, keep_ms=MINUTE_MS) == version
    assert await desk.commands.call("PTTL", desk.names.tag(one)) > 1_000


async def test_a_bump_gives_later_versions_and_says_so(desk: Desk) -> None:
    """tags_bump I1: later than any that an entry may carry."""
    one, two = tags_of_a_shard(desk)
    captured = await desk.capture(one, two)
    filled = await desk.put()
    done, version = await desk.bump(one, two)
    assert done == 1
    assert int(version) > max(*captured, filled)
    assert await desk.capture(one, two) == [int(version)] * 2
    logged = (await desk.log())[-1]
    assert (logged.version, logged.notice) == (int(version), Bumped((one, two)))


@pytest.mark.parametrize("how", ["capture", "bump"])
async def test_a_tag_that_was_lost_gets_a_version_that_it_never_had(desk: Desk, how: str) -> None:
    """tags_bump I1, tags_capture I1: also if the server's clock went back meanwhile."""
    one, _ = tags_of_a_shard(desk)
    future = await desk.now_us() + 3_600_000_000
    await desk.commands.call("HSET", desk.part("head"), "v", future)
    await desk.bump(one)
    await desk.commands.call("DEL", desk.names.tag(one))
    if how == "bump":
        await desk.bump(one)
    assert await desk.capture(one) == [future + 2]


async def test_a_bump_is_taken_once_per_mark(desk: Desk) -> None:
    """Events that are applied again after a crash have no second effect."""
    one, _ = tags_of_a_shard(desk)
    await desk.bump(one, mark="005")
    before = await desk.everything()
    assert await desk.bump(one, mark="005") == [2]
    assert await desk.everything() == before
    first, second = await desk.bump(one), await desk.bump(one)
    assert int(first[1]) < int(second[1])


async def test_a_soft_bump_keeps_the_hard_version(desk: Desk) -> None:
    """C4: until a hard one comes; on the wire it is the version, a blank and the hard one."""
    one, two = tags_of_a_shard(desk)
    first, second = await desk.capture(one, two)
    for _ in range(2):
        version = int((await desk.bump(one, two, soft=True))[1])
        assert await desk.captured(one, two) == [(version, first, 0), (version, second, 0)]
    stored = await desk.commands.call("GET", desk.names.tag(one))
    assert stored == f"{version} {first}".encode()
    hard = int((await desk.bump(one))[1])
    assert await desk.commands.call("GET", desk.names.tag(one)) == str(hard).encode()
    assert await desk.captured(one, two) == [(hard, hard, 0), (version, second, 0)]
    soft = int((await desk.bump(one, soft=True))[1])
    assert await desk.captured(one) == [(soft, hard, 0)]
    assert await desk.capture(one, keep_ms=1_000) == [soft]
    assert 0 < await desk.commands.call("PTTL", desk.names.tag(one)) <= 1_000


@pytest.mark.parametrize("lost", [None, "", "not a version", "12 x", " 5"])
async def test_a_soft_bump_of_what_was_lost_is_a_hard_one(desk: Desk, lost: str | None) -> None:
    """tags_bump I2: nobody knows any more how hard the last one was."""
    one, _ = tags_of_a_shard(desk)
    if lost is not None:
        await desk.commands.call("SET", desk.names.tag(one), lost)
    version = int((await desk.bump(one, soft=True))[1])
    assert await desk.captured(one) == [(version, version, 0)]


async def test_a_capture_tells_what_it_made(desk: Desk) -> None:
    """tags_capture: the same version for all that it made, which is their hard one, too."""
    one, two = tags_of_a_shard(desk)
    ((first, hard, made),) = await desk.captured(one)
    assert (hard, made) == (first, 1)
    again, (second, hard, made) = await desk.captured(one, two)
    assert again == (first, first, 0)
    assert (hard, made) == (second, 1)
    await desk.commands.call("SET", desk.names.tag(one), "no version")
    ((third, hard, made),) = await desk.captured(one)
    assert (hard, made) == (third, 1)
    assert third > second


# log_begin


async def test_a_log_is_begun_once(desk: Desk) -> None:
    """log_begin I1: by whoever comes first; everybody begins to follow at the same place."""
    first = await desk.log_begin()
    assert first is not None
    assert first.endswith(b"-0")
    assert await desk.log_begin() == first
    (logged,) = await desk.log()
    assert (str(logged.position).encode(), logged.notice) == (first, Dropped(()))


async def test_a_log_that_has_notices_is_not_written_to(desk: Desk) -> None:
    """log_begin I2: its end is told."""
    await desk.put()
    await desk.put()
    before = await desk.everything()
    assert await desk.log_begin() == str((await desk.log())[-1].position).encode()
    assert await desk.everything() == before


async def test_a_log_that_was_trimmed_to_its_end_goes_on_where_it_was(desk: Desk) -> None:
    """log_begin I1: so that the id tells how many there were."""
    await desk.put()
    await desk.put()
    epoch = (await desk.log())[-1].position.epoch
    await desk.commands.call("XTRIM", desk.part("log"), "MAXLEN", 0)
    assert await desk.log_begin() == f"{epoch}-2".encode()
    await desk.put()
    assert [logged.position.seq for logged in await desk.log()] == [2, 3]


# owner_claim, owner_release


async def test_one_owner_at_a_time(desk: Desk) -> None:
    """Others learn who it is and how long its lease may still last."""
    done, epoch, *_ = await desk.claim("a")
    assert done == 1
    refused, in_force, left_ms, owner = await desk.claim("b")
    assert (refused, in_force, owner) == (0, epoch, b"a")
    assert 0 < left_ms <= MINUTE_MS


async def test_claiming_again_renews_under_the_same_epoch(desk: Desk) -> None:
    """owner_claim I2: be it a renewal, a repetition, or late, as long as nobody came between."""
    _, epoch, *_ = await desk.claim("a", ttl_ms=1_000)
    before = int(await desk.commands.call("HGET", desk.part("own"), "u"))
    assert (await desk.claim("a"))[:2] == [1, epoch]
    assert int(await desk.commands.call("HGET", desk.part("own"), "u")) > before + 1_000_000
    await desk.end_lease()
    assert (await desk.claim("a"))[:2] == [1, epoch]
    assert (await desk.claim("b"))[0] == 0


async def test_a_lease_that_is_over_can_be_taken(desk: Desk) -> None:
    """owner_claim I1: under a larger epoch, also back and forth."""
    epochs = []
    for owner in ("a", "b", "a", "b"):
        done, epoch, *_ = await desk.claim(owner, token=owner)
        assert done == 1
        epochs.append(int(epoch))
        await desk.end_lease()
    assert epochs == sorted(set(epochs))


async def test_the_same_node_id_with_another_token_is_another_owner(desk: Desk) -> None:
    """owner_claim I2: two processes may share an id by mistake, and must not share a lease."""
    _, first, *_ = await desk.claim("a", token="one")
    assert (await desk.claim("a", token="two"))[:2] == [0, first]
    await desk.end_lease()
    done, second, *_ = await desk.claim("a", token="two")
    assert done == 1
    assert int(second) > int(first)


async def test_an_epoch_grows_though_the_record_or_the_clock_is_lost(desk: Desk) -> None:
    """owner_claim I1: max(previous + 1, clock)."""
    _, first, *_ = await desk.claim("a")
    await desk.commands.call("DEL", desk.part("own"))
    _, second, *_ = await desk.claim("a")
    assert int(second) > int(first)
    future = await desk.now_us() + 3_600_000_000
    await desk.commands.call("HSET", desk.part("own"), "e", future, "u", 1)
    assert (await desk.claim("b"))[:2] == [1, str(future + 1).encode()]


async def test_releasing_makes_way_at_once(desk: Desk) -> None:
    """owner_release I1: the next epoch is larger; a second release, or another's, does nothing."""
    _, epoch, *_ = await desk.claim("a")
    assert await desk.give_up("b", int(epoch)) == 0
    assert await desk.give_up("a", int(epoch) + 1) == 0
    assert (await desk.claim("b"))[0] == 0
    assert await desk.give_up("a", int(epoch)) == 1
    assert await desk.give_up("a", int(epoch)) == 0
    done, later, *_ = await desk.claim("b")
    assert done == 1
    assert int(later) > int(epoch)
    assert await desk.give_up("a", int(epoch)) == 0


async def test_who_claims_again_after_a_release_has_a_new_epoch(desk: Desk) -> None:
    """owner_release: what the owner sent before must not count as what it does now."""
    _, epoch, *_ = await desk.claim("a")
    await desk.give_up("a", int(epoch))
    _, later, *_ = await desk.claim("a")
    assert int(later) > int(epoch)
    assert (await desk.commit("a", int(epoch), "5-0"))[0] == 0


# checkpoint_commit

FAR = f"{1 << 63}-0"


async def sunk(desk: Desk) -> tuple[int, int, str]:
    """A claim and a pending write: the owner's epoch, the write's version and its job's id."""
    _, epoch, *_ = await desk.claim("a")
    _, version, _, _, job_id, _ = await desk.write("value")
    return int(epoch), int(version), bytes(job_id).decode()


async def test_a_commit_moves_the_checkpoint_and_trims(desk: Desk) -> None:
    """Entries up to the checkpoint are gone, the others stay; sent twice it is the same."""
    epoch, _, job_id = await sunk(desk)
    await desk.write("next")
    for _ in range(2):
        assert await desk.commit("a", epoch, job_id) == [1]
        assert await desk.commands.call("HGET", desk.part("done"), "writes") == job_id.encode()
        ((_, fields),) = await desk.commands.call("XRANGE", desk.part("writes"), "-", "+")
        assert fields[3] == b"job of next"


@pytest.mark.parametrize(
    ("follows", "last", "lost"),
    [
        ("0-0", "job", False),
        ("0-0", "", False),
        ("1-0", "job", True),  # the checkpoint has moved since the owner wrote it
        ("0-0", "9-9", True),  # the entries that it read are gone
    ],
)
async def test_a_commit_of_what_the_server_lost_moves_nothing(
    desk: Desk, follows: str, last: str, lost: bool
) -> None:
    """checkpoint_commit I6: but an entry known to be sunk may expire."""
    epoch, version, job_id = await sunk(desk)
    last = job_id if last == "job" else last
    reply = await desk.commit("a", epoch, job_id, [("k", version)], follows=follows, last=last)
    done = await desk.commands.call("HGET", desk.part("done"), "writes")
    assert (reply, done, await desk.length("writes")) == (
        ([2], b"0-0", 1) if lost else ([1], job_id.encode(), 0)
    )
    assert (await desk.entry()).pending == 0


async def test_a_second_checkpoint_is_compared_too(desk: Desk) -> None:
    """checkpoint_commit I6: a commit follows the one before."""
    epoch, _, first = await sunk(desk)
    _, _, _, _, raw_id, _ = await desk.write("next")
    second = bytes(raw_id).decode()
    assert await desk.commit("a", epoch, first, follows="0-0", last=first) == [1]
    assert await desk.commit("a", epoch, second, follows="0-0", last=second) == [2]
    assert await desk.commit("a", epoch, second, follows=first, last=second) == [1]


async def test_writes_are_trimmed_where_the_checkpoints_are_as_known(desk: Desk) -> None:
    """writes_trim I1: a checkpoint that went back keeps the entries it has to read again."""
    epoch, _, _ = await sunk(desk)
    await desk.commit("a", epoch, "0-1", last="")
    await desk.write("next")
    for known in (["writes", "0-2"], ["writes", "0-1", "writes:b", "0-1"], ["other", "0-1"]):
        assert await desk.trim(FAR, *known) == 0
    assert await desk.length("writes") == 2
    assert await desk.trim(FAR, "writes", "0-1", "writes:b", "0-0") == 1
    assert await desk.length("writes") == 0


async def test_what_was_sunk_may_expire_again(desk: Desk) -> None:
    """At the time that the write gave it; the value is as it was."""
    epoch, version, job_id = await sunk(desk)
    before = await desk.entry()
    assert await desk.commit("a", epoch, job_id, [("k", version)]) == [1]
    entry = await desk.entry()
    assert (entry.pending, entry.version, entry.payload) == (0, version, b"value")
    assert (entry.soft_at_ms, entry.hard_at_ms) == (before.soft_at_ms, before.hard_at_ms)
    at_ms = await desk.now_us() / 1000 + await desk.ttl_ms()
    assert abs(at_ms - entry.hard_at_ms) < 5_000


async def test_what_was_sunk_too_late_is_gone(desk: Desk) -> None:
    """The sink was away for longer than the entry was to live."""
    _, epoch, *_ = await desk.claim("a")
    _, version, _, _, job_id, _ = await desk.write(soft_ms=1, hard_ms=1)
    await anyio.sleep(0.005)
    assert (await desk.entry()).pending == int(version)
    await desk.commit("a", int(epoch), bytes(job_id).decode(), [("k", int(version))])
    assert await desk.raw() is None


async def test_a_newer_pending_write_is_left_alone(desk: Desk) -> None:
    """checkpoint_commit I2: the entry still waits for the newer one."""
    epoch, version, job_id = await sunk(desk)
    _, newer, *_ = await desk.write("newer")
    await desk.commit("a", epoch, job_id, [("k", version)])
    entry = await desk.entry()
    assert (entry.pending, entry.payload) == (int(newer), b"newer")
    assert await desk.ttl_ms() == -1


async def test_a_put_over_a_pending_write_stays_when_it_was_sunk(desk: Desk) -> None:
    """The value put is kept, and expires at the time that the put gave it."""
    epoch, version, job_id = await sunk(desk)
    await desk.put("put", hard_ms=10 * MINUTE_MS)
    await desk.commit("a", epoch, job_id, [("k", version)])
    entry = await desk.entry()
    assert (entry.pending, entry.payload) == (0, b"put")
    assert await desk.ttl_ms() > 8 * MINUTE_MS


async def test_what_was_invalidated_while_pending_is_dropped_when_sunk(desk: Desk) -> None:
    """Not before, and not if a newer write or a put came after the invalidation."""
    epoch, version, job_id = await sunk(desk)
    await desk.invalidate()
    assert (await desk.entry()).doomed
    await desk.commit("a", epoch, job_id, [("k", version)])
    assert await desk.raw() is None

    _, older, *_ = await desk.write("older")
    await desk.invalidate()
    await desk.put("put")
    await desk.commit("a", epoch, job_id, [("k", int(older))])
    assert (await desk.entry()).payload == b"put"

    await desk.write("older")
    await desk.invalidate()
    _, newer, *_ = await desk.write("newer")
    await desk.commit("a", epoch, job_id, [("k", int(newer))])
    assert (await desk.entry()).payload == b"newer"


@pytest.mark.parametrize("value", [None, b'{"a": 1}', b"\xfbE2?", b""])
async def test_a_commit_does_not_touch_what_is_not_pending(desk: Desk, value: bytes | None) -> None:
    """Whatever stands in place of the entry by now, and whatever version it is told."""
    epoch, _, job_id = await sunk(desk)
    name = desk.names.entry("k")
    await desk.commands.call("DEL", name)
    if value is not None:
        await desk.commands.call("SET", name, value)
    assert await desk.commit("a", epoch, job_id, [("k", 0)]) == [1]
    assert await desk.raw() == value
    version = await desk.put("put")
    assert await desk.commit("a", epoch, job_id, [("k", version), ("k", 0)]) == [1]
    assert (await desk.entry()).payload == b"put"


@pytest.mark.parametrize("how", ["other owner", "released", "record lost", "older epoch"])
async def test_a_commit_of_one_who_is_fenced_off_writes_nothing(desk: Desk, how: str) -> None:
    """checkpoint_commit I1: and it says which epoch is in force."""
    epoch, version, job_id = await sunk(desk)
    current = str(epoch).encode()
    if how == "other owner":
        await desk.end_lease()
        _, current, *_ = await desk.claim("b", token="b")
    elif how == "released":
        await desk.give_up("a", epoch)
    elif how == "record lost":
        await desk.commands.call("DEL", desk.part("own"))
        current = b"0"
    else:
        epoch -= 1
    before = await desk.everything()
    assert await desk.commit("a", epoch, job_id, [("k", version)]) == [0, current]
    assert await desk.everything() == before


# roster_beat, event_publish


async def test_a_wish_is_told_to_the_owner_and_makes_the_next(desk: Desk) -> None:
    """owner_claim I5: what is released goes to the one who wished, at once, and to no other."""
    _, epoch, *_ = await desk.claim("a")
    assert (await desk.claim("b", token="b"))[0] == 0
    assert (await desk.claim("a"))[3:] == [b"b", b"kept"]
    assert (await desk.claim("c", token="c"))[0] == 0
    await desk.give_up("a", int(epoch))
    refused, _, _, whose = await desk.claim("c", token="c")
    assert (refused, whose) == (0, b"b")
    assert (await desk.claim("a"))[0] == 0
    done, later, _, wisher, kind = await desk.claim("b", token="b")
    assert (done, wisher, kind) == (1, b"", b"wished")
    assert int(later) > int(epoch)
    assert (await desk.claim("b", token="b"))[3] == b""


async def test_a_wish_that_is_not_repeated_is_forgotten(desk: Desk) -> None:
    """owner_claim I5: as that of a node that has died."""
    _, epoch, *_ = await desk.claim("a")
    await desk.claim("b", token="b", fresh_ms=1)
    await anyio.sleep(0.005)
    assert (await desk.claim("a"))[3] == b""
    await desk.give_up("a", int(epoch))
    assert (await desk.claim("c", token="c"))[0] == 1


async def test_an_owner_who_does_not_give_way_is_not_renewed(desk: Desk) -> None:
    """owner_claim I2, I4: its lease ends forced_ms after the wish, or where it was to end."""
    _, epoch, *_ = await desk.claim("a", ttl_ms=50)
    await desk.claim("b", token="b", forced_ms=200)
    _, _, left_ms, *_ = await desk.claim("a", forced_ms=200)
    assert 0 < left_ms <= 200
    with anyio.fail_after(10):
        while (reply := await desk.claim("b", token="b", forced_ms=200))[0] == 0:
            assert (await desk.claim("a", forced_ms=200))[1] == epoch
            await anyio.sleep(0.005)
    assert reply[4] == b"forced"
    assert (await desk.claim("a"))[0] == 0


async def test_a_lease_is_not_shortened_by_a_wish(desk: Desk) -> None:
    """owner_claim I4: what was granted is what the owner counts on."""
    await desk.claim("a")
    assert (await desk.claim("b", token="b", forced_ms=0))[0] == 0
    assert (await desk.claim("b", token="b", forced_ms=0))[0] == 0
    granted, _, left_ms, *_ = await desk.claim("a", forced_ms=0)
    assert granted == 1
    assert left_ms > MINUTE_MS / 2


async def test_the_roster_tells_what_has_changed(desk: Desk) -> None:
    """roster_beat I2: each change once; who knows nothing, or another roster, is told all."""
    version, _, told = await desk.beat("a")
    assert told == {"a": "active"}
    assert await desk.beat("a", known=version) == (version, False, {})
    later, whole, told = await desk.beat("b", known=version)
    assert (whole, told) == (False, {"b": "active"})
    assert later > version
    newest, _, told = await desk.beat("b", "gone", known=later)
    assert told == {"b": "gone"}
    assert await desk.beat("a", known=newest) == (newest, False, {})
    assert await desk.beat("a", known=newest + 1) == (newest, True, {"a": "active", "b": "gone"})
    await desk.commands.call("DEL", desk.names.members)
    reborn, whole, told = await desk.beat("a", known=newest)
    assert (whole, told) == (True, {"a": "active"})
    assert reborn > newest


async def silent_for(desk: Desk, member: str, ms: int) -> None:
    await desk.commands.call("ZINCRBY", desk.names.nodes, -ms, member)


async def test_a_silent_member_is_suspect_and_then_gone(desk: Desk) -> None:
    """roster_beat I1: after three and five of its own beats; heard again, it is active."""
    await desk.beat("b", beat_ms=2 * MINUTE_MS)
    version, *_ = await desk.beat("a")
    await silent_for(desk, "b", 4 * MINUTE_MS)
    assert await desk.beat("a", known=version) == (version, False, {})
    await silent_for(desk, "b", 2 * MINUTE_MS)
    version, _, told = await desk.beat("a", known=version)
    assert told == {"b": "suspect"}
    version, _, told = await desk.beat("b", beat_ms=2 * MINUTE_MS, known=version)
    assert told == {"b": "active"}
    await silent_for(desk, "b", 10 * MINUTE_MS)
    version, _, told = await desk.beat("a", known=version)
    assert told == {"b": "gone"}
    await silent_for(desk, "b", MINUTE_MS)
    await desk.beat("a")
    assert await desk.commands.call("ZCARD", desk.names.nodes) == 1
    assert (await desk.beat("a", known=version - 1))[1]


@pytest.mark.parametrize("how", ["crashed", "planned"])
async def test_a_place_is_kept_for_the_grace(desk: Desk, how: str) -> None:
    """roster_beat I1: away, be it planned or not, until the grace since its last beat is over."""
    await desk.beat("a")
    grace_ms = 9 * MINUTE_MS
    await desk.beat("b", "away" if how == "planned" else "active", grace_ms=grace_ms)
    await silent_for(desk, "b", 6 * MINUTE_MS)
    version, _, told = await desk.beat("a")
    assert told["b"] == "away"
    await silent_for(desk, "b", 3 * MINUTE_MS)
    assert (await desk.beat("a", known=version))[2] == {"b": "gone"}


@pytest.mark.parametrize("by_ms", [-20 * MINUTE_MS, 20 * MINUTE_MS])
async def test_nobody_is_judged_by_an_outage(desk: Desk, by_ms: int) -> None:
    """roster_beat I3: nor by a clock that was set back."""
    await desk.beat("a")
    version, *_ = await desk.beat("b")
    head = bytes(await desk.commands.call("HGET", desk.names.members, "")).decode().split()
    head[2] = str(int(head[2]) + by_ms)
    await desk.commands.call("HSET", desk.names.members, "", " ".join(head))
    for member in ("a", "b"):
        await silent_for(desk, member, -by_ms)
    version, _, told = await desk.beat("a", known=version)
    assert told.get("b", "active") in ("suspect", "active")
    assert (await desk.beat("b", known=version))[2].get("b", "active") == "active"
    await silent_for(desk, "b", 5 * MINUTE_MS)
    assert (await desk.beat("a", known=version))[2] == {"b": "gone"}


async def test_events_are_published_all_or_none(desk: Desk) -> None:
    """event_publish I1: in order; a full stream refuses, and is not trimmed."""
    ids = await desk.publish("one", "two", bound=3)
    stored = await desk.commands.call("XRANGE", desk.names.events, "-", "+")
    assert stored == [[ids[0], [b"event", b"one"]], [ids[1], [b"event", b"two"]]]
    assert await desk.publish("three", "four", bound=3) == [0, 2]
    assert await desk.commands.call("XLEN", desk.names.events) == 2
    assert len(await desk.publish("three", bound=3)) == 1


async def test_events_sent_twice_are_there_twice(desk: Desk) -> None:
    """It is the id within the event that says they are the same."""
    first, second = await desk.publish("same"), await desk.publish("same")
    assert first != second
    assert await desk.commands.call("XLEN", desk.names.events) == 2


# writes_hold


async def waiting(desk: Desk, count: int = 3) -> tuple[int, list[str]]:
    """A claim and some writes that wait: the owner's epoch, and the ids of the jobs."""
    _, epoch, *_ = await desk.claim("a")
    replies = [await desk.write(f"value {n}", key=key) for n, key in enumerate("k" * count)]
    return int(epoch), [bytes(reply[4]).decode() for reply in replies]


async def test_what_is_held_is_in_one_stream_at_any_time(desk: Desk) -> None:
    """writes_hold I1: with its job, its version and the id it had; sent twice it is the same."""
    epoch, (first, second, third) = await waiting(desk)
    before = dict(await desk.commands.call("XRANGE", desk.part("writes"), "-", "+"))
    done, *held = await desk.hold("a", epoch, first, third)
    assert done == 1
    assert await desk.hold("a", epoch, first, third) == [1, b"-", b"-"]
    ((left, _),) = await desk.commands.call("XRANGE", desk.part("writes"), "-", "+")
    assert left == second.encode()
    found = await desk.commands.call("XRANGE", desk.part("held"), "-", "+")
    assert [raw_id for raw_id, _ in found] == held
    for (_, fields), origin in zip(found, (first, third), strict=True):
        assert fields == [*before[origin.encode()], b"f", origin.encode()]
    assert await desk.commands.call("EXISTS", desk.part("tried")) == 0


async def test_what_has_no_room_stays_where_it_is(desk: Desk) -> None:
    """writes_hold I4: and the reply says so."""
    epoch, ids = await waiting(desk)
    done, first, *rest = await desk.hold("a", epoch, *ids, held_max=1)
    assert (done, rest) == (1, [b"", b""])
    assert first
    assert await desk.length("writes") == 2


async def test_who_could_not_decode_is_noted_once_for_each(desk: Desk) -> None:
    """The ids of the writes as held; writes that are held already keep theirs."""
    epoch, (first, *_) = await waiting(desk)
    _, held = await desk.hold("a", epoch, first, token="one")
    held_id = bytes(held).decode()
    assert await desk.hold("a", epoch, held_id, source="held", token="two") == [1, held]
    assert await desk.commands.call("HGET", desk.part("tried"), held_id) == b"one two"
    assert await desk.length("held") == 1


async def test_one_who_is_fenced_off_holds_nothing(desk: Desk) -> None:
    """writes_hold I2."""
    epoch, ids = await waiting(desk)
    before = await desk.everything()
    assert await desk.hold("a", epoch - 1, *ids, token="t") == [0, str(epoch).encode()]
    assert await desk.hold("b", epoch, *ids) == [0, str(epoch).encode()]
    assert await desk.everything() == before


# Entries moved to another stream, and facts fixed once


async def test_an_entry_is_moved_once_under_its_id(desk: Desk) -> None:
    """Asked again with the id it changes nothing; an id that is too small is replaced."""
    assert await desk.append("held", "event", "one", entry_id="5-1") == [1, 0]
    assert await desk.append("held", "event", "one", entry_id="5-1") == [0]
    assert await desk.append("held", "event", "two", entry_id="3-0") == [1, 0]
    first, second = await desk.commands.call("XRANGE", desk.part("held"), "-", "+")
    assert first == [b"5-1", [b"event", b"one"]]
    assert second[0] != b"3-0"
    assert second[1] == [b"event", b"two"]


async def test_of_what_is_moved_the_newest_stay(desk: Desk) -> None:
    """The bound may be exceeded by part of a stream node; the reply counts dropped entries."""
    replies = [await desk.append("dead", "n", str(number), bound=10) for number in range(300)]
    kept = await desk.commands.call("XRANGE", desk.part("dead"), "-", "+")
    assert 10 <= len(kept) < 300
    assert sum(int(reply[1]) for reply in replies) == 300 - len(kept)
    assert kept[-1][1] == [b"n", b"299"]


async def test_a_fact_of_the_namespace_is_fixed_by_the_first(desk: Desk) -> None:
    """Later callers get the fixed value."""
    for value in ("64", "16"):
        assert await desk.run("meta_set", [desk.names.meta], "shards", value) == b"64"

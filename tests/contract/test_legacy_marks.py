"""Marks of what changed, for which no entry of another service is brought over (_change.lua C8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from support.scripts import Desk

DAY_MS = 86_400_000
MARKS_MAX = 100_000


async def now_ms(desk: Desk) -> int:
    seconds, _ = await desk.commands.call("TIME")
    return int(seconds) * 1000


async def until(desk: Desk) -> int:
    return int(await desk.commands.call("HGET", desk.part("head"), "l") or 0)


async def fill(desk: Desk) -> None:
    await desk.begin("t", seen=1 << 52)
    assert (await desk.fill("t", label="*k"))[0] == 1


async def write_through(desk: Desk) -> None:
    await desk.begin_write("w")
    assert (await desk.fill_write("w"))[0] == 1


Change = Callable[[Desk], Awaitable[object]]
CHANGES = [
    pytest.param(lambda desk: desk.invalidate(), id="invalidate"),
    pytest.param(lambda desk: desk.invalidate(soft=True), id="soft"),
    pytest.param(lambda desk: desk.put("new"), id="put"),
    pytest.param(lambda desk: desk.write("new"), id="write-behind"),
    pytest.param(write_through, id="write-through"),
    pytest.param(fill, id="fill"),
]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_marks_its_key_while_entries_are_brought_over(
    desk: Desk, change: Change
) -> None:
    """Every way to change a key leaves its mark, and none without ``l`` in the head."""
    await change(desk)
    assert await desk.marks() == set()
    await desk.begin_legacy(await now_ms(desk) + DAY_MS)
    await change(desk)
    assert await desk.marks() == {b"*k"}


async def test_a_tag_is_marked_when_it_is_bumped(desk: Desk) -> None:
    """tags_bump I4: also softly; a tag that is only captured is not."""
    await desk.begin_legacy(await now_ms(desk) + DAY_MS)
    await desk.capture("k")
    assert await desk.marks() == set()
    await desk.bump("k")
    assert await desk.marks() == {b"k"}


async def test_marks_end_with_their_time(desk: Desk) -> None:
    """The first change afterwards deletes the set and the time."""
    await desk.begin_legacy(await now_ms(desk) + DAY_MS)
    await desk.invalidate()
    await desk.commands.call("HSET", desk.part("head"), "l", await now_ms(desk) - 1_000)
    await desk.invalidate()
    assert (await desk.marks(), await until(desk)) == (set(), 0)


async def test_old_marks_are_trimmed(desk: Desk) -> None:
    """A mark of more than 31 days goes, a younger one stays."""
    await desk.begin_legacy(await now_ms(desk) + DAY_MS)
    now = await now_ms(desk)
    marks = desk.part("legacy")
    await desk.commands.call("ZADD", marks, now - 32 * DAY_MS, "old", now - 30 * DAY_MS, "young")
    await desk.invalidate()
    assert await desk.marks() == {b"young", b"*k"}


async def test_too_many_marks_close_the_shard(desk: Desk) -> None:
    """The set is bounded; without its marks nothing is brought over, until that time has come."""
    ends_at = await now_ms(desk) + DAY_MS
    await desk.begin_legacy(ends_at)
    scores = [word for each in range(MARKS_MAX) for word in (ends_at, f"t{each}")]
    for start in range(0, len(scores), 4_000):
        await desk.commands.call("ZADD", desk.part("legacy"), *scores[start : start + 4_000])
    await desk.invalidate()
    assert (await desk.marks(), await until(desk)) == (set(), -ends_at)
    assert await desk.begin_legacy(ends_at + 5) == [-ends_at - 5, 0]
    await desk.invalidate()
    assert (await desk.marks(), await until(desk)) == (set(), -ends_at - 5)


@pytest.mark.parametrize("spoilt", [b"x", b"nan", b"1e999", b"", b"9" * 400])
async def test_a_spoilt_time_stops_no_change(desk: Desk, spoilt: bytes) -> None:
    """Anybody may have written there; it is as if there were none, or one far ahead."""
    await desk.commands.call("HSET", desk.part("head"), "l", spoilt)
    assert (await desk.invalidate())[0] == 1
    assert (await desk.begin_legacy(await now_ms(desk) + DAY_MS))[1] in (0, 1)
    assert (await desk.invalidate())[0] == 1


async def test_a_spoilt_set_closes_the_shard(desk: Desk) -> None:
    """Something else under the name of the set: the change is done, and marks end."""
    await desk.begin_legacy(await now_ms(desk) + DAY_MS)
    await desk.commands.call("SET", desk.part("legacy"), "not ours")
    assert (await desk.invalidate())[0] == 1
    assert await until(desk) < 0


async def test_the_time_never_moves_back_and_a_late_begin_is_told(desk: Desk) -> None:
    """legacy_begin I1; ``late``: a key was changed before marks began."""
    ends_at = await now_ms(desk) + DAY_MS
    assert await desk.begin_legacy(ends_at) == [ends_at, 0]
    assert await desk.begin_legacy(ends_at - 5) == [ends_at, 0]
    assert await desk.begin_legacy(ends_at + 5) == [ends_at + 5, 0]
    await desk.commands.call("HDEL", desk.part("head"), "l")
    await desk.invalidate()
    assert await desk.begin_legacy(ends_at) == [ends_at, 1]

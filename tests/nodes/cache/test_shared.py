"""The shared tier on a real server: one round trip for many reads, and scripts as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any

import anyio
import pytest

from forebay.coordinator.valkey.link import Link
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.nodes.cache.shared import Granted, Held, Newer, SharedTier, Stamp
from forebay.nodes.cache.tags import Captured
from forebay.schemas.entry import EntryMeta, make_tail, read_entry, version_of
from forebay.schemas.errors import Backpressure, Disconnected, ServerRefused, Unavailable
from forebay.schemas.jobs import WriteJob
from forebay.schemas.keys import Names, dependents_of
from forebay.schemas.notices import Bumped, Dropped, Extended, read_notice
from forebay.schemas.settings import Durable
from support.links import link_to, running

TAIL = make_tail(b"\x01", kind="v", codec="m", meta=EntryMeta())
LIFETIME = {"soft_ms": 60_000, "hard_ms": 60_000, "tail": TAIL}


@pytest.fixture
async def link(valkey_server) -> AsyncIterator[Link]:
    made = link_to(valkey_server.socket_url)
    async with running(made):
        yield made


@pytest.fixture
def names(namespace: str) -> Names:
    return Names(namespace, 4)


def tier_on(commands: Any, names: Names, **durable: Any) -> SharedTier:
    return SharedTier(
        commands, commands, names, load_scripts(), origin="me", durable=Durable(**durable)
    )


@pytest.fixture
def tier(link: Link, names: Names) -> SharedTier:
    return tier_on(link, names)


class Slow:
    """Commands that are answered when they are let; otherwise the real ones."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.sent: list[tuple[Any, ...]] = []
        self.gate = anyio.Event()
        self.gate.set()
        self.error: BaseException | None = None

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        self.sent.append(args)
        reply = await self.link.call(*args)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return reply

    async def call_many(
        self, commands: Sequence[Any], *, timeout_ms: int | None = None
    ) -> list[Any]:
        return await self.link.call_many(commands)


async def test_reads_of_one_tick_travel_together(link: Link, names: Names, tier) -> None:
    """S1: up to 200 keys in an MGET; a key that many ask for is in it once."""
    await asyncio.gather(*[tier.put(f"k{n}", **LIFETIME) for n in range(300)])
    slow = Slow(link)
    several = tier_on(slow, names)
    got = await asyncio.gather(*[several.get(f"k{n % 450}") for n in range(900)])
    assert [len(sent) - 1 for sent in slow.sent] == [200, 200, 50]
    assert [raw is not None for raw in got] == [n % 450 < 300 for n in range(900)]
    assert got[0] == got[450] == await several.get("k0")


async def test_a_read_never_joins_one_that_was_sent(link: Link, names: Names, tier) -> None:
    """S1: it might be older than what the caller has heard since."""
    slow = Slow(link)
    several = tier_on(slow, names)
    slow.gate = anyio.Event()
    first = asyncio.ensure_future(several.get("k"))
    while not slow.sent:
        await anyio.sleep(0)
    await anyio.sleep(0.01)
    await tier.put("k", **LIFETIME)
    second = asyncio.ensure_future(several.get("k"))
    await anyio.sleep(0.01)
    slow.gate.set()
    assert await first is None
    assert await second is not None


async def test_a_cancelled_reader_disturbs_nobody(link: Link, names: Names, tier) -> None:
    """S1: others may have asked for the same key."""
    await tier.put("k", **LIFETIME)
    slow = Slow(link)
    several = tier_on(slow, names)
    slow.gate = anyio.Event()
    readers = [asyncio.ensure_future(_await(several.get("k"))) for _ in range(3)]
    await anyio.sleep(0.01)
    readers[0].cancel()
    await anyio.sleep(0.01)
    slow.gate.set()
    got = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(got[0], asyncio.CancelledError)
    assert got[1] == got[2]
    assert got[1] is not None


async def _await(future: Any) -> Any:
    return await future


async def test_each_reader_gets_an_error_of_its_own(link: Link, names: Names) -> None:
    """S1: and the next tick asks again."""
    slow = Slow(link)
    several = tier_on(slow, names)
    slow.error = Disconnected("gone")
    got = await asyncio.gather(
        *[several.get(f"k{n % 5}") for n in range(10)], return_exceptions=True
    )
    assert all(type(each) is Disconnected for each in got)
    assert len({id(each) for each in got}) == 10
    slow.error = None
    assert await several.get("k1") is None


async def test_a_lease_is_one_callers(tier: SharedTier) -> None:
    """Asked again with the same token it is granted again; a fill uses it up."""
    first = await tier.begin("k", "a", lease_ms=60_000, seen=-1)
    second = await tier.begin("k", "a", lease_ms=60_000, seen=-1)
    third = await tier.holds("k", "a")
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert isinstance(third, Granted)
    assert (first.entry, second.entry, third.entry) == (None, None, None)
    assert first.since < second.since < third.since
    held = await tier.begin("k", "b", lease_ms=60_000, seen=-1)
    assert isinstance(held, Held)
    assert 0 < held.left_ms <= 60_000
    assert not held.failing
    assert await tier.holds("k", "b") is None
    assert await tier.fill("k", "b", **LIFETIME) is None
    stamp = await tier.fill("k", "a", **LIFETIME)
    assert stamp is not None
    assert await tier.fill("k", "a", **LIFETIME) is None
    newer = await tier.begin("k", "c", lease_ms=60_000, seen=-1)
    assert isinstance(newer, Newer)
    assert read_entry(newer.entry, bytes_max=99).version == stamp.version
    again = await tier.begin("k", "c", lease_ms=60_000, seen=stamp.version)
    assert isinstance(again, Granted)
    assert (again.entry, again.since > stamp.version) == (newer.entry, True)
    await tier.release("k", "other")
    holds = await tier.holds("k", "c")
    assert holds is not None
    assert holds.entry == newer.entry
    await tier.release("k", "c")
    assert await tier.holds("k", "c") is None


async def test_a_source_that_failed_is_left_alone_by_those_who_are_patient(
    tier: SharedTier,
) -> None:
    """By whoever has something to serve; where there is no entry, by nobody."""
    await tier.begin("k", "a", lease_ms=60_000, seen=-1)
    assert not await tier.failed("k", "a", throttle_ms=60_000)
    stamp = await tier.put("k", **LIFETIME)
    seen = stamp.version
    await tier.begin("k", "a", lease_ms=60_000, seen=seen)
    assert not await tier.failed("k", "other", throttle_ms=60_000)
    assert await tier.failed("k", "a", throttle_ms=60_000)
    held = await tier.begin("k", "b", lease_ms=60_000, seen=seen, patient=True)
    assert isinstance(held, Held)
    assert held.failing
    assert 0 < held.left_ms <= 60_000
    assert isinstance(await tier.begin("k", "b", lease_ms=60_000, seen=seen), Granted)
    held = await tier.begin("k", "c", lease_ms=60_000, seen=seen, patient=True)
    assert held == Held(held.left_ms) if isinstance(held, Held) else False


async def test_an_unchanged_value_lives_on(tier: SharedTier, link: Link, names: Names) -> None:
    """With new lifetimes and another meta part; nodes are told by how much."""
    stamp = await tier.put("k", **LIFETIME)
    meta = EntryMeta(tags={"t": 5}, soft_ms=90_000)
    middle = make_tail(b"", kind="v", codec="m", meta=meta)
    times = {"soft_ms": 90_000, "hard_ms": 95_000, "middle": middle}
    assert await tier.extend("k", "a", since=stamp.version, **times) is None
    await tier.begin("k", "a", lease_ms=60_000, seen=stamp.version)
    assert await tier.extend("k", "a", since=stamp.version - 1, **times) == "changed"
    extended = await tier.extend("k", "a", since=stamp.version, **times)
    assert isinstance(extended, Stamp)
    assert extended.version > stamp.version
    entry = read_entry(await tier.get("k") or b"", bytes_max=99)
    assert (entry.version, entry.payload, entry.meta) == (extended.version, b"\x01", meta)
    assert (entry.soft_at_ms, entry.hard_at_ms) == (extended.soft_at_ms, extended.hard_at_ms)
    assert extended.hard_at_ms - extended.soft_at_ms == 5_000
    logged = await link.call("XREVRANGE", names.part(names.shard("k"), "log"), "+", "-")
    assert read_notice(logged[0][1][3]) == Extended("k", stamp.version, 90_000, 95_000)


async def test_versions_grow_and_lifetimes_are_the_servers(tier: SharedTier, link: Link) -> None:
    """S3: whatever way a value is stored."""
    stamps = [await tier.put("k", **LIFETIME) for _ in range(3)]
    receipt = await tier.write(WriteJob(key="k", value=b"\x01"), **LIFETIME)
    assert receipt.stamp is not None
    stamps.append(receipt.stamp)
    versions = [stamp.version for stamp in stamps]
    assert versions == sorted(set(versions))
    seconds, _ = await link.call("TIME")
    for stamp in stamps:
        assert abs(stamp.soft_at_ms - 60_000 - int(seconds) * 1000) < 30_000
    entry = read_entry(await tier.get("k") or b"", bytes_max=99)
    assert (entry.version, entry.pending) == (versions[-1], versions[-1])


async def test_an_invalidation_tells_what_it_announced(
    tier: SharedTier, link: Link, names: Names
) -> None:
    """One notice for up to 200 keys of a shard, in its log; each with its version."""
    keys = [f"k{n}" for n in range(1_000)]
    told = await tier.invalidate(keys=[*keys, *keys], tags=["t1", "t2", "t1"])
    dropped = [notice for notice, _ in told if isinstance(notice, Dropped)]
    bumped = [notice for notice, _ in told if isinstance(notice, Bumped)]
    assert sorted(key for notice in dropped for key in notice.keys) == sorted(keys)
    assert sorted(tag for notice in bumped for tag in notice.tags) == ["t1", "t2"]
    assert max(len(notice.keys) for notice in dropped) == 200
    logged = {}
    for shard in range(4):
        for _, fields in await link.call("XRANGE", names.part(shard, "log"), "-", "+"):
            logged[int(fields[1])] = read_notice(fields[3])
    for notice, version in told:
        assert logged[version] == notice
        name = (notice.keys if isinstance(notice, Dropped) else notice.tags)[0]
        assert version > 0
        assert names.shard(name) in range(4)
    assert await tier.capture(["t1", "t2"]) == {
        tag: Captured(version, version)
        for notice, version in told
        if isinstance(notice, Bumped)
        for tag in notice.tags
    }


async def test_a_soft_invalidation_leaves_a_stale_value(tier: SharedTier) -> None:
    """It may be served until its hard lifetime; a lease under way is void all the same."""
    await tier.put("k", **LIFETIME)
    await tier.begin("k", "a", lease_ms=60_000, seen=2**60)
    before = read_entry(await tier.get("k") or b"", bytes_max=99)
    await tier.invalidate(keys=["k"], soft=True)
    after = read_entry(await tier.get("k") or b"", bytes_max=99)
    assert after.soft_at_ms < before.soft_at_ms
    assert (after.hard_at_ms, after.version) == (before.hard_at_ms, before.version)
    assert await tier.fill("k", "a", **LIFETIME) is None


async def test_a_lost_tag_gets_a_version_that_no_entry_carries(
    tier: SharedTier, link: Link, names: Names
) -> None:
    """Evicted, it is made anew; captured again it stays, and is not said to be made."""
    first = await tier.capture(["t"])
    assert first["t"] == (first["t"].version, first["t"].version, True)
    assert await tier.capture(["t"]) == {"t": first["t"]._replace(made=False)}
    await link.call("DEL", names.tag("t"))
    second = await tier.capture(["t"])
    assert second["t"].hard > first["t"].version
    assert second["t"].made
    both = await tier.capture(["t", "u"])
    assert (both["t"].made, both["u"].made) == (False, True)
    assert both["t"].version == second["t"].version


async def test_a_soft_bump_keeps_the_hard_version(
    tier: SharedTier, link: Link, names: Names
) -> None:
    """And tells so; of a tag that is not there it is a hard one."""
    before = (await tier.capture(["t"]))["t"]
    told = await tier.invalidate(tags=["t"], soft=True)
    ((notice, version),) = told
    assert notice == Bumped(("t",), "me", True)
    assert (await tier.capture(["t"]))["t"] == Captured(version, before.hard)
    ((_, hard),) = await tier.invalidate(tags=["t"])
    assert (await tier.capture(["t"]))["t"] == Captured(hard, hard)
    await link.call("DEL", names.tag("t"))
    ((_, again),) = await tier.invalidate(tags=["t"], soft=True)
    assert (await tier.capture(["t"]))["t"] == Captured(again, again)


@pytest.mark.parametrize("soft", [True, False])
async def test_what_depends_on_a_key_is_outdated_with_it(tier: SharedTier, soft: bool) -> None:
    """By the tag named after the key, if there is one; as softly as the key itself."""
    of_k, of_other = map(dependents_of, ("k", "other"))
    before = (await tier.capture([of_k]))[of_k]
    ((_, version),) = await tier.invalidate(keys=["k"], soft=soft)
    assert (await tier.capture([of_k]))[of_k] == Captured(version, before.hard if soft else version)
    stamp = await tier.put("k", **LIFETIME)
    assert (await tier.capture([of_k]))[of_k] == Captured(stamp.version, stamp.version)
    await tier.put("other", **LIFETIME)
    assert (await tier.capture([of_other]))[of_other].made


async def test_a_full_stream_refuses_a_write_and_changes_nothing(link: Link, names: Names) -> None:
    """Backpressure, with how full it is before."""
    tier = tier_on(link, names, writes_max=2)
    pressures = [
        (await tier.write(WriteJob(key="k", value=b"\x01"), **LIFETIME)).pressure for _ in range(2)
    ]
    assert pressures == [0.5, 1.0]
    before = await tier.get("k")
    with pytest.raises(Backpressure) as caught:
        await tier.write(WriteJob(key="k", value=b"\x02"), **LIFETIME)
    assert (caught.value.length, caught.value.bound) == (2, 2)
    assert await tier.get("k") == before


async def test_a_put_that_is_refused_names_the_key_and_an_invalidation_takes_effect(
    link: Link, names: Names, tier: SharedTier
) -> None:
    """The caller learns which key is at fault; what is outdated goes all the same."""
    log = names.part(names.shard("k"), "log")
    await tier.put("k", **LIFETIME)
    await link.call("DEL", log)
    await link.call("SET", log, "no stream")
    with pytest.raises(ServerRefused, match="WRONGTYPE") as caught:
        await tier.put("k", **LIFETIME)
    assert log in caught.value.key
    assert await tier.get("k") is not None
    await tier.invalidate(keys=["k"])
    assert await tier.get("k") is None


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"1", b"{}", b"\xfbE1", b"\xfbE1c", b"\xfbE2c" + b"5" * 60, b"\xfbE1c" + b"5" * 60,
        b"\xfbE1c" + b" " * 60, b"\xfbE1c0x12345678901234" + b"0" * 50, b"\xfbE1c" + b"1e5 " * 20,
        b"\xfbE1c" + b"\0" * 60, b"\xfbE1x" + b"9" * 60, b"\x80\x04garbage",
    ],
)  # fmt: skip
async def test_both_sides_agree_on_the_version_of_any_bytes(link: Link, raw: bytes) -> None:
    """Ours is at least theirs, who count in doubles: what cannot be read can be loaded over."""
    lua = (files("forebay.coordinator.scripts") / "_change.lua").read_text()
    text = await link.call(
        "EVAL", lua + '\nreturn string.format("%.0f", version_of(ARGV[1]))', 0, raw
    )
    assert float(version_of(raw)) >= float(text)
    if raw[4:20].isdigit():
        assert float(version_of(raw)) == float(text)


async def test_a_closed_link_is_unavailable(valkey_server, names: Names) -> None:
    """Every command says so, and none waits for ever."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        tier = tier_on(link, names)
    for use in (tier.get("k"), tier.begin("k", "a", lease_ms=1, seen=-1), tier.holds("k", "a")):
        with anyio.fail_after(20), pytest.raises(Unavailable):
            await use

"""The server's clock is set forward and back by a minute: results stay right, or off by a bound.

The server runs under libfaketime, which reads the clock's offset from a file. It looks at its clock
only at intervals, so ``set_clock`` waits until the server returns the new time.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from prometheus_client import CollectorRegistry

from forebay.coordinator.clock import ServerClock, SystemClock
from forebay.coordinator.instruments import Instruments
from forebay.coordinator.log.clock_sync import ClockSync
from support.links import link_to, running
from support.programs import tool
from support.scripts import Desk
from support.valkey_server import ValkeyServer

JUMP_S = 60
SECOND_US = 1_000_000
LIMIT = ("", "channel", "word", 5, SECOND_US, 5, 0)  #: five a second, five at once


class Clocked:
    """A desk at a server whose clock can be set."""

    def __init__(self, desk: Desk, offset: Path) -> None:
        self.desk = desk
        self._offset = offset

    async def set_clock(self, by_s: int) -> None:
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(f"{by_s:+d}")
        fresh.replace(self._offset)
        with anyio.fail_after(10):
            while abs(await self.desk.now_us() / 1e6 - time.time() - by_s) > 5:
                await anyio.sleep(0.005)

    async def take(self, count: int = 1) -> list[int]:
        """Granted, the limit that binds, remaining tokens, wait and reset (microseconds)."""
        keys = [f"{{{self.desk.names.namespace}}}:limit"]
        reply = await self.desk.run("limit_take", keys, *LIMIT, "t", count, 1)
        return [int(each) for each in reply]

    async def lock(self, nonce: str, lease_us: int = 30 * SECOND_US) -> int:
        """The token; 0 if another has it."""
        *_, index, era = self.desk.names.lock("l")
        await self.desk.run("lock_begin", [era, index], 1, SECOND_US)
        terms = ("m", 1, 1, lease_us, "try", 0, "", "a test", "l")
        reply = await self.desk.run("lock_acquire", self.desk.names.lock("l"), nonce, *terms)
        return int(reply) if isinstance(reply, bytes) else int(reply[1]) if reply[0] == 1 else 0


def library() -> str:
    tool("faketime")
    return str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")))


@pytest.fixture
def offset(tmp_path: Path) -> Path:
    path = tmp_path / "offset"
    path.write_text("+0")
    return path


@pytest.fixture
def server(offset: Path) -> Iterator[ValkeyServer]:
    environ = {
        "LD_PRELOAD": library(),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with ValkeyServer(environ=environ) as server:
        yield server


@pytest.fixture
async def clocked(server: ValkeyServer, namespace: str, offset: Path) -> AsyncIterator[Clocked]:
    link = link_to(server.socket_url)
    async with running(link):
        yield Clocked(Desk(link, namespace), offset)


async def test_a_limit_is_not_closed_for_the_time_that_the_clock_was_set_back(
    clocked: Clocked,
) -> None:
    """G5: used up, it lets the next in after a fifth of a second, and not after a minute."""
    assert (await clocked.take(5))[0] == 5
    await clocked.set_clock(-JUMP_S)
    granted, _, _, wait_us, reset_us = (await clocked.take())[:5]
    assert granted or (wait_us <= SECOND_US / 5 and reset_us <= SECOND_US)
    await anyio.sleep(wait_us / 1e6)
    assert (await clocked.take())[0] == 1


async def test_a_limit_is_open_once_more_when_the_clock_was_set_forward(clocked: Clocked) -> None:
    """One more burst, and no more, also when the clock is set right again."""
    assert (await clocked.take(5))[0] == 5
    await clocked.set_clock(JUMP_S)
    assert (await clocked.take(6))[0] == 5
    await clocked.set_clock(0)
    granted, _, _, wait_us, _ = (await clocked.take(6))[:5]
    assert granted <= 1
    assert wait_us <= SECOND_US / 5


@pytest.mark.parametrize("by_s", [JUMP_S, -JUMP_S])
async def test_versions_and_log_ids_grow_over_a_jump(clocked: Clocked, by_s: int) -> None:
    """C1, C2: no version twice, and a dense log."""
    desk = clocked.desk
    for offset_s in (0, by_s, 0):
        await clocked.set_clock(offset_s)
        await desk.put()
        await desk.write()
        await desk.invalidate()
    logged = await desk.log()
    assert [each.position.seq for each in logged] == list(range(9))
    versions = [each.version for each in logged]
    assert versions == sorted(set(versions))


@pytest.mark.parametrize("by_s", [JUMP_S, -JUMP_S])
async def test_no_member_is_taken_for_gone_after_a_jump(clocked: Clocked, by_s: int) -> None:
    """I3 of roster_beat: it is suspect at most, and keeps its shards, until it is heard again."""
    for member in "ab":
        await clocked.desk.beat(member, beat_ms=1_000)
    await clocked.set_clock(by_s)
    found = (await clocked.desk.beat("a", beat_ms=1_000))[2]
    assert found["b"] in ("active", "suspect")
    assert (await clocked.desk.beat("b", beat_ms=1_000))[2] == {"a": "active", "b": "active"}


@pytest.mark.parametrize("by_s", [JUMP_S, -JUMP_S])
async def test_of_two_owners_the_older_one_is_fenced_off(clocked: Clocked, by_s: int) -> None:
    """Set forward, a lease ends early, and the next epoch is larger; set back, it lasts longer by
    that much, and its owner renews it.
    """
    desk = clocked.desk
    epoch = int((await desk.claim("a", ttl_ms=10_000))[1])
    await clocked.set_clock(by_s)
    reply = await desk.claim("b", token="b", ttl_ms=10_000)
    if by_s < 0:
        assert reply[0] == 0
        assert 10_000 < int(reply[2]) <= 10_000 - by_s * 1_000
        assert (await desk.claim("a", ttl_ms=10_000))[:2] == [1, str(epoch).encode()]
        assert int((await desk.claim("b", token="b"))[2]) <= 10_000
    else:
        assert reply[0] == 1
        assert int(reply[1]) > epoch
        assert (await desk.commit("a", epoch, "5-0"))[0] == 0


@pytest.mark.parametrize("by_s", [JUMP_S, -JUMP_S])
async def test_tokens_of_locks_grow_over_a_jump(clocked: Clocked, by_s: int) -> None:
    """L1: set forward, the next one gets it early, with a larger token, which guards go by."""
    first = await clocked.lock("p.1")
    await clocked.set_clock(by_s)
    if by_s < 0:
        assert await clocked.lock("p.2") == 0
        names = clocked.desk.names.lock("l")
        assert await clocked.desk.run("lock_release", names, "p.1", "", "l") in (1, [1, []])
    assert await clocked.lock("p.2") > first > 0


async def test_an_event_id_counts_once_when_the_clock_was_set_back(clocked: Clocked) -> None:
    """The id is remembered for longer, by the size of the jump."""
    assert (await clocked.desk.write(event_id="e1", seen_ms=5_000))[0] == 1
    await clocked.set_clock(-JUMP_S)
    assert await clocked.desk.write(event_id="e1", seen_ms=5_000) == [2]


async def test_a_jump_is_counted_and_logged_once(clocked: Clocked) -> None:
    """By each node, at its next look; a jump back is another one."""
    instruments = Instruments(CollectorRegistry())
    ours = SystemClock()
    sync = ClockSync(clocked.desk.commands, ServerClock(ours), ours, instruments)
    for jumps, by_s in enumerate((0, JUMP_S, 0, -JUMP_S)):
        await clocked.set_clock(by_s)
        for _ in range(3):
            await sync.look()
        assert instruments.counts["time_anomalies", "server_clock_jumped"] == jumps

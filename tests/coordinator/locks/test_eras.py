"""Restarts and failovers under locks: K1, K2 of coordinator/locks.py, N4 and N5 of renewals."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from conftest import MakeServer
from forebay.coordinator.valkey.link import Arg, Commands, Reply
from forebay.schemas.errors import ServerRefused
from forebay.schemas.errors_locks import LeaseLost, LockNotAcquired
from support.eventually import until
from support.lock_processes import Forge, MakeForge, smithy
from support.valkey_server import ValkeyServer

RECONNECTS = {"breaker_failures": 1_000}


@pytest.fixture
def server(make_server: MakeServer) -> ValkeyServer:
    return make_server("valkey")


@pytest.fixture
async def make(server: ValkeyServer, namespace: str) -> AsyncIterator[MakeForge]:
    async with smithy(server, namespace, **RECONNECTS) as make:
        yield make


async def test_after_the_loss_of_everything_holders_reclaim_first(
    make: MakeForge, server: ValkeyServer
) -> None:
    """A restart without its data: who held a lock has it again, with its token, and nobody else."""
    one, two = await make("one"), await make("two")
    async with one.lock("l") as lease:
        await restarted(server, one, two)
        assert await two.try_lock("l") is None
        assert await two.try_lock("other") is None
        await until(lambda: _held_by(two, "one"))
        assert (await two.show("l")).holders[0].token == lease.token
        assert one.counts["lock_renewals", "reclaimed"] == 1
        lease.check()


async def test_when_the_grace_is_over_locks_are_granted_again(
    make: MakeForge, server: ValkeyServer
) -> None:
    """And the tokens are larger than those from before, though the record is gone (K1)."""
    one, two = await make("one"), await make("two")
    async with one.lock("l") as lease:
        pass
    await restarted(server, one, two)
    assert await two.try_lock("l") is None
    await end_grace(two)
    async with two.lock("l") as later:
        assert later.token > lease.token


async def test_reclaimed_it_ends_when_it_would_have_ended(
    make: MakeForge, server: ValkeyServer
) -> None:
    """A holder that has died meanwhile blocks nobody for longer than its lease."""
    one, two = await make("one"), await make("two")
    async with one.lock("l", lease=3):
        await restarted(server, one, two)
        await until(lambda: _held_by(two, "one"))
        assert (await two.show("l")).holders[0].left_ms <= 3_000


async def test_a_lock_of_the_lost_era_that_comes_too_late_is_lost(
    make: MakeForge, server: ValkeyServer
) -> None:
    """When the grace is over and another has it, its old holder is told."""
    one, two = await make("one"), await make("two")
    one.renewals.connected = lambda: None  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        async with one.lock("l", lease=2):
            await restarted(server, one, two)
            assert await two.try_lock("l") is None
            await end_grace(two)
            async with two.lock("l"):
                await anyio.sleep_forever()


async def test_a_namespace_that_is_new_has_no_grace(make: MakeForge) -> None:
    """The first lock need not wait for holders that cannot exist."""
    one = await make("one")
    assert await one.try_lock("l") is not None


async def test_the_younger_of_two_who_reclaim_has_it(make: MakeForge, server: ValkeyServer) -> None:
    """The higher token wins, whoever comes first, and the other is told."""
    one, two = await make("one"), await make("two")
    old = await one.lock("l", lease=2).acquire()
    await one.expire("l")
    new = await two.lock("l", lease=2).acquire()
    one.renewals.connected = lambda: None  # type: ignore[method-assign]
    two.renewals.connected = lambda: None  # type: ignore[method-assign]
    await restarted(server, one, two)
    assert await two.try_lock("x") is None  # begins the era
    await one.renewals.renew([old])
    assert await _held_by(two, "one")
    await two.renewals.renew([new])
    assert await _held_by(two, "two")
    await one.renewals.renew([old])
    assert (old.reason, new.reason) == ("taken", None)
    await new.release()


class Refusing:
    """Commands of a server that is not ready: the first so many scripts are refused."""

    def __init__(self, commands: Commands, code: str) -> None:
        self.left = 0
        self._commands = commands
        self._code = code
        self.call_many = commands.call_many

    async def call(self, *words: Arg, timeout_ms: int | None = None) -> Reply:
        if words[0] == "EVALSHA" and self.left:
            self.left -= 1
            raise ServerRefused(self._code, "not now", "EVALSHA")
        return await self._commands.call(*words, timeout_ms=timeout_ms)


@pytest.mark.parametrize("code", ["LOADING", "READONLY"])
async def test_a_server_that_is_not_ready_is_waited_for(make: MakeForge, code: str) -> None:
    """G3: who waits goes on to wait; who only tries is told."""
    refusing: list[Refusing] = []

    def commands(link: Commands) -> Commands:
        refusing.append(Refusing(link, code))
        return refusing[0]

    one = await make("one", commands=commands)
    refusing[0].left = 3
    async with one.lock("l"):
        assert refusing[0].left == 0
    refusing[0].left = 1
    with pytest.raises(ServerRefused):
        await one.try_lock("l")


async def test_what_will_not_pass_is_told_at_once(make: MakeForge) -> None:
    """G3 is for outages: a user without rights is told what is wrong."""
    refusing: list[Refusing] = []

    def commands(link: Commands) -> Commands:
        refusing.append(Refusing(link, "NOPERM"))
        return refusing[0]

    one = await make("one", commands=commands)
    refusing[0].left = 1
    with pytest.raises(ServerRefused):
        await one.lock("l").acquire()


# Failover


@pytest.fixture
def replica(make_server: MakeServer, server: ValkeyServer) -> ValkeyServer:
    made = make_server("valkey", config={"repl-diskless-sync-delay": "0"})
    made.execute("REPLICAOF", "127.0.0.1", server.port)
    return made


async def test_tokens_grow_over_a_failover_that_lost_grants(
    make: MakeForge, server: ValkeyServer, replica: ValkeyServer, namespace: str
) -> None:
    """K1, K2: a promoted replica that never saw the lock grants nothing before its grace is over,
    and then a larger token.
    """
    one = await make("one")
    async with one.lock("seen"):
        pass
    await until(lambda: _linked(replica))
    await until(lambda: _has(replica, one.names.lock("seen")[0]))
    replica.execute("REPLICAOF", "NO", "ONE")  # from here on it sees nothing
    async with one.lock("l") as lost:
        pass
    server.kill9()
    async with smithy(replica, namespace, **RECONNECTS) as promoted:
        two = await promoted("two")
        assert await two.try_lock("l") is None
        with pytest.raises(LockNotAcquired):
            await two.lock("l", timeout=0.05).acquire()
        await end_grace(two)
        async with two.lock("l") as later:
            assert later.token > lost.token


async def restarted(server: ValkeyServer, *forges: Forge) -> None:
    before = [each.link.statistics().connects for each in forges]
    server.kill9()
    server.start()

    def again() -> bool:
        now = [each.link.statistics().connects for each in forges]
        return all(a > b for a, b in zip(now, before, strict=True))

    await until(again)


async def end_grace(forge: Forge) -> None:
    for shard in range(forge.names.shards):
        await forge.link.call("HSET", forge.names.part(shard, "era"), "grace", 1)


async def _held_by(forge: Forge, name: str) -> bool:
    return await forge.holders("l") == [name]


async def _linked(replica: ValkeyServer) -> bool:
    return b"master_link_status:up" in replica.execute("INFO", "replication")


async def _has(server: ValkeyServer, key: str) -> bool:
    return bool(server.execute("EXISTS", key))

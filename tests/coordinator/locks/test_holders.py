"""Holders that stand still, are busy, or die: N1 and N3 of renewals, K2 of locks, S1 and S2."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from prometheus_client import CollectorRegistry

from forebay.coordinator.instruments import Instruments
from forebay.coordinator.locks.store import Held
from forebay.coordinator.stalls import Stalls
from forebay.schemas.errors import ServerRefused, TimedOut
from forebay.schemas.errors_locks import LeaseLost, LockNotAcquired
from support.eventually import until
from support.lock_processes import MakeForge, smithy
from support.node_process import environ
from support.valkey_server import ValkeyServer

PATIENCE_S = 20.0
ReadLine = Callable[[], Awaitable[list[str]]]
HOLDER = """
import sys, anyio, forebay
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers

async def main(url, namespace):
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=4, id="holder"),
        valkey=Valkey(url=url), workers=Workers(enabled=False),
    )
    async with forebay.Node(settings=settings) as node:
        try:
            async with node.lock("l", lease=2) as lease:
                print("held", lease.token, flush=True)
                await anyio.sleep_forever()
        except forebay.LeaseLost as lost:
            print("lost", lost.reason, flush=True)

import structlog
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
anyio.run(main, *sys.argv[1:])
"""


@pytest.fixture
async def make(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[MakeForge]:
    async with smithy(valkey_server, namespace) as make:
        yield make


@asynccontextmanager
async def holder(server: ValkeyServer, namespace: str) -> AsyncIterator[tuple[int, ReadLine]]:
    """Its process id, and how to read a line of what it says."""
    command = [sys.executable, "-c", HOLDER, server.socket_url, namespace]
    async with await anyio.open_process(command, env=environ()) as process:
        assert process.stdout is not None
        said = BufferedByteReceiveStream(process.stdout)

        async def line() -> list[str]:
            with anyio.fail_after(PATIENCE_S):
                return (await said.receive_until(b"\n", 1_000)).decode().split()

        try:
            yield process.pid, line
        finally:
            process.kill()


async def test_a_process_that_stood_still_knows_that_it_has_lost(
    make: MakeForge, valkey_server: ValkeyServer, namespace: str
) -> None:
    """SIGSTOP for longer than the lease: another has the lock, and the first is told at once."""
    one = await make("one")
    async with holder(valkey_server, namespace) as (pid, line):
        word, token = await line()
        os.kill(pid, signal.SIGSTOP)
        async with one.lock("l", timeout=PATIENCE_S) as lease:
            assert word == "held"
            assert lease.token > int(token)
            os.kill(pid, signal.SIGCONT)
            assert await line() == ["lost", "expired"]


@pytest.mark.parametrize("stall_s,reason", [(0.0, "taken"), (2.0, "expired")])
@pytest.mark.parametrize("status", [0, 2])
async def test_the_deadline_decides_before_a_late_reply(
    make: MakeForge, stall_s: float, reason: str, status: int
) -> None:
    """N3: a refusal that is read after the deadline does not hide that the lease expired."""
    one = await make("one")

    async def refused(leases: Sequence[Held], *, timeout_ms: int) -> tuple[int, list[int]]:
        time.sleep(stall_s)
        return 0, [status] * len(leases)

    async def taken(lease: Held, left_s: float) -> bool:
        return False

    one.records.renew = refused  # type: ignore[method-assign]
    one.records.reclaim = taken  # type: ignore[method-assign]
    with pytest.raises(LeaseLost) as lost:
        async with one.lock("l", lease=2):
            await anyio.sleep_forever()
    assert lost.value.reason == reason


async def test_what_a_dead_process_held_is_free_when_its_lease_ends(
    make: MakeForge, valkey_server: ValkeyServer, namespace: str
) -> None:
    """kill -9: whoever waits has it then, and not before."""
    one = await make("one")
    async with holder(valkey_server, namespace) as (_, line):
        await line()
    assert await one.try_lock("l") is None
    async with one.lock("l", timeout=PATIENCE_S):
        pass


async def test_a_busy_event_loop_loses_no_lease(make: MakeForge) -> None:
    """N1: the schedule is absolute, so steps of work that are shorter than the slack do no harm."""
    one = await make("one")
    async with one.lock("l", lease=2) as lease:
        end_at = time.monotonic() + 4.5
        while time.monotonic() < end_at:
            time.sleep(0.06)
            await anyio.sleep(0)
            lease.check()
    assert one.counts["lock_renewals", "renewed"] >= 4
    assert one.counts["time_anomalies", "loop_stalled"] >= 1


async def test_two_renewals_may_run_out_of_time(make: MakeForge) -> None:
    """N1: the third comes before the deadline."""
    one = await make("one")
    renew, failures = one.records.renew, 0

    async def slow(leases: Sequence[Held], *, timeout_ms: int) -> tuple[int, list[int]]:
        nonlocal failures
        if failures < 2:
            failures += 1
            await anyio.sleep(timeout_ms / 1000)
            raise TimedOut(timeout_ms)
        return await renew(leases, timeout_ms=timeout_ms)

    one.records.renew = slow  # type: ignore[method-assign]
    async with one.lock("l", lease=2):
        await until(lambda: one.counts["lock_renewals", "renewed"] == 1)
    assert one.counts["lock_renewals", "failed"] == 2


async def test_a_deadline_is_not_put_off_by_a_renewal_under_way(make: MakeForge) -> None:
    """N3: without an answer the lease is lost at its deadline, before the server's end of it."""
    one, two = await make("one"), await make("two")

    async def never(*args: object, **options: object) -> object:
        return await anyio.sleep_forever()

    with pytest.raises(LeaseLost) as caught:
        async with one.lock("l", lease=2) as lease:
            one.records.renew = never  # type: ignore[method-assign,assignment]
            await anyio.sleep_forever()
    assert caught.value.reason == "expired"
    assert one.counts["lock_losses", "expired"] == 1
    async with two.lock("l") as later:
        assert later.token > lease.token


class Replicas:
    """Says whether replicas have it."""

    def __init__(self, *, there: bool) -> None:
        self.there = there
        self.since = 1

    async def confirm(self, *, since: int, timeout_ms: int) -> None:
        await anyio.lowlevel.checkpoint()
        if not self.there:
            raise ServerRefused("NOREPLICAS", "there is none")


async def test_at_level_replicated_a_grant_counts_when_replicas_have_it(make: MakeForge) -> None:
    """G4: else it is released, and LockNotAcquired says why; so it is where nobody can tell."""
    one = await make("one")
    one.replication = Replicas(there=True)
    async with one.lock("l", level="replicated"):
        pass
    for replicas in (Replicas(there=False), None):
        one.replication = replicas
        with pytest.raises(LockNotAcquired) as caught:
            await one.lock("l", level="replicated").acquire()
        assert caught.value.reason == "not_replicated"
        assert await one.list() == []


async def test_at_level_replicated_a_renewal_counts_when_replicas_have_it(make: MakeForge) -> None:
    """N6: else the lease ends at its deadline, and its holder is told."""
    one = await make("one")
    one.replication = replicas = Replicas(there=True)
    with pytest.raises(LeaseLost) as caught:
        async with one.lock("l", level="replicated", lease=2) as lease:
            granted_until = lease.deadline
            await until(lambda: lease.deadline > granted_until)
            replicas.there = False
            await anyio.sleep_forever()
    assert caught.value.reason == "expired"


def test_time_that_passes_unevenly_is_counted() -> None:
    """S1: a late wake-up; a punctual one does not count."""
    instruments = Instruments(CollectorRegistry())
    stalls, counts = Stalls(instruments), instruments.counts
    stalls.woke(due=10.0, now=10.04)
    assert counts["time_anomalies", "loop_stalled"] == 0
    stalls.woke(due=11.0, now=11.2)
    assert counts["time_anomalies", "loop_stalled"] == 1

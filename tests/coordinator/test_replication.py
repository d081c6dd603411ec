"""Replication on real primaries and replicas: R1-R5."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from forebay.coordinator.clock import SystemClock
from forebay.coordinator.log.replication import Replication
from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.errors import Unconfirmed
from forebay.schemas.settings import Valkey
from support.eventually import until
from support.valkey_server import ValkeyServer

LONG_MS = 20_000
MARKER = "forebay:t:mark:n"


class Pair:
    """A primary, a replica of it, and what asks them."""

    def __init__(self, primary: ValkeyServer, backend: Backend, replicas_min: int) -> None:
        self.primary = primary
        self.backend = backend
        self.dials = 0
        numbers = itertools.count(1)
        self.replication = Replication(
            backend.link,
            self._dial,
            MARKER,
            replicas_min=replicas_min,
            command_timeout_ms=1_000,
            clock=SystemClock(),
            ids=lambda: f"nonce-{next(numbers)}",
        )

    @asynccontextmanager
    async def _dial(self) -> AsyncIterator[Any]:
        self.dials += 1
        async with self.backend.blocking_link("replication") as link:
            self.link = link
            yield link

    async def confirm(self, timeout_ms: int = LONG_MS) -> None:
        await self.replication.confirm(since=self.replication.since, timeout_ms=timeout_ms)


Open = Callable[..., Awaitable[Pair]]


@pytest.fixture
def primary(make_server: Any) -> ValkeyServer:
    made: ValkeyServer = make_server(config={"repl-diskless-sync-delay": "0"})
    return made


@pytest.fixture
def replica(make_server: Any, primary: ValkeyServer) -> ValkeyServer:
    """It follows the primary, and is in step with it."""
    server: ValkeyServer = make_server()
    server.execute("REPLICAOF", "127.0.0.1", primary.port)
    return server


@asynccontextmanager
async def pair_of(primary: ValkeyServer, *, replicas_min: int = 1) -> AsyncIterator[Pair]:
    settings = Valkey(url=primary.socket_url, reconnect_jitter_ms=5, reconnect_max_ms=40)
    async with Backend(settings, client_name="t") as backend, anyio.create_task_group() as tasks:
        pair = Pair(primary, backend, replicas_min)
        await tasks.start(pair.replication.run)
        yield pair
        tasks.cancel_scope.cancel()


@pytest.fixture
async def pair(primary: ValkeyServer, replica: ValkeyServer) -> AsyncIterator[Pair]:
    async with pair_of(primary) as made:
        yield made


async def test_what_is_confirmed_is_on_the_replica(pair: Pair, replica: ValkeyServer) -> None:
    """R1: whatever was accepted before, on another connection."""
    for number in range(50):
        await pair.backend.link.call("SET", "k", number)
        await pair.confirm()
        assert replica.execute("GET", "k") == str(number).encode()


async def test_nothing_is_dialed_before_somebody_asks(pair: Pair) -> None:
    """R5: and then once."""
    assert pair.dials == 0
    await pair.confirm()
    await pair.confirm()
    assert pair.dials == 1
    assert 0 < await pair.backend.link.call("PTTL", MARKER) <= 60_000


async def test_many_who_ask_at_once_share_a_marker(pair: Pair) -> None:
    """R4: those who came before it was written."""
    await pair.confirm()
    before = pair.replication.rounds
    async with anyio.create_task_group() as tasks:
        for _ in range(500):
            tasks.start_soon(pair.confirm)
    assert pair.replication.rounds - before <= 3


async def test_whoever_comes_after_the_marker_gets_one_of_his_own(
    pair: Pair, replica: ValkeyServer
) -> None:
    """R1: the marker under way may have been written before his write."""
    await pair.confirm()
    replica.sigstop()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.confirm)
            await until(lambda: len(pair.replication._marked) == 1)
            before = pair.replication.rounds
            await pair.backend.link.call("SET", "k", "late")
            tasks.start_soon(pair.confirm)
            await until(lambda: len(pair.replication._new) == 1)
            replica.sigcont()
    finally:
        replica.sigcont()
    assert pair.replication.rounds == before + 1
    assert replica.execute("GET", "k") == b"late"


async def test_a_paused_replica_confirms_nothing(pair: Pair, replica: ValkeyServer) -> None:
    """R1: until it goes on; the time is kept."""
    await pair.confirm()
    replica.sigstop()
    try:
        with pytest.raises(Unconfirmed) as caught:
            await pair.confirm(timeout_ms=50)
        assert (caught.value.level, caught.value.reached) == ("replicated", "accepted")
        assert caught.value.waited_ms >= 50
    finally:
        replica.sigcont()
    await pair.confirm()


async def test_a_replica_that_lags_longer_than_a_slice_is_waited_for(
    pair: Pair, replica: ValkeyServer
) -> None:
    """R2: on the same connection the same marker is waited for again, not a later one."""
    await pair.confirm()
    calls: list[tuple[Any, ...]] = []
    call = pair.link.call

    async def told(*args: Any, timeout_ms: int | None = None) -> Any:
        calls.append(args)
        return await call(*args, timeout_ms=timeout_ms)

    pair.link.call = told
    replica.sigstop()
    try:
        async with anyio.create_task_group() as tasks:
            before = pair.replication.rounds
            tasks.start_soon(pair.confirm)
            await until(lambda: len(calls) >= 2)
            replica.sigcont()
    finally:
        replica.sigcont()
    assert pair.replication.rounds == before + 1
    assert {args[0] for args in calls} == {"WAIT"}


async def test_without_a_replica_nothing_is_confirmed(primary: ValkeyServer) -> None:
    """R1: not even on a primary that is all there is."""
    async with pair_of(primary) as pair:
        with pytest.raises(Unconfirmed):
            await pair.confirm(timeout_ms=30)


async def test_fewer_replicas_than_asked_for_are_not_enough(
    primary: ValkeyServer, replica: ValkeyServer
) -> None:
    """R1: one of two."""
    async with pair_of(primary, replicas_min=2) as pair:
        with pytest.raises(Unconfirmed):
            await pair.confirm(timeout_ms=200)


async def test_a_lost_connection_of_its_own_costs_a_new_marker(
    pair: Pair, primary: ValkeyServer, replica: ValkeyServer
) -> None:
    """R2: WAIT on the new one would speak of nothing, and be answered at once."""
    await pair.confirm()
    replica.sigstop()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_unconfirmed, pair, 400)
            await until(lambda: len(pair.replication._marked) == 1)
            connects = pair.link.connects
            pair.link._wire.drop("the test says so")
            await until(lambda: pair.link.connects > connects)
    finally:
        replica.sigcont()
    await pair.confirm()


async def expect_unconfirmed(pair: Pair, timeout_ms: int) -> None:
    with pytest.raises(Unconfirmed):
        await pair.confirm(timeout_ms=timeout_ms)


async def test_a_link_connected_anew_confirms_nothing_of_before(pair: Pair) -> None:
    """R3: another primary may answer there now."""
    since = pair.replication.since
    pair.backend.link._wire.drop("the test says so")
    await until(lambda: pair.replication.since > since)
    with pytest.raises(Unconfirmed):
        await pair.replication.confirm(since=since, timeout_ms=LONG_MS)
    await pair.confirm()


async def test_a_primary_that_was_demoted_and_promoted_confirms_nothing_of_before(
    pair: Pair, primary: ValkeyServer, replica: ValkeyServer
) -> None:
    """R3: on one open connection; writes accepted before may have been lost."""
    await pair.confirm()
    since, connects = pair.replication.since, pair.backend.link.connects
    replica.execute("REPLICAOF", "NO", "ONE")
    follow(primary, replica)
    primary.execute("REPLICAOF", "NO", "ONE")
    follow(replica, primary)
    with pytest.raises(Unconfirmed):
        await pair.replication.confirm(since=since, timeout_ms=LONG_MS)
    assert pair.backend.link.connects == connects
    assert not pair.replication.kept(since)
    await pair.confirm()
    assert pair.replication.kept(pair.replication.since)


def follow(server: ValkeyServer, leader: ValkeyServer) -> None:
    """Return when it has all that its leader has."""
    server.execute("REPLICAOF", "127.0.0.1", leader.port)
    for _ in range(2_000):
        if b"master_link_status:up" in server.execute("INFO", "replication"):
            return
        time.sleep(0.005)
    raise AssertionError("the replica does not follow")


async def test_a_marker_that_the_link_does_not_read_confirms_nothing(pair: Pair) -> None:
    """R2: the two connections lead to different primaries."""
    call = pair.backend.link.call

    async def elsewhere(*args: Any, timeout_ms: int | None = None) -> Any:
        return b"older" if args[0] == "GET" else await call(*args, timeout_ms=timeout_ms)

    pair.backend.link.call = elsewhere  # type: ignore[method-assign]
    await expect_unconfirmed(pair, LONG_MS)


async def test_a_primary_that_became_a_replica_confirms_nothing(
    pair: Pair, primary: ValkeyServer, make_server: Any
) -> None:
    """R1: it refuses the marker."""
    await pair.confirm()
    primary.execute("REPLICAOF", "127.0.0.1", make_server().port)
    await expect_unconfirmed(pair, LONG_MS)


async def test_cancelling_one_costs_the_others_nothing(pair: Pair, replica: ValkeyServer) -> None:
    """R4: nor does one whose time is up; nobody stays behind."""
    await pair.confirm()
    replica.sigstop()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.confirm)
            await expect_unconfirmed(pair, 20)
            async with anyio.create_task_group() as others:
                others.start_soon(pair.confirm)
                await until(lambda: len(pair.replication._marked | pair.replication._new) >= 2)
                others.cancel_scope.cancel()
            replica.sigcont()
    finally:
        replica.sigcont()
    assert not pair.replication._marked | pair.replication._new


async def test_the_end_tells_those_who_wait(primary: ValkeyServer) -> None:
    """Unconfirmed at once, not when their time is up; so do those who come later."""
    async with anyio.create_task_group() as outside:
        async with pair_of(primary) as pair:
            outside.start_soon(expect_unconfirmed, pair, 10 * LONG_MS)
            await until(lambda: len(pair.replication._marked) == 1)
        await expect_unconfirmed(pair, LONG_MS)


async def test_a_server_that_cannot_wait_confirms_nothing() -> None:
    """The fake one has no replicas."""
    settings = Valkey(fake=True)
    async with Backend(settings, client_name="t", fake_name="replication") as backend:
        pair = Pair(None, backend, 1)  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            await tasks.start(pair.replication.run)
            await expect_unconfirmed(pair, LONG_MS)
            tasks.cancel_scope.cancel()


class Scripted:
    """A connection that is lost and made anew once; there WAIT is answered at once."""

    def __init__(self, lost: str) -> None:
        self.connects = 1
        self.markers = 0
        self._lost = lost

    async def ready(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._pass("between" if self.markers else "")

    async def call(self, *args: Any, timeout_ms: int | None = None) -> int:
        await anyio.lowlevel.checkpoint()
        self._pass("during")
        return int(self.connects > 1)

    async def call_many(self, commands: Any, *, timeout_ms: int | None = None) -> list[Any]:
        await anyio.lowlevel.checkpoint()
        self.markers += 1
        return [b"OK", 0]

    def _pass(self, moment: str) -> None:
        if self._lost == moment:
            self._lost, self.connects = "", self.connects + 1


class Echo:
    """A link that reads the marker back."""

    generation = 1

    async def call(self, *args: Any, timeout_ms: int | None = None) -> bytes:
        return b"nonce"

    def check_primary(self, reply: bytes) -> None:
        """The answer of a primary."""


@pytest.mark.parametrize("lost", ["between", "during"])
async def test_a_wait_on_another_connection_than_the_markers_counts_for_nothing(lost: str) -> None:
    """R2: the marker is written again, and waited for there."""
    own = Scripted(lost)

    @asynccontextmanager
    async def dial() -> AsyncIterator[Any]:
        yield own

    replication = Replication(
        Echo(),  # type: ignore[arg-type]
        dial,
        MARKER,
        replicas_min=1,
        command_timeout_ms=1_000,
        clock=SystemClock(),
        ids=lambda: "nonce",
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(replication.run)
        await replication.confirm(since=1, timeout_ms=LONG_MS)
        assert own.markers == 2
        tasks.cancel_scope.cancel()

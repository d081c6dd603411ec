"""Locks at level ``replicated``, on a primary with a real replica: G4 of grants, N6 of renewals."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager

import anyio
import pytest

import forebay
from conftest import MakeServer
from forebay.schemas.keys import Names
from forebay.schemas.settings import NodeSettings, Settings, Valkey
from support.eventually import until
from support.valkey_server import ValkeyServer

LEVEL = {"level": "replicated", "lease": 2}
SHARDS = 4


@pytest.fixture
def primary(make_server: MakeServer) -> ValkeyServer:
    return make_server("valkey", config={"repl-diskless-sync-delay": "0"})


@pytest.fixture
def replica(make_server: MakeServer, primary: ValkeyServer) -> ValkeyServer:
    made = make_server("valkey")
    made.execute("REPLICAOF", "127.0.0.1", primary.port)
    return made


@pytest.fixture
async def node(
    primary: ValkeyServer, replica: ValkeyServer, namespace: str
) -> AsyncIterator[forebay.Node]:
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=SHARDS),
        valkey=Valkey(url=primary.socket_url, reconnect_jitter_ms=5, reconnect_max_ms=40),
    )
    await until(lambda: _acknowledges(primary))
    async with forebay.Node(settings=settings) as made:
        async with made.lock("first", **LEVEL):
            pass
        yield made


@contextmanager
def paused(server: ValkeyServer) -> Iterator[None]:
    server.sigstop()
    try:
        yield
    finally:
        server.sigcont()


async def test_what_is_granted_is_on_the_replica(
    node: forebay.Node, replica: ValkeyServer, namespace: str
) -> None:
    """G4: already when the block begins, and also where it was waited for."""
    record = Names(namespace, SHARDS).lock("l")[0]
    tokens = []

    async def work() -> None:
        async with node.lock("l", **LEVEL) as lease:
            assert int(replica.execute("HGET", record, "t")) == lease.token
            tokens.append(lease.token)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(work)
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 20


async def test_while_the_replica_stands_still_nothing_is_had(
    node: forebay.Node, replica: ValkeyServer
) -> None:
    """G4: neither by who waits nor by who tries; nothing is left, and afterwards it goes on."""
    with paused(replica):
        for options in ({}, {"timeout": 5}):
            with pytest.raises(forebay.LockNotAcquired) as caught:
                await node.lock("l", **LEVEL, **options).acquire()
            assert caught.value.reason == "not_replicated"
        with pytest.raises(forebay.LockNotAcquired):
            await node.try_lock("l", **LEVEL)
        view = await node.locks.show("l")
        assert (view.holders, view.waiting) == ((), 0)
        async with node.lock("l"):  # at level fast nobody asks the replica
            pass
    async with node.lock("l", **LEVEL) as lease:
        assert lease.token > view.token


async def test_cancelled_while_replicas_are_asked_nothing_is_held(
    node: forebay.Node, replica: ValkeyServer
) -> None:
    """G2: it was granted already, and is released before the cancellation goes on."""
    with paused(replica):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(node.lock("l", level="replicated", lease=30).acquire)
            await until(lambda: _is_held(node, "l"))
            tasks.cancel_scope.cancel()
        assert not await _is_held(node, "l")


async def test_a_holder_whose_replica_stands_still_is_told(
    node: forebay.Node, replica: ValkeyServer
) -> None:
    """N6: though the primary renews it, it may be that a successor knows nothing of that."""
    async with AsyncExitStack() as stack:
        with pytest.raises(forebay.LeaseLost) as caught:
            async with node.lock("l", **LEVEL):
                stack.enter_context(paused(replica))
                await anyio.sleep_forever()
        assert caught.value.reason == "expired"
    async with node.lock("l", **LEVEL, timeout=10):
        pass


async def test_a_replica_that_comes_back_in_time_costs_no_lease(
    node: forebay.Node, replica: ValkeyServer
) -> None:
    """N1, N6: a renewal that was not confirmed is tried again."""
    async with node.lock("l", **LEVEL) as lease:
        until_s = lease.deadline
        with paused(replica):
            await anyio.sleep(0.8)  # the first renewal is due meanwhile
        await until(lambda: lease.deadline > until_s)
        lease.check()


def _acknowledges(primary: ValkeyServer) -> bool:
    said = primary.execute("INFO", "replication")
    return re.search(rb"state=online,offset=[1-9]", said) is not None


async def _is_held(node: forebay.Node, name: str) -> bool:
    return bool((await node.locks.show(name)).holders)

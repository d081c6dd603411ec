"""Locks as a service takes them: nodes/locking.py, and how a node starts and stops with them."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest
from prometheus_client.exposition import generate_latest

import forebay
from forebay.schemas.errors import ForebayError, InvalidKey

MakeNode = Callable[..., forebay.Node]


async def test_two_nodes_share_locks(make_node: MakeNode) -> None:
    """What one holds the other does not get, and sees."""
    async with make_node() as one, make_node() as two:
        async with one.lock("l", meta={"why": "test"}):
            assert await two.try_lock("l") is None
            (view,) = await two.locks.list()
            assert (view.name, view.holders[0].meta) == ("l", {"why": "test"})
        async with (
            two.lock("l"),
            two.semaphore("s", capacity=2).acquire(),
            two.rwlock("r").writing(),
            two.lock_all(["a", "b"]),
        ):
            assert len(await one.locks.list()) == 5


async def test_a_node_that_stops_releases_what_it_holds(make_node: MakeNode) -> None:
    """Whoever forgot to is told, and others need not wait for the end of the lease."""
    async with make_node() as one:
        async with make_node() as two:
            forgotten = await two.try_lock("l", on_loss="event")
            assert forgotten is not None
        assert (forgotten.reason, forgotten.lost.is_set()) == ("stopped", True)
        async with one.lock("l", timeout=0):
            pass


async def test_locks_need_a_running_node(make_node: MakeNode) -> None:
    """Said clearly; and one string is no list of names."""
    with pytest.raises(ForebayError, match="not running"):
        make_node().lock("l")
    async with make_node() as node:
        with pytest.raises(InvalidKey):
            node.lock_all("ab")


async def test_what_is_held_is_counted(make_node: MakeNode) -> None:
    """As metrics of the node, without the names."""
    async with make_node() as node, node.lock("secret-name"):
        await anyio.lowlevel.checkpoint()
        text = generate_latest(node.registry).decode()
        assert "forebay_locks_held 1.0" in text
        assert 'forebay_lock_acquires_total{result="taken"} 1.0' in text
        assert "secret-name" not in text

"""Five nodes, one more, one killed, one drained, one restarted: who owns what, and in which order.

The members' times are as users have them: a beat a second, dead after five. Where a bound in
seconds is promised, it is that of the promise, plus the delay that the nodes themselves measured.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.eventually import wait_until
from support.node_process import NodeProcess, Shop
from support.publisher import Publisher, assert_in_order
from support.valkey_server import ValkeyServer

SHARDS = 64
OWNED_WITHIN_S = 6.0

pytestmark = pytest.mark.slow


@pytest.fixture
def shop(valkey_server: ValkeyServer, tmp_path: Path, namespace: str) -> Iterator[Shop]:
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url) as shop:
        yield shop


@contextmanager
def load(server: ValkeyServer, shop: Shop) -> Iterator[Publisher]:
    """Events all the while; in the end, each key's last one is in the sink, all in order."""
    publisher = Publisher(server, shop.stream)
    publisher.start()
    try:
        wait_until(lambda: publisher.count > 50, what="some events")
        yield publisher
    finally:
        publisher.end()
    wait_until(lambda: shop.stored() == publisher.published, what="every last write in the sink")
    assert_in_order(shop)


def assert_handed_in_order(shop: Shop) -> None:
    """No key was handed to the sink out of order; after a crash the newest may come twice."""
    newest: dict[str, int] = {}
    for write in shop.sunk():
        assert write["version"] >= newest.get(write["key"], 0), write
        newest[write["key"]] = write["version"]


class Owners:
    """What the records in Valkey say, by the server's clock."""

    def __init__(self, server: ValkeyServer, namespace: str) -> None:
        self._server = server
        names = [f"{{{namespace}:{n:02}}}:own" for n in range(SHARDS)]
        self._names = [*names, f"{{forebay:{namespace}:events}}:own"]

    def now(self) -> list[str]:
        """The owner of each shard, and last of the ingress stream; empty: nobody in force."""
        seconds, micros = self._server.execute("TIME")
        now_us = int(seconds) * 1_000_000 + int(micros)
        found = []
        for name in self._names:
            owner, ends = self._server.execute("HMGET", name, "o", "u")
            found.append(bytes(owner).decode() if owner and int(ends) > now_us else "")
        return found

    def all_without(self, owner: str) -> bool:
        """Whether everything is owned, and nothing by this one."""
        found = self.now()
        return all(found) and owner not in found

    def fair_among(self, count: int) -> bool:
        """All are owned, by so many, none with more than its share."""
        *shards, events = self.now()
        loads = [shards.count(owner) for owner in set(shards)]
        most = -(-SHARDS // count)
        return all(shards) and bool(events) and len(loads) == count and max(loads) <= most


def assert_in_time(owned: Callable[[], bool], nodes: Sequence[NodeProcess]) -> None:
    """Everything has an owner within the bound, on a machine that runs the nodes when asked to.

    A node that gets no processor measures how late its event loop was. A heartbeat, a claim and
    its reply may each be late by as much.
    """
    began = time.monotonic()
    wait_until(owned, what="an owner of everything")
    took_s = time.monotonic() - began
    assert took_s <= OWNED_WITHIN_S + 3 * max(map(event_loop_lag_s, nodes))


def event_loop_lag_s(node: NodeProcess) -> float:
    """The longest delay of its event loop in the last 15 seconds."""
    found = re.search(
        r"^forebay_event_loop_lag_max_seconds (\S+)$",
        node.get("/metrics").body.decode(),
        re.MULTILINE,
    )
    assert found is not None
    return float(found[1])


def moved(before: Sequence[str], after: Sequence[str]) -> int:
    return sum(old != new for old, new in zip(before, after, strict=True))


def start(nodes: Sequence[NodeProcess]) -> None:
    for node in nodes:
        node.spawn()
    for node in nodes:
        node.until_ready()


def id_of(node: NodeProcess, owners: Owners) -> str:
    """As it stands in the records: the id of a node, or a label with a random part."""
    label = node.stats()["instance"]
    return next(owner for owner in owners.now() if owner.split("~")[0] == label)


def test_every_shard_is_owned_whoever_comes_and_goes(
    shop: Shop, valkey_server: ValkeyServer, namespace: str
) -> None:
    """One joins, one is killed, one drains: all owned within 6 s, moves as few, keys in order."""
    owners = Owners(valkey_server, namespace)
    nodes = [shop.node(f"node-{number}") for number in range(5)]
    start(nodes)
    wait_until(lambda: owners.fair_among(5), what="a fair share for each of five")
    with load(valkey_server, shop):
        before = owners.now()
        newcomer = shop.node("node-5").start()
        wait_until(lambda: owners.fair_among(6), what="a fair share for the newcomer")
        newcomers = id_of(newcomer, owners)
        after = owners.now()
        overload = sum(max(0, before[:-1].count(owner) - 11) for owner in set(before))
        assert moved(before, after) == after.count(newcomers) <= overload

        victim = next(each for each in nodes if id_of(each, owners) == after[-1])
        dead = after[-1]
        victim.signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        living = [each for each in (*nodes, newcomer) if each is not victim]
        assert_in_time(lambda: owners.all_without(dead), living)
        assert moved(after, owners.now()) == after.count(dead)

        before = owners.now()
        leaver = next(each for each in nodes if each is not victim)
        gone = id_of(leaver, owners)
        assert leaver.stop() == 0
        living.remove(leaver)
        assert_in_time(lambda: owners.all_without(gone), living)
        assert moved(before, owners.now()) == before.count(gone)
        assert owners.fair_among(4)
    assert_handed_in_order(shop)


def test_a_rolling_restart_with_ids_moves_no_shard(
    shop: Shop, valkey_server: ValkeyServer, namespace: str
) -> None:
    """Each comes back to what it had; events go on meanwhile, with one owner or another."""
    owners = Owners(valkey_server, namespace)
    nodes = [shop.node(f"node-{n}", node__id=f"web-{n}") for n in range(3)]
    start(nodes)
    wait_until(lambda: owners.fair_among(3), what="a fair share for each of three")

    def labels() -> list[str]:
        return [owner.split("~")[0] for owner in owners.now()[:-1]]

    before, seen = labels(), set[str]()
    with load(valkey_server, shop):
        for node in nodes:
            assert node.stop() == 0
            seen.update(map(str, zip(range(SHARDS), labels(), strict=True)))
            node.start()
            wait_until(lambda: labels() == before, what=f"the return of {node}")
    assert seen <= set(map(str, zip(range(SHARDS), before, strict=True))) | {
        str((shard, "")) for shard in range(SHARDS)
    }
    assert [node.stats()["counters"].get("handovers dead", 0) for node in nodes] == [0, 0, 0]
    assert_handed_in_order(shop)

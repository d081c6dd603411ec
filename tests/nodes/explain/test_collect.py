"""Explaining a key with nodes that run, on a real server."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import pytest

import forebay
from forebay.coordinator.valkey.backend import Backend
from forebay.nodes.explain import collect
from forebay.nodes.explain.collect import LOOK_BACK, explain, names_at
from forebay.nodes.explain.document import NOTICES_SHOWN_MAX, Explanation, NearState
from forebay.nodes.explain.node_part import ASKING_MAX
from forebay.nodes.explain.questions import ANSWER_BYTES_MAX, ask
from forebay.nodes.explain.renderer import words
from forebay.schemas.errors import Backpressure, InvalidKey
from forebay.schemas.keys import Names
from forebay.schemas.settings import CacheDefaults, NodeSettings, Settings, Valkey, Workers
from support.valkey_server import ValkeyServer

SHARDS = 4
PATIENCE_S = 30.0
TOO_LARGE = b"1" * (ANSWER_BYTES_MAX + 1)


def made(namespace: str, valkey: Valkey, id: str = "", **sections: Any) -> forebay.Node:
    """A node with one cache, ``product:{id}``, and a sink that is not run."""
    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=SHARDS, id=id),
        valkey=valkey,
        workers=Workers(enabled=False),
        **sections,
    )
    node = forebay.Node(settings=settings)

    @node.cached("product:{id}", ttl=60, stale_for=300, tags=["catalog"])
    async def product(id: int) -> dict[str, int] | None:
        await gates[node].wait()
        return {"id": id} if id else None

    @node.sink("product:{id}")
    async def save(writes: list[forebay.Write[Any]]) -> None: ...

    gates[node] = anyio.Event()
    gates[node].set()
    return node


gates: dict[forebay.Node, anyio.Event] = {}


@pytest.fixture
async def node(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[forebay.Node]:
    async with made(namespace, Valkey(url=valkey_server.socket_url), "a") as node:
        yield node


def product_of(node: forebay.Node) -> Any:
    return node.caches[0]


def near_of(document: Explanation, id: str = "a") -> NearState:
    return next(each for each in document.nodes.answers if each.node.startswith(f"{id}~"))


async def test_it_works_on_every_kind_of_server(
    backend_settings: Valkey, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A miss, a load, a read elsewhere, an invalidated tag: each is told as it is, by all nodes."""
    # Asked once, and awaited for longer than a busy machine takes: nobody may stay silent.
    monkeypatch.setattr(collect, "ask", partial(ask, wait_s=PATIENCE_S))
    one, two = (made(namespace, backend_settings, each) for each in ("a", "b"))
    async with one, two:
        absent = await one.explain("product:42")
        await product_of(one)(42)
        loaded = await two.explain("product:42")
        await one.invalidate(tags=["catalog"])
        outdated = await two.explain("product:42")

    for document in (absent, loaded, outdated):
        assert (len(document.nodes.answers), document.nodes.silent) == (2, 0)
    assert (absent.entry.state, absent.lease.state) == ("absent", "free")
    assert (loaded.entry.state, [tag.state for tag in loaded.entry.tags]) == ("fresh", ["holds"])
    assert (near_of(loaded, "a").state, near_of(loaded, "b").state) == ("fresh", "absent")
    assert near_of(loaded, "a").version == loaded.entry.version
    assert outdated.entry.state == "outdated"
    assert (near_of(outdated, "a").state, near_of(outdated, "a").tag) == ("behind", "catalog")
    assert [line.kind for line in outdated.log.notices] == ["bumped", "changed"]


async def test_nothing_is_changed_by_looking(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """C1: no lease, no tag, no entry, no hit, no recency in the near cache."""
    await product_of(node)(1)
    before, hits = valkey_server.execute("DBSIZE"), product_of(node)._cache.near_hits
    await node.explain("product:1")
    await node.explain("product:2")

    assert valkey_server.execute("DBSIZE") == before
    assert product_of(node)._cache.near_hits == hits
    assert not product_of(node)._cache.path.near.peek("product:1").visited


async def test_a_load_under_way_is_told_with_its_lease(node: forebay.Node) -> None:
    """Who waits sees for how long, and which node is at it."""
    gates[node] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(product_of(node), 7)
        document = await node.explain("product:7")
        # The nodes are asked first, and the server after.
        while not near_of(document).loading or document.lease.state == "free":
            document = await node.explain("product:7")
        gates[node].set()

    assert document.lease.state == "held"
    assert 0 < document.lease.left_ms <= node.settings.cache.lease_ms
    assert near_of(document).loading
    assert "a load is under way" in document.verdict
    assert any(f"probably by node {node._parts.node_id}" in line for line in words(document))


async def test_pending_writes_negatives_and_soft_invalidations(node: forebay.Node) -> None:
    """Each is told by the entry, with the route that the key takes."""
    product = product_of(node)
    await product.write_behind(1, {"id": 1})
    await product(0)
    await product(3)
    await node.invalidate(["product:3"], soft=True)
    pending, negative, soft = [await node.explain(f"product:{n}") for n in (1, 0, 3)]

    assert (pending.entry.state, pending.entry.pending) == ("fresh", pending.entry.version)
    assert (near_of(pending).cache, near_of(pending).sink) == ("product", "save")
    assert (negative.entry.negative, negative.entry.state) == (True, "fresh")
    assert (soft.entry.state, soft.entry.soft_dropped) == ("stale", True)
    assert soft.log.notices[0].soft


@pytest.mark.parametrize(
    "command,why",
    [
        (("SET", "junk"), "bad_magic"),
        (("HSET", "f", "v"), "WRONGTYPE"),
        (("SET", "x" * 70_000), "oversized"),
        (("SET", "\x00"), "too_short"),
    ],
)
async def test_what_cannot_be_read_is_named(
    node: forebay.Node, valkey_server: ValkeyServer, command: tuple[str, ...], why: str
) -> None:
    """R4 seen from outside: such bytes are a miss, and here is the reason."""
    name = node._parts.names.entry("product:9")
    valkey_server.execute(command[0], name, *command[1:])
    names, backend = node._parts.names, node._parts.backend
    document = await explain(backend, names, "product:9", nonce="ab" * 8, bytes_max=100)

    assert document.entry.state == "unreadable"
    if why == "bad_magic":
        assert document.entry.why.startswith(("bad_magic", "too_short"))
    else:
        assert why in document.entry.why


async def test_keys_of_no_cache_and_of_no_node(node: forebay.Node) -> None:
    """A key that nobody declares is looked at all the same; what is no key is refused."""
    document = await node.explain("unheard:of")
    assert near_of(document).state == "no_cache"
    assert (await node.explain("product:abc")).nodes.silent == 0  # fits, but no call makes it
    with pytest.raises(InvalidKey):
        await node.explain("two words")


async def test_those_who_do_not_answer_are_counted(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """K1: one who listens and says nothing, as an older version does, is silent."""
    names, parts = node._parts.names, node._parts
    async with Backend(Valkey(url=valkey_server.socket_url), client_name="old") as other:
        other.pubsub.subscribe(names.work.encode())
        await other.pubsub.ready()
        found = await ask(
            parts.backend.link, parts.backend.pubsub, names, "a", nonce="ab" * 8, wait_s=0.3
        )

    assert (len(found.answers), found.silent) == (1, 1)
    assert names.reply("ab" * 8).encode() not in parts.backend.pubsub.channels


async def test_false_answers_are_left_out(node: forebay.Node, valkey_server: ValkeyServer) -> None:
    """K2: what is too large, or no answer, is none; there are no more answers than nodes."""
    names, channel = node._parts.names, node._parts.names.reply("cd" * 8)
    async with Backend(Valkey(url=valkey_server.socket_url), client_name="liar") as liar:

        def lie(_: bytes, payload: bytes) -> None:
            for answer in (
                b"junk",
                b"{}",
                b'{"node":"b","state":"?"}',
                b"1" * (ANSWER_BYTES_MAX + 1),
            ):
                valkey_server.execute("PUBLISH", channel, answer)

        liar.pubsub.on_message(lie)
        liar.pubsub.subscribe(names.work.encode())
        await liar.pubsub.ready()
        parts = node._parts.backend
        found = await ask(parts.link, parts.pubsub, names, "a", nonce="cd" * 8, wait_s=0.3)

    assert [each.node for each in found.answers] == [node._parts.node_id]
    assert found.silent == 1


async def test_cancelled_while_it_waits_for_answers(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """K3: the channel is given up, and the place of the caller is free again."""
    pubsub, names = node._parts.backend.pubsub, node._parts.names
    async with Backend(Valkey(url=valkey_server.socket_url), client_name="old") as other:
        asked = anyio.Event()
        other.pubsub.on_message(lambda *_: asked.set())
        other.pubsub.subscribe(names.work.encode())
        await other.pubsub.ready()
        before = pubsub.channels
        async with anyio.create_task_group() as tasks:
            for _ in range(ASKING_MAX):
                tasks.start_soon(node.explain, "a")
            await asked.wait()
            with pytest.raises(Backpressure):
                await node.explain("a")
            tasks.cancel_scope.cancel()

    assert pubsub.channels == before
    assert (await node.explain("a")).nodes.silent == 0


async def test_log_is_read_back_so_far_and_no_further(
    node: forebay.Node, valkey_server: ValkeyServer
) -> None:
    """C2: of many notices the newest are told; older ones than the bound are not looked for."""
    product = product_of(node)
    for _ in range(NOTICES_SHOWN_MAX + 3):
        await product.invalidate(1)
    many = await node.explain("product:1")
    assert len(many.log.notices) == NOTICES_SHOWN_MAX
    assert [line.version for line in many.log.notices] == sorted(
        (line.version for line in many.log.notices), reverse=True
    )

    other = next(
        f"other:{n}"
        for n in range(100)
        if node._parts.names.shard(f"other:{n}") == node._parts.names.shard("product:1")
    )
    for _ in range(LOOK_BACK // 200):
        await anyio.lowlevel.checkpoint()
        await node._parts.backend.link.call_many(
            [
                (
                    "XADD",
                    node._parts.names.part(node._parts.names.shard(other), "log"),
                    "*",
                    "a",
                    "b",
                )
                for _ in range(250)
            ]
        )
    late = await node.explain("product:1")
    assert [line for line in late.log.notices if line.kind == "dropped"] == []
    assert late.log.more
    assert late.log.looked_at < LOOK_BACK + 300


async def test_without_nodes_the_shared_part_is_told(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """C3: also by one who has been told another number of shards."""
    settings = Valkey(url=valkey_server.socket_url)
    async with made(namespace, settings, "a") as node:
        await product_of(node)(1)
    async with Backend(settings, client_name="explain") as backend:
        names = await names_at(backend.link, Names(namespace, 64))
        nonce = secrets.token_hex(16)
        document = await explain(backend, names, "product:1", nonce=nonce, bytes_max=1_000)

    assert (document.shards, document.entry.state) == (SHARDS, "fresh")
    assert document.verdict.endswith("; no node runs")


async def test_other_cache_versions_are_told(valkey_server: ValkeyServer, namespace: str) -> None:
    """A node that was started with another CACHE_VER reads other entries."""
    settings = Valkey(url=valkey_server.socket_url)
    old = made(namespace, settings, "old")
    new = made(namespace, settings, "new", cache=CacheDefaults(version="2"))
    async with old, new:
        await product_of(old)(1)
        document = await new.explain("product:1")

    assert (document.entry.state, near_of(document, "old").state) == ("absent", "fresh")
    assert any("reads entries of cache version 0, not 2" in line for line in words(document))

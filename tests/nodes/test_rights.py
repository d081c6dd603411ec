"""A node as the user of the shipped ACL file: it does all its work, and names what it lacks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
import pytest
import valkey
from click.testing import CliRunner

import forebay
from conftest import require
from forebay.coordinator import rights
from forebay.coordinator.rights import needed
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.nodes.cli.main import Invocation, root
from forebay.schemas.errors import ForebayError, StartupError
from forebay.schemas.settings import CacheDefaults, Http, NodeSettings, Settings
from support.acl_users import as_node, restore, shipped_users
from support.eventually import until
from support.valkey_server import ValkeyServer

pytestmark = pytest.mark.anyio

DOCUMENT = rights.RIGHTS.partition("#")[0]
CHANNELS = "resetchannels &__redis__:invalidate"
KEYS = "resetkeys ~forebay:shop:* ~{forebay:shop:*"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    require("valkey")
    with ValkeyServer(acl=shipped_users()) as server:
        yield server


class Shop(NamedTuple):
    node: forebay.Node
    product: Any
    api: Any

    @classmethod
    def at(cls, server: ValkeyServer, **cache: Any) -> Shop:
        settings = Settings(
            node=NodeSettings(namespace="shop", shards=4),
            valkey=as_node(server),
            cache=CacheDefaults(**cache),
            http=Http(port=0),
        )
        node = forebay.Node(settings=settings)

        @node.cached("product:{id}", ttl=60, stale_for=60, tags=["catalog"], legacy_key="old:{id}")
        async def product(id: int) -> int:
            return id

        @node.sink("product:{id}")
        async def save(writes: Sequence[forebay.Write[int]]) -> None:
            await asyncio.sleep(0)

        return cls(node, product, node.limit("api", rate=100, per=1, concurrency=2))

    def check(self, name: str) -> tuple[str, str]:
        (found,) = [each for each in self.node.checks() if each.name == name]
        return found.state, found.detail

    @property
    def ready(self) -> bool:
        return all(each.state != "fail" for each in self.node.checks() if "ready" in each.gates)


def as_publisher(server: ValkeyServer, event: bytes) -> None:
    with valkey.Valkey(
        unix_socket_path=server.socket_path, username="shop-publisher", password="pw"
    ) as client:
        client.xadd("forebay:shop:events", {"event": event})


async def caching(shop: Shop, server: ValkeyServer) -> None:
    """Reads, loads, every kind of write, invalidation, refreshes and warming."""
    node, product = shop.node, shop.product
    await product(1)
    await product.many([1, 2, 3])
    await product.put(4, 4)
    await product.write_through(5, 5)
    await product.write_behind(6, 6, until="sink")
    await product.write_around(7, 7)
    await node.invalidate(keys=["product:1"], tags=["catalog"])
    await product(2)
    await node.invalidate(tags=["catalog"], soft=True)
    await product(2)
    await node.publish(
        [
            {"type": "refresh", "keys": ["product:2"]},
            {"type": "write", "key": "product:8", "value": 8, "id": "one"},
            {"type": "invalidate", "tags": ["catalog"]},
        ]
    )
    as_publisher(server, b'{"type":"write","key":"product:9","value":"no number"}')
    await until(lambda: node._parts.dead_letters.buried == 1)
    with pytest.raises(ForebayError, match="accepted, but not known to be replicated"):
        await product.write_behind(4, 5, until="replicated", timeout=0.1)


async def coordinating(shop: Shop) -> None:
    """Locks of each kind, and each way to ask a limit."""
    node, api = shop.node, shop.api
    async with node.lock("one", meta={"a": 1}), node.lock_all(["a", "b"]):
        assert await node.try_lock("one") is None
        await node.locks.show("one")
        await node.locks.list()
        waiting = asyncio.create_task(node.lock("one", timeout=30).__aenter__())
        await until(lambda: node.locks.statistics().waiting == 1)
    async with await waiting:
        pass
    async with node.semaphore("few", capacity=2).acquire(), node.rwlock("r").reading():
        pass
    await api.take("ann")
    await api.peek("ann")
    await api.force("ann")
    await api.refund("ann")
    hold = await api.reserve("ann", 2)
    await hold.settle(1)
    async with api.slot("ann"):
        pass


async def observing(shop: Shop, server: ValkeyServer) -> None:
    """Statistics, explanations, the endpoint; entries that others change are followed."""
    node = shop.node
    stats = await node.stats()
    assert stats["unavailable"] is None
    await node.explain("product:2")
    crew = node._parts.crew
    assert crew is not None
    assert crew.external is not None
    await shop.product(2)
    server.execute("DEL", node._parts.names.entry("product:2"))
    await until(lambda: shop.product._cache.path.near.peek("product:2") is None)


def command_line(server: ValkeyServer, *words: str) -> str:
    environ = {
        "FOREBAY_URL": server.url,
        "FOREBAY_NAMESPACE": "shop",
        "FOREBAY_NODE__SHARDS": "4",
        "FOREBAY_VALKEY__USERNAME": "shop-node",
        "FOREBAY_VALKEY__PASSWORD": "pw",
    }
    done = CliRunner().invoke(root, words, env=environ, obj=Invocation())
    assert done.exit_code == 0, done.output
    return done.output


async def test_node_does_all_its_work_with_the_shipped_file(server: ValkeyServer) -> None:
    """No command of a node, a worker or the command line is refused by the ACL."""
    restore(server, "%R~old:*")  # where another service stored its values
    server.execute("ACL", "LOG", "RESET")
    shop = Shop.at(server, external_writers=True)
    async with shop.node:
        await until(lambda: shop.ready)
        await caching(shop, server)
        await coordinating(shop)
        await observing(shop, server)
        for words in (
            ("publish", "invalidate", "product:1"),
            ("explain", "product:2"),
            ("locks", "ls"),
            ("limits", "ls"),
        ):
            await anyio.to_thread.run_sync(command_line, server, *words)
        assert shop.check("rights") == ("pass", "")
    denied = [
        dict(zip(each[::2], each[1::2], strict=True)) for each in server.execute("ACL", "LOG")
    ]

    assert [each[b"object"] for each in denied if each[b"username"] == b"shop-node"] == []


async def start_of(server: ValkeyServer) -> str:
    """How the start of a further node ends: with this message, or well."""
    shop = Shop.at(server, external_writers=True)
    try:
        await shop.node._enter(workers=False)
    except StartupError as error:
        return str(error)
    await shop.node.stop()
    return ""


def names(right: str, message: str) -> bool:
    """Whether a message names the right, the user, and where the list is."""
    named = right.replace("|", " ") in message.lower().replace("|", " ")
    return named and "shop-node" in message and DOCUMENT in message


@asynccontextmanager
async def running(server: ValkeyServer) -> AsyncIterator[Shop]:
    """A node that is well, and has to be well again after the block."""
    restore(server)
    shop = Shop.at(server, external_writers=True)
    async with shop.node:
        await until(lambda: shop.ready)
        yield shop
        restore(server)
        await shop.node._parts.rights.look()
        await until(lambda: shop.ready)
        assert shop.check("rights") == ("pass", "")
        await shop.product.write_behind(1, 2, until="sink", timeout=30)
        assert await shop.product(1) == 2


COMMANDS = sorted(needed(load_scripts()) - {"select"})
GROUPS = 6


@pytest.mark.parametrize("group", range(GROUPS))
async def test_each_command_taken_away_is_named(group: int, server: ValkeyServer) -> None:
    """Without a command, ``rights`` names it and readiness fails; where only a feature is lost, it
    warns and names that. No node starts without a command that all its work needs.
    """
    async with running(server) as shop:
        for command in COMMANDS[group::GROUPS]:
            lost = rights.PARTLY.get(command, "")
            restore(server, f"-{command}")
            await shop.node._parts.rights.look()
            state, detail = shop.check("rights")
            refused = await start_of(server)

            assert names(command, detail), command
            assert (state, shop.ready) == (("warn", shop.ready) if lost else ("fail", False)), (
                command
            )
            assert lost in detail
            assert (refused == "") == bool(lost), command
            assert lost or names(command, refused), refused


PATTERNS = [
    (f"{KEYS}", "~{shop:*"),
    ("resetkeys ~{shop:* ~{forebay:shop:*", "~forebay:shop:*"),
    ("resetkeys ~{shop:* ~forebay:shop:*", "~{forebay:shop:*"),
    (CHANNELS, "&forebay:shop:*"),
]


async def test_each_pattern_taken_away_is_named(server: ValkeyServer) -> None:
    """Without a pattern of keys or channels the node is not ready, and names the pattern."""
    async with running(server) as shop:
        for rules, pattern in PATTERNS:
            restore(server, *rules.split())
            await shop.node._parts.rights.look()
            state, detail = shop.check("rights")
            refused = await start_of(server)

            assert (state, shop.ready) == ("fail", False)
            assert names(pattern, detail)
            assert names(pattern, refused)


async def test_another_database_needs_select(server: ValkeyServer) -> None:
    """A node with a database of its own is refused by name without SELECT."""
    restore(server, "-select")
    options = msgspec.structs.replace(as_node(server), url=f"{server.url[:-1]}3")
    node = forebay.Node(settings=Settings(node=NodeSettings(namespace="shop"), valkey=options))
    with pytest.raises(StartupError) as caught:
        await node.start()

    assert names("select", str(caught.value))


def test_document_lists_what_is_lost() -> None:
    """The table in the documentation is the one in the code."""
    text = (Path(forebay.__file__).parent / DOCUMENT).read_text()
    rows = [
        f"| `{right.replace('|', chr(92) + '|')}` | {lost} |"
        for right, lost in rights.PARTLY.items()
    ]

    assert [row for row in rows if row not in text] == []

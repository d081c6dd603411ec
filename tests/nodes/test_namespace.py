"""The metadata of a namespace is restored after FLUSHALL, and its keys are counted."""

from __future__ import annotations

import pytest

from forebay.coordinator.clock import SystemClock
from forebay.nodes.namespace import PAGE_KEYS, PAGES_MAX, NamespaceKeyCount, check_metadata
from forebay.nodes.web.protocols import Check
from forebay.schemas.errors import ConfigError
from forebay.schemas.keys import Names
from forebay.schemas.settings import Valkey
from support.eventually import until


@pytest.fixture
def own_server(make_server):
    """A server of its own, since the test flushes it."""
    return make_server()


@pytest.mark.parametrize("command", ["FLUSHALL", "FLUSHDB"])
async def test_the_record_is_written_again_after_a_flush(make_node, own_server, command) -> None:
    """B2: a node with another number of shards is refused as before the flush."""
    async with make_node(valkey=Valkey(url=own_server.socket_url)) as node:
        names, link = node._parts.names, node._parts.backend.link
        own_server.execute(command)

        async def is_back() -> bool:
            return bool(await link.call("HGET", names.meta, "shards") == b"4")

        await until(is_back)
        other = Names(names.namespace, 8)
        with pytest.raises(ConfigError, match="created with 4"):
            await check_metadata(link, other, node._parts.scripts, {})


async def test_marks_begin_again_after_a_flush(make_node, own_server) -> None:
    """B2: a value that another service stores after the flush is used, unless invalidated since."""
    node = make_node(valkey=Valkey(url=own_server.socket_url))

    @node.cached("product:{id}", ttl=60, legacy_key="v1:product:{id}")
    async def product(id: int) -> int:
        return -id

    async with node:
        own_server.execute("FLUSHALL")
        heads = [node._parts.names.part(shard, "head") for shard in range(4)]
        await until(lambda: all(own_server.execute("HEXISTS", head, "l") for head in heads))
        await product.invalidate(2)
        for number in (1, 2):
            own_server.execute("SET", f"v1:product:{number}", 10 * number)
        assert [await product(1), await product(2)] == [10, -2]


async def test_a_namespace_that_is_born_anew_with_other_shards_is_told(
    make_node, own_server
) -> None:
    """B2: the node is not ready and reports why, until the metadata matches again."""
    async with make_node(valkey=Valkey(url=own_server.socket_url)) as node:
        names = node._parts.names

        def check() -> Check:
            return next(each for each in node.checks() if each.name == "namespace")

        assert (check().state, check().gates) == ("pass", frozenset(("ready",)))
        own_server.execute("HSET", names.meta, "shards", 8)
        node._parts.metadata.lost()
        await until(lambda: check().state == "fail")
        assert "was created with 8; set node.shards = 8" in check().detail
        own_server.execute("HSET", names.meta, "shards", 4)
        await until(lambda: check().state == "pass")


async def test_stats_count_the_keys_of_the_namespace(make_node, own_server) -> None:
    """B3: the count is exact in a small database, with other keys in it; B4: it is reused."""
    for number in range(50):
        own_server.execute("SET", f"other:{number}", 1)
    async with make_node(valkey=Valkey(url=own_server.socket_url)) as node:
        names = node._parts.names
        own_server.execute("SET", names.entry("a"), 1)
        told = await node.stats()
        keys, ours = told["keys"], told["namespace_keys"]
        assert ours["is_estimate"] is False
        own = {bytes(key) for key in own_server.execute("KEYS", f"*{names.namespace}*")}
        assert 0 < ours["count"] <= len(own)
        assert keys - 50 - 5 <= ours["count"] <= keys - 50
        own_server.execute("SET", names.entry("b"), 1)
        assert (await node.stats())["namespace_keys"] == ours


async def test_keys_of_a_large_database_are_estimated(own_server, make_node) -> None:
    """B3: a bounded number of pages is read, and their share is extrapolated to all keys."""
    key = "(n % 4 == 0 and '{big:00}:e0:' or 'x:') .. n"
    script = f"for n = 1, ARGV[1] do redis.call('SET', {key}, 1) end"
    every = 2 * PAGES_MAX * PAGE_KEYS
    own_server.execute("EVAL", script, 0, every)
    async with make_node(valkey=Valkey(url=own_server.socket_url)) as node:
        link, calls = node._parts.backend.link, []

        class Counted:
            async def call(self, *args: object, **options: object) -> object:
                calls.append(args[0])
                return await link.call(*args, **options)  # type: ignore[arg-type]

        found = await NamespaceKeyCount(Counted(), Names("big", 4), SystemClock()).get_count()  # type: ignore[arg-type]
    assert found is not None
    assert found.is_estimate
    assert calls.count("SCAN") == PAGES_MAX
    assert found.count == pytest.approx(every / 4, rel=0.2)


async def test_without_the_right_to_scan_there_is_no_count(make_node, own_server) -> None:
    """B5: without the right to SCAN, the rest of /stats is complete."""
    own_server.execute("ACL", "SETUSER", "few", "on", ">pw", "~*", "&*", "+@all", "-scan")
    valkey = Valkey(url=own_server.socket_url, username="few", password="pw")  # type: ignore[arg-type]
    async with make_node(valkey=valkey) as node:
        told = await node.stats()
    assert told["namespace_keys"] is None
    assert told["keys"] > 0

"""Legacy entries: values of another service are imported once, and never undo a change."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

import forebay
from forebay.nodes.cache.cached import Cached
from forebay.nodes.cache.legacy import WINDOW_S, lifetimes
from forebay.nodes.cache.policy import Policy
from forebay.schemas.entry import read_legacy
from forebay.schemas.errors import ConfigError
from support.workers import invalidate as invalidation
from support.workers import write as write_event

Row = dict[str, int]
OLD, NEW = {"n": 1}, {"n": 2}
DAY_MS = 86_400_000


@pytest.fixture
def old(valkey_server, namespace: str):
    """Store a value as the other service does: ``old(1, OLD, left_ms=...)``."""

    def store(row: Any, value: Any, *, left_ms: int = 0, stale_in_s: float | None = None) -> str:
        wrapped = {"value": value, "stale_at": time.time() + (stale_in_s or 0)}
        text = json.dumps(value if stale_in_s is None else wrapped)
        name = f"v1:{namespace}:{row}"
        valkey_server.execute("SET", name, text, *(["PX", left_ms] if left_ms else []))
        return name

    return store


@pytest.fixture
def declare(source, namespace: str):
    """The cache that most tests use: rows by id; all old names have the same suffix."""

    def made(node: forebay.Node, **options: Any) -> Cached[Any, Row | None]:
        given = {"ttl": 600.0, "legacy_key": f"v1:{namespace}:{{id}}", **options}

        @node.cached("row:{id}", **given)
        async def row(id: int) -> Row | None:
            return await source.get(id)

        node.sink("row:{id}")(into_nothing)
        return row

    return made


async def into_nothing(writes: list[forebay.Write[Any]]) -> None:
    """A sink that stores nothing."""


def results(node: forebay.Node) -> dict[str, int]:
    counts = node._instruments.counts
    return {key[2]: count for key, count in counts.items() if key[0] == "legacy_entries" and count}


def forget(node: forebay.Node, server: Any, key: str) -> None:
    """Remove the entry, as if it had expired."""
    server.execute("DEL", node._parts.names.entry(key))
    for cached in node.caches:
        cached._cache.path.near.clear()


@pytest.mark.parametrize("stale_in_s", [None, 3_600.0])
@pytest.mark.parametrize("mutable", [False, True])
async def test_both_forms_spare_the_load_and_keep_their_lifetime(
    make_node, declare, source, old, valkey_server, stale_in_s, mutable
) -> None:
    """Y1, Y4: no load runs; the remaining lifetime is kept, also beyond ``ttl``; the age is
    unknown, near too.
    """
    node = make_node()
    row = declare(node, mutable=mutable)
    old(1, OLD, left_ms=DAY_MS, stale_in_s=stale_in_s)
    async with node:
        first, second = [await row.get_with_info(1) for _ in range(2)]
        left_ms = valkey_server.execute("PTTL", node._parts.names.entry("row:1"))
        assert (first.value, first.tier, first.age_ms, first.stale) == (OLD, "shared", None, False)
        assert (second.value, second.tier, second.age_ms) == (OLD, "near", None)
        assert 0.9 * DAY_MS < left_ms <= DAY_MS
        assert (source.loads, results(node)) == (0, {"used": 1})
        shown = await node.explain("row:1")
    assert shown.entry.age_ms is None


async def test_without_a_lifetime_it_gets_that_of_the_cache(
    make_node, declare, source, old, valkey_server
) -> None:
    """Y4: it is not imported again after that lifetime."""
    node = make_node()
    row = declare(node, ttl=60.0, stale_for=30.0)
    old(1, OLD)
    source.values[1] = NEW
    async with node:
        assert await row(1) == OLD
        assert 80_000 < valkey_server.execute("PTTL", node._parts.names.entry("row:1")) <= 90_000
        forget(node, valkey_server, "row:1")
        assert await row(1) == NEW
        assert results(node) == {"used": 1, "outdated": 1}


async def test_a_value_past_its_stale_at_is_served_stale_and_refreshed(
    make_node, declare, source, old, eventually
) -> None:
    """Y4: the reader gets the old value at once, as stale; the refresh stores the new one."""
    node = make_node()
    row = declare(node)
    old(1, OLD, left_ms=DAY_MS, stale_in_s=-5.0)
    source.values[1] = NEW
    async with node:
        first = await row.get_with_info(1)
        assert (first.value, first.stale, first.age_ms) == (OLD, True, None)

        async def is_new() -> bool:
            return await row(1) == NEW

        await eventually(is_new)
        assert (await row.get_with_info(1)).age_ms is not None
    assert source.loads == 1


POLICY = Policy(ttl_ms=60_000, stale_ms=30_000)
NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize(
    "raw, left_ms, expected",
    [
        (b"1", 5_000, (5_000, 5_000)),
        (b"1", 900_000, (900_000, 900_000)),
        (b"1", -1, (60_000, 90_000)),
        (b'{"value": 1, "stale_at": 1700000003}', 5_000, (3_000, 5_000)),
        (b'{"value": 1, "stale_at": 1700000009.5}', 5_000, (5_000, 5_000)),
        (b'{"value": 1, "stale_at": 1700000003}', -1, (3_000, 90_000)),
        (b'{"value": 1, "stale_at": 1699999990}', 5_000, (-10_000, 5_000)),
        (b'{"value": 1, "stale_at": -1e30}', 5_000, (1 - NOW_MS, 5_000)),
        (b'{"value": 1, "stale_at": 1e30}', 5_000, (5_000, 5_000)),
        (b"1", 10**15, (366 * DAY_MS, 366 * DAY_MS)),
    ],
)
def test_lifetimes(raw: bytes, left_ms: int, expected: tuple[int, int]) -> None:
    """Y4: the times that an entry is fresh and kept, as a table."""
    entry = read_legacy(raw, bytes_max=1_000)
    assert lifetimes(entry, left_ms, NOW_MS, POLICY) == expected


BAD = {
    "no JSON": b"\x80\x04\x95pickled",
    "cut off": b'{"n": 1',
    "another type": b'["a", "b"]',
    "a wrapped value of another type": b'{"value": "x", "stale_at": 1e12}',
    "too large": b'{"n": 1' + b" " * 3_000 + b"}",
    "nested too deeply": b"[" * 2_000,
    "an envelope of ours": b"\xfbE1c" + b"9" * 62,
    "NaN": b'{"n": NaN}',
    "no UTF-8": b'{"n": "\xff"}',
}


@pytest.mark.parametrize("what", BAD)
async def test_an_unusable_value_is_a_miss_that_is_counted_and_logged_once(
    make_node, declare, source, valkey_server, namespace, what
) -> None:
    """Y5: the loader runs, and no error is raised."""
    node = make_node(value_bytes_max=2_048)
    row = declare(node)
    for each in (1, 2):
        valkey_server.execute("SET", f"v1:{namespace}:{each}", BAD[what])
    source.values |= {1: NEW, 2: NEW}
    with capture_logs() as logs:
        async with node:
            assert await row.many([1, 2]) == [NEW, NEW]
    lines = [line for line in logs if line["event"] == "legacy.unreadable"]
    warned = [line for line in lines if line["log_level"] == "warning"]
    assert len(lines) == 2
    assert [line["name"] for line in warned] == [f"v1:{namespace}:{warned[0]['key'][4:]}"]
    assert results(node) == {"unreadable": 2}


@pytest.mark.parametrize("command", [("HSET", "a", 1), ("RPUSH", "a"), ("SET", "")])
async def test_another_type_of_key_is_a_miss(
    make_node, declare, source, valkey_server, namespace, command
) -> None:
    """Y5: a hash, a list and an empty string are misses."""
    node = make_node()
    row = declare(node)
    verb, *words = command
    valkey_server.execute(verb, f"v1:{namespace}:1", *words)
    source.values[1] = NEW
    async with node:
        assert await row(1) == NEW
    assert results(node) == {"absent" if verb == "SET" else "unreadable": 1}


@pytest.mark.parametrize("negative_ttl, loads", [(None, 0), (0.0, 1)])
async def test_null_is_a_known_absence_if_absences_are_cached(
    make_node, declare, source, old, negative_ttl, loads
) -> None:
    """It lives as long as other absences; if absences are not cached, the loader runs."""
    node = make_node()
    row = declare(node, negative_ttl=negative_ttl)
    old(1, None, left_ms=DAY_MS)
    async with node:
        assert await row(1) is None
    assert source.loads == loads


async def test_many_readers_on_three_nodes_import_it_once(
    make_node, declare, source, old, valkey_server
) -> None:
    """Y1: the import is single-flight in the cluster."""
    nodes = [make_node() for _ in range(3)]
    rows = [declare(node) for node in nodes]
    old(1, OLD, left_ms=DAY_MS)
    got: list[Any] = []

    async def read(row: Cached[Any, Any]) -> None:
        got.append(await row(1))

    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        for node in nodes:
            await stack.enter_async_context(node)
        for number in range(60):
            tasks.start_soon(read, rows[number % 3])
    assert got == [OLD] * 60
    assert source.loads == 0
    assert sum(results(node).get("used", 0) for node in nodes) == 1


async def test_a_bulk_read_loads_only_keys_without_an_old_value(
    make_node, declare, source, old
) -> None:
    """An imported key leaves the group of the batch loader."""
    node = make_node()
    row = declare(node)
    asked: list[list[int]] = []

    @row.batch
    async def rows(ids: list[int]) -> dict[int, Row]:
        asked.append(ids)
        return dict.fromkeys(ids, NEW)

    for each in (1, 3):
        old(each, OLD, left_ms=DAY_MS)
    async with node:
        assert await row.many([1, 2, 3, 4]) == [OLD, NEW, OLD, NEW]
    assert [sorted(each) for each in asked] == [[2, 4]]


async def test_a_failing_source_does_not_prevent_an_import(
    make_node, declare, source, old, eventually
) -> None:
    """An import needs no source, also while its breaker is open."""
    node = make_node(breaker_failures=1, breaker_recovery_ms=60_000)
    row = declare(node)
    source.error = RuntimeError("no database")
    old(1, OLD, left_ms=DAY_MS)
    async with node:
        with pytest.raises(RuntimeError):
            await row(2)
        with pytest.raises(forebay.SourceFailing):
            await row(3)
        assert await row(1) == OLD


# Newer values


async def by_event(node: forebay.Node, event: bytes) -> None:
    names, server = node._parts.names, node._parts.backend.link
    await server.call("XADD", names.events, "*", "event", event)


Change = Callable[[forebay.Node, Any], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "invalidate": lambda node, row: row.invalidate(1),
    "soft": lambda node, row: node.invalidate(["row:1"], soft=True),
    "tag": lambda node, row: node.invalidate(tags=["rows"]),
    "tag, softly": lambda node, row: node.invalidate(tags=["rows"], soft=True),
    "dependency": lambda node, row: node.invalidate(["base:1"]),
    "put": lambda node, row: row.put(1, {"n": 7}),
    "write-behind": lambda node, row: row.write_behind(1, {"n": 7}),
    "write-through": lambda node, row: row.write_through(1, {"n": 7}),
    "write-around": lambda node, row: row.write_around(1, {"n": 7}),
    "event": lambda node, row: by_event(node, invalidation("row:1")),
    "event of a tag": lambda node, row: by_event(node, b'{"type":"invalidate","tags":["rows"]}'),
    "written by event": lambda node, row: by_event(node, write_event("row:1", {"n": 7})),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_no_change_is_undone_by_the_old_value(
    make_node, declare, source, old, valkey_server, eventually, what
) -> None:
    """Y2: also of a node that does not declare the cache so, and after the entry is gone; and the
    other service storing its value again changes nothing.
    """
    node, other = make_node(workers=True), make_node(version="2")
    row = declare(node, tags=["rows"], depends_on=["base:{id}"])
    changing = declare(other, legacy_key="", tags=["rows"], depends_on=["base:{id}"])
    source.values[1] = NEW
    async with node, other:
        assert not await any_marks(node)
        await CHANGES[what](other, changing)
        await eventually(lambda: any_marks(node))
        forget(node, valkey_server, "row:1")
        valkey_server.execute("DEL", other._parts.names.entry("row:1"))
        old(1, OLD, left_ms=DAY_MS)
        assert await row(1) == NEW
    assert results(node) == {"outdated": 1}


async def any_marks(node: forebay.Node) -> bool:
    names = node._parts.names
    commands = [("ZCARD", names.part(shard, "legacy")) for shard in range(names.shards)]
    return any(await node._parts.backend.link.call_many(commands))


async def test_without_its_mark_the_old_value_would_come_back(
    make_node, declare, source, old, valkey_server
) -> None:
    """Negative control of the test above: the mark prevents the import."""
    node = make_node()
    row = declare(node)
    old(1, OLD, left_ms=DAY_MS)
    async with node:
        await row.invalidate(1)
        for shard in range(node._parts.names.shards):
            valkey_server.execute("DEL", node._parts.names.part(shard, "legacy"))
        assert await row(1) == OLD


@pytest.mark.parametrize("what", ["invalidate", "tag"])
async def test_a_change_between_reading_and_storing_wins(
    make_node, declare, source, old, monkeypatch, what
) -> None:
    """Y1, Y2: the fill of the older value is refused, or carries an older tag."""
    node = make_node()
    row = declare(node, tags=["rows"])
    old(1, OLD, left_ms=DAY_MS)
    source.values[1] = NEW
    async with node:
        legacy = row._cache.path.legacy
        read = legacy._read

        async def read_then_change(key: str, tags: Any) -> Any:
            found = await read(key, tags)
            await CHANGES[what](node, row)
            return found

        monkeypatch.setattr(legacy, "_read", read_then_change)
        first = await row(1)
        assert first == (NEW if what == "invalidate" else OLD)
        monkeypatch.undo()
        assert await row(1) == NEW


async def test_a_loaded_value_is_not_replaced_by_an_older_one(
    make_node, declare, source, old, valkey_server
) -> None:
    """Y2: a value that was loaded and has expired was newer."""
    node = make_node()
    row = declare(node)
    source.values[1] = NEW
    async with node:
        assert await row(1) == NEW
        old(1, OLD, left_ms=DAY_MS)
        forget(node, valkey_server, "row:1")
        assert await row(1) == NEW
    assert (source.loads, results(node)) == (2, {"absent": 1, "outdated": 1})


async def test_the_window_ends(make_node, declare, source, old, valkey_server) -> None:
    """Y3: it ends 30 days after the first start with the cache, and a start then logs it."""
    old(1, OLD, left_ms=DAY_MS)
    source.values[1] = NEW
    first, node = make_node(), make_node()
    declare(first)
    row = declare(node)
    async with first:
        names = first._parts.names
    began_ms = int(valkey_server.execute("HGET", names.meta, "legacy:row:{}"))
    assert began_ms > 0
    valkey_server.execute("HSET", names.meta, "legacy:row:{}", began_ms - WINDOW_S * 1000)
    with capture_logs() as logs:
        async with node:
            assert await row(1) == NEW
    assert [line["template"] for line in logs if line["event"] == "legacy.over"] == ["row:{}"]
    assert results(node) == {"closed": 1}


async def test_changes_before_the_marks_are_reported(make_node, declare, old) -> None:
    """Y3: these changes have no marks, and the start logs a warning."""
    before, node = make_node(), make_node()
    changed = declare(before, legacy_key="")
    declare(node)
    async with before:
        await changed.invalidate(1)
    with capture_logs() as logs:
        async with node:
            pass
    assert [line["shards"] for line in logs if line["event"] == "legacy.late"] == [1]


async def test_a_cancelled_import_leaves_no_lease(
    make_node, declare, old, valkey_server, monkeypatch
) -> None:
    """The lease is released if the node stops during the import."""
    node = make_node(lease_ms=60_000)
    row = declare(node)
    old(1, OLD, left_ms=DAY_MS)
    reached = anyio.Event()

    async def hang(key: str, tags: Any) -> Any:
        reached.set()
        await anyio.sleep_forever()

    async with node, anyio.create_task_group() as tasks:
        lease = node._parts.names.lease("row:1")
        monkeypatch.setattr(row._cache.path.legacy, "_read", hang)
        tasks.start_soon(row, 1)
        await reached.wait()
        assert valkey_server.execute("EXISTS", lease) == 1
        tasks.cancel_scope.cancel()
    assert valkey_server.execute("EXISTS", lease) == 0


async def test_a_name_that_the_user_may_not_read_is_a_miss(
    make_node, declare, source, make_server, namespace
) -> None:
    """Y5: the key patterns of the user do not include it."""
    own = f"~{{{namespace}:* ~forebay:{namespace}:* ~{{forebay:{namespace}:*"
    server = make_server(acl=[f"user default on nopass {own} &* +@all"])
    node = make_node(server)
    row = declare(node)
    source.values[1] = NEW
    with capture_logs() as logs:
        async with node:
            assert await row(1) == NEW
    assert results(node) == {"refused": 1}
    (line,) = [line for line in logs if line["event"] == "legacy.refused"]
    assert "NOPERM" in line["error"] or "permission" in line["error"]


@pytest.mark.parametrize(
    "legacy_key", ["v1:row", "v1:{other}", "v1:{id}:{more}", "v1:{id"], ids=str
)
async def test_an_old_name_with_other_fields_is_refused_when_declared(
    make_node, declare, legacy_key
) -> None:
    """Otherwise two keys would share an old name."""
    with pytest.raises((ConfigError, forebay.InvalidKey), match="legacy_key"):
        declare(make_node(), legacy_key=legacy_key)


async def test_old_names_are_not_escaped(make_node, valkey_server, namespace) -> None:
    """Fields in the names of the other service are plain text."""
    node = make_node()

    @node.cached("by:{name}:{place}", ttl=60, legacy_key=f"{namespace}/{{place}}|{{name}}")
    async def found(name: str, place: int) -> str:
        raise LookupError(name)

    valkey_server.execute("SET", f"{namespace}/7|a b:c/ü", '"here"')
    async with node:
        assert await found("a b:c/ü", 7) == "here"

"""With any planted record in Valkey, nodes live, the loop does not stall, other keys work.

Two whole nodes run while seeded records of every kind, spoilt in every way, are planted in two of
the four shards, and in the records shared by the namespace. Keys of the other shards are read,
invalidated and written through a sink meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import msgspec
import pytest

from faults.service import PLANTED, Service, lock_of, subject_of, works
from forebay.schemas.keys import EVENTS, Names
from forebay.schemas.notices import Dropped, write_notice
from support.valkey_server import ValkeyServer

LAST = b"18446744073709551615"
SPOILT: tuple[bytes, ...] = (
    b"",
    b"x",
    b"-1",
    b"1e999",
    b"nan",
    b"inf",
    b"0x10",
    b"1_000",
    b" 5",
    b"\xff\xfe",
    b"\x00" * 40,
    b"9" * 16,
    b"9" * 20,
    b"9" * 400,
    b"9" * 5_000,
    b"9" * 20 + b"-" + b"9" * 20,
    b"99999999999999-0",
    LAST + b"-" + LAST,
    b"f" * 1_000_000,
    b"[" * 5_000,
    b"\x91" * 5_000,
    b"\xdd\xff\xff\xff\xff",
    b"\xfbE1c" + b"9" * 62,
    b"{}",
    b'{"held": "' + b"f" * 300_000 + b'"}',
    b"1 active 1000 0 {}",
    b"9999999999999999 active 9999999999 9999999999 [" + b"[" * 3_000,
    b"1 2 3 4",
    b"9999999999999999 9999999999999999 9999999999999999 9999999999999999",
)
Plant = tuple[Any, ...]


def plants(names: Names, rng: random.Random) -> Iterator[Plant]:
    """One spoilt record of every kind."""

    def bad() -> bytes:
        return rng.choice(SPOILT)

    shard = rng.choice(PLANTED)
    part = names.part
    key = next(f"item:{n}" for n in range(1_000) if names.shard(f"item:{n}") == shard)
    entry, lease, tag = names.of_key(key)
    record, queue, waiters, index, era = names.lock(lock_of(names, shard))
    log = part(shard, "log")
    yield ("XADD", log, "*", "v", bad(), "n", bad())
    yield ("XADD", log, "*", bad(), bad())
    yield ("XADD", log, "*", "n", write_notice(Dropped(("a",))), "v", bad())
    yield (
        "XADD",
        log,
        rng.choice(["*", "99999999999999999-0", f"{LAST.decode()}-5"]),
        "v",
        "1",
        "n",
        "x",
    )
    for field in ("e", "v", "o", "i", "c", "l"):
        yield ("HSET", part(shard, "head"), field, bad())
    for field in ("o", "t", "e", "u", "w", "s", "f"):
        yield ("HSET", part(rng.choice((EVENTS, shard)), "own"), field, bad())
    for field in ("writes", "writes:table", "events", "g", "b", bad()):
        yield ("HSET", part(rng.choice((EVENTS, shard)), "done"), field, bad())
    yield ("SET", entry, bad(), "PX", 5_000)
    yield ("SET", lease, bad(), "PX", 500)
    yield ("SET", tag, bad())
    yield ("SET", names.fence(key), bad(), "PX", 5_000)
    yield ("ZADD", part(shard, "legacy"), rng.choice(["inf", "-inf", "5"]), bad())
    yield ("ZADD", part(shard, "seen"), rng.choice(["inf", "-inf", "5"]), bad())
    yield ("XADD", part(shard, "writes"), "*", "v", bad(), "j", bad())
    yield ("XADD", part(shard, "writes"), "*", bad(), bad())
    job = msgspec.msgpack.encode({"type": "w", "key": key, "value": bad()[:100]})
    yield (
        "XADD",
        part(shard, "writes"),
        rng.choice(["*", LAST + b"-" + LAST]),
        "v",
        bad(),
        "j",
        job,
    )
    yield ("XADD", part(shard, "refreshes"), rng.choice(["*", LAST + b"-" + LAST]), "j", bad())
    yield ("XADD", part(shard, "refreshes"), "*", bad(), "j")
    yield ("XADD", part(EVENTS, "dead"), rng.choice(["*", LAST + b"-" + LAST]), bad(), bad())
    yield ("XADD", part(shard, "dead"), "*", "from", bad(), "reason", bad())
    yield ("XADD", part(EVENTS, "held"), "*", bad(), bad())
    yield ("XADD", names.events, "*", bad(), bad())
    yield ("XADD", names.events, "*", "event", bad(), "held", bad())
    yield ("XADD", names.events, rng.choice(["*", LAST + b"-" + LAST]), "event", bad())
    yield ("HSET", names.members, rng.choice([b"\xff\xfe", b"", b"m" * 600, b"evil"]), bad())
    for name in (b"\xff\xfe", b"evil"):
        yield ("HSET", names.members, name, b"1 active 1000 0 " + bad())
        yield ("ZADD", names.nodes, "inf", name)
    yield ("HSET", names.members, "", "1 1 1")  # so that the whole is told
    yield (
        "ZADD",
        names.nodes,
        rng.choice(["inf", "-inf", "5"]),
        rng.choice([bad()[:600], b"evil"]),
    )
    for field in ("k", "c", "v", "t", "r", "f", "h:x", "a:x", "h:\xff".encode("latin-1")):
        yield ("HSET", record, field, bad())
    yield ("ZADD", queue, rng.choice(["inf", "-inf", "5"]), bad()[:600])
    yield ("HSET", waiters, bad()[:600], bad())
    yield ("ZADD", index, "inf", bad()[:600])
    for field in ("rid", "grace", "max"):
        yield ("HSET", era, field, bad())
    yield ("SET", names.limit("r", "api", subject_of(names, shard)), bad())
    for channel in (names.bell, names.work, names.limits, f"{names.wake}x", names.reply("0" * 16)):
        yield ("PUBLISH", channel, bad())
        yield ("PUBLISH", channel, rng.choice([b"0 ", b"w ", b"x ", b"g ", b"f "]) + bad())
    yield ("PUBLISH", names.bell, b"%d " % shard + b" ".join(bad()[:600] for _ in range(4)))
    yield ("PUBLISH", names.work, b"x " + names.reply("0" * 16).encode() + b" " + bad()[:600])


@pytest.mark.parametrize("seed", range(6))
async def test_nodes_live_with_spoilt_records_of_every_kind(
    valkey_server: ValkeyServer, namespace: str, seed: int
) -> None:
    """No record ends a node or stalls its loop; other keys work; a new node starts."""
    rng = random.Random(seed)
    service = Service(valkey_server, namespace)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(service.watch)
        for _ in range(2):
            await stack.enter_async_context(service.make())
        names = service.nodes[0]._parts.names
        link = service.nodes[0]._parts.backend.link
        await works(service, 1)
        for turn in range(2, 5):
            service.late_s = 0.0
            await link.call_many(list(plants(names, rng)))
            await works(service, turn)
            assert service.late_s < 2
            assert all(node.is_running for node in service.nodes)
        async with service.make() as late:
            assert late.is_running
        tasks.cancel_scope.cancel()

"""Nodes of two cache versions side by side, as in a rolling deploy that raises ``CACHE_VER``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

import forebay
from forebay.coordinator.valkey.backend import Backend
from forebay.schemas.settings import CacheDefaults, NodeSettings, Settings, Valkey, Workers
from support.eventually import until
from support.scripts import MINUTE_MS, Desk

# The scripts


@pytest.fixture
async def desks(backend_settings: Valkey, namespace: str) -> AsyncIterator[tuple[Desk, Desk]]:
    """The same namespace as a node of version "1" and as one of version "v2-b" see it."""
    async with Backend(backend_settings, client_name="test") as backend:
        yield (
            Desk(backend.link, namespace, cache_version="1"),
            Desk(backend.link, namespace, cache_version="v2-b"),
        )


async def fill(desk: Desk, value: str) -> None:
    await desk.begin("t", seen=1 << 52)
    assert (await desk.fill("t", value))[0] == 1


Outdate = Callable[[Desk], Awaitable[object]]


async def write_through(desk: Desk) -> None:
    await desk.begin_write("w")
    assert (await desk.fill_write("w"))[0] == 1


@pytest.mark.parametrize(
    "outdate",
    [
        pytest.param(lambda desk: desk.invalidate(), id="invalidate"),
        pytest.param(lambda desk: desk.put("new"), id="put"),
        pytest.param(lambda desk: desk.write("new"), id="write-behind"),
        pytest.param(write_through, id="write-through"),
    ],
)
async def test_what_outdates_a_key_outdates_it_in_every_version(
    desks: tuple[Desk, Desk], outdate: Outdate
) -> None:
    """entries_invalidate I4, entry_put I5, entry_write I3, write_fill I4: the other entry goes."""
    old, new = desks
    await fill(old, "of 1")
    await fill(new, "of v2-b")
    await outdate(old)
    assert await new.raw() is None


async def test_a_fill_leaves_the_entry_of_another_version(desks: tuple[Desk, Desk]) -> None:
    """A load leaves entries of other versions: else they would undo each other's work."""
    old, new = desks
    await fill(new, "of v2-b")
    await fill(old, "of 1")
    assert (await new.entry()).payload == b"of v2-b"


async def test_a_soft_invalidation_leaves_stale_entries_in_every_version(
    desks: tuple[Desk, Desk],
) -> None:
    """entries_invalidate I4: as softly as in the own version."""
    old, new = desks
    await fill(new, "of v2-b")
    await old.invalidate(soft=True)
    assert (await new.entry()).soft_at_ms == 0


async def test_a_value_of_others_touches_the_other_version(desks: tuple[Desk, Desk]) -> None:
    """entry_touch I3: a write past the scripts changes the value for every version."""
    old, new = desks
    await fill(new, "of v2-b")
    await old.commands.call("SET", old.names.entry("k"), "7")
    await old.touch()
    assert await new.raw() is None
    assert await old.raw() == b"7"


async def sunk(desk: Desk, owner: Desk) -> tuple[int, int, str]:
    """A write pending in one version, and a claim by an owner of the other."""
    _, epoch, *_ = await owner.claim("a")
    _, version, _, _, job_id, _ = await desk.write("value")
    return int(epoch), int(version), bytes(job_id).decode()


async def test_an_owner_of_another_version_settles_the_write(desks: tuple[Desk, Desk]) -> None:
    """checkpoint_commit I5: the entry may expire again; it was pinned for ever."""
    old, new = desks
    epoch, version, job_id = await sunk(new, old)
    assert await new.ttl_ms() == -1
    assert await old.commit("a", epoch, job_id, [("k", version)]) == [1]
    assert (await new.entry()).pending == 0
    assert 0 < await new.ttl_ms() <= 2 * MINUTE_MS


async def test_an_older_write_of_another_version_ends_with_the_newer(
    desks: tuple[Desk, Desk],
) -> None:
    """checkpoint_commit I5: the older entry is kept, as doomed, only until the newer was sunk."""
    old, new = desks
    _, epoch, *_ = await old.claim("a")
    await old.write("older")
    _, version, _, _, job_id, _ = await new.write("newer")
    assert (await old.entry()).doomed
    await old.commit("a", int(epoch), bytes(job_id).decode(), [("k", int(version))])
    assert await old.raw() is None
    assert (await new.entry()).payload == b"newer"


async def test_nothing_is_filled_while_a_write_of_another_version_waits(
    desks: tuple[Desk, Desk],
) -> None:
    """entry_fill I3, write_begin I4: the source is older than the accepted write."""
    old, new = desks
    epoch, version, job_id = await sunk(old, old)
    await new.begin("t")
    assert await new.fill("t", "the old row") == [0]
    assert await new.begin_write("w") == [2]
    await old.commit("a", epoch, job_id, [("k", version)])
    assert await new.fill("t", "the old row") == [0]  # checkpoint_commit I6
    await fill(new, "the new row")


async def test_many_versions_are_bounded(backend_settings: Valkey, namespace: str) -> None:
    """C5: the sixteen that were stored last are known, and no more."""
    async with Backend(backend_settings, client_name="test") as backend:
        for number in range(20):
            desk = Desk(backend.link, namespace, cache_version=f"v{number}")
            await fill(desk, "value")
            await fill(desk, "value again")
        known = await backend.link.call("HGET", desk.part("head"), "c")
        assert bytes(known).decode().split() == [f"v{number}" for number in range(4, 20)]
        await desk.invalidate()
        for number in range(4, 20):
            other = Desk(backend.link, namespace, cache_version=f"v{number}")
            assert await other.raw() is None


# Nodes


class Shop:
    """A node of one cache version; ``prices`` is the database that all share."""

    def __init__(
        self, label: str, namespace: str, valkey: Valkey, prices: dict[int, int], *, works: bool
    ) -> None:
        self.node = node = forebay.Node(
            settings=Settings(
                node=NodeSettings(namespace=namespace, id=f"n{label}", shards=2),
                valkey=valkey,
                cache=CacheDefaults(version=label),
                workers=Workers(
                    enabled=works, ownership_ttl_ms=1_000, beat_ms=100, flush_delay_ms=0
                ),
            )
        )

        @node.cached("price:{id}", ttl=300)
        async def price(id: int) -> int | None:
            return prices.get(id)

        @node.sink("price:{id}")
        async def save(writes: list[forebay.Write[int]]) -> None:
            prices.update({int(w.params["id"]): w.value for w in writes if w.value is not None})

        self.price = price


@pytest.fixture
async def shops(
    backend_settings: Valkey, namespace: str
) -> AsyncIterator[tuple[Shop, Shop, dict[int, int]]]:
    """Version 1 does all the work, version 2 is embedded in a service."""
    prices = {1: 10}
    async with AsyncExitStack() as stack:
        old = Shop("1", namespace, backend_settings, prices, works=True)
        new = Shop("2", namespace, backend_settings, prices, works=False)
        for shop in (old, new):
            await stack.enter_async_context(shop.node)
        yield old, new, prices


async def test_an_event_applied_by_one_version_reaches_the_other(
    shops: tuple[Shop, Shop, dict[int, int]],
) -> None:
    """The worker of version 1 applies it, and the entry of version 2 is outdated, too."""
    old, new, prices = shops
    assert (await old.price(1), await new.price(1)) == (10, 10)
    prices[1] = 11
    await new.node.publish([{"type": "invalidate", "keys": ["price:1"]}])

    async def both_are_new() -> bool:
        return (await old.price(1), await new.price(1)) == (11, 11)

    await until(both_are_new)


@pytest.mark.parametrize("writes", ["1", "2"])
async def test_a_call_of_one_version_reaches_the_other(
    shops: tuple[Shop, Shop, dict[int, int]], writes: str
) -> None:
    """invalidate, put and write_behind by either: the other reads no stale value afterwards."""
    old, new, prices = shops
    writer, reader = (old, new) if writes == "1" else (new, old)

    async def is_read(expected: int) -> bool:
        return await reader.price(1) == expected

    assert (await reader.price(1), await writer.price(1)) == (10, 10)
    prices[1] = 20
    await writer.price.invalidate(1)
    await until(lambda: is_read(20))
    prices[1] = 30
    await writer.price.put(1, 30)
    await until(lambda: is_read(30))
    await writer.price.write_behind(1, 40)
    await until(lambda: is_read(40))
    found = await reader.price.get_with_info(1)
    assert (prices[1], found.value, found.stale) == (40, 40, False)

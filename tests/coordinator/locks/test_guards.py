"""Keys that refuse an old token: coordinator/guards.py."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from forebay.coordinator.locks.guards import Guards, fence_of
from forebay.schemas.errors import InvalidKey
from forebay.schemas.errors_locks import LeaseLost, StaleToken
from support.lock_processes import SCRIPTS, Forge, smithy
from support.valkey_server import ValkeyServer


@pytest.fixture
async def forge(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[Forge]:
    async with smithy(valkey_server, namespace) as make:
        yield await make("one")


@pytest.fixture
def guards(forge: Forge) -> Guards:
    return Guards(forge.link, SCRIPTS)


async def test_an_older_token_is_refused_and_changes_nothing(
    forge: Forge, guards: Guards, namespace: str
) -> None:
    """V1: with both tokens in the error; the same token may write again."""
    key = f"{namespace}:report"
    await guards.set(key, "new", token=7)
    await guards.set(key, "newer", token=7)
    with pytest.raises(StaleToken) as caught:
        await guards.set(key, "old", token=6)
    assert (caught.value.key, caught.value.token, caught.value.highest) == (key, 6, 7)
    with pytest.raises(StaleToken):
        await guards.delete(key, token=6)
    assert await forge.link.call("GET", key) == b"newer"


async def test_the_highest_token_outlives_the_value(
    forge: Forge, guards: Guards, namespace: str
) -> None:
    """V2: deleted or expired, an old writer is still refused."""
    key = f"{namespace}:report"
    await guards.set(key, "x", token=7, ttl=60)
    assert 0 < await forge.link.call("PTTL", key) <= 60_000
    assert await guards.delete(key, token=8)
    assert not await guards.delete(key, token=8)
    assert await guards.highest(key) == 8
    with pytest.raises(StaleToken):
        await guards.set(key, "x", token=7)


async def test_a_lease_that_is_over_writes_nothing(
    forge: Forge, guards: Guards, namespace: str
) -> None:
    """Given a lease, a guard looks at it before it sends anything."""
    key = f"{namespace}:report"
    async with forge.lock("l") as lease:
        await guards.set(key, "x", token=lease)
    with pytest.raises(LeaseLost):
        await guards.set(key, "y", token=lease)
    assert await forge.link.call("GET", key) == b"x"
    assert await guards.highest(key) == lease.token


async def test_what_cannot_be_a_key_is_refused(guards: Guards) -> None:
    """Also braces: the key itself decides about the slot of both."""
    assert fence_of("a") == "{a}:fence"
    with pytest.raises(InvalidKey):
        await guards.set("{a}b", "x", token=1)

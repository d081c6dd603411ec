"""Cancelled wherever it waits, a lock leaves nothing behind: G1 and G2 of coordinator/grants.py."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from forebay.coordinator.valkey.link import Commands
from support.eventually import until
from support.lock_processes import Forge, MakeForge, smithy
from support.valkey_server import ValkeyServer
from support.workers import Cut


@pytest.fixture
async def make(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[MakeForge]:
    async with smithy(valkey_server, namespace) as make:
        yield make


async def nothing_left(forge: Forge) -> None:
    """No holder, no waiter, nothing pending."""

    async def clean() -> bool:
        views = [await forge.show(name) for name in ("a", "b", "c", "d")]
        return not any(view.holders or view.waiting for view in views)

    await until(clean)
    assert forge.statistics().held == 0
    assert forge.statistics().waiting == 0


async def block(forge: Forge) -> None:
    async with forge.lock("a"):
        pass


async def semaphore(forge: Forge) -> None:
    async with forge.semaphore("b", capacity=2).acquire(2):
        pass


async def several(forge: Forge) -> None:
    async with forge.lock_all(["a", "b", "c"]):
        pass


async def tried(forge: Forge) -> None:
    lease = await forge.try_lock("d")
    assert lease is not None
    await lease.release()


PRIMITIVES = [(block, 2), (semaphore, 2), (several, 6), (tried, 2)]
CUTS = [
    pytest.param(primitive, at, answered, id=f"{primitive.__name__}-{at}-{answered}")
    for primitive, calls in PRIMITIVES
    for at in range(1, calls + 1)
    for answered in (False, True)
]


@pytest.mark.parametrize("primitive,at,answered", CUTS)
async def test_cancelled_at_every_call(
    make: MakeForge,
    primitive: Callable[[Forge], Awaitable[None]],
    at: int,
    answered: bool,
) -> None:
    """Whether the server got the request or not, it is released before the cancellation goes on."""
    cuts: list[Cut] = []

    def cut(commands: Commands) -> Commands:
        cuts.append(made := Cut(commands, answered=answered))
        return made

    forge = await make("one", commands=cut)
    cuts[0]._at = len(cuts[0].calls) + at
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(primitive, forge)
        await cuts[0].reached.wait()
        tasks.cancel_scope.cancel()
    await nothing_left(forge)
    assert await forge.list() == []


async def test_cancelled_in_the_queue(make: MakeForge) -> None:
    """A place is given up, and whoever is behind moves up."""
    one, two = await make("one"), await make("two")
    behind = anyio.Event()

    async def wait(done: anyio.Event) -> None:
        async with two.lock("a"):
            done.set()

    async with anyio.create_task_group() as tasks:
        async with one.lock("a"):
            with anyio.CancelScope() as first:
                async with anyio.create_task_group() as inner:
                    inner.start_soon(wait, anyio.Event())
                    await until(lambda: _waiting(one, 1))
                    tasks.start_soon(wait, behind)
                    await until(lambda: _waiting(one, 2))
                    first.cancel()
            assert (await one.show("a")).waiting == 1
        await behind.wait()
    await nothing_left(two)


async def _waiting(forge: Forge, count: int) -> bool:
    return (await forge.show("a")).waiting == count


async def test_a_lock_that_was_handed_over_in_vain_is_passed_on(make: MakeForge) -> None:
    """Who is cancelled just as it is handed the lock gives it to the next."""
    one, two = await make("one"), await make("two")
    lease = await one.lock("a").acquire()
    reached = anyio.Event()

    async def behind() -> None:
        async with two.lock("a"):
            reached.set()

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:

                async def ahead() -> None:
                    await block(one)

                inner.start_soon(ahead)
                await until(lambda: _waiting(one, 1))
                tasks.start_soon(behind)
                await until(lambda: _waiting(one, 2))
                await one.records.release("a", lease.nonce)
                scope.cancel()
        await reached.wait()
    lease.released = True
    one.renewals.drop(lease)
    await nothing_left(one)


@pytest.mark.slow
async def test_thousands_of_cancellations_leave_no_orphan(make: MakeForge) -> None:
    """However they fall: when all have ended, every lock is free, and none is held in vain."""
    forges = [await make(name) for name in ("one", "two")]
    rng = random.Random(5)
    ended = dict.fromkeys(("through", "cancelled"), 0)

    async def life(forge: Forge) -> None:
        for _ in range(60):
            with anyio.move_on_after(rng.expovariate(1 / 0.004)) as scope:
                match rng.randrange(3):
                    case 0:
                        async with forge.lock(rng.choice("ab")):
                            await anyio.sleep(rng.random() * 0.001)
                    case 1:
                        async with forge.semaphore("c", capacity=3).acquire(rng.randint(1, 3)):
                            await anyio.sleep(0)
                    case _:
                        if (lease := await forge.try_lock("d")) is not None:
                            async with lease:
                                await anyio.sleep(0)
            ended["cancelled" if scope.cancelled_caught else "through"] += 1

    async with anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(life, forges[number % 2])
    assert sum(ended.values()) == 3_000
    assert ended["cancelled"] > 500
    for forge in forges:
        await nothing_left(forge)


async def test_a_lock_of_another_library_fails_this(valkey_server: ValkeyServer) -> None:
    """Negative control: valkey-py's Lock, cancelled at its calls, leaves orphans that we'd see."""
    import valkey.asyncio as theirs

    client: Any = theirs.Valkey(unix_socket_path=valkey_server.socket_path)
    rng = random.Random(5)
    orphans = 0
    async with client:
        for number in range(400):
            name = f"theirs-{number}"
            with anyio.move_on_after(rng.expovariate(1 / 0.0004)):
                async with client.lock(name, timeout=10):
                    pass
            orphans += await client.exists(name)
    assert orphans > 0

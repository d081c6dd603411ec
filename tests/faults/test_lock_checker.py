"""The checker of lock histories: it passes what is right, and finds each fault that is planted."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest

from faults.lock_checker import Granted, Written, faults_of
from smithy import Forge, MakeForge, smithy
from valkeyd import ValkeyServer


def grant(number: int, **changes: object) -> Granted:
    """The ``number``-th of a history without fault."""
    right = Granted(
        name="l",
        token=number,
        by=f"p{number}",
        asked_at=0.9 * number,
        granted_at=float(number),
        believed_until=number + 0.5,
    )
    return msgspec.structs.replace(right, **changes)


RIGHT = [grant(number) for number in range(10)]


def test_a_history_without_fault_passes() -> None:
    """In whatever order it was recorded, and for several locks side by side."""
    mixed = [*RIGHT, *(msgspec.structs.replace(each, name="m") for each in RIGHT)]
    random.Random(1).shuffle(mixed)
    assert faults_of(mixed, [Written(key="k", token=token) for token in (1, 1, 2)]) == []


@pytest.mark.parametrize(
    "at,changes,fault",
    [
        (5, {"token": 4}, "H1"),
        (5, {"token": 3}, "H1"),
        (5, {"believed_until": 6.1}, "H2"),
        (5, {"believed_until": 8.0}, "H2"),
        (5, {"asked_at": 0.0}, "H4"),
        (9, {"granted_at": 20.0, "believed_until": 21.0}, "H5"),
    ],
)
def test_a_planted_fault_is_found(at: int, changes: dict[str, object], fault: str) -> None:
    """Negative control: a wrong token, an overlap, an order turned round, a lock left idle."""
    planted = [each if each.token != at else grant(at, **changes) for each in RIGHT]
    assert any(each.startswith(fault) for each in faults_of(planted))


def test_a_write_under_an_old_token_is_found() -> None:
    """Negative control of H3."""
    (fault,) = faults_of([], [Written(key="k", token=2), Written(key="k", token=1)])
    assert fault.startswith("H3")


@pytest.fixture
async def make(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[MakeForge]:
    async with smithy(valkey_server, namespace) as make:
        yield make


async def test_our_locks_pass(make: MakeForge) -> None:
    """A thousand critical sections of four processes, undisturbed, are without fault."""
    forges = [await make(name) for name in ("one", "two", "three", "four")]
    history: list[Granted] = []

    async def work(forge: Forge, number: int) -> None:
        rng = random.Random(number)
        for _ in range(32):
            name, asked_at = rng.choice("ab"), forge._clock.monotonic()
            async with forge.lock(name) as lease:
                granted_at = forge._clock.monotonic()
                await anyio.sleep(rng.random() * 0.0005)
                until = forge._clock.monotonic()
            history.append(
                Granted(
                    name=name,
                    token=lease.token,
                    by=f"{number}",
                    asked_at=asked_at,
                    granted_at=granted_at,
                    believed_until=until,
                )
            )

    async with anyio.create_task_group() as tasks:
        for number in range(32):
            tasks.start_soon(work, forges[number % 4], number)
    assert len(history) == 1_024
    assert faults_of(history) == []

"""The checker of lock histories: it passes what is right, and finds each fault that is planted."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import anyio
import msgspec
import pytest

from faults.lock_checker import Granted, Written, faults_of
from support.lock_processes import Forge, MakeForge, smithy
from support.valkey_server import ValkeyServer


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


def write(number: int, token: int, **changes: float) -> Written:
    """The ``number``-th write, under this token."""
    right = Written(key="k", token=token, sent_at=number, done_at=number + 0.5)
    return msgspec.structs.replace(right, **changes)


RIGHT = [grant(number) for number in range(10)]


def test_a_history_without_fault_passes() -> None:
    """In whatever order it was recorded, and for several locks side by side."""
    mixed = [*RIGHT, *(msgspec.structs.replace(each, name="m") for each in RIGHT)]
    random.Random(1).shuffle(mixed)
    assert faults_of(mixed, [write(number, token) for number, token in enumerate((1, 1, 2))]) == []


@pytest.mark.parametrize(
    "at,changes,fault",
    [
        (5, {"token": 4}, "H1"),
        (5, {"token": 3}, "H1"),
        (5, {"believed_until": 6.1}, "H2"),
        (5, {"believed_until": 8.0}, "H2"),
        (5, {"asked_at": 0.0}, "H4"),
        (9, {"granted_at": 20.0, "believed_until": 21.0}, "H5"),
        (5, {"lost": "expired"}, "H6"),
    ],
)
def test_a_planted_fault_is_found(at: int, changes: dict[str, object], fault: str) -> None:
    """Negative control: a wrong token, an overlap, an order turned round, a lock left idle."""
    planted = [each if each.token != at else grant(at, **changes) for each in RIGHT]
    assert any(each.startswith(fault) for each in faults_of(planted))


@pytest.mark.parametrize(
    "at,changes",
    [
        (5, {"asked_at": 0.0}),
        (9, {"granted_at": 20.0, "believed_until": 21.0}),
        (5, {"lost": "expired"}),
    ],
)
def test_what_a_disturbance_explains_is_no_fault(at: int, changes: dict[str, object]) -> None:
    """Places, free locks and leases may be lost then, and shortly afterwards."""
    history = [each if each.token != at else grant(at, **changes) for each in RIGHT]
    assert faults_of(history, disturbed=[(4.5, 5.8), (9.5, 18.0)]) == []


def test_a_disturbance_explains_neither_tokens_nor_overlaps() -> None:
    """Negative control: H1 and H2 hold at all times."""
    wrong = [grant(5), grant(6, granted_at=5.2, token=5)]
    kinds = [each[:2] for each in faults_of(wrong, disturbed=[(0.0, 100.0)])]
    assert kinds == ["H1", "H2"]


def test_a_write_under_an_old_token_is_found() -> None:
    """Negative control of H3."""
    (fault,) = faults_of([], [write(1, 2), write(2, 1)])
    assert fault.startswith("H3")


def test_writes_side_by_side_may_come_in_any_order() -> None:
    """H3 knows the order only of writes of which one was acknowledged before the other began."""
    assert faults_of([], [write(1, 2, done_at=2.5), write(2, 1)]) == []


@pytest.fixture
async def make(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[MakeForge]:
    async with smithy(valkey_server, namespace) as make:
        yield make


async def test_our_locks_pass(make: MakeForge) -> None:
    """A thousand critical sections of four processes, undisturbed, are without fault."""
    forges = [await make(name) for name in ("one", "two", "three", "four")]
    history: list[Granted] = []
    slowest_s = 0.0  # two questions this close may reach the server in the other order

    async def ping(forge: Forge) -> None:
        nonlocal slowest_s
        while True:
            began = forge._clock.monotonic()
            await forge.link.call("PING")
            slowest_s = max(slowest_s, forge._clock.monotonic() - began)

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

    async with anyio.create_task_group() as pings:
        for forge in forges:
            pings.start_soon(ping, forge)
        async with anyio.create_task_group() as tasks:
            for number in range(32):
                tasks.start_soon(work, forges[number % 4], number)
        pings.cancel_scope.cancel()
    assert len(history) == 1_024
    assert faults_of(history, margin_s=0.05 + slowest_s) == []

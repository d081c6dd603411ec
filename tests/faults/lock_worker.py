"""A process whose tasks take locks, write through a guard and give back, until it is told to end.

    python -m faults.lock_worker        with LOCK_FAULTS in the environment; ends on SIGTERM

W1  What is begun is written down before anything is done under it, see ``lock_history``.
W2  Who has lost a lease tries to write under its token all the same, as one who does not know.
W3  Without tasks of its own it obeys orders, JSON lines on its standard input. What comes of them
    is in its history.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import anyio
import msgspec
import structlog
from anyio.abc import TaskGroup

import forebay
from faults.lock_history import Began, Ended, LockHistory, Refused, Wrote
from faults.lock_plants import plant
from faults.lock_setting import BeBusy, Give, LockSetup, Order, Take
from forebay.coordinator.locks.lease import Lease
from forebay.schemas.errors import ForebayError
from forebay.schemas.settings import NodeSettings, Settings, Valkey, Workers

_PAUSE_S = 0.05
_LONG_EVERY = 20
now = time.monotonic


class Worker:
    def __init__(self, setup: LockSetup, node: forebay.Node) -> None:
        self._setup = setup
        self._node = node
        self._history = LockHistory(setup.path, setup.process)
        self._given: dict[str, asyncio.Event] = {}

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                for number in range(self._setup.tasks):
                    tasks.start_soon(self._work, number)
                if not self._setup.tasks:
                    tasks.start_soon(self._obey, tasks)
                async for _ in signals:
                    tasks.cancel_scope.cancel()
                    break

    async def _obey(self, tasks: TaskGroup) -> None:
        decode = msgspec.json.Decoder(Order).decode
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        async for line in lines:
            order = decode(line)
            if isinstance(order, Take):
                given = self._given[order.name] = asyncio.Event()
                hold = partial(self._section, order.name, given.wait, order.timeout_s)
                tasks.start_soon(hold)
            elif isinstance(order, Give):
                self._given.pop(order.name).set()
            elif isinstance(order, BeBusy):
                tasks.start_soon(self._be_busy, order.pass_s)

    async def _be_busy(self, pass_s: float) -> None:
        while True:
            time.sleep(pass_s)
            await asyncio.sleep(0)

    async def _work(self, number: int) -> None:
        rng = random.Random(f"{self._setup.seed} {self._setup.process} {number}")
        while True:
            hold = partial(anyio.sleep, self._hold_s(rng))
            await self._section(rng.choice(self._setup.names), hold)

    def _hold_s(self, rng: random.Random) -> float:
        if rng.randrange(_LONG_EVERY) == 0:
            return self._setup.long_hold_s
        return rng.uniform(0.0, 2 * self._setup.hold_s)

    async def _section(
        self, name: str, hold: Callable[[], Awaitable[object]], timeout_s: float | None = None
    ) -> None:
        asked_at, ended_at, held = now(), math.inf, None
        lock = self._node.lock(
            name, lease=self._setup.lease_s, level=self._setup.level, timeout=timeout_s
        )
        try:
            async with lock as lease:
                granted_at, held = now(), lease
                lease.check()
                self._history.write(
                    Began(name=name, token=lease.token, asked_at=asked_at, granted_at=granted_at)
                )
                try:
                    await self._write(name, lease)
                    await hold()
                finally:
                    ended_at = now()
                    self._end(lease, ended_at)
        except forebay.LeaseLost as lost:
            if held is not None:
                self._end(held, ended_at, lost.reason)
                await self._write(name, held, late=True)
        except ForebayError as error:
            why = getattr(error, "reason", None) or str(error)[:80]
            self._history.write(Refused(name=name, why=why, at=now()))
            await anyio.sleep(_PAUSE_S)

    def _end(self, lease: Lease, at: float, lost: str = "") -> None:
        """Whoever is late believed until the deadline: a lease that is asked says so."""
        until = min(at, lease.deadline)
        self._history.write(
            Ended(name=lease.name, token=lease.token, believed_until=until, lost=lost)
        )

    async def _write(self, name: str, lease: Lease, *, late: bool = False) -> None:
        key, token, sent_at = f"register:{name}", lease.token, now()
        refused = False
        try:
            await self._node.guards.set(key, str(token), token=token)
        except forebay.StaleToken:
            refused = True
        except ForebayError:
            return  # nobody knows whether it was written
        self._history.write(
            Wrote(key=key, token=token, sent_at=sent_at, done_at=now(), refused=refused, late=late)
        )


async def main() -> None:
    setup = LockSetup.from_environ()
    plant(setup.planted)
    settings = Settings(
        node=NodeSettings(namespace=setup.namespace, shards=setup.shards, id=setup.process),
        valkey=Valkey(
            url=setup.url, reconnect_jitter_ms=20, reconnect_max_ms=100, breaker_recovery_ms=100
        ),
        workers=Workers(enabled=False),
    )
    async with forebay.Node(settings=settings) as node:
        print("ready", flush=True)
        await Worker(setup, node).run()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with suppress(KeyboardInterrupt):
        anyio.run(main)

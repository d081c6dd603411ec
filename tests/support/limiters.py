"""Limiters on a real server for tests, each as a process of its own would have it.

async with house_of(server, namespace) as house:
    limiter = house.limiter(Limit(name="api", rate=10))
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from forebay.coordinator.background import BackgroundTasks, background_tasks
from forebay.coordinator.clock import Clock, SystemClock
from forebay.coordinator.instruments import Instruments
from forebay.coordinator.limits.limiter import Limiter
from forebay.coordinator.valkey.link import Commands, Link
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.schemas.keys import Names
from forebay.schemas.limits import Limit
from support.links import link_to, running
from support.valkey_server import ValkeyServer


class ServerTime:
    """The test clock of the scripts, and a monotonic clock that goes with it."""

    def __init__(self) -> None:
        self.us = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.us

    def monotonic(self) -> float:
        return (self.us - 1_800_000_000_000_000) / 1e6

    def wait(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)


class House:
    """The limiters of one namespace, on one link."""

    def __init__(self, link: Link, names: Names, tasks: BackgroundTasks) -> None:
        self.link = link
        self.names = names
        self.tasks = tasks
        self.made: list[Limiter] = []

    def limiter(
        self,
        *limits: Limit,
        commands: Commands | None = None,
        clock: Clock | None = None,
        time: ServerTime | None = None,
        budget_ms: int = 20_000,
        members: Callable[[], int] = lambda: 1,
    ) -> Limiter:
        made = Limiter(
            commands or self.link,
            self.names,
            load_scripts(),
            clock=clock or time or SystemClock(),
            tasks=self.tasks,
            instruments=Instruments(CollectorRegistry()),
            ids=lambda: uuid.uuid4().hex,
            budget_ms=budget_ms,
            members=members,
            test_clock_us=time,
        )
        made.doorbell_changed(live=True)
        made.define(limits)
        self.made.append(made)
        return made

    async def state(self, limit: str, subject: str) -> Any:
        return await self.link.call("GET", self.names.limit("r", limit, subject))


@asynccontextmanager
async def house_of(server: ValkeyServer, namespace: str) -> AsyncIterator[House]:
    link = link_to(server.socket_url)
    async with running(link), background_tasks() as tasks:
        house = House(link, Names(namespace, 4), tasks)
        try:
            yield house
        finally:
            for limiter in house.made:
                await limiter.aclose()
            tasks.close()

"""Locks of several processes, played in one loop: each with a link, a pubsub and a name.

async with smithy(server, namespace) as make:
    one, two = await make("one"), await make("two")
    async with one.lock("l"):
        assert await two.try_lock("l") is None
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import anyio
from prometheus_client import CollectorRegistry

from forebay.coordinator.clock import Clock, SystemClock
from forebay.coordinator.instruments import Instruments
from forebay.coordinator.locks.locks import Locks
from forebay.coordinator.valkey.link import Commands, Link
from forebay.coordinator.valkey.scripting import load_scripts
from forebay.schemas.keys import Names
from support.links import doorbell_to, link_to, running
from support.valkey_server import ValkeyServer

SCRIPTS = load_scripts()
SHARDS = 4


class Forge(Locks):
    """The locks of one process, with what they are made of."""

    def __init__(
        self, link: Link, names: Names, name: str, commands: Commands, clock: Clock
    ) -> None:
        self.instruments = Instruments(CollectorRegistry())
        super().__init__(
            commands,
            names,
            SCRIPTS,
            node_id=name,
            process=name,
            clock=clock,
            rng=random.Random(name),
            instruments=self.instruments,
        )
        self.link = link
        self.names = names
        self.renewals = self._renewals
        self.reaper = self._reaper
        self.records = self._records
        self.counts = self.instruments.counts

    async def holders(self, name: str) -> list[str]:
        return [each.by for each in (await self.show(name)).holders]

    async def queue(self, name: str) -> list[str]:
        return [each.by for each in (await self.show(name)).queue]

    async def expire(self, name: str) -> None:
        """Have every lease of it end on the server now; the holders do not know."""
        record = self.names.lock(name)[0]
        raw = await self.link.call("HGETALL", record)
        for field, line in zip(raw[::2], raw[1::2], strict=True):
            if field.startswith(b"h:"):
                weight, token, _, rest = line.split(b" ", 3)
                await self.link.call("HSET", record, field, b" ".join([weight, token, b"1", rest]))


class MakeForge(Protocol):
    async def __call__(
        self,
        name: str,
        *,
        commands: Callable[[Commands], Commands] = ...,
        clock: Clock = ...,
    ) -> Forge: ...


@asynccontextmanager
async def smithy(server: ValkeyServer, namespace: str, **options: Any) -> AsyncIterator[MakeForge]:
    names = Names(namespace, SHARDS)
    async with AsyncExitStack() as stack:

        async def make(
            name: str,
            *,
            commands: Callable[[Commands], Commands] = lambda link: link,
            clock: Clock | None = None,
        ) -> Forge:
            link = link_to(server.socket_url, **options)
            bell = doorbell_to(server.socket_url, **options)
            await stack.enter_async_context(running(link))
            await stack.enter_async_context(running(bell))
            forge = Forge(link, names, name, commands(link), clock or SystemClock())
            tasks = await stack.enter_async_context(_cancelled_in_the_end())
            await link.call_many([("SCRIPT", "LOAD", each.source) for each in SCRIPTS.values()])
            await tasks.start(forge.run, bell, link, lambda: _run_id(link))
            await bell.ready()
            return forge

        yield make


async def _run_id(link: Link) -> str:
    info = (await link.call("INFO", "server")).decode()
    return next(
        line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("run_id:")
    )


@asynccontextmanager
async def _cancelled_in_the_end() -> AsyncIterator[anyio.abc.TaskGroup]:
    async with anyio.create_task_group() as tasks:
        yield tasks
        tasks.cancel_scope.cancel()

"""A process that writes versions to the source of truth, and invalidates what is old now.

    python -m faults.writers NUMBER SECONDS

W1  A bump is written down before it begins. It is over when the invalidation was acknowledged;
    what is not known to have succeeded is repeated, however long the server is away.
W2  Each subject is written by one task of one process, one version after the other.
W3  The pace is kept by the clock, not by the answers; what an outage made impossible is not
    made up for.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio
import msgspec

import forebay
from faults.agent import Watch
from faults.history import History
from faults.setting import Setup, Subject
from faults.source import Source
from forebay.schemas.errors import ServerRefused
from forebay.schemas.settings import NodeSettings, Settings, Valkey

_TASKS = 32
_REPEAT_S = 0.05
_BEHIND_S_MAX = 0.5


class Writer:
    """``agents``: where acks are told to."""

    def __init__(
        self, number: int, setup: Setup, node: forebay.Node, agents: Sequence[asyncio.StreamWriter]
    ) -> None:
        self._setup = setup
        self._node = node
        self._agents = agents
        self._source = Source(setup.source)
        self._history = History(setup.path, f"writer-{number}")
        self._versions: dict[Subject, int] = {}
        self._random = random.Random(f"{setup.seed} writer {number}")
        own = list(setup.all_subjects())[number :: setup.writers]
        self._shares = [own[each::_TASKS] for each in range(_TASKS)]
        self._interval_s = _TASKS * setup.writers / setup.rate

    async def run(self, seconds: float) -> None:
        end_at = time.monotonic() + seconds
        async with anyio.create_task_group() as tasks:
            for share in self._shares:
                tasks.start_soon(self._write, share, end_at)
        self._history.close()
        self._source.close()

    async def _write(self, share: Sequence[tuple[Subject, bool]], end_at: float) -> None:
        due_at = time.monotonic() + self._interval_s * self._random.random()
        while due_at < end_at:
            await anyio.sleep(max(0.0, due_at - time.monotonic()))
            subject, watched = self._random.choice(share)
            ack_ns = await self._bump(subject)
            if watched:
                self._tell(Watch(str(subject), ack_ns))
            due_at = max(due_at + self._interval_s, time.monotonic() - _BEHIND_S_MAX)

    async def _bump(self, subject: Subject) -> int:
        """The next version; returns when it was acknowledged."""
        name = str(subject)
        version = self._versions[subject] = self._versions.get(subject, 0) + 1
        began_ns = self._history.write("bump", "invoke", subject=name, version=version)
        self._source.write(name, version)
        while True:
            try:
                await self._invalidate(subject)
            except (forebay.Unavailable, ServerRefused) as error:
                self._history.write(
                    "bump",
                    "unknown",
                    subject=name,
                    version=version,
                    began_ns=began_ns,
                    note=type(error).__name__,
                )
                await anyio.sleep(_REPEAT_S)
            else:
                return self._history.write(
                    "bump", "ok", subject=name, version=version, began_ns=began_ns
                )

    async def _invalidate(self, subject: Subject) -> None:
        if subject.kind == "group":
            await self._node.invalidate(tags=[str(subject)])
        else:
            await self._node.invalidate([str(subject)])

    def _tell(self, watch: Watch) -> None:
        line = msgspec.json.encode(watch) + b"\n"
        for agent in self._agents:
            agent.write(line)  # a stopped node reads it later; what waits is bounded by its stop


async def main(number: int, seconds: float) -> None:
    setup = Setup.from_environ()
    settings = Settings(
        node=NodeSettings(namespace=setup.namespace, shards=setup.shards),
        valkey=Valkey(url=setup.url),
    )
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(forebay.Node(settings=settings))
        agents = []
        for name in setup.nodes:
            _, agent = await asyncio.open_unix_connection(setup.socket(name))
            stack.callback(agent.close)
            agents.append(agent)
        await Writer(number, setup, node, agents).run(seconds)
        for agent in agents:
            agent.close()
            await agent.wait_closed()  # all has been sent


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), float(sys.argv[2]))

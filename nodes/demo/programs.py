"""The two programs beside the cluster: the replayer and the readers, as processes.

I1  They know nothing of the session: the replayer gets Valkey's address, on stdin since it
    may hold a password; the readers get the URLs of the nodes.
I2  What they report each moment is put into the scene.
I3  One that ends by itself before its time is ProcessFailed with the end of its log.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec

from ...coordinator.background import background_tasks
from ...schemas.errors import ProcessFailed
from .children import Child, tail_of
from .readers import ReadReport
from .replayer import Report
from .scene import Scene

__all__ = ["Programs"]

_STOP_LIMIT_S = 3.0


class Programs:
    """``async with programs.running(): await programs.replayed()``"""

    def __init__(
        self,
        scene: Scene,
        *,
        directory: Path,
        environ: Mapping[str, str],
        url: str,
        events_key: str,
        nodes: Sequence[str],
        duration_s: float,
        days: int,
        rate: float,
    ) -> None:
        self.half_way = anyio.Event()
        self._replayed = anyio.Event()
        self._scene = scene
        self._directory = directory
        self._environ = environ
        self._replayer = self._child(
            "replayer",
            *("--url", "-", "--events-key", events_key),
            *("--duration", str(duration_s), "--days", str(days)),
            first_line=url,
        )
        self._readers = self._child("readers", "--nodes", ",".join(nodes), "--rate", str(rate))

    @property
    def children(self) -> list[Child]:
        return [self._replayer, self._readers]

    async def replayed(self) -> None:
        """Until the last event of the last day is in the stream."""
        await self._replayed.wait()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        try:
            for child in self.children:
                await child.start()
            async with background_tasks() as tasks:
                tasks.start_soon(self._follow_replayer)
                tasks.start_soon(self._follow_readers)
                yield
        finally:
            for child in self.children:
                await child.stop(_STOP_LIMIT_S)

    def _child(self, name: str, *arguments: str, first_line: str = "") -> Child:
        return Child(
            name,
            [sys.executable, "-P", "-m", f"{__package__}.{name}", *arguments],
            environ=self._environ,
            log_path=self._directory / f"{name}.log",
            reports=True,
            first_line=first_line,
        )

    async def _follow_replayer(self) -> None:
        async for line in self._replayer.lines():
            report = msgspec.json.decode(line, type=Report)
            self._scene.replay = report
            if report.published * 2 >= report.total:
                self.half_way.set()
        if code := await self._replayer.wait():
            raise _ended(self._replayer, code)
        self._replayed.set()

    async def _follow_readers(self) -> None:
        async for line in self._readers.lines():
            self._scene.reads = msgspec.json.decode(line, type=ReadReport)
        raise _ended(self._readers, await self._readers.wait())


def _ended(child: Child, code: int) -> ProcessFailed:
    return ProcessFailed(child.name, f"ended with {code}", said=tail_of(child.log_path))

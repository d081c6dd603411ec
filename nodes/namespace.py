"""The record of a namespace: its number of shards, fixed when its first node started.

B1  The first node decides; one with another number refuses to start.
B2  When logs were lost, as after FLUSHALL, the record is written again, and marks for values of
    another service begin again. If another node was first with another number of shards, this one
    is not ready, and says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import anyio
import structlog

from ..coordinator.valkey.link import Commands
from ..coordinator.valkey.scripting import Scripts, run
from ..schemas.errors import ConfigError, ForebayError
from ..schemas.keys import Names
from ..schemas.replies import SHARDS_MAX, integer

__all__ = ["NamespaceRecord", "check_birth"]

log = structlog.get_logger(__name__)

_PAUSE_S = 1.0


async def check_birth(
    link: Commands, names: Names, scripts: Scripts, origins: Mapping[str, str]
) -> None:
    """The first node decides for all.

    Raises:
        ConfigError: this node was given another number. UnreadableRecord: it cannot be read.
    """
    reply = await run(link, scripts["meta_set"], [names.meta], ["shards", names.shards])
    born_with = integer(reply, f"the field shards of {names.meta}", low=1, high=SHARDS_MAX)
    if born_with != names.shards:
        raise ConfigError(
            setting="node.shards",
            value=str(names.shards),
            origin=origins.get("node.shards", "default"),
            problem=f"the namespace {names.namespace} was born with {born_with}",
            fix=f"set node.shards = {born_with}, or use another namespace",
        )


class NamespaceRecord:
    """``tasks.start_soon(record.run)``; ``record.lost()`` when keys of the namespace were lost."""

    def __init__(
        self,
        link: Commands,
        names: Names,
        scripts: Scripts,
        origins: Mapping[str, str],
        begin_marks: Callable[[], Awaitable[None]],
    ) -> None:
        self.problem = ""  #: empty: the record is as this node was told
        self._link = link
        self._names = names
        self._scripts = scripts
        self._origins = origins
        self._begin_marks = begin_marks
        self._lost = anyio.Event()

    def lost(self) -> None:
        self._lost.set()

    async def run(self) -> None:
        while True:
            await self._lost.wait()
            self._lost = anyio.Event()
            if not await self._written():
                self._lost.set()
                await anyio.sleep(_PAUSE_S)

    async def _written(self) -> bool:
        before = self.problem
        try:
            await check_birth(self._link, self._names, self._scripts, self._origins)
            await self._begin_marks()
        except ConfigError as error:
            self.problem = f"{error.problem}; {error.fix}"
            if not before:
                log.error("namespace.reborn", problem=error.problem, fix=error.fix)
        except ForebayError as error:
            log.debug("namespace.record_failed", error=str(error))
        else:
            self.problem = ""
            return True
        return False

"""Metadata of a namespace in Valkey: its number of shards, and a count of its keys.

B1  The first node decides the number of shards; a node with another number refuses to start.
B2  After a loss of logs, as by FLUSHALL, the metadata is written again, and the marks for values
    of another service start again. If a node with another number of shards was first, this node
    is not ready and reports why.
B3  A count reads at most ``PAGES_MAX`` pages of SCAN. In a larger database the count is an
    estimate: the namespace's share of the sample, times all keys. SCAN walks a hash table, so its
    first pages are a fair sample.
B4  A count is reused for ``KEPT_S``: frequent requests cost the server nothing.
B5  If the server does not answer, or the user may not SCAN, there is no count.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import anyio
import structlog
from msgspec import Struct

from ..coordinator.clock import Clock
from ..coordinator.valkey.link import Commands
from ..coordinator.valkey.scripting import Scripts, run
from ..schemas.errors import ConfigError, ForebayError
from ..schemas.keys import Names
from ..schemas.replies import SHARDS_MAX, array, integer

log = structlog.get_logger(__name__)

PAGES_MAX = 20
PAGE_KEYS = 1_000
KEPT_S = 10.0
_PAUSE_S = 1.0


async def check_metadata(
    link: Commands, names: Names, scripts: Scripts, origins: Mapping[str, str]
) -> None:
    """Write the metadata if there is none, else compare it with this node's settings.

    Raises:
        ConfigError: this node has another number of shards. UnreadableRecord: it is malformed.
    """
    reply = await run(link, scripts["meta_set"], [names.meta], ["shards", names.shards])
    stored = integer(reply, f"the field shards of {names.meta}", low=1, high=SHARDS_MAX)
    if stored != names.shards:
        raise ConfigError(
            setting="node.shards",
            value=str(names.shards),
            origin=origins.get("node.shards", "default"),
            problem=f"the namespace {names.namespace} was created with {stored}",
            fix=f"set node.shards = {stored}, or use another namespace",
        )


class NamespaceMetadata:
    """``tasks.start_soon(metadata.run)``; call ``metadata.lost()`` when keys were lost."""

    def __init__(
        self,
        link: Commands,
        names: Names,
        scripts: Scripts,
        origins: Mapping[str, str],
        begin_marks: Callable[[], Awaitable[None]],
    ) -> None:
        self.problem = ""  #: empty: the metadata matches this node's settings
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
            if not await self._restore():
                self._lost.set()
                await anyio.sleep(_PAUSE_S)

    async def _restore(self) -> bool:
        before = self.problem
        try:
            await check_metadata(self._link, self._names, self._scripts, self._origins)
            await self._begin_marks()
        except ConfigError as error:
            self.problem = f"{error.problem}; {error.fix}"
            if not before:
                log.error("namespace.metadata_conflict", problem=error.problem, fix=error.fix)
        except ForebayError as error:
            log.debug("namespace.metadata_failed", error=str(error))
        else:
            self.problem = ""
            return True
        return False


class NamespaceKeys(Struct, frozen=True):
    count: int
    is_estimate: bool


class NamespaceKeyCount:
    """The number of keys of a namespace, for ``/stats``."""

    def __init__(self, commands: Commands, names: Names, clock: Clock) -> None:
        self._commands = commands
        self._prefixes = tuple(pattern[1:-1].encode() for pattern in names.key_patterns)
        self._clock = clock
        self._kept: NamespaceKeys | None = None
        self._kept_until = float("-inf")
        self._one_at_a_time = anyio.Lock()

    async def get_count(self) -> NamespaceKeys | None:
        """The number of keys of the namespace; None: see B5."""
        async with self._one_at_a_time:
            if self._clock.monotonic() >= self._kept_until:
                try:
                    self._kept = await self._scan()
                except ForebayError:
                    self._kept = None
                self._kept_until = self._clock.monotonic() + KEPT_S
            return self._kept

    async def _scan(self) -> NamespaceKeys:
        cursor, seen = b"0", set[bytes]()
        for _ in range(PAGES_MAX):
            reply = await self._commands.call("SCAN", cursor, "COUNT", PAGE_KEYS)
            cursor, page = array(reply, "SCAN", length=2)
            seen.update(map(bytes, array(page, "the keys of SCAN")))  # SCAN may repeat a key
            if cursor == b"0":
                break
        ours = sum(key.startswith(self._prefixes) for key in seen)
        if cursor == b"0" or not seen:
            return NamespaceKeys(ours, is_estimate=False)
        every = integer(await self._commands.call("DBSIZE"), "DBSIZE")
        return NamespaceKeys(round(ours / len(seen) * every), is_estimate=True)

"""Bounds the records of shards: the owner of a shard trims the old ones.

X1  The newest ``retain`` notices stay. A follower that is further behind sees a gap, and
    asks again for whatever it remembers of the shard: nothing goes wrong, it only costs.
X2  Event ids are forgotten when no event can be a repetition any more: ingress has applied all
    that was published within ``dedupe_ms`` after them.
X3  A log whose position here is doubtful is left alone.
X4  If no member has a sink, the shards have no owner: then the owner of ingress trims them.
"""

from __future__ import annotations

import anyio
import structlog
from anyio.abc import TaskStatus

from ...coordinator.log.follower import Follower
from ...coordinator.log.ownership import Ownership
from ...coordinator.valkey.link import Commands
from ...coordinator.valkey.scripting import granted
from ...schemas.errors import ForebayError
from ...schemas.keys import EVENTS, Names
from ...schemas.replies import integer, order

__all__ = ["Trimmer"]

log = structlog.get_logger(__name__)

_EVERY_S = 5.0


class Trimmer:
    def __init__(
        self,
        commands: Commands,
        names: Names,
        ownership: Ownership,
        follower: Follower,
        *,
        retain: int,
        dedupe_ms: int,
    ) -> None:
        self._commands = commands
        self._names = names
        self._ownership = ownership
        self._follower = follower
        self._retain = retain
        self._dedupe_ms = dedupe_ms

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Trim now and then, until cancelled."""
        task_status.started()
        while True:
            await anyio.sleep(_EVERY_S)
            try:
                await self.trim()
                await self.forget()
            except ForebayError as error:
                log.debug("trim.failed", error=str(error))

    async def trim(self) -> None:
        """Cut the logs of the shards that this node owns now."""
        owned = self._ownership.kept_up()
        views = [self._follower.views[shard] for shard in owned]
        await self._commands.call_many(
            [
                ("XTRIM", self._names.part(view.number, "log"), "MINID", "~",
                 f"{view.epoch}-{view.seq - self._retain}")
                for view in views
                if view.seq > self._retain and view.live_until > float("-inf")
            ]
        )  # fmt: skip

    async def forget(self) -> None:
        """Drop the old event ids of the owned shards, which ingress has passed."""
        owned = self._ownership.kept_up()
        streams = (self._names.part(EVENTS, "before"), self._names.events)
        first = [("XRANGE", stream, "-", "+", "COUNT", 1) for stream in streams]
        (seconds, _), *found = granted(await self._commands.call_many([("TIME",), *first]))
        waiting = [order(bytes(reply[0][0]).decode())[0] for reply in found if reply]
        past_ms = min([integer(seconds, "the server's clock") * 1_000, *waiting])
        until_ms = past_ms - self._dedupe_ms
        await self._commands.call_many(
            [
                ("ZREMRANGEBYSCORE", self._names.part(shard, "seen"), "-inf", until_ms)
                for shard in owned
            ]
        )

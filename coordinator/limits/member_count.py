"""The number of processes that share the limits of a namespace, with or without workers.

N1  Each process subscribes to the channel of refunds, so the server can count the subscribers.
N2  The largest of the last few counts is used: after a failover processes reconnect one by one, and
    a larger count only makes shares smaller. Without a reply the last count stays.

Only the primary is asked, because all processes subscribe there.
"""

from __future__ import annotations

from collections import deque

import anyio
import structlog

from ...schemas.errors import ServerRefused, Unavailable, UnreadableRecord
from ...schemas.keys import Names
from ...schemas.replies import array, integer
from ..valkey.link import Commands

__all__ = ["MemberCount"]

log = structlog.get_logger(__name__)

_LOOK_S = 2.0
_LOOKS = 5


class MemberCount:
    def __init__(self, commands: Commands, names: Names) -> None:
        self._commands = commands
        self._channel = names.limits
        self._looks: deque[int] = deque(maxlen=_LOOKS)

    def __repr__(self) -> str:
        return f"<MemberCount {self.count}>"

    @property
    def count(self) -> int:
        """The number of processes, including this one."""
        return max((1, *self._looks))

    async def look(self) -> None:
        """Ask the server once; a refusal or a missing reply is ignored."""
        try:
            reply = await self._commands.call("PUBSUB", "NUMSUB", self._channel)
            listeners = integer(array(reply, "NUMSUB", length=2)[1], "NUMSUB")
        except (Unavailable, ServerRefused, UnreadableRecord) as error:
            log.debug("member_count.unknown", reason=str(error))
            return
        self._looks.append(listeners)

    async def run(self) -> None:
        """Ask the server every few seconds, until cancelled."""
        while True:
            await self.look()
            await anyio.sleep(_LOOK_S)

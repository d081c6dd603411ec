"""How many processes share the limits of a namespace, whether or not they do its work.

N1  Each of them listens to the channel of refunds, so the server can count them.
N2  The most of the last few looks counts: after a failover not all are back at once, and too
    many members only make shares smaller. While the server does not tell, the count stays.

A replica or another server of a cluster is not asked: all listen to the primary.
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
        """Of processes, with this one."""
        return max((1, *self._looks))

    async def look(self) -> None:
        """Ask the server; it may refuse, or not answer."""
        try:
            reply = await self._commands.call("PUBSUB", "NUMSUB", self._channel)
            listeners = integer(array(reply, "NUMSUB", length=2)[1], "NUMSUB")
        except (Unavailable, ServerRefused, UnreadableRecord) as error:
            log.debug("headcount.unknown", reason=str(error))
            return
        self._looks.append(listeners)

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            await self.look()
            await anyio.sleep(_LOOK_S)

"""Shards whose keys the server refuses, such as a key of another type: each waits by itself.

Q1  A refusal that concerns the server as a whole is raised. One that concerns keys is logged with
    its shard and key, once a minute, and kept for health until the shard is served again.
"""

from __future__ import annotations

import structlog

from ...coordinator.log_once import LogOnce
from ...coordinator.valkey.link import Reply
from ...schemas.errors import ForebayError, ServerRefused

__all__ = ["RefusedShards"]

log = structlog.get_logger(__name__)


class RefusedShards(dict[int, LogOnce]):
    """The refusals, by shard."""

    def __init__(self, sink: str | None) -> None:
        super().__init__()
        self._sink = sink

    def has(self, shard: int, *replies: Reply) -> bool:
        """Whether one of these replies is a refusal."""
        for reply in replies:
            if isinstance(reply, ForebayError):
                self.note(shard, reply)
                return True
        return False

    def note(self, shard: int, error: ForebayError) -> None:
        if not isinstance(error, ServerRefused) or not error.of_keys:
            raise error
        once = self.setdefault(shard, LogOnce())
        once.say(log, "shard.refused", error, sink=self._sink, shard=shard, key=error.key)

    def over(self, shard: int) -> None:
        if self.pop(shard, None) is not None:
            log.info("shard.served", sink=self._sink, shard=shard)

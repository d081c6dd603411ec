"""Shards whose keys the server refuses, such as a key of another type: each waits by itself.

Q1  A refusal that concerns the server as a whole is raised. One that concerns keys is logged with
    its shard and key, once a minute, and kept for health until the shard is served again.
"""

from __future__ import annotations

import structlog

from ...coordinator.link import Reply
from ...coordinator.log_once import LogOnce
from ...schemas.errors import ForebayError, ServerRefused
from ...schemas.keys import Names

__all__ = ["RefusedShards"]

log = structlog.get_logger(__name__)


class RefusedShards(dict[int, LogOnce]):
    """The refusals, by shard."""

    def __init__(self, names: Names, sink: str | None) -> None:
        super().__init__()
        self._names = names
        self._sink = sink

    def has(self, shard: int, **replies: Reply) -> bool:
        """Whether one of these replies is a refusal; each is named after its part of the shard."""
        for part, reply in replies.items():
            if isinstance(reply, ForebayError):
                self.note(shard, self._names.part(shard, part), reply)
                return True
        return False

    def note(self, shard: int, key: str, error: ForebayError) -> None:
        if not isinstance(error, ServerRefused) or not error.of_keys:
            raise error
        once = self.setdefault(shard, LogOnce())
        once.say(log, "shard.refused", error.at(key), sink=self._sink, shard=shard, key=key)

    def over(self, shard: int) -> None:
        if self.pop(shard, None) is not None:
            log.info("shard.served", sink=self._sink, shard=shard)

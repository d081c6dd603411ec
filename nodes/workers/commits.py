"""The commit of a shard's writes: the checkpoint moves, and entries that were sunk may expire."""

from __future__ import annotations

from collections.abc import Mapping

from ...coordinator.ownership import Tenure
from ...coordinator.scripting import Call, Scripts
from ...schemas.keys import Names
from ...schemas.replies import following
from .stretches import Queued

__all__ = ["checkpoint_call"]


def checkpoint_call(
    scripts: Scripts,
    names: Names,
    node_id: str,
    tenure: Tenure,
    *,
    checkpoint: str,
    position: str,
    stream: str = "writes",
    trimmed_to: str = "0-0",
    follows: str = "",
    last: str = "",
    newest: Mapping[str, Queued],
) -> Call:
    """Moves ``checkpoint`` to ``position``, and trims the stream up to ``trimmed_to``; ``newest``
    are the writes that are done, by key. Where the checkpoint is not ``follows``, or the stream has
    no entry ``last``, it moves nothing.
    """
    shard = tenure.resource
    return Call(
        script=scripts["checkpoint_commit"],
        keys=[
            names.part(shard, "own"),
            names.part(shard, "done"),
            names.part(shard, stream),
            names.part(shard, "head"),
            *(name for key in newest for name in (names.entry(key), names.lease(key))),
        ],
        args=[
            node_id,
            tenure.epoch,
            checkpoint,
            position,
            following(trimmed_to),
            names.work,
            shard,
            follows,
            last,
            *(entry.version for entry in newest.values()),
        ],
    )

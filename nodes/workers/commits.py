"""The commit of a shard's writes: the checkpoint moves, and entries that were sunk may expire."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from ...coordinator.log.ownership import Claim
from ...coordinator.valkey.link import Reply
from ...coordinator.valkey.scripting import Call, Scripts
from ...schemas.errors import UnreadableRecord
from ...schemas.keys import Names, Part
from ...schemas.replies import following, stream_id
from .coalescer import Queued
from .owned_shards import OwnedShard

__all__ = ["checkpoint_call", "checkpoint_in", "trim_call"]

log = structlog.get_logger(__name__)


def checkpoint_call(
    scripts: Scripts,
    names: Names,
    node_id: str,
    tenure: Claim,
    *,
    checkpoint: str,
    position: str,
    stream: Part = "writes",
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


def trim_call(scripts: Scripts, names: Names, holding: OwnedShard) -> Call:
    """Deletes the writes that all lanes are past."""
    return Call(
        script=scripts["writes_trim"],
        keys=[names.part(holding.shard, "done"), names.part(holding.shard, "writes")],
        args=[following(holding.passed), *holding.checkpoints()],
    )


def checkpoint_in(reply: Reply, names: Names, shard: int, checkpoint: str) -> str:
    """The checkpoint; if it is invalid, the stream's beginning: its entries are not done."""
    try:
        name = f"{names.part(shard, 'done')} {checkpoint}"
        return "0-0" if reply is None else stream_id(reply, name)
    except UnreadableRecord as error:
        log.warning("checkpoint.unreadable", shard=shard, error=str(error))
        return "0-0"

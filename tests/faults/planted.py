"""Faults that are put into a node on purpose: a checker that does not find them proves nothing.

``gaps``        bells out of order are applied as if in order, what a log lacks is not missed,
                no reconnect is noticed nor a run id compared, and a node is always current
``blind fill``  what a loader returned is stored, whether its lease is there or not
"""

from __future__ import annotations

from typing import Any

from faults.setting import Planted
from forebay.coordinator.log import Follower
from forebay.coordinator.shard_view import ShardView
from forebay.nodes.cache.shared import SharedTier
from forebay.schemas.notices import Position

__all__ = ["plant"]


def plant(fault: Planted) -> None:
    """Do it in this process; nothing, if the name is empty."""
    if fault == "gaps":
        _ignore_gaps()
    elif fault == "blind fill":
        _fill_blindly()


def _ignore_gaps() -> None:
    def follows(view: ShardView, position: Position) -> bool:
        return True

    _replace(ShardView, "follows", follows)
    _replace(Follower, "connection_changed", lambda follower: None)
    Follower.live_until = property(  # type: ignore[assignment, misc]
        lambda follower: float("inf"), lambda follower, until: None
    )


def _fill_blindly() -> None:
    async def fill(tier: SharedTier, key: str, token: str, **entry: Any) -> Any:
        return await tier.put(key, **entry)

    _replace(SharedTier, "fill", fill)


def _replace(of: type, name: str, by: Any) -> None:
    assert callable(getattr(of, name))  # it is still called so
    setattr(of, name, by)

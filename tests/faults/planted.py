"""Faults that are put into a node on purpose: a checker that does not find them proves nothing.

``gaps``        a bell is applied whatever came before it, and what lies before it is never
                read; the loss of a pubsub or a link is not heeded, nor another run id; and
                the node always says that it is current
``blind fill``  what a loader returned is stored, whether its lease is there or not
"""

from __future__ import annotations

from typing import Any

from faults.setting import Planted
from forebay.coordinator.log.follower import Follower
from forebay.coordinator.log.shard_view import ShardView
from forebay.nodes.cache.shared import SharedTier
from forebay.schemas.notices import Position


def plant(fault: Planted) -> None:
    """Do it in this process; nothing, if the name is empty."""
    if fault == "gaps":
        _ignore_gaps()
    elif fault == "blind fill":
        _fill_blindly()


def _ignore_gaps() -> None:
    def confirms(view: ShardView, raw_id: bytes, raw_version: bytes) -> bool:
        return Position.parse(bytes(raw_id)) <= view.position

    def doorbell_changed(follower: Follower, live: bool) -> None:
        follower._doorbell_live = True

    _replace(ShardView, "follows", lambda view, position: True)
    _replace(ShardView, "tell", lambda view, position, version: view.start_over(position))
    _replace(ShardView, "confirms", confirms)
    _replace(ShardView, "contradicts", lambda view, position: False)
    _replace(Follower, "doorbell_changed", doorbell_changed)
    _replace(Follower, "connection_changed", lambda follower: None)
    Follower.live_until = property(  # type: ignore[assignment, misc]
        lambda follower: float("inf"), lambda follower, until: None
    )


def _fill_blindly() -> None:
    async def fill(
        tier: SharedTier, key: str, token: str, *, mark: bool = False, **entry: Any
    ) -> Any:
        return await tier.put(key, **entry)

    _replace(SharedTier, "fill", fill)


def _replace(of: type, name: str, by: Any) -> None:
    assert callable(getattr(of, name))  # it is still called so
    setattr(of, name, by)

"""The coordinator role of a node: locks and limits for programs that are no node.

``http.coordinator`` says whether a node has it; where that is unset, a node has it that does the
cluster's work.
"""

from __future__ import annotations

import secrets

from .runtime import Running
from .web.lock_service import LockService
from .web.protocols import Coordination

__all__ = ["coordination_of"]


def coordination_of(parts: Running) -> Coordination | None:
    """What this node has for others, if it is to have anything; once for each endpoint."""
    http = parts.settings.http
    wanted = parts.crew is not None if http.coordinator is None else http.coordinator
    if not wanted:
        return None
    backend = parts.backend
    desk = LockService(
        backend.link,
        backend.pubsub,
        parts.names,
        parts.scripts,
        node_id=parts.node_id,
        clock=parts.clock,
        rng=parts.rng,
        ids=lambda: secrets.token_hex(16),
        tasks=parts.tasks,
        instruments=parts.instruments,
        # The others are for those who do not wait.
        waiters_max=max(1, http.connections_max // 2),
    )
    return Coordination(locks=desk, limits=parts.limiter)

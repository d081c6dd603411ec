"""What is going on in the demo, for whoever shows it; nothing here acts."""

from __future__ import annotations

from collections import deque

from msgspec import Struct, field

from .readers import ReadReport
from .replayer import Report

__all__ = ["Backlog", "NodeScene", "Scene"]

_NOTES_MAX = 100


class Backlog(Struct, frozen=True, kw_only=True):
    """What has been accepted and is not yet done."""

    events: int
    writes: int


class NodeScene(Struct, kw_only=True):
    name: str
    url: str
    up: bool = False
    backlog: Backlog | None = None  #: None: it does not say


class Scene(Struct, kw_only=True):
    """Written by the session, read by a view, in one thread."""

    backend: str = ""  #: address, without a password
    why: str = ""  #: it was chosen
    directory: str = ""
    ready: bool = False
    nodes: list[NodeScene] = field(default_factory=list)
    replay: Report | None = None
    reads: ReadReport | None = None
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=_NOTES_MAX))

    @property
    def backlog(self) -> Backlog | None:
        """Of the cluster: each node sees all of it, or its own part; the largest counts."""
        told = [node.backlog for node in self.nodes if node.backlog is not None]
        if not told:
            return None
        return Backlog(
            events=max(each.events for each in told), writes=max(each.writes for each in told)
        )

"""The plan, the present state and the outcome of ``forebay dev``: data only."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field

from ...schemas.settings import Settings
from .readers import ReadReport
from .replayer import ReplayReport

NODE_COMMAND = (
    *(sys.executable, "-P", "-m", "forebay.nodes.cli", "run"),
    *("--app", "forebay.nodes.demo.app:node"),
)
_NOTES_MAX = 100


class Plan(Struct, frozen=True, kw_only=True):
    settings: Settings
    origins: Mapping[str, str]  #: of the settings
    environ: Mapping[str, str]  #: environment of all children
    node_environ: Mapping[str, str]  #: settings for the nodes; the session adds its own
    namespace: str
    nodes: int = 3
    port: int = 8642
    duration_s: float = 60.0  #: of one replayed day
    rate: float = 150.0  #: reads per second
    once: bool = False
    kill: bool = False
    data_dir: Path | None = None  #: kept afterwards; None: a temporary directory
    node_command: tuple[str, ...] = NODE_COMMAND


class Outcome(Struct, frozen=True, kw_only=True):
    """The result of a day that was replayed once."""

    ok: bool
    killed: bool
    checks: dict[str, bool]
    problems: dict[str, str]  #: of the failed checks
    counts: dict[str, int]
    timings_s: dict[str, float]
    backend: dict[str, str]
    nodes: dict[str, list[int]]  #: exit codes, one for each start of a node


class Backlog(Struct, frozen=True, kw_only=True):
    """Accepted work that is not done yet."""

    events: int
    writes: int


class NodeScene(Struct, kw_only=True):
    name: str
    url: str
    up: bool = False
    backlog: Backlog | None = None  #: None: the node does not report it


class Scene(Struct, kw_only=True):
    """The session writes it and a view reads it, in one thread."""

    backend: str = ""  #: address, without password
    why: str = ""  #: the reason for this backend
    directory: str = ""
    ready: bool = False
    nodes: list[NodeScene] = field(default_factory=list)
    replay: ReplayReport | None = None
    reads: ReadReport | None = None
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=_NOTES_MAX))

    @property
    def backlog(self) -> Backlog | None:
        """The largest backlog that a node reports: a node sees all of it, or its own part."""
        reported = [node.backlog for node in self.nodes if node.backlog is not None]
        if not reported:
            return None
        return Backlog(
            events=max(each.events for each in reported),
            writes=max(each.writes for each in reported),
        )

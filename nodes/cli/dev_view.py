"""What `forebay dev` shows: a live table on a terminal that has rich, plain lines otherwise.

Plain: the beginning once, then a line every two seconds, and each note as it comes. With
``--json`` the same goes to stderr, less often: the document has stdout to itself.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import click

from ... import __version__
from ..demo.scene import Scene
from ..demo.session import Outcome, Plan
from .sources import wants_color

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["View", "outcome_lines", "prepare", "view_for"]

_PLAIN_EVERY = 2  #: updates, which come once a second
_JSON_EVERY = 10
_EXAMPLE = (
    '{"type":"write","key":"flight:FB1-JFK-LAX","value":{"id":"FB1-JFK-LAX","status":"delayed",'
    '"month":1,"day":1,"sched_dep_time":1,"sched_arr_time":400,"carrier":"FB","flight":1,'
    '"origin":"JFK","dest":"LAX","distance":2475},'
    '"invalidates":{"tags":["airport:JFK","airport:LAX"]}}'
)


class View(Protocol):
    def update(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def prepare() -> None:
    """Import the view's modules before the event loop runs: they would block it."""
    if _has_table():
        import_module("rich.live")


def _has_table() -> bool:
    return sys.stdout.isatty() and find_spec("rich") is not None


def view_for(scene: Scene, plan: Plan, *, as_json: bool) -> View:
    if as_json:
        return PlainView(scene, plan, every=_JSON_EVERY, to_stderr=True)
    if _has_table():
        return RichView(scene, plan)
    return PlainView(scene, plan, every=_PLAIN_EVERY)


class PlainView:
    def __init__(self, scene: Scene, plan: Plan, *, every: int, to_stderr: bool = False) -> None:
        self._scene = scene
        self._plan = plan
        self._every = every
        self._to_stderr = to_stderr
        self._updates = 0
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._notes()

    def update(self) -> None:
        self._notes()
        if not self._scene.ready:
            return
        if not self._begun:
            self._begun = True
            for line in beginning(self._scene, self._plan):
                self._say(line)
        if self._updates % self._every == 0 and self._scene.replay is not None:
            self._say(_summary(self._scene))
        self._updates += 1

    def _notes(self) -> None:
        while self._scene.notes:
            self._say(self._scene.notes.popleft())

    def _say(self, line: str) -> None:
        click.echo(line, err=self._to_stderr)


class RichView:
    """Needs rich; the table stays at the bottom, notes go by above it."""

    def __init__(self, scene: Scene, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live

        self._scene = scene
        self._plan = plan
        self._begun = False
        self._console = Console(no_color=not wants_color(sys.stdout), highlight=False)
        self._live: Any = Live(console=self._console, auto_refresh=False, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.update()
        self._live.stop()

    def update(self) -> None:
        if self._scene.ready and not self._begun:
            self._begun = True
            for line in beginning(self._scene, self._plan):
                self._console.print(line, markup=False, soft_wrap=True)
        while self._scene.notes:
            self._console.print(self._scene.notes.popleft(), markup=False)
        if self._begun:
            self._live.update(_table(self._scene), refresh=True)


def beginning(scene: Scene, plan: Plan) -> Iterator[str]:
    """What a newcomer needs: what runs where, and what to try next."""
    node = scene.nodes[0].url
    events_key = f"forebay:{plan.namespace}:events"
    yield f"Forebay {__version__}: departure boards of New York's airports on 1 January 2013"
    yield ""
    yield f"  valkey  {scene.backend}  ({scene.why})"
    yield f"  nodes   {'  '.join(each.url for each in scene.nodes)}"
    yield f"  files   {scene.directory}  (database, logs{'' if plan.data_dir else '; temporary'})"
    yield ""
    yield "Look at a board, on any node:"
    yield f"  curl -s {node}/v1/cache/board:JFK"
    yield "Publish an event, from any language, and look again: a flight to LAX stands on top."
    if _client := _shell_client(scene.backend, plan):
        yield f"  {_client} XADD {events_key} '*' event '{_EXAMPLE}'"
        yield "or without a client:"
    yield f"  curl -s {node}/v1/events -H 'content-type: application/json' -d '{_EXAMPLE}'"
    yield ""
    yield "Ctrl-C ends it all."
    yield ""


def outcome_lines(outcome: Outcome) -> Iterator[str]:
    """For people; ``--json`` has the same."""
    counts = outcome.counts
    yield ""
    yield (
        f"{counts['flights']} flights, {counts['events']} events, {counts['reads']} reads; "
        f"the day took {outcome.timings_s.get('day', 0):.1f} s"
    )
    for name, ok in outcome.checks.items():
        problem = f": {outcome.problems[name]}" if name in outcome.problems else ""
        yield f"  {'ok  ' if ok else 'FAIL'}  {name.replace('_', ' ')}{problem}"


def _shell_client(address: str, plan: Plan) -> str:
    """redis-cli and valkey-cli are the same to us; nothing if neither is here."""
    client = next((name for name in ("valkey-cli", "redis-cli") if shutil.which(name)), "")
    if not client or not address.startswith(("redis://", "valkey://")):
        return ""
    secret = " --askpass" if plan.settings.valkey.password else ""
    return f"{client} -u {address.replace('valkey://', 'redis://')}{secret}"


def _summary(scene: Scene) -> str:
    replay, reads, backlog = scene.replay, scene.reads, scene.backlog
    parts = []
    if replay is not None:
        parts.append(f"{replay.clock:>6}  event {replay.published} of {replay.total}")
    if reads is not None:
        parts.append(
            f"{reads.reads} reads/s  near {_percent(reads.tiers.get('near', 0), reads.reads)}  "
            f"stale {_percent(reads.stale, reads.reads)}  p99 {reads.p99_ms:.1f} ms  "
            f"errors {reads.errors}"
        )
    if backlog is not None:
        parts.append(f"backlog {backlog.events}+{backlog.writes}")
    up = sum(node.up for node in scene.nodes)
    parts.append(f"nodes {up}/{len(scene.nodes)}")
    return "  |  ".join(parts)


def _table(scene: Scene) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("node", "url", "state", "events waiting", "writes waiting"):
        table.add_column(name)
    for node in scene.nodes:
        backlog = node.backlog
        told = ("-", "-") if backlog is None else (str(backlog.events), str(backlog.writes))
        # No markup: notes are printed without any, and the table along with them.
        state = Text("ready", style="green") if node.up else Text("down", style="red")
        table.add_row(node.name, node.url, state, *told)
    return Group(_summary(scene), table)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole if whole else 0:>3} %"

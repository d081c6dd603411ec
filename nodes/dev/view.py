"""The display of ``forebay dev``: a live table if rich is installed, plain lines otherwise.

The plain view prints an introduction, then one line every two seconds and each note. With
``--json`` it prints to stderr and less often, because stdout holds the JSON document only.
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
from ..cli.sources import wants_color
from .scene import Outcome, Plan, Scene

if TYPE_CHECKING:
    from rich.console import Group

_PLAIN_EVERY = 2  #: updates; there is one per second
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
    """Import modules of the view before the event loop runs, because imports block it."""
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
        self._introduced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._print_notes()

    def update(self) -> None:
        self._print_notes()
        if not self._scene.ready:
            return
        if not self._introduced:
            self._introduced = True
            for line in introduction(self._scene, self._plan):
                self._print(line)
        if self._updates % self._every == 0 and self._scene.replay is not None:
            self._print(_summary(self._scene))
        self._updates += 1

    def _print_notes(self) -> None:
        while self._scene.notes:
            self._print(self._scene.notes.popleft())

    def _print(self, line: str) -> None:
        click.echo(line, err=self._to_stderr)


class RichView:
    """The view with rich: the table stays at the bottom, and notes appear above it."""

    def __init__(self, scene: Scene, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live

        self._scene = scene
        self._plan = plan
        self._introduced = False
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
        if self._scene.ready and not self._introduced:
            self._introduced = True
            for line in introduction(self._scene, self._plan):
                self._console.print(line, markup=False, soft_wrap=True)
        while self._scene.notes:
            self._console.print(self._scene.notes.popleft(), markup=False)
        if self._introduced:
            self._live.update(_table(self._scene), refresh=True)


def introduction(scene: Scene, plan: Plan) -> Iterator[str]:
    """Introduction: the processes, their addresses, and commands to try."""
    node = scene.nodes[0].url
    events_key = f"forebay:{plan.namespace}:events"
    yield f"Forebay {__version__}: departure boards of New York's airports on 1 January 2013"
    yield ""
    yield f"  valkey  {scene.backend}  ({scene.why})"
    yield f"  nodes   {'  '.join(each.url for each in scene.nodes)}"
    yield f"  files   {scene.directory}  (database, logs{'' if plan.data_dir else '; temporary'})"
    yield ""
    yield "Read a board, on any node:"
    yield f"  curl -s {node}/v1/cache/board:JFK"
    yield "Publish an event, then read the board again: a flight to LAX is at the top."
    if _client := _shell_client(scene.backend, plan):
        yield f"  {_client} XADD {events_key} '*' event '{_EXAMPLE}'"
        yield "or with curl:"
    yield f"  curl -s {node}/v1/events -H 'content-type: application/json' -d '{_EXAMPLE}'"
    yield ""
    yield "Press Ctrl-C to stop."
    yield ""


def outcome_lines(outcome: Outcome) -> Iterator[str]:
    """The outcome as text; ``--json`` prints the same as JSON."""
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
    """A command line of valkey-cli or redis-cli, or an empty string if neither is installed."""
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
        waiting = ("-", "-") if backlog is None else (str(backlog.events), str(backlog.writes))
        # Text instead of markup: the console prints notes, and the table with them, without markup.
        state = Text("ready", style="green") if node.up else Text("down", style="red")
        table.add_row(node.name, node.url, state, *waiting)
    return Group(_summary(scene), table)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole if whole else 0:>3} %"

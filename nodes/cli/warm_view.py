"""What `forebay warm` shows on stderr: a bar on a terminal that has rich, else a line at times."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Protocol, Self

import click

from ...coordinator.clock import Clock
from ..cache.warming import WarmReport

__all__ = ["PlainView", "View", "prepare", "view_for"]

_PLAIN_EVERY_S = 5.0


class View(Protocol):
    def update(self, report: WarmReport) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def prepare() -> None:
    """Import the view's modules before the event loop runs: they would block it."""
    if _has_bar():
        import_module("rich.progress")


def _has_bar() -> bool:
    return sys.stderr.isatty() and find_spec("rich") is not None


def view_for(name: str, total: int, clock: Clock) -> View:
    if _has_bar():
        return _Bar(name, total)
    return PlainView(name, total, clock)


class PlainView:
    """The first line comes after some seconds: what is quicker needs none."""

    def __init__(self, name: str, total: int, clock: Clock) -> None:
        self._name = name
        self._total = total
        self._monotonic = clock.monotonic
        self._next_at = clock.monotonic() + _PLAIN_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def update(self, report: WarmReport) -> None:
        now = self._monotonic()
        if now >= self._next_at:
            self._next_at = now + _PLAIN_EVERY_S
            counts = f"{report.asked} of {self._total} keys, {report.failed} failed"
            click.echo(f"{self._name}: {counts}", err=True)


class _Bar:
    def __init__(self, name: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns,
            TextColumn("{task.fields[failed]}"),
            Remaining(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(name, total=total, failed="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, report: WarmReport) -> None:
        failed = f"{report.failed} failed" if report.failed else ""
        self._progress.update(self._task, completed=report.asked, failed=failed)

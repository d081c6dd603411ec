"""`forebay locks`: who holds which lock, who waits, and how to take one from who holds it.

I1  `ls` and `show` change nothing.
I2  It needs the server alone, and looks at one that others use.
I3  `release` is force: the holder's block is cancelled when it hears of it, its token is refused by
    guards from then on. Exit code 1 says that nobody held the lock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import anyio
import click
import msgspec

from ...coordinator.clock import SystemClock
from ...coordinator.locks.locks import LISTED_MAX
from ...coordinator.locks.store import LockStore
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.scripting import load_scripts
from ...schemas.errors import InvalidKey
from ...schemas.keys import Names, check_key
from ...schemas.locks import Holder, LockView, Waiting
from ...schemas.masking import escape_controls
from ...schemas.settings_sources import Resolved
from ..explain.collect import names_at
from .namespaces import must_be_born
from .options import setting_options
from .sources import load, log_to_stderr, must_be_shared

__all__ = ["command"]

T = TypeVar("T")
_NAME = "locks"
_NOBODY = 1


@click.group(_NAME)
def command() -> None:
    """Show locks, or release one by force."""


def _options(each: Callable[..., Any]) -> Callable[..., Any]:
    each = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")(
        each
    )
    return setting_options(each)


@command.command("ls")
@_options
def ls(as_json: bool, config: str | None, flags: Mapping[str, object]) -> None:
    """The locks that are held, by name."""
    views = _asked(_list, config, flags)
    if as_json:
        _print(views)
    for view in () if as_json else views:
        _tell(_line(view))


@command.command("show", epilog="Example:  forebay locks show rebuild")
@click.argument("name")
@_options
def show(name: str, as_json: bool, config: str | None, flags: Mapping[str, object]) -> None:
    """Who holds the lock NAME since when and what for, and who waits."""
    (view,) = _asked(partial(_show, names=[_checked(name)]), config, flags)
    if as_json:
        _print(view)
        return
    _tell(_line(view))
    for holder in view.holders:
        _tell(f"  held by {_held(holder)}")
    for waiting in view.queue:
        _tell(f"  waits: {_waits(waiting)}")


@command.command("release", epilog="Example:  forebay locks release rebuild")
@click.argument("name")
@_options
def release(name: str, as_json: bool, config: str | None, flags: Mapping[str, object]) -> int:
    """Take the lock NAME from whoever holds it; exit code 1 if nobody does."""
    count = _asked(partial(_force, name=_checked(name)), config, flags)
    if as_json:
        _print({"name": name, "released": count})
    else:
        click.echo(f"{name}: taken from {count}" if count else f"{name}: nobody held it")
    return 0 if count else _NOBODY


def _checked(name: str) -> str:
    try:
        return check_key(name, name="lock")
    except InvalidKey as error:
        raise click.UsageError(str(error)) from None


def _asked(
    question: Callable[[LockStore], Awaitable[T]],
    config: str | None,
    flags: Mapping[str, object],
) -> T:
    resolved = load(config, flags)
    must_be_shared(resolved, "to look at")
    log_to_stderr(resolved, _NAME)
    return anyio.run(partial(_ask, resolved, question))


async def _ask(resolved: Resolved, question: Callable[[LockStore], Awaitable[T]]) -> T:
    settings, clock = resolved.settings, SystemClock()
    async with Backend(
        settings.valkey, client_name=_NAME, origins=resolved.origins, clock=clock
    ) as backend:
        asked = Names(settings.node.namespace, settings.node.shards, database=backend.database)
        await must_be_born(backend.link, asked, resolved)
        names = await names_at(backend.link, asked)
        scripts = load_scripts()
        records = LockStore(backend.link, names, scripts, clock=clock, handed=lambda *_handed: None)
        return await question(records)


async def _list(records: LockStore) -> list[LockView]:
    return await records.held(LISTED_MAX)


async def _show(records: LockStore, *, names: Sequence[str]) -> list[LockView]:
    return await records.show(names)


async def _force(records: LockStore, *, name: str) -> int:
    return await records.force(name)


def _print(value: object) -> None:
    click.echo(msgspec.json.encode(value).decode())


def _tell(line: str) -> None:
    """What others have stored moves no cursor here."""
    click.echo(escape_controls(line))


def _line(view: LockView) -> str:
    if not view.kind:
        return f"{view.name}: nobody has used it lately"
    held = ", ".join(holder.by for holder in view.holders) or "nobody"
    token = f", token {view.token}" if view.token else ""
    return f"{view.name}: {view.kind}, held by {held}, {view.waiting} wait{token}"


def _held(holder: Holder) -> str:
    since = datetime.fromtimestamp(holder.since_ms / 1000, UTC).isoformat(timespec="seconds")
    left = f"{holder.left_ms / 1000:.1f} s left unless renewed"
    return f"{holder.by} since {since}, {left}, token {holder.token}{_meta(holder.meta)}"


def _waits(waiting: Waiting) -> str:
    waited, silent = waiting.waited_ms / 1000, waiting.silent_ms / 1000
    return f"{waiting.by} for {waited:.1f} s, heard of {silent:.1f} s ago{_meta(waiting.meta)}"


def _meta(meta: Mapping[str, object]) -> str:
    return f", {msgspec.json.encode(meta).decode()}" if meta else ""

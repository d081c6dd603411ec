"""`forebay limits`: which rate limits there are, how one stands, and to take of it by hand.

I1  `ls` and `show` charge nothing.
I2  Limits are those of the configuration, and with ``--app`` also those of the application. A limit
    that is told other numbers here decides by these: it is the same bucket.
I3  The exit code of `take` is 1 if the limit refused; so a shell can wait or give up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import anyio
import click
import msgspec

from ...coordinator.limits.limiter import Limiter
from ...schemas.errors import InvalidKey
from ...schemas.errors_limits import InvalidLimit
from ...schemas.limits import Limit, Verdict
from ..node import Node, running_parts, use_settings
from .options import setting_options
from .run import load_app
from .sources import errors_told, load, log_to_stderr, must_be_shared

__all__ = ["command"]

T = TypeVar("T")
_NAME = "limits"
_REFUSED = 1


@click.group(_NAME)
def command() -> None:
    """Show rate limits, or take of one."""


def _options(each: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout."),
        click.option(
            "--app",
            envvar="FOREBAY_APP",
            show_envvar=True,
            help="The node that declares more limits, as module:attribute.",
        ),
    ):
        each = option(each)
    return setting_options(each)


@command.command("ls")
@_options
def ls(as_json: bool, **options: Any) -> None:
    """The limits, by name."""
    known = _asked(_list, **options)
    if as_json:
        _print(known)
    for limit in () if as_json else known:
        click.echo(_line(limit))


@command.command("show", epilog="Example:  forebay limits show api user-1")
@click.argument("name")
@click.argument("subject")
@_options
def show(name: str, subject: str, as_json: bool, **options: Any) -> None:
    """How much of the limit NAME is left for SUBJECT; nothing is charged."""
    verdict = _asked(partial(_peek, name=name, subject=subject), **options)
    _tell(verdict, f"{verdict.remaining} left", as_json=as_json)


@command.command("take", epilog="Example:  forebay limits take api user-1 --cost 5")
@click.argument("name")
@click.argument("subject")
@click.option("--cost", type=int, default=1, show_default=True, help="How many tokens.")
@click.option("--partial", "part", is_flag=True, help="As many of them as there are.")
@_options
def take(name: str, subject: str, cost: int, part: bool, as_json: bool, **options: Any) -> int:
    """Charge SUBJECT under the limit NAME; exit code 1 if that is refused."""
    question = partial(_take, name=name, subject=subject, cost=cost, part=part)
    verdict = _asked(question, **options)
    said = f"took {verdict.granted}, {verdict.remaining} left" if verdict.allowed else "refused"
    _tell(verdict, said, as_json=as_json)
    return 0 if verdict.allowed else _REFUSED


def _asked(
    question: Callable[[Limiter], Awaitable[T]],
    *,
    app: str | None,
    config: str | None,
    flags: Mapping[str, object],
) -> T:
    with errors_told():
        resolved = load(config, {**flags, "workers.enabled": "false"})
        must_be_shared(resolved, "to ask")
        log_to_stderr(resolved, _NAME)
        node = load_app(app) if app else Node()
        use_settings(node, resolved)
    try:
        return anyio.run(partial(_ask, node, question))
    except (InvalidLimit, InvalidKey) as error:
        raise click.UsageError(str(error)) from None


async def _ask(node: Node, question: Callable[[Limiter], Awaitable[T]]) -> T:
    async with node:
        return await question(running_parts(node).limiter)
    raise AssertionError("a node keeps nothing back that is raised in its block")


async def _list(limiter: Limiter) -> list[Limit]:
    known = limiter.limits
    return [known[name] for name in sorted(known)]


async def _peek(limiter: Limiter, *, name: str, subject: str) -> Verdict:
    return await limiter.of(name).peek(subject)


async def _take(limiter: Limiter, *, name: str, subject: str, cost: int, part: bool) -> Verdict:
    return await limiter.of(name).take(subject, cost, partial=part)


def _print(value: object) -> None:
    click.echo(msgspec.json.encode(value).decode())


def _tell(verdict: Verdict, said: str, *, as_json: bool) -> None:
    if as_json:
        _print(verdict)
        return
    again = f", try again in {verdict.retry_after_ms} ms" if not verdict.allowed else ""
    full = f", full in {verdict.reset_after_ms} ms" if verdict.reset_after_ms else ""
    click.echo(f"{verdict.limit}: {said}{again}{full}")


def _line(limit: Limit) -> str:
    shadow = ", refuses nothing (shadow)" if limit.shadow else ""
    slots = f", {limit.concurrency} at a time" if limit.concurrency else ""
    return f"{limit.name}: {limit.rate:g} in {limit.per:g} s, {limit.burst} at once{slots}{shadow}"

"""The options of commands that have settings: what they gather are the flags for ``sources``.

Imports click alone, since `forebay health` runs every few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["any_setting_options", "setting_options"]


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command with settings has; it gets ``config`` and ``flags``."""
    for option in (
        click.option("--namespace", expose_value=False, callback=_own_flag, help="As in Valkey."),
        click.option("--url", expose_value=False, callback=_own_flag, help="valkey://HOST:PORT/DB"),
    ):
        command = option(command)
    return any_setting_options(command)


def any_setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--config`` and ``--set`` alone, for a command whose ``--url`` is another."""
    for option in (
        click.option(
            "--set",
            "flags",
            multiple=True,
            metavar="NAME=VALUE",
            callback=_assignments,
            expose_value=True,
            help="Any setting by its name, such as http.port=0; may be repeated.",
        ),
        click.option("--config", metavar="FILE", help="The configuration file, TOML."),
    ):
        command = option(command)
    return command


def _own_flag(context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Keep the value of an option for the ``flags`` that the command gets."""
    if value is not None and option.name is not None:
        context.meta.setdefault(__name__, {})[option.name] = value


def _assignments(
    context: click.Context, _: click.Parameter, values: tuple[str, ...]
) -> dict[str, object]:
    flags: dict[str, object] = context.meta.setdefault(__name__, {})
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter("write --set NAME=VALUE, such as --set http.port=0")
        flags[name.strip()] = value
    return flags

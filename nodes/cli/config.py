"""`forebay config`: what is set, where it came from, and whether it can be used.

``acl`` prints the users that a namespace needs in Valkey.
``check`` also refuses what could not start, and warns of what is not used: an address that another
setting overrides, a reader, a variable with a name that resembles one that is read; and of files
with a secret that other users may read.
Nothing connects anywhere; that the server answers is shown by `forebay health`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

import click
import msgspec

from ...coordinator.clock import SystemClock
from ...coordinator.rights import users_file
from ...coordinator.valkey.scripting import load_scripts
from ...schemas.errors import ConfigError
from ...schemas.keys import Names
from ...schemas.settings_env import misspelt_names
from ...schemas.settings_sources import Resolved, SettingRow, describe
from ..secret_files import exposed_secrets
from ..values.codec import compressor
from .options import setting_options
from .sources import RefusedSettings, errors_told, load

__all__ = ["command"]


@click.group("config")
def command() -> None:
    """Show the settings in force, check them, or print the users that Valkey needs."""


@command.command("show")
@setting_options
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@click.option("--changed", is_flag=True, help="Only what differs in origin from the defaults.")
def show(config: str | None, flags: Mapping[str, object], as_json: bool, changed: bool) -> None:
    """Every setting with its value and where it came from; secrets are masked."""
    with errors_told():
        rows = describe(load(config, flags))
    if changed:
        rows = [row for row in rows if row.origin != "default"]
    if as_json:
        click.echo(_json([_plain(row) for row in rows]))
        return
    for line in _table(rows):
        click.echo(line)


@command.command("check")
@setting_options
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@click.pass_context
def check(
    context: click.Context, config: str | None, flags: Mapping[str, object], as_json: bool
) -> None:
    """Exit 0 if the settings can be used, 2 and the reason if not."""
    try:
        resolved = load(config, flags)
        _check_installed(resolved)
        _check_token(resolved)
    except ConfigError as error:
        if not as_json:
            raise RefusedSettings(error) from None
        click.echo(_json(_told(error)))
        context.exit(error.exit_code)
    rows = describe(resolved)
    found = [*resolved.warnings, *exposed_secrets(resolved)]
    warnings = [*map(str, found), *misspelt_names(os.environ)]
    kinds = Counter(row.origin.partition(" ")[0] for row in rows)
    if as_json:
        told = {"ok": True, "settings": len(rows), "from": dict(sorted(kinds.items()))}
        click.echo(_json({**told, "warnings": warnings}))
        return
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    counts = ", ".join(f"{count} from {kind}" for kind, count in sorted(kinds.items()))
    click.echo(f"ok: {len(rows)} settings, {counts}")


@command.command("acl", epilog="Example:  forebay config acl --namespace shop > users.acl")
@setting_options
def acl(config: str | None, flags: Mapping[str, object]) -> None:
    """Users for this namespace, as a Valkey ACL file; they are off until they get a password."""
    with errors_told():
        node = load(config, flags).settings.node
    click.echo(users_file(Names(node.namespace, node.shards), load_scripts()), nl=False)


def _check_installed(resolved: Resolved) -> None:
    try:
        compressor(resolved.settings.cache.compression)
    except ConfigError as error:
        raise ConfigError(
            setting=error.setting,
            value=error.value,
            origin=resolved.origins[error.setting],
            problem=error.problem,
            fix=error.fix,
        ) from None


def _check_token(resolved: Resolved) -> None:
    http = resolved.settings.http
    if http.enabled and http.token_file:
        from ..web.access import token_middleware

        token_middleware(http.token_file, SystemClock(), resolved.origins["http.token_file"])


def _plain(row: SettingRow) -> dict[str, str]:
    return {"name": row.name, "value": row.value_shown, "origin": row.origin}


def _told(error: ConfigError) -> dict[str, object]:
    fields = ("setting", "value", "origin", "problem", "fix")
    return {"ok": False, **{name: getattr(error, name) for name in fields}}


def _json(document: object) -> str:
    return msgspec.json.format(msgspec.json.encode(document)).decode()


def _table(rows: Sequence[SettingRow]) -> list[str]:
    values = [row.value_shown or '""' for row in rows]
    name_width = max((len(row.name) for row in rows), default=0)
    value_width = min(40, max(map(len, values), default=0))
    return [
        f"{row.name:<{name_width}}  {value:<{value_width}}  {row.origin}"
        for row, value in zip(rows, values, strict=True)
    ]

"""`forebay import`: bring over what another service has stored, ahead of the readers.

I1  The application declares the cache of ``--as``: its type is checked, its tags are carried.
I2  It starts the node of the application without workers, and loads nothing.
I3  Where keys were invalidated or written before changes were marked, it refuses without
    ``--force``: an old value may be older than these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import click
import msgspec

from ...schemas.errors import ConfigError
from ...schemas.keys import KeyTemplate
from ..cache.cached import Cached
from ..cache.imports import OldNames, import_old
from ..node import Node
from .options import setting_options
from .run import load_app
from .sources import errors_told, load, log_to_stderr, must_be_shared

__all__ = ["command"]

_SHOWN = (
    "used",
    "present",
    "held",
    "absent",
    "outdated",
    "unreadable",
    "refused",
    "closed",
    "no_key",
)
_FAILED = 1


@click.command("import")
@click.option(
    "--app",
    envvar="FOREBAY_APP",
    show_envvar=True,
    required=True,
    help="The node, as module:attribute.",
)
@click.option("--match", required=True, metavar="PATTERN", help="Old names, such as v1:product:*")
@click.option("--as", "template", required=True, help="The keys of the cache: product:{id}")
@click.option("--dry-run", is_flag=True, help="Count what would be done, and store nothing.")
@click.option("--force", is_flag=True, help="Also where keys have changed before.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@setting_options
def command(
    app: str,
    match: str,
    template: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    config: str | None,
    flags: Mapping[str, object],
) -> int:
    """Store the values at the old names of PATTERN as entries, with the lifetime that they have."""
    with errors_told():
        resolved = load(config, {**flags, "workers.enabled": "false"})
        must_be_shared(resolved, "to import from")
        log_to_stderr(resolved, "import")
        node = load_app(app)
        node.configure(resolved)
        cached = _cache_of(node, template)
        names = OldNames(match, KeyTemplate(template))
        cached.bring_over_from(names.legacy_key)
    counts = anyio.run(partial(_import, node, cached, names, dry_run, force))
    shown = {each: counts[each] for each in _SHOWN}
    if as_json:
        click.echo(msgspec.json.encode({"dry_run": dry_run, **shown}).decode())
    else:
        verb = "would be used" if dry_run else "used"
        more = [f"{count} {each}" for each, count in shown.items() if count and each != "used"]
        click.echo(", ".join([f"{shown['used']} {verb}", *more]))
    return _FAILED if counts["refused"] or counts["closed"] else 0


def _cache_of(node: Node, template: str) -> Cached[Any, Any]:
    wanted = KeyTemplate(template)
    for cached in node.caches:
        if cached.template.text == wanted.text:
            return cached
    known = ", ".join(each.template.text for each in node.caches) or "none"
    raise click.UsageError(f"the application has no cache of {template}; it has {known}")


async def _import(
    node: Node, cached: Cached[Any, Any], names: OldNames, dry_run: bool, force: bool
) -> Counter[str]:
    async with node:
        legacy = cached.path.legacy
        if legacy is not None and legacy.late and not (force or dry_run):
            raise ConfigError(
                setting="--force",
                value="not given",
                origin="the command line",
                problem=f"keys of {legacy.late} shards changed before: old values may be older",
                fix="declare legacy_key before the first change, or give --force",
            )
        return await import_old(node.parts.backend.link, cached, names, dry_run=dry_run)

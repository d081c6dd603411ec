"""`forebay import`: store the values of another service as entries, before readers ask for them.

I1  The application declares the cache of ``--as``: its type checks the values, its tags are stored.
I2  The command starts the application's node without workers and calls no loader.
I3  If keys were invalidated or written before changes were marked, the command refuses without
    ``--force``: an old value may be older than these changes.
M1  Each key is imported as its first reader would import it (see ``cache.legacy``), without the
    loader: under the fill lease, and only if the key has no entry and no mark. The import never
    overwrites newer values, may run beside running nodes, and may be repeated or interrupted.
M2  Names are found with SCAN, ``PAGE`` at a time. A name is used only if the cache derives the same
    name from the key that was parsed from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import anyio
import click
import msgspec

from ...coordinator.valkey.link import Commands
from ...schemas.errors import ConfigError, InvalidKey
from ...schemas.keys import KeyTemplate
from ...schemas.replies import array, integer
from ..cache.cache import Cache
from ..cache.cached import cache_of
from ..node import Node, running_parts, use_settings
from .options import setting_options
from .run import load_app
from .sources import errors_told, load, log_to_stderr, must_be_shared

PAGE = 500
_CONCURRENCY = 20
_STAR = "*"
_GLOB = re.compile(r"[?\[\]\\]")
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
        use_settings(node, resolved)
        cached = _cache_of(node, template)
        names = OldNames(match, KeyTemplate(template))
        cached.declare_legacy_key(names.legacy_key)
    counts = anyio.run(partial(_import, node, cached, names, dry_run, force))
    shown = {each: counts[each] for each in _SHOWN}
    if as_json:
        click.echo(msgspec.json.encode({"dry_run": dry_run, **shown}).decode())
    else:
        verb = "would be used" if dry_run else "used"
        more = [f"{count} {each}" for each, count in shown.items() if count and each != "used"]
        click.echo(", ".join([f"{shown['used']} {verb}", *more]))
    return _FAILED if counts["refused"] or counts["closed"] else 0


def _cache_of(node: Node, template: str) -> Cache[Any]:
    wanted = KeyTemplate(template)
    caches = [cache_of(cached) for cached in node.caches]
    for cache in caches:
        if cache.template.text == wanted.text:
            return cache
    known = ", ".join(each.template.text for each in caches) or "none"
    raise click.UsageError(f"the application has no cache of {template}; it has {known}")


async def _import(
    node: Node, cached: Cache[Any], names: OldNames, dry_run: bool, force: bool
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
        return await import_old(running_parts(node).backend.link, cached, names, dry_run=dry_run)


class OldNames:
    """The old names that match a pattern such as ``v1:product:*``, with one star for each field.

    Raises:
        InvalidKey: the pattern has another number of stars than fields, or another wildcard.
    """

    def __init__(self, pattern: str, template: KeyTemplate) -> None:
        literals, fields = pattern.split(_STAR), template.fields
        if len(literals) != len(fields) + 1 or _GLOB.search(pattern):
            problem = f"needs one * for each field of {template.text}, and no other wildcard"
            raise InvalidKey("--match", pattern, problem)
        self.pattern = pattern
        self._template = template
        between = "".join(dict.fromkeys("".join(literals[1:-1])))
        field = f"([^{re.escape(between)}]+)" if between else "(.+)"
        parts = [re.escape(literals[0])]
        for literal in literals[1:]:
            parts += [field, re.escape(literal)]
        self._names = re.compile("".join(parts), re.DOTALL)
        named = [literals[0]]
        for name, literal in zip(fields, literals[1:], strict=True):
            named += [f"{{{name}}}", literal]
        self.legacy_key = "".join(named)  #: as ``node.cached`` takes it

    def key_of(self, name: bytes) -> str:
        """The key with this old name; raises InvalidKey."""
        try:
            found = self._names.fullmatch(name.decode())
        except UnicodeDecodeError:
            found = None
        if found is None:
            raise InvalidKey("the name", ascii(name), f"does not fit {self.pattern}")
        return self._template.of_texts(found.groups())


async def import_old(
    commands: Commands,
    cached: Cache[Any],
    names: OldNames,
    *,
    dry_run: bool = False,
    progress: Callable[[Counter[str]], object] = lambda counts: None,
) -> Counter[str]:
    """Import every name; return how many had each outcome.

    An outcome is ``present``, ``held``, ``no_key``, or a result of ``LegacyEntries``.
    """
    counts: Counter[str] = Counter()
    limiter, cursor = anyio.CapacityLimiter(_CONCURRENCY), b"0"
    while True:
        reply = await commands.call("SCAN", cursor, "MATCH", names.pattern, "COUNT", PAGE)
        following, page = array(reply, "SCAN", length=2)
        async with anyio.create_task_group() as tasks:
            for name in dict.fromkeys(map(bytes, array(page, "SCAN"))):
                one = partial(_import_name, cached, names, name, dry_run, limiter, counts)
                tasks.start_soon(one)
        progress(counts)
        cursor = b"%d" % integer(following, "the cursor of SCAN", high=2**64)
        if cursor == b"0":
            return counts


async def _import_name(
    cached: Cache[Any],
    names: OldNames,
    name: bytes,
    dry_run: bool,
    limiter: anyio.CapacityLimiter,
    counts: Counter[str],
) -> None:
    try:
        key = names.key_of(name)
        is_same = cached.keying.legacy_name(key).encode() == name
        cached.keying.arguments(key)
    except InvalidKey:
        is_same = False
    async with limiter:
        outcome = await cached.import_key(key, dry_run=dry_run) if is_same else "no_key"
    counts[outcome] += 1

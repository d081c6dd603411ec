"""`forebay warm`: load keys of one cache into the shared tier, ahead of their readers.

I1  All keys are looked at first: one that is none of the cache's is named with its place, and
    nothing is loaded then.
I2  No line of more than ``LINE_BYTES_MAX`` bytes and no more than ``KEYS_MAX`` keys are taken.
I3  It starts the node of the application without workers: what it does for the cluster ends with
    the last key.
I4  The summary goes to stdout; progress and failures go to stderr.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

import anyio
import click
import msgspec

from ...coordinator.clock import SystemClock
from ...schemas.errors import InvalidKey
from ...schemas.keys import KEY_BYTES_MAX
from ..cache.cache import Cache
from ..cache.cached import cache_of
from ..cache.warming import WarmReport, warm
from ..node import Node, use_settings
from .options import setting_options
from .run import load_app
from .sources import errors_told, load, log_to_stderr, must_be_shared
from .warm_view import prepare, view_for

__all__ = ["KEYS_MAX", "LINE_BYTES_MAX", "command"]

KEYS_MAX = 1_000_000
LINE_BYTES_MAX = KEY_BYTES_MAX + 64  #: some white space is let pass
_NAME = "warm"
_FAILED = 1
_EXAMPLES = """
\b
Examples:
  forebay warm --app shop.cache:node product product:1 product:2
  forebay warm --app shop.cache:node product --keys-from keys.txt --per-second 200
"""


@click.command("warm", epilog=_EXAMPLES)
@click.option(
    "--app",
    envvar="FOREBAY_APP",
    show_envvar=True,
    required=True,
    help="The node, as module:attribute.",
)
@click.argument("cache")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--keys-from", type=click.File("rb"), help="A file with a key in each line; - reads stdin."
)
@click.option(
    "--per-second",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="At most so many keys; no limit if not given.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1_000),
    default=10,
    show_default=True,
    help="Keys under way at a time.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@setting_options
def command(
    app: str,
    cache: str,
    keys: tuple[str, ...],
    keys_from: IO[bytes] | None,
    per_second: float | None,
    concurrency: int,
    as_json: bool,
    config: str | None,
    flags: Mapping[str, object],
) -> int:
    """Load the keys of CACHE that are not fresh, ahead of their readers."""
    with errors_told():
        resolved = load(config, {**flags, "workers.enabled": "false"})
        must_be_shared(resolved, "to load into")
        log_to_stderr(resolved, _NAME)
        node = load_app(app)
        use_settings(node, resolved)
    found = _cache_of(node, cache)
    wanted = _checked(found, keys, keys_from)
    prepare()
    report = anyio.run(partial(_warm, node, found, wanted, concurrency, per_second))
    _tell(found.name, report, as_json=as_json)
    return _FAILED if report.failed else 0


def _cache_of(node: Node, name: str) -> Cache[Any]:
    for cached in node.caches:
        if cached.name == name:
            return cache_of(cached)
    known = ", ".join(each.name for each in node.caches) or "none"
    raise click.UsageError(f"the application has no cache {name!r}; it has {known}")


def _checked(cached: Cache[Any], keys: Sequence[str], keys_from: IO[bytes] | None) -> list[str]:
    """All keys, each once, in their order; a UsageError if one is none of the cache's."""
    if not keys and keys_from is None:
        raise click.UsageError("name at least one KEY, or give --keys-from")
    found: dict[str, None] = {}
    for number, key in enumerate(keys, 1):
        _add(found, cached, f"KEY {number}", key)
    for place, key in _lines(keys_from) if keys_from is not None else ():
        _add(found, cached, place, key)
    return list(found)


def _add(found: dict[str, None], cached: Cache[Any], place: str, key: str) -> None:
    try:
        cached.keying.arguments(key)
    except InvalidKey as error:
        raise click.UsageError(f"{place}: {error}") from None
    found[key] = None
    if len(found) > KEYS_MAX:
        raise click.UsageError(f"{place}: over {KEYS_MAX} keys; give fewer at a time")


def _lines(keys_from: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The keys, each with its place; empty lines are passed over."""
    name, number = getattr(keys_from, "name", "the file"), 0
    while raw := keys_from.readline(LINE_BYTES_MAX + 1):
        number += 1
        place = f"{name}, line {number}"
        if len(raw) > LINE_BYTES_MAX:
            raise click.UsageError(f"{place}: over {LINE_BYTES_MAX} bytes")
        try:
            key = raw.decode().strip()
        except UnicodeDecodeError:
            raise click.UsageError(f"{place}: is not valid UTF-8") from None
        if key:
            yield place, key


async def _warm(
    node: Node,
    cached: Cache[Any],
    keys: Sequence[str],
    concurrency: int,
    per_second: float | None,
) -> WarmReport:
    async with node:
        with view_for(cached.name, len(keys), SystemClock()) as view:
            report = await warm(
                cached,
                keys,
                by_key=True,
                concurrency=concurrency,
                per_second=per_second,
                progress=view.update,
            )
    return report


def _tell(name: str, report: WarmReport, *, as_json: bool) -> None:
    failures = [
        {"key": each.key, "problem": f"{type(each.error).__name__}: {each.error}"}
        for each in report.failures
    ]
    if as_json:
        counts = {each: getattr(report, each) for each in ("asked", "loaded", "fresh", "failed")}
        told = {"cache": name, **counts, "seconds": round(report.seconds, 3), "failures": failures}
        click.echo(msgspec.json.encode(told).decode())
        return
    for each in failures:
        click.echo(f"{each['key']}: {each['problem']}", err=True)
    if report.failed > len(failures):
        click.echo(f"and {report.failed - len(failures)} more", err=True)
    click.echo(
        f"{name}: {report.asked} keys in {report.seconds:.1f} s: {report.loaded} loaded, "
        f"{report.fresh} were fresh, {report.failed} failed"
    )

"""`forebay explain KEY`: in words, why a read of this key hits or misses.

I1  Nothing is changed by looking, and no value is shown.
I2  It needs the server alone; nodes that run add what they know, each within a second.
I3  It looks at a server that others use: one of its own would know nothing; and at a namespace
    that a node has run in.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial

import anyio
import click
import msgspec

from ...coordinator.clock import SystemClock
from ...coordinator.valkey.backend import Backend
from ...schemas.errors import InvalidKey, Unavailable
from ...schemas.keys import Names, check_key
from ...schemas.settings_sources import Resolved
from ..explain.collect import explain, names_at
from ..explain.document import Explanation
from ..explain.renderer import words
from .namespaces import must_be_born
from .options import setting_options
from .sources import load, log_to_stderr, must_be_shared

__all__ = ["command"]

_NAME = "explain"
_NO_SERVER = 3


@click.command("explain", epilog="Example:  forebay explain product:42")
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@setting_options
def command(key: str, as_json: bool, config: str | None, flags: Mapping[str, object]) -> None:
    """Why a read of KEY hits or misses: the entry, its tags and lease, and every node's copy."""
    try:
        check_key(key)
    except InvalidKey as error:
        raise click.UsageError(str(error)) from None
    resolved = load(config, flags)
    must_be_shared(resolved, "to look at")
    log_to_stderr(resolved, _NAME)
    try:
        document = anyio.run(partial(_found_out, resolved, key))
    except Unavailable as error:
        raise _gone(error) from None
    if as_json:
        click.echo(msgspec.json.encode(document).decode())
        return
    for line in words(document):
        click.echo(line)


async def _found_out(resolved: Resolved, key: str) -> Explanation:
    settings = resolved.settings
    async with Backend(
        settings.valkey, client_name=_NAME, origins=resolved.origins, clock=SystemClock()
    ) as backend:
        node, cache = settings.node, settings.cache
        asked = Names(node.namespace, node.shards, cache.version, backend.database)
        await must_be_born(backend.link, asked, resolved)
        names = await names_at(backend.link, asked)
        nonce, bytes_max = secrets.token_hex(16), cache.value_bytes_max
        return await explain(backend, names, key, nonce=nonce, bytes_max=bytes_max)


def _gone(error: Unavailable) -> click.ClickException:
    told = click.ClickException(str(error))
    told.exit_code = _NO_SERVER  # type: ignore[misc]  # click reads it per instance
    return told

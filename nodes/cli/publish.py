"""`forebay publish`: put one event into the cluster's ingress stream.

I1  An event is checked as its readers will check it, before anything is connected. A write to a
    key for which no live member declares a sink is refused, as by ``node.publish``.
I2  It is sent once. A full stream refuses it; when no reply came, the error says that the
    event may be in, and the same command with the same ``--id`` may be repeated.
I3  It goes to a server that others use: one of its own would forget the event at once; and into a
    namespace that a node has run in.

Whether and when the event is applied is the nodes' part; the id of its entry is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import click
import msgspec

from ...coordinator.clock import SystemClock
from ...coordinator.log.sink_directory import SinkDirectory
from ...coordinator.valkey.backend import Backend
from ...coordinator.valkey.scripting import load_scripts, run
from ...schemas.errors import Backpressure, InvalidEvent
from ...schemas.events import read_event
from ...schemas.keys import EVENTS, Names
from ...schemas.settings import Settings
from ...schemas.settings_sources import Resolved
from ..publishing import no_sink
from .namespaces import must_be_born
from .options import setting_options
from .sources import load, log_to_stderr, must_be_shared

__all__ = ["command"]

_NAME = "publish"


@click.group("publish")
def command() -> None:
    """Publish an event: invalidate, write or refresh."""


def _event_options(each: Any) -> Any:
    """What the three have in common besides the settings."""
    each = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")(
        each
    )
    each = click.option(
        "--id", "event_id", metavar="ID", help="A repetition with the same id has no effect."
    )(each)
    return setting_options(each)


@command.command(
    "invalidate", epilog="Example:  forebay publish invalidate product:42 --tag catalog"
)
@_event_options
@click.argument("keys", metavar="KEY...", nargs=-1)
@click.option("--tag", "tags", multiple=True, help="Whatever carries this tag; may be repeated.")
@click.option("--soft", is_flag=True, help="Old values may be served while new ones are loaded.")
def invalidate(keys: tuple[str, ...], tags: tuple[str, ...], soft: bool, **options: Any) -> None:
    """Copies of these keys are old, and whatever carries these tags."""
    if not keys and not tags:
        raise click.UsageError("name at least one KEY or --tag")
    _publish({"type": "invalidate", "keys": keys, "tags": tags, "soft": soft}, **options)


@command.command("write", epilog="Example:  forebay publish write product:42 '{\"price\": 7}'")
@_event_options
@click.argument("key")
@click.argument("value", metavar="JSON")
@click.option(
    "--ttl", type=float, metavar="SECONDS", help="Lifetime; the cache's own if not given."
)
def write(key: str, value: str, ttl: float | None, **options: Any) -> None:
    """Write a value now to the cache and soon to its source; null deletes."""
    try:
        msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="JSON") from None
    body: dict[str, object] = {"type": "write", "key": key, "value": msgspec.Raw(value.encode())}
    if ttl is not None:
        body["ttl"] = ttl
    _publish(body, **options)


@command.command("refresh", epilog="Example:  forebay publish refresh product:42 product:43")
@_event_options
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
def refresh(keys: tuple[str, ...], **options: Any) -> None:
    """Load these keys again, without waiting for a reader."""
    _publish({"type": "refresh", "keys": keys}, **options)


def _publish(
    body: dict[str, object],
    *,
    event_id: str | None,
    as_json: bool,
    config: str | None,
    flags: Mapping[str, object],
) -> None:
    if event_id:
        body["id"] = event_id
    raw = msgspec.json.encode(body)
    resolved = load(config, flags)
    try:
        read_event(raw, bytes_max=resolved.settings.durable.event_bytes_max)
    except InvalidEvent as error:
        raise click.UsageError(str(error)) from None
    must_be_shared(resolved, "to publish to")
    log_to_stderr(resolved, _NAME)
    try:
        entry_id = anyio.run(partial(_send, resolved, raw, body))
    except InvalidEvent as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        stream = _names(resolved.settings).events
        click.echo(msgspec.json.encode({"stream": stream, "id": entry_id}).decode())
    else:
        click.echo(entry_id)


def _names(settings: Settings) -> Names:
    return Names(settings.node.namespace, settings.node.shards)


async def _send(resolved: Resolved, raw: bytes, body: Mapping[str, object]) -> str:
    settings = resolved.settings
    names, bound = _names(settings), settings.durable.events_max
    stream = names.events
    script = load_scripts()["event_publish"]
    async with Backend(
        settings.valkey, client_name=_NAME, origins=resolved.origins, clock=SystemClock()
    ) as backend:
        await must_be_born(backend.link, names, resolved)
        if body["type"] == "write":
            directory = SinkDirectory(backend.link, names, clock=SystemClock())
            for key in await directory.without_sink([str(body["key"])]):
                raise no_sink(key)
        keys = [stream, names.part(EVENTS, "before")]
        reply = await run(backend.link, script, keys, [bound, raw])
    if reply[0] == 0:
        raise Backpressure(stream, reply[1], bound)
    return str(reply[0], "ascii")

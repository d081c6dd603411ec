"""`forebay run --app module:attribute`: a node as a process of its own.

SIGTERM or SIGINT drains it: readiness fails, what is under way is finished, ownership is
handed over, and the exit code is 0, or 4 if time ran out. A second signal stops at once.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import click
import structlog

from ...coordinator.background import background_tasks
from ...coordinator.clock import SystemClock
from ...schemas.errors import ConfigError
from ...schemas.settings_sources import Resolved
from ..logs import configure_logs
from ..node import Node
from ..web.server import serve
from .sources import errors_told, load, setting_options, wants_color

log = structlog.get_logger(__name__)

_DRAIN_TOO_LONG = 4


@click.command("run")
@click.option(
    "--app", envvar="FOREBAY_APP", show_envvar=True, help="The node, as module:attribute."
)
@click.option("--port", type=int, help="Of the HTTP endpoint; 0 takes any free one.")
@setting_options
def command(
    app: str | None, port: int | None, config: str | None, flags: Mapping[str, object]
) -> int:
    """Run a node as a worker until it is told to stop."""
    with errors_told():
        given = {**flags} if port is None else {**flags, "http.port": port}
        resolved = load(config, given)
        settings = resolved.settings
        configure_logs(
            settings.log,
            instance=settings.node.id or str(os.getpid()),
            stream=sys.stderr,
            secrets=[settings.valkey.password],
            color=wants_color(sys.stderr),
        )
        node = load_app(app) if app else Node()
        node.configure(resolved)
        return _loop_run(node, resolved)


def load_app(target: str) -> Node:
    """The node, or what a function without arguments returns.

    Raises:
        ConfigError: there is no such module or attribute, or it is no node.
    """
    module_name, _, attribute = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in (attribute or "node").split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise _no_app(target, str(error)) from error
    if callable(found) and not isinstance(found, Node):
        found = found()
    if not isinstance(found, Node):
        raise _no_app(target, f"it is a {type(found).__name__}, not a node")
    return found


def _no_app(target: str, problem: str) -> ConfigError:
    return ConfigError(
        setting="--app",
        value=target,
        origin="the command line or FOREBAY_APP",
        problem=problem,
        fix="name the module and the attribute that holds the Node, such as shop.cache:node",
    )


def _loop_run(node: Node, resolved: Resolved) -> int:
    options: dict[str, Any] = {}
    try:
        import uvloop

        options["loop_factory"] = uvloop.new_event_loop
    except ImportError:
        pass
    code: int = anyio.run(run_node, node, resolved, backend_options=options)
    return code


async def run_node(node: Node, resolved: Resolved) -> int:
    """Serve until a signal comes; returns the exit code."""
    stop = anyio.Event()
    async with background_tasks() as tasks:
        await tasks.start(_watch_signals, stop)
        await node.start(workers=True)
        async with AsyncExitStack() as stack:
            stack.push_async_exit(node.__aexit__)
            url = await _serve(stack, node, resolved)
            log.info("node.started", url=url, node=node.instance)
            await stop.wait()
            finished = await node.drain()
    return 0 if finished else _DRAIN_TOO_LONG


async def _serve(stack: AsyncExitStack, node: Node, resolved: Resolved) -> str:
    settings = resolved.settings
    if not settings.http.enabled:
        return ""
    address = await stack.enter_async_context(
        serve(
            node,
            settings.http,
            event_bytes_max=settings.durable.event_bytes_max,
            clock=SystemClock(),
            random=random.Random(),
            origin_of=lambda setting: resolved.origins.get(setting, "default"),
        )
    )
    return address.url


async def _watch_signals(
    stop: anyio.Event, *, task_status: Any = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for received in signals:
            if stop.is_set():
                log.warning("node.killed", signal=received.name)
                os._exit(128 + received)
            log.info("node.draining", signal=received.name)
            stop.set()

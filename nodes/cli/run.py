"""`forebay run --app module:attribute`: a node as a process of its own.

P1  The first SIGTERM or SIGINT drains: readiness fails, what is under way is finished,
    ownership is handed over; the exit code is 0, or 4 if accepted work is left undone.
P2  A second signal ends the process at once, also while the application holds the event
    loop up: 128 + its number. So does a first one before there is anything to drain.
P3  A server of our own that dies takes the node with it: whoever started us starts both.
P4  What is wrong with the application or the settings is one line and exit code 2.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import click
import structlog

from ...coordinator.background import background_tasks
from ...coordinator.valkey.embedded import EmbeddedServer
from ...schemas.errors import ConfigError, ForebayError, ProcessFailed
from ..logs import configure_logs
from ..node import Node, enter, running_parts, use_settings
from .options import setting_options
from .reloads import reloads, watch
from .sources import errors_told, file_in_force, load, wants_color

log = structlog.get_logger(__name__)

_UNDRAINED = 4
_SIGNALLED = 128


@click.command("run")
@click.option(
    "--app", envvar="FOREBAY_APP", show_envvar=True, help="The node, as module:attribute."
)
@click.option("--host", help="Address that the HTTP endpoint listens on.")
@click.option("--port", type=int, help="Port of the HTTP endpoint; 0 takes any free one.")
@setting_options
def command(
    app: str | None,
    host: str | None,
    port: int | None,
    config: str | None,
    flags: Mapping[str, object],
) -> int:
    """Run a node as a worker until it is told to stop."""
    with errors_told():
        named = {"host": host, "port": port}
        given = {**flags, **{name: value for name, value in named.items() if value is not None}}
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
        use_settings(node, resolved, lambda: load(config, given))
        found = file_in_force(config)
        watched = found[0] if found else None
        # Before the event loop runs: this would block it.
        importlib.import_module("..web.server", __package__)
        code: int = anyio.run(run_node, node, watched, backend_options=_fast_loop())
        return code


def load_app(target: str) -> Node:
    """The node, or what a function without arguments returns.

    Raises:
        ConfigError: there is no such module or attribute, it fails, or it is no node.
    """
    module_name, _, attribute = target.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in (attribute or "node").split("."):
            found = getattr(found, part)
        if callable(found) and not isinstance(found, Node):
            found = found()
    except ForebayError:
        raise
    except Exception as error:
        raise _no_app(target, _what_failed(error)) from error
    if not isinstance(found, Node):
        raise _no_app(target, f"it is a {type(found).__name__}, not a node")
    return found


def _what_failed(error: Exception) -> str:
    """The error, and which line of the application it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, importlib.__file__)
    places = [f for f in frames if f.filename not in ours and not f.filename.startswith("<")]
    where = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{where}"


def _no_app(target: str, problem: str) -> ConfigError:
    return ConfigError(
        setting="--app",
        value=target,
        origin="the command line or FOREBAY_APP",
        problem=problem,
        fix="name the module and the attribute that holds the Node, such as shop.cache:node",
    )


def _fast_loop() -> dict[str, Any]:
    try:
        import uvloop
    except ImportError:
        return {}
    return {"loop_factory": uvloop.new_event_loop}


async def run_node(node: Node, watched: Path | None) -> int:
    """Serve until a signal comes; returns the exit code. ``watched`` says what the limits are."""
    stop = anyio.Event()
    with anyio.CancelScope() as life:
        with _signals() as signals:
            signals.first = lambda _: life.cancel()
            async with AsyncExitStack() as stack:
                await enter(node, workers=True)
                stack.push_async_exit(node.__aexit__)
                tasks = await stack.enter_async_context(background_tasks())
                tasks.start_soon(_fail_with, running_parts(node).backend.server)
                url = await stack.enter_async_context(node.serving())
                signals.first = lambda _: stop.set()
                reload = stack.enter_context(reloads(node.reload_limits))
                if watched is not None:
                    tasks.start_soon(watch, watched, reload)
                log.info("node.started", url=url, node=node.instance)
                await stop.wait()
                log.info("node.draining", signal=signals.name)
                finished = await node.drain()
        return 0 if finished else _UNDRAINED
    return _SIGNALLED + signals.number


async def _fail_with(server: EmbeddedServer | None) -> None:
    if server is not None:
        await server.died.wait()
        raise ProcessFailed("the embedded valkey-server", "ended by itself; its log says why")


class _Signals:
    """What came, and what to do when the first one comes: called in the event loop."""

    def __init__(self) -> None:
        self.number = 0
        self.first: Callable[[int], None] = lambda _: None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Handlers of the interpreter, not of the loop: they run while the loop is held up, too."""
    signals, loop = _Signals(), asyncio.get_running_loop()

    def handle(number: int, _: FrameType | None) -> None:
        if signals.number:
            os._exit(_SIGNALLED + number)
        signals.number = number
        loop.call_soon_threadsafe(lambda: signals.first(number))

    before = {each: signal.signal(each, handle) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

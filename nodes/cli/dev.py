"""``forebay dev``: Valkey, three nodes and a replay of one day of real flights, in one command.

I1  It needs only this package: Valkey is embedded unless a URL is set.
I2  SIGINT or SIGTERM stops everything in order with exit code 0; a second signal kills everything.
I3  With ``--once`` the exit code is 0 only if all checks pass, and 1 if it is interrupted.
I4  With ``--json`` stdout holds one JSON document; all other output goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import anyio
import anyio.abc
import click
import msgspec

from ...coordinator.background import background_tasks
from ...coordinator.clock import SystemClock
from ...schemas.errors import ConfigError, ProcessFailed
from ...schemas.masking import escape_controls
from ...schemas.settings import Log, Secret, Settings
from ...schemas.settings_names import FIELDS
from ...schemas.settings_sources import Resolved
from ..dev.scene import Outcome, Plan
from ..dev.session import Session
from ..dev.view import View, outcome_lines, prepare, view_for
from ..logs import configure_logs
from .options import setting_options
from .sources import errors_told, load

NAMESPACE = "flights"
_ONCE_DURATION_S = 8.0
_ENDLESS_DURATION_S = 120.0
_SHOW_EVERY_S = 1.0
_FOREIGN_PREFIXES = ("FOREBAY_", "VALKEY_")
_FOREIGN = ("CACHE_VER", "RATE_MAX_TOKENS", "RATE_WINDOW_SEC", "CREDENTIALS_DIRECTORY")
_OURS = ("node.id", "node.namespace", "http.enabled", "http.host", "http.port", "log.format")
_OF_A_GIVEN_SERVER = ("url", "reader_url", "username", "password", "fake", "embedded_dir")


@click.command("dev")
@setting_options
@click.option("--once", is_flag=True, help="Replay one day, check the result, and exit.")
@click.option(
    "--json", "as_json", is_flag=True, help="With --once: print the outcome as JSON on stdout."
)
@click.option(
    "--kill", is_flag=True, help="Kill one node half-way through the day, and restart it."
)
@click.option(
    "--nodes", type=click.IntRange(1, 16), default=3, show_default=True, help="Number of nodes."
)
@click.option(
    "--duration",
    type=click.FloatRange(0, 86_400),
    metavar="SECONDS",
    help=f"Duration of a day.  [default: {_ENDLESS_DURATION_S:g}; --once: {_ONCE_DURATION_S:g}]",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_000),
    default=8642,
    show_default=True,
    help="HTTP port of the first node; 0: any free ports.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 10_000),
    default=150.0,
    show_default=True,
    help="Reads of boards per second.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of database and logs; it is kept.  [default: temporary]",
)
def command(
    config: str | None,
    flags: Mapping[str, object],
    once: bool,
    as_json: bool,
    kill: bool,
    nodes: int,
    duration: float | None,
    port: int,
    rate: float,
    data_dir: Path | None,
) -> int:
    """Try Forebay: departure boards of the New York airports, updated while flights depart."""
    if as_json and not once:
        raise click.UsageError("--json needs --once")
    if once and data_dir is not None and (data_dir / "flights.db").exists():
        raise click.UsageError(f"--once needs a new database, but {data_dir} already contains one")
    with errors_told():
        resolved = load(config, flags)
        _refuse_fake(resolved)
    plan = Plan(
        settings=resolved.settings,
        origins=resolved.origins,
        environ=_plain_environ(os.environ),
        node_environ=_node_environ(resolved.settings),
        namespace=_namespace(resolved),
        nodes=nodes,
        port=port,
        duration_s=_duration_s(duration, once=once),
        rate=rate,
        once=once,
        kill=kill,
        data_dir=data_dir,
    )
    configure_logs(Log(level="error"), instance="dev", stream=sys.stderr)
    prepare()
    try:
        outcome = anyio.run(_run, plan, as_json)
    except ExceptionGroup as group:
        failed = _process_failed(group)
        if failed is None:
            raise
        _report(failed)
        return failed.exit_code
    except ProcessFailed as failed:
        _report(failed)
        return failed.exit_code
    return _exit_code(outcome, once=once, as_json=as_json)


async def _run(plan: Plan, as_json: bool) -> Outcome | None:
    session = Session(plan, clock=SystemClock())
    view = view_for(session.scene, plan, as_json=as_json)
    async with background_tasks() as tasks:
        await tasks.start(_obey_signals, session)
        tasks.start_soon(_show, view)
        with view:
            return await session.run()


async def _obey_signals(
    session: Session, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        asked = 0
        async for _ in signals:
            asked += 1
            if asked == 1:
                session.scene.notes.append("stopping; repeat the signal to kill all processes")
                session.cancel()
            else:
                session.kill_all()


async def _show(view: View) -> None:
    while True:
        view.update()
        await anyio.sleep(_SHOW_EVERY_S)


def _exit_code(outcome: Outcome | None, *, once: bool, as_json: bool) -> int:
    if outcome is None:
        if as_json:
            click.echo('{"ok": false, "interrupted": true}')
        return 1 if once else 0
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcome)).decode())
    else:
        for line in outcome_lines(outcome):
            click.echo(line)
    return 0 if outcome.ok else 1


def _process_failed(group: BaseExceptionGroup[BaseException]) -> ProcessFailed | None:
    found = group.subgroup(ProcessFailed)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]  # type: ignore[assignment]
    return found


def _report(failed: ProcessFailed) -> None:
    for line in failed.said.splitlines():
        click.echo(f"  {failed.name} | {escape_controls(line)}", err=True)
    click.echo(f"Error: {failed}", err=True)


def _refuse_fake(resolved: Resolved) -> None:
    if resolved.settings.valkey.fake and not resolved.settings.valkey.url:
        raise ConfigError(
            setting="valkey.fake",
            value="true",
            origin=resolved.origins["valkey.fake"],
            problem="fakeredis works in one process only, and the demo has several",
            fix="unset it, or use it with `forebay run`",
        )


def _namespace(resolved: Resolved) -> str:
    chosen = resolved.origins.get("node.namespace", "default") != "default"
    return resolved.settings.node.namespace if chosen else NAMESPACE


def _duration_s(given: float | None, *, once: bool) -> float:
    if given is not None:
        return given
    return _ONCE_DURATION_S if once else _ENDLESS_DURATION_S


def _plain_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings; the nodes get the resolved settings instead."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_FOREIGN_PREFIXES) and name not in _FOREIGN
    }


def _node_environ(settings: Settings) -> dict[str, str]:
    """The settings that differ from their defaults, as environment of the nodes."""
    changed = {}
    for name, field in FIELDS.items():
        value = getattr(getattr(settings, field.section), field.leaf)
        given = field.section == "valkey" and field.leaf in _OF_A_GIVEN_SERVER
        if value == field.default or name in _OURS or (given and not settings.valkey.url):
            continue
        changed[field.env_name] = _as_text(value)
    return changed


def _as_text(value: object) -> str:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)

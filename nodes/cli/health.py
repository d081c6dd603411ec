"""`forebay health`: ask a running node whether it is well. Made for probes of containers.

I1  One line, and exit 0 if the node says yes; 1 if it says no, or says nothing in time.
I2  The node is where its settings say: ``http.host`` and ``http.port``, of the environment, the
    file and ``--set``, as for `forebay run`. No other setting can make a probe fail.
I3  With ``--url`` nothing but the standard library is imported, and never what logs, since it
    runs every few seconds.

It asks over HTTP, like anybody else: what it says is what a load balancer is told.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import click

from .options import any_setting_options

__all__ = ["command"]

_SETTINGS = ("http.enabled", "http.host", "http.port")
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- where a node listens that listens on all
_PATHS = {"ready": "/readyz", "live": "/livez", "start": "/startupz"}
_BODY_BYTES_MAX = 4_096
_LINE_CHARS_MAX = 200


class Answer(NamedTuple):
    ok: bool
    detail: str


@click.command("health")
@click.option(
    "--url", help="http://HOST:PORT of the node; by default as http.host and http.port say."
)
@click.option(
    "--check",
    type=click.Choice(list(_PATHS)),
    default="ready",
    show_default=True,
    help="The probe to ask.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.01, 60),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for each part of the answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@any_setting_options
def command(
    url: str | None,
    check: str,
    timeout: float,
    as_json: bool,
    config: str | None,
    flags: Mapping[str, object],
) -> int:
    """Ask a running node whether it is well: exit 0 if it is, 1 if not."""
    host, port, base = _in_settings(config, flags) if url is None else _target(url)
    answer = _ask(host, port, base + _PATHS[check], timeout)
    if as_json:
        click.echo(json.dumps({"check": check, "ok": answer.ok, "detail": answer.detail}))
    else:
        click.echo(f"{check}: {answer.detail}", err=not answer.ok)
    return 0 if answer.ok else 1


def _in_settings(config: str | None, flags: Mapping[str, object]) -> tuple[str, int, str]:
    """Where a node with these settings listens."""
    from .sources import errors_told, values

    with errors_told():
        found = values(_SETTINGS, config, flags)
    enabled, host, port = (found[name] for name in _SETTINGS)
    if not enabled:
        raise click.UsageError("http.enabled = false: such a node answers no probe; give --url")
    if not port:
        raise click.UsageError("http.port = 0: the node takes any free port; give --url")
    return _ANY.get(host, host), port, ""


def _target(url: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    else:
        if (
            parts.scheme == "http"
            and host
            and not (parts.query or parts.fragment or parts.username)
        ):
            return host, port or 80, parts.path.rstrip("/")
    raise click.BadParameter("write http://HOST:PORT", param_hint="--url")


def _ask(host: str, port: int, path: str, timeout_s: float) -> Answer:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Accept": "text/plain", "Connection": "close"})
        response = connection.getresponse()
        line = _first_line(response.read(_BODY_BYTES_MAX))
    except TimeoutError:
        return Answer(False, f"no answer from {host}:{port} within {timeout_s:g} s")
    except OSError as error:
        return Answer(False, f"{host}:{port}: {error.strerror or type(error).__name__}")
    except http.client.HTTPException:
        return Answer(False, f"{host}:{port} does not speak HTTP")
    finally:
        connection.close()
    if response.status == http.client.OK:
        return Answer(True, line or "ok")
    return Answer(False, f"{response.status} {line}".rstrip())


def _first_line(body: bytes) -> str:
    """Printable, and short enough for one line of a log."""
    text = body.decode(errors="replace").strip().partition("\n")[0].strip()
    return "".join(each if each.isprintable() else "?" for each in text)[:_LINE_CHARS_MAX]

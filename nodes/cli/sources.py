"""Where settings come from on this machine: the one place that reads environment and files.

I1  The configuration file is the first of: the one given by ``--config``, the one named
    by FOREBAY_CONFIG, ``./forebay.toml``, ``/etc/forebay/forebay.toml``. One that was
    named must be there; one that is there must be readable.
I2  Whatever is wrong ends as one line and an exit code, never as a traceback.
I3  No file of more than 1 MiB, no secret of more than 64 KiB is read, and nothing but a regular
    file: a FIFO would wait for whoever writes to it.
I4  Reading settings imports no logging, so that `forebay health` may do it every few seconds.

What the text means is decided in ``schemas.settings_sources``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from msgspec import structs

from ...coordinator.files import check_readable, read_file
from ...schemas.errors import ConfigError
from ...schemas.settings_names import plainly
from ...schemas.settings_sources import FileSource, Resolved, resolve, values_of

__all__ = [
    "DEFAULT_FILES",
    "RefusedSettings",
    "errors_told",
    "load",
    "log_to_stderr",
    "must_be_shared",
    "process_environment",
    "read_secret",
    "values",
    "wants_color",
]

DEFAULT_FILES = (Path("forebay.toml"), Path("/etc/forebay/forebay.toml"))
_FILE_BYTES_MAX = 1_048_576
_SECRET_BYTES_MAX = 65_536
_PATHS = ("tls_ca_file", "tls_cert_file", "tls_key_file")


class RefusedSettings(click.ClickException):
    """A ConfigError on its way to the person at the terminal."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it per instance


@contextmanager
def errors_told() -> Iterator[None]:
    """Turns a ConfigError into one line on stderr and its exit code."""
    try:
        yield
    except ConfigError as error:
        raise RefusedSettings(error) from None


def load(
    config: str | None = None,
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """The settings in force for this process."""
    given = os.environ if environ is None else environ
    resolved = resolve(
        file=_file(config, given), environ=given, flags=flags or {}, read_secret=read_secret
    )
    for leaf in _PATHS:
        _must_be_readable(f"valkey.{leaf}", getattr(resolved.settings.valkey, leaf), resolved)
    return resolved


def process_environment() -> Mapping[str, str]:
    """The environment of this process, for what is no setting."""
    return os.environ


def values(
    names: Iterable[str],
    config: str | None,
    flags: Mapping[str, object],
    *,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values in force of these settings, whatever is wrong with all others."""
    given = os.environ if environ is None else environ
    return values_of(names, file=_file(config, given), environ=given, flags=flags)


def read_secret(path: str) -> str | None:
    """The content of a secret's file; None if there is none."""
    try:
        return _read(Path(path), _SECRET_BYTES_MAX)
    except (FileNotFoundError, NotADirectoryError):
        return None


def must_be_shared(resolved: Resolved, purpose: str) -> None:
    """Refuse a server of our own; ``purpose`` such as "to publish to".

    Raises:
        ConfigError: no server is named.
    """
    if resolved.settings.valkey.url:
        return
    raise ConfigError(
        setting="valkey.url",
        value="unset",
        origin=resolved.origins["valkey.url"],
        problem=f"there is no server that others use, {purpose}",
        fix="give --url, or set FOREBAY_URL",
    )


def log_to_stderr(resolved: Resolved, instance: str) -> None:
    """For a command: one wants to hear of trouble only, unless asked otherwise."""
    from ..logs import configure_logs

    settings, asked = resolved.settings, resolved.origins["log.level"] != "default"
    configure_logs(
        settings.log if asked else structs.replace(settings.log, level="error"),
        instance=instance,
        stream=sys.stderr,
        secrets=[settings.valkey.password],
        color=wants_color(sys.stderr),
    )


def wants_color(stream: TextIO) -> bool:
    """Whether to colour what is written there; NO_COLOR forbids it."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def file_in_force(
    config: str | None, environ: Mapping[str, str] | None = None
) -> tuple[Path, str] | None:
    """The file that ``load`` reads, and who named it; None: it reads none."""
    named, origin = config, "flag --config"
    if named is None:
        given = os.environ if environ is None else environ
        named, origin = given.get("FOREBAY_CONFIG") or None, "environment FOREBAY_CONFIG"
    if named is not None:
        return Path(named), origin
    found = next((path for path in DEFAULT_FILES if _is_there(path)), None)
    return (found, "the default place") if found else None


def _file(config: str | None, environ: Mapping[str, str]) -> FileSource | None:
    found = file_in_force(config, environ)
    return _file_source(*found) if found else None


def _is_there(path: Path) -> bool:
    """True also for a file that we may not even look at: reading it then says so."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _file_source(path: Path, origin: str) -> FileSource:
    try:
        return FileSource(
            path=plainly(str(path)), text=_read(path, _FILE_BYTES_MAX), place=str(path)
        )
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or type(error).__name__}"
    except ValueError:
        problem = "it is too large or not UTF-8"
    raise ConfigError(
        setting="the configuration file",
        value=plainly(str(path)),
        origin=origin,
        problem=problem,
        fix="name a readable TOML file, or none",
    )


def _read(path: Path, bytes_max: int) -> str:
    return read_file(path, bytes_max).decode("utf-8-sig")


def _must_be_readable(name: str, path: str, resolved: Resolved) -> None:
    if not path:
        return None
    try:
        return check_readable(path)
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or type(error).__name__}"
    raise ConfigError(
        setting=name,
        value=plainly(path),
        origin=resolved.origins[name],
        problem=problem,
        fix="name a readable PEM file",
    )

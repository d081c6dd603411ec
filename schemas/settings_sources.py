"""From file text, environment and flags to one ``Settings``, and where each value came from.

I1  The order is defaults < file < neutral names < mounted secrets < ``FOREBAY_*`` < flags.
I2  Whatever cannot be used is a ConfigError with the setting, its masked value, the
    origin, the problem and the fix. Nothing unknown is ignored in file or flags.
I3  Credentials leave the URL: they end up in ``valkey.username`` and ``valkey.password``,
    so that no ``repr`` of the settings shows them. A URL that is overridden takes its
    credentials with it; they are never sent to another server.
I4  No secret is in ``Resolved``, in its rows, in a warning or in an error, except inside a
    ``Secret``.
I5  An environment that describes a server and gives no address is a ConfigError: no other
    server is used instead. ``valkey.fake`` of the environment, or of a flag, goes before
    addresses by neutral names, with a warning.

No file, environment or clock is touched here: text, mappings and ``read_secret`` are
given. ``read_secret(path)`` returns the content, or None if there is no such file; it
raises OSError if the file cannot be read and ValueError if it is too large.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct, structs

from .errors import ConfigError
from .limits import Limit
from .settings import HostName, Limits, Secret, Settings
from .settings_checks import check
from .settings_env import (
    FILE_RANK,
    FLAG_RANK,
    NEUTRAL_RANK,
    OWN_RANK,
    Found,
    ReadSecret,
    from_environment,
    from_secret_file,
)
from .settings_limits import named_limits
from .settings_names import (
    FIELDS,
    SECTIONS,
    Field,
    expectation,
    known_names,
    nearest,
    plainly,
    shown,
)
from .settings_neutral import refuse_without_address
from .urls import Endpoint, endpoint_of, parse_url

__all__ = [
    "FLAGS",
    "FileSource",
    "Resolved",
    "SettingRow",
    "SettingWarning",
    "describe",
    "resolve",
    "values_of",
]

_TEXT_CHARS_MAX = 4_096
_DOTS_MAX = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BOUNDS = frozenset(field.name for field in structs.fields(Limits))
_TRUTH = frozenset({"true", "false", "1", "0"})

#: flags with a name of their own; any other setting is given by its dotted name
FLAGS: Mapping[str, str] = {
    "url": "valkey.url",
    "reader_url": "valkey.reader_url",
    "fake": "valkey.fake",
    "startup_timeout_ms": "valkey.startup_timeout_ms",
    "namespace": "node.namespace",
    "id": "node.id",
    "host": "http.host",
    "port": "http.port",
    "log_level": "log.level",
    "log_format": "log.format",
    "drain_ms": "workers.drain_ms",
}


class FileSource(Struct, frozen=True, kw_only=True):
    """The text of a configuration file."""

    path: str  #: as it is shown to people
    text: str
    place: str = ""  #: the path as the system knows it

    def __repr__(self) -> str:
        return f"FileSource({self.path!r})"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("path", self.path)]


class SettingWarning(Struct, frozen=True, kw_only=True):
    """A value that is not used, or that others may know, and why."""

    setting: str
    value: str  #: masked
    origin: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value} (from {self.origin}): {self.problem}; {self.fix}"


class Resolved(Struct, frozen=True, kw_only=True):
    """The settings in force, and by dotted name where each came from."""

    settings: Settings
    origins: dict[str, str]
    secret_files: dict[str, str] = {}  #: by the name of a secret, the file that it is from
    warnings: tuple[SettingWarning, ...] = ()  #: in the order of the settings' definition


class SettingRow(Struct, frozen=True, kw_only=True):
    """One line of `forebay config show`."""

    name: str
    value_shown: str
    origin: str


def resolve(
    *,
    file: FileSource | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    read_secret: ReadSecret,
) -> Resolved:
    best: dict[str, Found] = {}
    lost: list[Found] = []
    in_file = list(_from_file(file, read_secret)) if file else []
    in_flags = list(_from_flags(flags))
    in_environment = from_environment(environ, read_secret, in_file + in_flags)
    for found in in_file + in_environment + in_flags:
        held = best.get(found.name)
        if held is None or found.rank >= held.rank:
            best[found.name] = found
            lost += [held] if held else []
        else:
            lost.append(found)
    not_used = _fake_before_neutral_addresses(best)
    if not _names_server(best):
        refuse_without_address(environ)
    _part_from_credentials(best)
    origins = {name: best[name].origin if name in best else "default" for name in FIELDS}
    settings = _build({name: _decoded(found) for name, found in best.items()})
    check(settings, origins)
    warnings = (*_overridden(lost), *not_used, *_reader(settings, origins))
    return Resolved(
        settings=settings,
        origins=origins,
        secret_files={n: f.file for n, f in best.items() if f.file and FIELDS[n].secret},
        warnings=warnings,
    )


def _names_server(best: Mapping[str, Found]) -> bool:
    """Whether a URL is given, or a fake server asked for."""
    url, fake = best.get("valkey.url"), best.get("valkey.fake")
    return bool(url and url.value) or bool(fake and _decoded(fake))


def _fake_before_neutral_addresses(best: dict[str, Found]) -> list[SettingWarning]:
    """Drop these addresses, in place, where a fake server is asked for by the environment or a
    flag. One that comes from elsewhere contradicts it, see ``check``.
    """
    fake = best.get("valkey.fake")
    if fake is None or fake.rank < NEUTRAL_RANK or not _decoded(fake):
        return []
    found = []
    for name in ("valkey.url", "valkey.reader_url"):
        if name in best and best[name].rank == NEUTRAL_RANK:
            dropped = best.pop(name)
            problem = (
                f"it is not used, since valkey.fake is set ({fake.origin}): all data is in this"
                " process, and lost with it"
            )
            fix = "unset valkey.fake to use the server"
            found.append(_unused(dropped, problem, fix))
    return found


def _overridden(lost: Iterable[Found]) -> Iterator[SettingWarning]:
    """What is wrong with URLs that were overridden; they may be in force tomorrow."""
    for found in lost:
        if FIELDS[found.name].url and found.value:
            try:
                parse_url(_text(found), setting=found.name, origin=found.origin)
            except ConfigError as error:
                problem = f"it is overridden, and {error.problem}"
                yield _unused(found, problem, error.fix)


def _reader(settings: Settings, origins: Mapping[str, str]) -> Iterator[SettingWarning]:
    reader, primary = endpoint_of(settings.valkey, reader=True), endpoint_of(settings.valkey)
    if reader is None or primary is None or reader.address == primary.address:
        return
    name = "valkey.reader_url"
    yield SettingWarning(
        setting=name,
        value=shown(name, settings.valkey.reader_url),
        origin=origins[name],
        problem="it is not used: all reads go to valkey.url, since a replica may lag behind",
        fix="unset it",
    )


def _unused(found: Found, problem: str, fix: str) -> SettingWarning:
    return SettingWarning(
        setting=found.name,
        value=shown(found.name, found.value),
        origin=found.origin,
        problem=problem,
        fix=fix,
    )


def describe(resolved: Resolved) -> list[SettingRow]:
    """All settings in the order of their definition, secrets masked."""
    rows = []
    for name, field in FIELDS.items():
        value = getattr(getattr(resolved.settings, field.section), field.leaf)
        origin = resolved.origins.get(name, "default")
        rows.append(SettingRow(name=name, value_shown=shown(name, value), origin=origin))
    return rows


def values_of(
    names: Iterable[str],
    *,
    file: FileSource | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
) -> dict[str, Any]:
    """The values in force of these settings, whatever is wrong with all others. No secrets.

    Raises:
        ConfigError: one of them cannot be used, the file is not TOML, or a flag is no setting.
    """
    tables = _parsed(file, f"file {file.path}") if file else {}
    given = {found.name: found for found in _from_flags(flags)}
    values = {}
    for name in names:
        field = FIELDS[name]
        table, text = tables.get(field.section), environ.get(field.env_name)
        found = given.get(name)
        if found is None and text:
            origin = f"environment {field.env_name}"
            found = Found(name=name, value=text, origin=origin, rank=OWN_RANK)
        if found is None and file and isinstance(table, dict) and field.leaf in table:
            found = _file_value(name, table[field.leaf], table, f"file {file.path}", _no_secret)
        values[name] = field.default if found is None else _decoded(found)
    return values


def _no_secret(_: str) -> None:
    return None


def _from_file(file: FileSource, read_secret: ReadSecret) -> Iterator[Found]:
    origin = f"file {file.path}"
    for section, table in _parsed(file, origin).items():
        if section not in SECTIONS:
            raise _unknown(section, origin)
        if not isinstance(table, dict):
            fix = f"write [{section}] and its settings below"
            raise _refused(section, "***", origin, "is a section, not a value", fix)
        if section == "limits":
            named = {k: v for k, v in table.items() if isinstance(v, dict) and k not in _BOUNDS}
            table = {k: v for k, v in table.items() if k not in named}
            yield from _named_limits(named, origin)
        for leaf, value in table.items():
            found = _file_value(f"{section}.{leaf}", value, table, origin, read_secret)
            yield structs.replace(found, file=found.file or file.place)


def _named_limits(tables: dict[str, Any], origin: str) -> Iterator[Found]:
    if tables:
        limits = named_limits(tables, origin)
        yield Found(
            name="limiter.named", value=limits, origin=origin, rank=FILE_RANK, textual=False
        )


def _file_value(
    name: str, value: object, table: dict[str, Any], origin: str, read_secret: ReadSecret
) -> Found:
    if name in FIELDS:
        return Found(name=name, value=value, origin=origin, rank=FILE_RANK, textual=False)
    plain = name.removesuffix("_file")
    if plain == name or plain not in FIELDS or not FIELDS[plain].may_be_file:
        raise _unknown(name, origin)
    if plain.partition(".")[2] in table:
        raise _refused(plain, "***", origin, f"{plain} and {name} are both set", "keep one")
    if not isinstance(value, str):
        raise _refused(name, "***", origin, "must be text, the path of a file", "put it in quotes")
    origin = f"{origin}, file {plainly(value)}"
    found = from_secret_file(plain, value, read_secret, origin=origin, rank=FILE_RANK)
    if found is None:
        raise _refused(plain, "***", origin, "the file is not there", "correct the path")
    return found


def _parsed(file: FileSource, origin: str) -> dict[str, Any]:
    for number, line in enumerate(file.text.splitlines(), 1):
        if line.count(".") > _DOTS_MAX:  # tomllib's time grows with the square of a dotted key
            problem = f"has more than {_DOTS_MAX} dots in line {number}"
            fix = "write a long list on several lines"
            raise _refused("the configuration", "***", origin, problem, fix)
    try:
        return tomllib.loads(file.text)
    except (ValueError, RecursionError) as error:
        problem = plainly(f"is not TOML: {error}")
    raise _refused("the configuration", "***", origin, problem, "correct that line")


def _from_flags(flags: Mapping[str, object]) -> Iterator[Found]:
    for flag, value in flags.items():
        if value is None:
            continue
        name = FLAGS.get(flag, flag)
        spelled = f"--{flag.replace('_', '-')}" if flag in FLAGS else f"--set {flag}"
        origin = f"flag {plainly(spelled)}"
        if name not in FIELDS:
            raise _unknown(name, origin)
        textual = isinstance(value, str)
        yield Found(name=name, value=value, origin=origin, rank=FLAG_RANK, textual=textual)


def _part_from_credentials(best: dict[str, Found]) -> None:
    """Move user names and passwords out of the URLs, in place."""
    for name in ("valkey.url", "valkey.reader_url"):
        found = best.get(name)
        if found is None or not found.value:
            continue
        text = _text(found)
        endpoint = parse_url(text, setting=name, origin=found.origin)
        best[name] = structs.replace(found, value=endpoint.address_url)
        if name == "valkey.url":
            _take_credentials(endpoint, found, best)
        else:
            _same_credentials(endpoint, found, best)


def _take_credentials(endpoint: Endpoint, found: Found, best: dict[str, Found]) -> None:
    pairs = (("username", endpoint.username), ("password", endpoint.password.reveal()))
    for leaf, value in pairs:
        name = f"valkey.{leaf}"
        held = best.get(name)
        if not value or (held is not None and held.rank > found.rank):
            continue
        if held is not None and held.rank == found.rank and held.value != value:
            problem = f"valkey.url, from {found.origin}, holds another one"
            raise _refused(
                name, shown(name, held.value), held.origin, problem, "take it out of the URL"
            )
        origin = f"{found.origin}, in the URL"
        best[name] = Found(name=name, value=value, origin=origin, rank=found.rank, file=found.file)


def _same_credentials(endpoint: Endpoint, found: Found, best: dict[str, Found]) -> None:
    """The reader is asked as the same user; credentials in its URL may only repeat it."""
    pairs = (("username", endpoint.username), ("password", endpoint.password.reveal()))
    for leaf, value in pairs:
        held = best.get(f"valkey.{leaf}")
        if value and (held is None or held.value != value):
            problem = f"its {leaf} is not valkey.{leaf}"
            fix = "primary and reader share one user; take it out of this URL"
            raise _refused(found.name, shown(found.name, found.value), found.origin, problem, fix)


def _decoded(found: Found) -> object:
    field, value = FIELDS[found.name], found.value
    if found.textual and found.name in _LISTS:
        return _LISTS[found.name](field, found)
    if field.secret:
        return Secret(_text(found))
    if field.name == "cache.version" and type(value) is int:
        value = str(value)  # a label that looks like a number needs no quotes in a file or in code
    elif field.text:
        _text(found)
    elif found.textual and isinstance(value, str):
        value = value.strip()
        if bool in _parts(field) and value.lower() not in _TRUTH:
            raise _wrong(field, found)
    try:
        return msgspec.convert(value, field.type, strict=not found.textual)
    except (msgspec.ValidationError, ValueError):
        raise _wrong(field, found) from None


def _limits_in_json(field: Field, found: Found) -> tuple[Limit, ...]:
    try:
        tables = msgspec.json.decode(_text(found), type=dict[str, dict[str, Any]])
    except msgspec.DecodeError:
        raise _wrong(field, found) from None
    return named_limits(tables, found.origin)


def _hosts_in_text(field: Field, found: Found) -> tuple[str, ...]:
    names = [part.strip() for part in _text(found).split(",") if part.strip()]
    try:
        return msgspec.convert(names, tuple[HostName, ...])
    except msgspec.ValidationError:
        raise _wrong(field, found) from None


_LISTS = {"limiter.named": _limits_in_json, "http.hosts": _hosts_in_text}


def _parts(field: Field) -> tuple[Any, ...]:
    return getattr(field.type, "__args__", (field.type,))


def _text(found: Found) -> str:
    value = found.value
    if not isinstance(value, str):
        raise _wrong(FIELDS[found.name], found)
    too_long = len(value) > _TEXT_CHARS_MAX
    if too_long or _CONTROL.search(value):
        problem = (
            f"is longer than {_TEXT_CHARS_MAX} characters"
            if too_long
            else ("holds a control character, such as a line end")
        )
        masked = shown(found.name, value)
        raise _refused(found.name, masked, found.origin, problem, "correct it")
    return value


def _wrong(field: Field, found: Found) -> ConfigError:
    default = shown(field.name, field.default)
    fix = "change it, or remove it" + (f" for the default, {default}" if default else "")
    choices = [each for each in _parts(field) if isinstance(each, str)]
    close = nearest(str(found.value), choices) if choices else ""
    if close:
        fix = f"did you mean {close}?"
    problem, value = f"must be {expectation(field)}", shown(field.name, found.value)
    if isinstance(found.value, str) and not found.textual and not field.secret:
        value = f'"{value}"'  # in a file "80" is no number
    return _refused(field.name, value, found.origin, problem, fix)


def _build(values: Mapping[str, object]) -> Settings:
    sections: dict[str, Any] = {}
    for section in structs.fields(Settings):
        prefix = section.name + "."
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        sections[section.name] = section.type(**own)
    return Settings(**sections)


def _unknown(name: str, origin: str) -> ConfigError:
    section = name.partition(".")[0]
    close = nearest(name, [*FIELDS, *([] if "." in name else SECTIONS)])
    if close:
        fix = f"did you mean {close}?"
    elif section in SECTIONS:
        fix = known_names(section)
    else:
        fix = "the sections are " + ", ".join(SECTIONS)
    return _refused(plainly(name), "***", origin, "is no setting", fix)


def _refused(name: str, masked: str, origin: str, problem: str, fix: str) -> ConfigError:
    return ConfigError(setting=name, value=masked, origin=origin, problem=problem, fix=fix)

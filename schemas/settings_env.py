"""Which environment variables are settings, and what they say.

I1  A ``FOREBAY_*`` name that nothing reads is refused, with the nearest one that exists;
    except what Kubernetes adds for a service of that name.
I2  Neutral names (``VALKEY_*``, ``CACHE_VER``, ``RATE_*``) are honoured unless a
    ``FOREBAY_*`` name sets the same; unknown ones among them belong to other software.
I3  A variable that is set but empty counts as not set.
I4  NAME and NAME_FILE together are refused; a file that NAME_FILE names must be there,
    while the places where systemd and container engines put secrets may be empty.

A neutral address is VALKEY_URL, or else VALKEY_HOST with VALKEY_PORT, VALKEY_DB and
VALKEY_TLS. Values are still text here, ``settings_sources`` decodes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping

from msgspec import Struct

from .errors import ConfigError
from .settings_names import FIELDS, SECTIONS, known_names, nearest, plainly, shown

__all__ = ["READ_BY_THE_COMMAND_LINE", "Found", "from_environment", "from_secret_file"]

ReadSecret = Callable[[str], str | None]

READ_BY_THE_COMMAND_LINE = frozenset({"FOREBAY_CONFIG", "FOREBAY_APP", "FOREBAY_DEMO_DB"})
_READ_BY_TESTS = "FOREBAY_TEST_"
_SHORT = {"FOREBAY_URL": "valkey.url", "FOREBAY_NAMESPACE": "node.namespace"}
_NEUTRAL = {
    "VALKEY_URL": "valkey.url",
    "VALKEY_USERNAME": "valkey.username",
    "VALKEY_PASSWORD": "valkey.password",
    "VALKEY_FAKE": "valkey.fake",
    "CACHE_VER": "cache.version",
    "RATE_MAX_TOKENS": "limiter.max_tokens",
    "RATE_WINDOW_SEC": "limiter.window_s",
}
_KUBERNETES = re.compile(
    r"FOREBAY(_\w+)?_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)\w*)\Z"
)
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")

FILE_RANK, NEUTRAL_RANK, MOUNTED_RANK, OWN_RANK, FLAG_RANK = range(1, 6)


class Found(Struct, frozen=True, kw_only=True):
    """One value of one setting, as some source gives it."""

    name: str
    value: object
    origin: str
    rank: int  #: the greater one wins
    textual: bool = True  #: it may have to be read as a number or a truth value

    def __repr__(self) -> str:
        return f"Found({self.name} = {shown(self.name, self.value)} from {self.origin})"


def from_environment(environ: Mapping[str, str], read_secret: ReadSecret) -> list[Found]:
    present = {name: value for name, value in environ.items() if value}
    own = list(_own(present, read_secret))
    mounted = list(_mounted(present, read_secret, skip={found.name for found in own}))
    decided = {found.name for found in own + mounted}
    return own + mounted + list(_neutral(present, read_secret, skip=decided))


def from_secret_file(
    name: str, path: str, read_secret: ReadSecret, *, origin: str, rank: int
) -> Found | None:
    """The value that the file holds, without its last line end; None: there is no file."""

    def refused(problem: str) -> ConfigError:
        fix = "write the value alone into that file"
        return ConfigError(setting=name, value="***", origin=origin, problem=problem, fix=fix)

    try:
        text = read_secret(path)
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:  # not UTF-8, or too large
        raise refused("cannot be read: it is too large or not UTF-8") from None
    if text is None:
        return None
    value = text.removesuffix("\n").removesuffix("\r")
    if not value:
        raise refused("the file is empty")
    if "\n" in value:
        raise refused("the file has more than one line")
    return Found(name=name, value=value, origin=origin, rank=rank)


def _own(environ: Mapping[str, str], read_secret: ReadSecret) -> Iterator[Found]:
    known = {field.env_name: name for name, field in FIELDS.items()} | _SHORT
    taken: dict[str, Found] = {}
    for variable in sorted(environ):
        if not variable.startswith("FOREBAY_") or _read_elsewhere(variable, environ[variable]):
            continue
        setting = known.get(variable.removesuffix("_FILE"))
        if variable in known:
            setting = known[variable]
        elif setting is None or not FIELDS[setting].may_be_file:
            raise _unknown(variable, known)
        found = _read(variable, setting, environ, read_secret, rank=OWN_RANK)
        other = taken.setdefault(setting, found)
        if other.value != found.value:
            raise _set_twice(found, other)
    yield from taken.values()


def _neutral(
    environ: Mapping[str, str], read_secret: ReadSecret, skip: Collection[str]
) -> Iterator[Found]:
    have = set(skip)
    for variable, setting in _NEUTRAL.items():
        if setting in have:
            continue
        by_file = f"{variable}_FILE" if FIELDS[setting].may_be_file else variable
        for each in sorted({variable, by_file} & environ.keys()):
            have.add(setting)
            found = _read(each, setting, environ, read_secret, rank=NEUTRAL_RANK)
            if setting == "valkey.url":
                _must_agree(found, environ)
            yield found
    if "valkey.url" not in have:
        yield from _address(environ)
    if "valkey.reader_url" not in have:
        yield from _reader(environ)


def _read(
    variable: str,
    setting: str,
    environ: Mapping[str, str],
    read_secret: ReadSecret,
    *,
    rank: int,
) -> Found:
    """The value of a variable, or of the file that it names."""
    origin = f"environment {variable}"
    by_file = variable.endswith("_FILE") and FIELDS[setting].may_be_file
    plain = variable.removesuffix("_FILE") if by_file else variable
    if plain in environ and f"{plain}_FILE" in environ:
        problem = f"{plain} and {plain}_FILE are both set"
        raise _refused(setting, environ[plain], origin, problem, "unset one of them")
    if not by_file:
        return Found(name=setting, value=environ[variable], origin=origin, rank=rank)
    path = environ[variable]
    origin = f"{origin}, file {plainly(path)}"
    found = from_secret_file(setting, path, read_secret, origin=origin, rank=rank)
    if found is None:
        raise _refused(setting, "***", origin, "the file is not there", "correct the path")
    return found


def _mounted(
    environ: Mapping[str, str], read_secret: ReadSecret, skip: Collection[str]
) -> Iterator[Found]:
    """Secrets where systemd (LoadCredential) and container engines put them."""
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    for name, field in FIELDS.items():
        if not field.secret or name in skip:
            continue
        flat = f"{field.section}_{field.leaf}"
        paths = [f"/run/secrets/forebay_{flat}"]
        if credentials:
            paths.insert(0, f"{credentials}/{flat}")
        for path in paths:
            origin = f"file {plainly(path)}"
            found = from_secret_file(name, path, read_secret, origin=origin, rank=MOUNTED_RANK)
            if found is not None:
                yield found
                break


def _address(environ: Mapping[str, str]) -> Iterator[Found]:
    """A URL made of VALKEY_HOST and its companions."""
    parts = _parts(environ)
    if "VALKEY_HOST" not in parts and "VALKEY_PORT" not in parts:
        return
    host = parts.get("VALKEY_HOST", "localhost")
    names = [name for name in ("HOST", "PORT", "DB", "TLS", "SSL") if f"VALKEY_{name}" in parts]
    origin = "environment " + ", ".join(f"VALKEY_{name}" for name in names)
    db = _number(parts, "VALKEY_DB", 0, 65_535) or "0"
    port = _number(parts, "VALKEY_PORT", 1, 65_535)
    scheme = "valkeys" if _tls(parts) else "valkey"
    url = _assembled(host, port=port, scheme=scheme, db=db)
    yield Found(name="valkey.url", value=url, origin=origin, rank=NEUTRAL_RANK)


def _reader(environ: Mapping[str, str]) -> Iterator[Found]:
    parts = _parts(environ)
    names = ("VALKEY_READER_ENDPOINT", "VALKEY_READER_HOST")
    endpoint = next((name for name in names if name in parts), None)
    if endpoint is None:
        return
    url = parts[endpoint]
    if "://" not in url:
        scheme, db, port = _as_the_primary(environ, parts)
        port = _number(parts, "VALKEY_READER_PORT", 1, 65_535) or port
        url = _assembled(url, port=port, scheme=scheme, db=db)
    origin = f"environment {endpoint}"
    yield Found(name="valkey.reader_url", value=url, origin=origin, rank=NEUTRAL_RANK)


def _as_the_primary(environ: Mapping[str, str], parts: Mapping[str, str]) -> tuple[str, str, str]:
    """Scheme, database and port for a reader that was given as a bare host."""
    names = ("FOREBAY_URL", "FOREBAY_VALKEY__URL", "VALKEY_URL")
    primary = next((environ[name] for name in names if name in environ), None)
    if primary is None:
        db = _number(parts, "VALKEY_DB", 0, 65_535) or "0"
        scheme = "valkeys" if _tls(parts) else "valkey"
        return scheme, db, _number(parts, "VALKEY_PORT", 1, 65_535)
    tail = re.search(r"[^/]/(\d{1,5})\Z", primary)
    return "valkeys" if _is_tls(primary) else "valkey", tail[1] if tail else "0", ""


def _assembled(host: str, *, port: str, scheme: str, db: str) -> str:
    if host.startswith("/"):
        return f"unix://{host}" + (f"?db={db}" if db != "0" else "")
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    has_port = re.search(r"(\A[^:]+|\]):\d+\Z", host)
    return f"{scheme}://{host}{'' if has_port or not port else ':' + port}/{db}"


def _must_agree(found: Found, environ: Mapping[str, str]) -> None:
    """VALKEY_TLS and VALKEY_DB cannot change a URL; refuse rather than ignore them."""
    parts, url = _parts(environ), str(found.value)
    if _tls(parts) and not _is_tls(url):
        raise _refused(
            found.name, url, found.origin, "VALKEY_TLS asks for TLS", "write valkeys:// in the URL"
        )
    db = _number(parts, "VALKEY_DB", 0, 65_535)
    if db and int(db) and not re.search(rf"(/|[?&]db=)0*{int(db)}\Z", url):
        raise _refused(
            found.name, url, found.origin, f"VALKEY_DB names database {db}", "write it in the URL"
        )


def _parts(environ: Mapping[str, str]) -> dict[str, str]:
    """The neutral variables, less what Kubernetes adds for a service named valkey."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith("VALKEY_") and not (name.endswith("_PORT") and _is_link(value))
    }


def _is_tls(url: str) -> bool:
    return url.lower().startswith(("valkeys:", "rediss:"))


def _tls(parts: Mapping[str, str]) -> bool:
    for name in ("VALKEY_TLS", "VALKEY_SSL"):
        if name in parts:
            value = parts[name].lower()
            if value not in ("true", "false", "1", "0"):
                origin = f"environment {name}"
                problem = "must be true or false"
                raise _refused("valkey.url", parts[name], origin, problem, "write true or false")
            return value in ("true", "1")
    return False


def _number(parts: Mapping[str, str], name: str, least: int, most: int) -> str:
    text = parts.get(name, "")
    if text and not (text.isascii() and text.isdigit() and least <= int(text[:6]) <= most):
        problem = f"{name} must be a whole number from {least} to {most}"
        setting = "valkey.reader_url" if "READER" in name else "valkey.url"
        raise _refused(setting, text, f"environment {name}", problem, "correct or unset it")
    return text


def _read_elsewhere(variable: str, value: str) -> bool:
    if variable in READ_BY_THE_COMMAND_LINE or variable.startswith(_READ_BY_TESTS):
        return True
    link = variable.endswith("_PORT") and "__" not in variable and _is_link(value)
    return link or bool(_KUBERNETES.match(variable))


def _is_link(value: str) -> bool:
    return bool(_SERVICE_LINK.match(value))


def _unknown(variable: str, known: Mapping[str, str]) -> ConfigError:
    files = [name + "_FILE" for name, setting in known.items() if FIELDS[setting].may_be_file]
    by_dotted = {_dotted(name): name for name in (*known, *files, *READ_BY_THE_COMMAND_LINE)}
    close = by_dotted.get(nearest(_dotted(variable), by_dotted))
    section = _dotted(variable).partition(".")[0]
    listed = known_names(section) if section in SECTIONS else ""
    fix = f"did you mean {close}?" if close else listed or "see `forebay config show`"
    origin = f"environment {variable}"
    return _refused(variable, "***", origin, "is no setting", fix)


def _dotted(variable: str) -> str:
    """Without the prefix that all share, which would make any two look alike."""
    return variable.removeprefix("FOREBAY_").lower().replace("__", ".")


def _set_twice(found: Found, other: Found) -> ConfigError:
    problem = f"{other.origin} says something else"
    return _refused(found.name, found.value, found.origin, problem, "unset one of them")


def _refused(setting: str, value: object, origin: str, problem: str, fix: str) -> ConfigError:
    text = shown(setting, value) if setting in FIELDS else "***"
    return ConfigError(setting=setting, value=text, origin=origin, problem=problem, fix=fix)

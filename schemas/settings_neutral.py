"""Neutral names of the environment: ``VALKEY_*``, ``CACHE_VER``, ``RATE_*``.

N1  A ``FOREBAY_*`` name that sets the same goes before them. Two neutral names that set the
    same to different values are refused.
N2  A primary is named by VALKEY_URL, by VALKEY_HOST, or by VALKEY_WRITER_ENDPOINT; its port by
    VALKEY_PORT or VALKEY_WRITER_PORT. VALKEY_DB and VALKEY_TLS complete it; they cannot
    change a URL, and are refused where they contradict one.
N3  A bare reader host has the port of VALKEY_READER_PORT, else the primary's; its database and
    TLS are the primary's.
N4  ``refuse_without_address`` finds every ``VALKEY_*`` name that describes a server, also a
    misspelt or foreign one: where no address results, no other server may be used instead.
N5  What Kubernetes adds for a service named valkey is no setting.

Values are text here, and are decoded by ``settings_sources``. No message contains the value of
a name that is not known.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

from msgspec import Struct

from .errors import ConfigError
from .settings_names import FIELDS, shown

__all__ = [
    "NEUTRAL",
    "Address",
    "is_link",
    "is_of_kubernetes",
    "misspelt",
    "primary_address",
    "reader_address",
    "refuse_without_address",
    "url_must_agree",
]

#: names that hold one setting each; an address is put together of several
NEUTRAL: Mapping[str, str] = {
    "VALKEY_URL": "valkey.url",
    "VALKEY_USERNAME": "valkey.username",
    "VALKEY_USER": "valkey.username",
    "VALKEY_PASSWORD": "valkey.password",
    "VALKEY_FAKE": "valkey.fake",
    "CACHE_VER": "cache.version",
    "RATE_MAX_TOKENS": "limiter.max_tokens",
    "RATE_WINDOW_SEC": "limiter.window_s",
}
_HOSTS = ("VALKEY_HOST", "VALKEY_WRITER_ENDPOINT")
_PORTS = ("VALKEY_PORT", "VALKEY_WRITER_PORT")
_READERS = ("VALKEY_READER_ENDPOINT", "VALKEY_READER_HOST")
_ADDRESS = (*_HOSTS, *_PORTS, *_READERS, "VALKEY_READER_PORT", "VALKEY_DB")
_ADDRESS_TLS = ("VALKEY_TLS", "VALKEY_SSL")
_FILES = tuple(f"{name}_FILE" for name, setting in NEUTRAL.items() if FIELDS[setting].may_be_file)
_KNOWN = frozenset((*NEUTRAL, *_FILES, *_ADDRESS, *_ADDRESS_TLS))
_DESCRIBES_NO_SERVER = frozenset({"VALKEY_FAKE"})
_DESCRIBES_A_SERVER = re.compile(
    r"VALKEY_((\w+_)?(ADDR|ADDRESS|DATABASE|DB|ENDPOINT|HOST|HOSTNAME|NODE|PASS|PASSWORD|PORT|SERVER"
    r"|SSL|TLS|URI|URL|USER|USERNAME)S?(_FILE)?\Z"
    r"|(CLUSTER|MASTER|PRIMARY|READER|REPLICA|SENTINEL|SSL|TLS|WRITER)_)"
)
_KUBERNETES = re.compile(
    r"(FOREBAY|VALKEY)(_\w+)?_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)\w*)\Z"
)
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
_DB_MAX = 65_535
_NAMED_MAX = 8
_SPELLED_ALIKE = 0.85
_SPELLED_ALIKE_AFTER_PREFIX = 0.75


class Address(Struct, frozen=True, kw_only=True):
    """A URL, and the variables that it was made of."""

    url: str
    origin: str


def is_link(value: str) -> bool:
    return bool(_SERVICE_LINK.match(value))


def is_of_kubernetes(variable: str, value: str) -> bool:
    """Whether Kubernetes added this for a service named after Forebay or Valkey."""
    link = variable.endswith("_PORT") and "__" not in variable and is_link(value)
    return link or bool(_KUBERNETES.match(variable))


def primary_address(environ: Mapping[str, str]) -> Address | None:
    """The address by VALKEY_HOST or VALKEY_WRITER_ENDPOINT, with the names that complete it."""
    parts = _parts(environ)
    host, port = _one_of(parts, _HOSTS), _one_of(parts, _PORTS)
    if host is None and "VALKEY_PORT" in parts:
        host = ("", "localhost")
    if host is None:
        return None
    name, text = host
    used = [each for each in (name, port and port[0], *_completing(parts)) if each]
    origin = "environment " + ", ".join(used)
    number = _number(parts, port[0], 1, 65_535) if port else ""
    if "://" in text:
        url_must_agree(text, origin, environ)
        return Address(url=text, origin=origin)
    url = _assembled(text, port=number, scheme=_scheme(parts), db=_database(parts))
    if port and not re.search(rf"\Aunix:|:0*{number}/", url):
        problem = f"{port[0]} says port {number}"
        _refuse("valkey.url", url, origin, problem, f"unset it, or the port in {name}")
    return Address(url=url, origin=origin)


def reader_address(environ: Mapping[str, str], primary_url: str) -> Address | None:
    parts = _parts(environ)
    reader = _one_of(parts, _READERS)
    if reader is None:
        return None
    name, text = reader
    origin = f"environment {name}"
    if "://" in text:
        return Address(url=text, origin=origin)
    scheme, db, port = _scheme(parts), _database(parts), ""
    if primary_url:
        tail = re.search(r"[^/]/(\d{1,5})\Z", primary_url)
        scheme, db = "valkeys" if _is_tls(primary_url) else "valkey", tail[1] if tail else "0"
    if _one_of(parts, _HOSTS) and (of_primary := _one_of(parts, _PORTS)):
        port = _number(parts, of_primary[0], 1, 65_535)
    port = _number(parts, "VALKEY_READER_PORT", 1, 65_535) or port
    return Address(url=_assembled(text, port=port, scheme=scheme, db=db), origin=origin)


def url_must_agree(url: str, origin: str, environ: Mapping[str, str]) -> None:
    """VALKEY_TLS and VALKEY_DB cannot change a URL; refuse rather than ignore them."""
    parts = _parts(environ)
    if _tls(parts) and not _is_tls(url):
        problem = "VALKEY_TLS asks for TLS"
        _refuse("valkey.url", url, origin, problem, "write valkeys:// in the URL")
    db = _number(parts, "VALKEY_DB", 0, _DB_MAX)
    if db and int(db) and not re.search(rf"(/|[?&]db=)0*{int(db)}\Z", url):
        problem = f"VALKEY_DB names database {db}"
        _refuse("valkey.url", url, origin, problem, "write it in the URL")


def refuse_without_address(environ: Mapping[str, str]) -> None:
    """To be called where nothing names a server.

    Raises:
        ConfigError: variables describe one all the same.
    """
    found = sorted(
        name for name in _parts({k: v for k, v in environ.items() if v}) if _describes(name)
    )
    if not found:
        return
    unknown = next((name for name in found if name not in _KNOWN), None)
    fix = "set VALKEY_URL, VALKEY_HOST or VALKEY_WRITER_ENDPOINT, or unset what describes it"
    if unknown is not None:
        close = _closest(unknown)
        fix = f"nothing reads {unknown}; " + (f"did you mean {close}?" if close else fix)
    raise ConfigError(
        setting="valkey.url",
        value="(not set)",
        origin=f"environment {', '.join(found[:_NAMED_MAX])}",
        problem="a server is described, and nothing gives its address",
        fix=fix,
    )


def misspelt(environ: Mapping[str, str], own: Iterable[str]) -> Iterator[str]:
    """A sentence for each variable that nothing reads and that resembles one that is read;
    ``own`` are the names that begin with FOREBAY_.
    """
    own = frozenset(own)
    for name, value in sorted(environ.items()):
        if not value or name in _KNOWN or is_of_kubernetes(name, value):
            continue
        if name.startswith("FOREBAY_"):
            continue  # refused where nothing reads it
        close = _closest(name) or _nearest(name.upper(), own, _SPELLED_ALIKE)
        if close:
            yield f"environment {name}: nothing reads it; did you mean {close}?"
        elif _describes(name):
            yield f"environment {name}: nothing reads it; the names are {', '.join(_LISTED)}"


_LISTED = ("VALKEY_URL", *_HOSTS, *_PORTS, "VALKEY_DB", "VALKEY_TLS", "VALKEY_USER")


def _describes(name: str) -> bool:
    if name in _KNOWN:
        return name not in _DESCRIBES_NO_SERVER and name.startswith("VALKEY_")
    close = _closest(name) if name.startswith("VALKEY_") else ""
    return bool(_DESCRIBES_A_SERVER.match(name)) or _known_to_describe(close)


def _known_to_describe(name: str) -> bool:
    return name.startswith("VALKEY_") and name not in _DESCRIBES_NO_SERVER


def _closest(name: str) -> str:
    """The known name that was probably meant, or nothing."""
    upper = name.upper()
    if not upper.startswith("VALKEY_"):
        return _nearest(upper, _KNOWN, _SPELLED_ALIKE)
    # Without the prefix that all share, which would make any two look alike.
    tails = {each.removeprefix("VALKEY_") for each in _KNOWN if each.startswith("VALKEY_")}
    tail = _nearest(upper.removeprefix("VALKEY_"), tails, _SPELLED_ALIKE_AFTER_PREFIX)
    return f"VALKEY_{tail}" if tail else ""


def _nearest(name: str, known: Iterable[str], cutoff: float) -> str:
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)), "")


def _parts(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of this prefix, less what Kubernetes adds for a service named valkey."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith("VALKEY_") and not is_of_kubernetes(name, value)
    }


def _one_of(parts: Mapping[str, str], names: Iterable[str]) -> tuple[str, str] | None:
    """The first of these names that is set, and its value, which no other may contradict."""
    found = [(name, parts[name]) for name in names if name in parts]
    for name, value in found[1:]:
        if value != found[0][1]:
            setting = "valkey.reader_url" if "READER" in name else "valkey.url"
            problem = f"{found[0][0]} says something else"
            _refuse(setting, value, f"environment {name}", problem, "unset one of them")
    return found[0] if found else None


def _completing(parts: Mapping[str, str]) -> list[str]:
    return [name for name in ("VALKEY_DB", *_ADDRESS_TLS) if name in parts]


def _assembled(host: str, *, port: str, scheme: str, db: str) -> str:
    if host.startswith("/"):
        return f"unix://{host}" + (f"?db={db}" if db != "0" else "")
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    has_port = re.search(r"(\A[^:]+|\]):\d+\Z", host)
    return f"{scheme}://{host}{'' if has_port or not port else ':' + port}/{db}"


def _scheme(parts: Mapping[str, str]) -> str:
    return "valkeys" if _tls(parts) else "valkey"


def _database(parts: Mapping[str, str]) -> str:
    return _number(parts, "VALKEY_DB", 0, _DB_MAX) or "0"


def _is_tls(url: str) -> bool:
    return url.lower().startswith(("valkeys:", "rediss:"))


def _tls(parts: Mapping[str, str]) -> bool:
    for name in _ADDRESS_TLS:
        if name in parts:
            value = parts[name].lower()
            if value not in ("true", "false", "1", "0"):
                problem, origin = "must be true or false", f"environment {name}"
                _refuse("valkey.url", parts[name], origin, problem, "write true or false")
            return value in ("true", "1")
    return False


def _number(parts: Mapping[str, str], name: str, least: int, most: int) -> str:
    text = parts.get(name, "")
    if text and not (text.isascii() and text.isdigit() and least <= int(text[:6]) <= most):
        problem = f"{name} must be a whole number from {least} to {most}"
        setting = "valkey.reader_url" if "READER" in name else "valkey.url"
        _refuse(setting, text, f"environment {name}", problem, "correct or unset it")
    return text


def _refuse(setting: str, value: str, origin: str, problem: str, fix: str) -> NoReturn:
    raise ConfigError(
        setting=setting, value=shown(setting, value), origin=origin, problem=problem, fix=fix
    )

"""The address of a server, read from a URL.

I1  Every URL is either an ``Endpoint`` or a ConfigError that says what is wrong with it
    and what to write; no part of it is guessed.
I2  ``str`` and ``repr`` of an Endpoint show no password, nor does the error.
I3  ``parse_url(endpoint.address_url)`` is the endpoint without its credentials.

Understood are ``valkey://`` and ``redis://`` (plain), ``valkeys://`` and ``rediss://``
(TLS), both as ``scheme://[user[:password]@]host[:port][/db]``, and
``unix:///path[?db=n]``. User name and password are percent-decoded. Whether anybody
listens there is found out by connecting, not here.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from msgspec import Struct

from .errors import ConfigError
from .masking import escape_controls, mask_url
from .settings import Secret, Valkey

__all__ = ["DEFAULT_PORT", "SCHEMES", "Endpoint", "endpoint_of", "mask_url", "parse_url"]

DEFAULT_PORT = 6379
SCHEMES = ("valkey", "valkeys", "redis", "rediss", "unix")
_TLS_SCHEMES = frozenset({"valkeys", "rediss"})
_URL_CHARS_MAX = 2_048
_UNIX_PATH_BYTES_MAX = 107  #: the size of sun_path on Linux, less its final zero
_DB_MAX = 65_535
_UNSAFE = re.compile(r"[\x00-\x20\x7f\"<>\\^`{|}]")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?\Z")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_EXAMPLE = "write valkey://HOST:PORT/DB"


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where a server is and who we are to it."""

    scheme: str
    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""  #: of the socket, for unix
    db: int = 0
    username: str = ""
    password: Secret = Secret("")
    tls: bool = False

    @property
    def address(self) -> str:
        """Host and port, or the path of the socket."""
        return self.path or f"{_bracketed(self.host)}:{self.port}"

    @property
    def address_url(self) -> str:
        """The URL without user name and password."""
        if self.path:
            return f"unix://{quote(self.path)}" + (f"?db={self.db}" if self.db else "")
        return f"{self.scheme}://{self.address}/{self.db}"

    def __str__(self) -> str:
        scheme, _, rest = self.address_url.partition("://")
        if self.password:
            return f"{scheme}://{quote(self.username, safe='')}:***@{rest}"
        return f"{scheme}://***@{rest}" if self.username else self.address_url


class _Malformed(Exception):
    """What is wrong with a URL, and what to do about it; never the URL itself."""

    def __init__(self, problem: str, fix: str = _EXAMPLE) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix


def parse_url(text: str, *, setting: str, origin: str) -> Endpoint:
    try:
        return _parse(text)
    except _Malformed as malformed:
        problem, fix = malformed.problem, malformed.fix
    shown = escape_controls(mask_url(text[:_URL_CHARS_MAX]))
    raise ConfigError(
        setting=setting,
        value=shown if len(shown) <= 120 else shown[:117] + "...",
        origin=origin,
        problem=problem,
        fix=fix,
    )


def endpoint_of(valkey: Valkey, *, reader: bool = False) -> Endpoint | None:
    """The primary, or the reader, with the credentials that apply; None: there is none.

    Settings that came through ``resolve`` hold their credentials apart from the URL.
    Those made in code may hold them in it, where they count if there are no others.
    """
    text = valkey.reader_url if reader else valkey.url
    if not text:
        return None
    setting = "valkey.reader_url" if reader else "valkey.url"
    found = parse_url(text, setting=setting, origin="the settings")
    return Endpoint(
        scheme=found.scheme,
        host=found.host,
        port=found.port,
        path=found.path,
        db=found.db,
        tls=found.tls,
        username=valkey.username or found.username,
        password=valkey.password or found.password,
    )


def _parse(text: str) -> Endpoint:
    parts = _split(text)
    scheme = parts.scheme
    if parts.fragment:
        raise _Malformed("has a part after #", "a # in the password is written %23")
    userinfo, _, address = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    host, port, path = ("", DEFAULT_PORT, _socket_path(parts, address))
    if scheme != "unix":
        host, port, path = (*_host_and_port(address), "")
    return Endpoint(
        scheme=scheme,
        host=host,
        port=port,
        path=path,
        db=_database(parts),
        username=_decoded("user name", username),
        password=Secret(_decoded("password", password)),
        tls=scheme in _TLS_SCHEMES,
    )


def _split(text: str) -> SplitResult:
    if not text:
        raise _Malformed("is empty")
    if len(text) > _URL_CHARS_MAX:
        raise _Malformed(f"is longer than {_URL_CHARS_MAX} characters")
    if _UNSAFE.search(text):
        raise _Malformed(
            'holds a blank, a control character or one of " < > \\ ^ ` { | }',
            "in a password write such characters as %XX",
        )
    scheme, found, _ = text.partition("://")
    if not found or not scheme:
        raise _Malformed("has no scheme such as valkey://")
    if scheme.lower() not in SCHEMES:
        close = difflib.get_close_matches(scheme.lower(), SCHEMES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}://?" if close else ""
        raise _Malformed("has an unknown scheme", f"use one of {', '.join(SCHEMES)}{hint}")
    try:
        parts = urlsplit(text)
    except ValueError:  # mostly brackets that hold no IPv6 address
        raise _Malformed("has a host that cannot be read") from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise _Malformed(
            "has an @ behind its first /, ? or #", "in a password write / as %2F, ? %3F, # %23"
        )
    return parts


def _host_and_port(address: str) -> tuple[str, int]:
    if not address:
        raise _Malformed("has no host")
    if "," in address:
        raise _Malformed("has more than one host", "name one server")
    if address.startswith("["):
        host, _, rest = address[1:].partition("]")
        port, colon = rest.removeprefix(":"), ":" if rest else ""
    else:
        host, colon, port = address.partition(":")
    if ":" in port:
        raise _Malformed("has too many colons", "write an IPv6 address as [::1]:6379")
    if not host:
        raise _Malformed("has no host")
    if colon and not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65_535):
        raise _Malformed(
            "has a port that is no whole number from 1 to 65535", "write valkey://HOST:6379"
        )
    return _host(host, literal=address.startswith("[")), int(port) if colon else DEFAULT_PORT


def _host(host: str, *, literal: bool) -> str:
    if literal:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise _Malformed("has brackets without an IPv6 address in them") from None
    if len(host) > 253 or not _HOST.match(host):
        raise _Malformed("has a host name that cannot be one", "use letters, digits, '-' and '.'")
    return host.lower()


def _socket_path(parts: SplitResult, address: str) -> str:
    if parts.scheme != "unix":
        return ""
    if address:
        raise _Malformed("has a host", "write unix:///PATH with three slashes")
    path = _decoded("path", parts.path)
    if path in ("", "/"):
        raise _Malformed("has no path", "write unix:///PATH with three slashes")
    if len(path.encode()) > _UNIX_PATH_BYTES_MAX:
        raise _Malformed(
            f"has a path of more than {_UNIX_PATH_BYTES_MAX} bytes", "move the socket up"
        )
    return path


def _database(parts: SplitResult) -> int:
    found = [] if parts.scheme == "unix" or parts.path in ("", "/") else [parts.path[1:]]
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name != "db":
            raise _Malformed(
                "has an option other than db", "certificates and time limits are settings"
            )
        found.append(value)
    if len(found) > 1:
        raise _Malformed("names the database twice", "keep one")
    number = found[0] if found else "0"
    if not (number.isascii() and number.isdigit() and int(number[:6]) <= _DB_MAX):
        raise _Malformed(f"has a database that is no whole number from 0 to {_DB_MAX}")
    return int(number)


def _decoded(what: str, text: str) -> str:
    if _BARE_PERCENT.search(text):
        raise _Malformed(f"has a bare % in its {what}", "write it %25")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _Malformed(f"has a {what} that is not UTF-8", "percent-encode its UTF-8") from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

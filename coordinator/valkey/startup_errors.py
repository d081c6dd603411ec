"""Explains why a server cannot be used, as one error that an operator can act on.

I1  Every error names one setting, its masked value, its origin, and a fix.
I2  Errors that may end by waiting (nothing listens yet, still loading, no disk space) are kept
    apart from those that do not (wrong password, TLS on one side only, no Valkey, too old).
I3  If the server's message does not explain the failure, the port is probed for its protocol.

The tables are here; ``handshake`` does the waiting.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Literal

import anyio
from msgspec import Struct

from ...schemas.errors import (
    RIGHTS,
    ForebayError,
    ServerRefused,
    StartupError,
    TimedOut,
    Unavailable,
)
from ...schemas.settings import Valkey
from ...schemas.urls import Endpoint

__all__ = ["Speaks", "Target", "what_speaks"]

Speaks = Literal["valkey", "tls", "http", "silence", "nothing", "something else"]

_SNIFF_S = 1.0
_HELLO = b"PING\r\n\r\n"
_OTHER_SCHEME = {"valkey": "valkeys", "valkeys": "valkey", "redis": "rediss", "rediss": "redis"}
_WAIT_CODES = frozenset({"LOADING", "MISCONF", "MASTERDOWN", "BUSY"})

#: by code of the server: which setting is to blame, what is wrong, and what to do
_REFUSALS: dict[str, tuple[str, str, str]] = {
    "WRONGPASS": (
        "password",
        "user name or password is wrong, or the user is disabled",
        "correct valkey.username and valkey.password",
    ),
    "NOAUTH": (
        "password",
        "it asks for a password",
        "set FOREBAY_VALKEY__PASSWORD, or FOREBAY_VALKEY__PASSWORD_FILE",
    ),
    "NOPERM": (
        "username",
        "this user lacks a right",
        f"give it what `forebay config acl` prints; {RIGHTS} explains it",
    ),
    "MISCONF": (
        "url",
        "it refuses writes, since it cannot save to its disk",
        "look at its log and at the free space of its disk",
    ),
    "OOM": (
        "url",
        "its memory is full",
        "raise its maxmemory, or remove data; a node by itself starts all the same",
    ),
    "LOADING": ("url", "it is still loading its data", "raise valkey.startup_timeout_ms"),
    "MASTERDOWN": ("url", "it is a replica without a primary", "set valkey.url to the primary"),
    "READONLY": ("url", "it is a replica", "set valkey.url to the primary"),
}
_WITHOUT_PASSWORD = "without any password configured"  # noqa: S105
_REPLICA_OF = "it is a replica of "
_NO_SUCH_DATABASE = "out of range"


class Target(Struct, frozen=True, kw_only=True):
    """The server that is being connected to, as the settings name it."""

    endpoint: Endpoint
    setting: str  #: valkey.url
    options: Valkey
    origins: Mapping[str, str]

    def fault(self, problem: str, fix: str, *, leaf: str = "url") -> StartupError:
        name = self.setting if leaf == "url" else f"valkey.{leaf}"
        value = str(self.endpoint)
        if leaf == "username":
            value = self.options.username or self.endpoint.username or "(not set)"
        elif leaf == "password":
            given = self.options.password or self.endpoint.password
            value = "***" if given else "(not set)"
        if leaf != "url":
            problem = f"{self.endpoint.address}: {problem}"
        origin = self.origins.get(name, "default" if value == "(not set)" else "in code")
        return StartupError(setting=name, value=value, origin=origin, problem=problem, fix=fix)

    def replica(self, leader: str) -> StartupError:
        fix = f"name its primary, {leader}"
        return self.fault("it is a replica, and refuses writes (READONLY)", fix)

    def refused(self, error: ServerRefused) -> StartupError:
        words = f"{error.code} {error.message}".strip()[:200]
        if _WITHOUT_PASSWORD in error.message:
            return self.fault("it has no password", "unset valkey.password", leaf="password")
        if _NO_SUCH_DATABASE in error.message:
            return self.fault(f"it has no database {self.endpoint.db}", "name a lower one, as /0")
        if error.code == "READONLY" and _REPLICA_OF in error.message:
            return self.replica(error.message.partition(_REPLICA_OF)[2])
        known = _REFUSALS.get(error.code)
        if known is None:
            at = f", at {error.key}" if error.key else ""
            return self.fault(f"it refused us: {words}{at}", "see what the server's log says")
        leaf, problem, fix = known
        return self.fault(f"{problem} ({words})", fix, leaf=leaf)

    async def certain(self, error: ForebayError) -> StartupError | None:
        """The fault, if waiting cannot cure it."""
        if isinstance(error, ServerRefused):
            return self.refused(error) if error.code not in _WAIT_CODES else None
        # Where nobody listens there is nobody to ask.
        spoken = "nothing" if _is_absence(error) else await what_speaks(self.endpoint)
        return self._mistaken(spoken) or self._secured_badly(error)

    def may_pass(self, error: ForebayError) -> bool:
        """Whether waiting may help, for a server that was reached before."""
        if isinstance(error, ServerRefused):
            return error.code in _WAIT_CODES
        return isinstance(error, Unavailable)

    def given_up(self, error: ForebayError) -> StartupError:
        """The fault, when there is no more time to wait."""
        return self.refused(error) if isinstance(error, ServerRefused) else self._unreachable(error)

    def _mistaken(self, spoken: Speaks) -> StartupError | None:
        other = _OTHER_SCHEME.get(self.endpoint.scheme, "")
        if spoken == "tls" and not self.endpoint.tls:
            return self.fault("this port speaks TLS", f"write {other}://")
        if spoken == "valkey" and self.endpoint.tls:
            return self.fault("this port speaks no TLS", f"write {other}://")
        if spoken in ("http", "something else"):
            what = "HTTP" if spoken == "http" else "no Valkey protocol"
            return self.fault(f"this port speaks {what}", "name the port of Valkey, often 6379")
        return None

    def _secured_badly(self, error: ForebayError) -> StartupError | None:
        if not self.endpoint.tls:
            return None
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError):
                fix = "set valkey.tls_ca_file; tls_cert_file and tls_key_file if it wants ours"
                return self.fault(_reason(error), fix)
            if isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError):
                return self.fault(_reason(error), "correct the path, or the rights of the file")
        return None

    def _unreachable(self, error: ForebayError) -> StartupError:
        waited = f"not reached within {self.options.startup_timeout_ms} ms"
        fix = "start the server, or correct host and port"
        if any(isinstance(cause, socket.gaierror) for cause in _causes(error)):
            fix = "correct the host name"
        elif isinstance(error, TimedOut):
            fix = "see whether a firewall is in between, and whether the server is alive"
        return self.fault(f"{waited}: {_reason(error)}", fix)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_absence(error: ForebayError) -> bool:
    kinds = (ConnectionRefusedError, FileNotFoundError, socket.gaierror)
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _reason(error: ForebayError) -> str:
    return error.reason if isinstance(error, Unavailable) else str(error)


async def what_speaks(endpoint: Endpoint) -> Speaks:
    """Say PING to the port, in plain text, and judge by the first bytes that come back."""
    if endpoint.path:
        return "nothing"
    try:
        with anyio.fail_after(_SNIFF_S):
            async with await anyio.connect_tcp(endpoint.host, endpoint.port) as stream:
                await stream.send(_HELLO)
                return _judged(await stream.receive(64))
    except TimeoutError:
        return "silence"
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        return "tls" if await _shakes_hands(endpoint) else "nothing"


async def _shakes_hands(endpoint: Endpoint) -> bool:
    """Whether a TLS handshake succeeds there; many TLS servers hang up on plain text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # nothing is said to the server, nor believed of it
    context.verify_mode = ssl.CERT_NONE
    with suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        with anyio.move_on_after(_SNIFF_S):
            async with await anyio.connect_tcp(
                endpoint.host, endpoint.port, ssl_context=context, tls_standard_compatible=False
            ):
                return True
    return False


def _judged(first: bytes) -> Speaks:
    if first.startswith((b"+PONG", b"-")):
        return "valkey"
    if first.startswith(b"\x15\x03"):  # a TLS alert
        return "tls"
    return "http" if first.startswith((b"HTTP/", b"<")) else "something else"

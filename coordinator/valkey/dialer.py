"""Opens one connection to Valkey and hands over its transport.

valkey-py does TCP, TLS and unix sockets, AUTH, SELECT, and the name and library of the client. The
wire does all that follows this handshake.

I1  ``dial`` ends within the connect timeout, including the handshake.
I2  Every failure is an error of ours that names the cause: connection refused, unknown host name,
    no answer, TLS, or the refusal of the server. It contains no password.
I3  The hand-over loses no byte: ``attach`` refuses a transport on which the server has already
    sent data or closed the connection.
I4  A connection that is not handed over is closed, also when ``dial`` is cancelled.
I5  If a primary is required, a replica is refused (READONLY) and its primary is named: an address
    that moves may lead to the server that was demoted.
I6  The history is the replication id. It changes at each restart and each promotion, also where the
    run id stays the same: when a primary was demoted and promoted again.
I7  A primary also changes its id when its first replica connects, or its last one has been gone for
    long. Then it names no previous id, and no data were lost.

Host names in certificates are checked unless ``tls_insecure`` is set. The protocol is RESP2.
``dial`` tries once; ``Backoff`` computes how long a caller waits before the next try:

B1  The first try after a loss is spread over ``jitter_ms``, so that clients do not reconnect to a
    restarted server all at once.
B2  Later waits double from ``jitter_ms`` up to ``max_ms``, half fixed and half random (equal
    jitter), so that no wait is near zero.
B3  Only a connection that lasted for ``max_ms`` restarts the sequence: a server that accepts and
    closes connections is not tried in a tight loop.
"""

# ruff: noqa: SLF001 - valkey-py has no public API to hand its streams over.

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Iterator
from typing import Any, cast

import anyio
from valkey import exceptions as foreign
from valkey.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)

from ...schemas.errors import Disconnected, ForebayError, ServerRefused, TimedOut, Unavailable
from ...schemas.settings import Valkey
from ...schemas.urls import Endpoint
from ..files import check_readable

# Seconds of idleness, seconds between probes, probes: a dead peer is noticed after 5 s
# even if nobody calls. Not every platform names all of them.
_KEEPALIVE = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}


class Dialed:
    """A connection after its handshake, waiting for the protocol that will speak on it."""

    __slots__ = ("_reader", "_writer", "history")

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, history: str = ""
    ) -> None:
        self.history = history  #: of the primary; empty where none was asked for
        self._reader = reader
        self._writer = writer

    def attach(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """Let the protocol have the transport; it must keep this object as long.

        The stream writer inside closes the transport when it is collected.
        """
        transport = self._writer.transport
        leftover = bool(self._reader._buffer)  # type: ignore[attr-defined]
        if leftover or self._reader.at_eof() or transport.is_closing():
            transport.abort()
            raise Disconnected("the server hung up after the handshake")
        transport.set_protocol(protocol)
        return cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def close(self) -> None:
        self._writer.transport.abort()


class Dialer:
    __slots__ = ("_client_name", "_endpoint", "_options", "primary")

    def __init__(
        self, endpoint: Endpoint, options: Valkey, client_name: str, *, primary: bool = False
    ) -> None:
        """``primary``: a replica that answers at the address is refused."""
        self.primary = primary
        self._endpoint = endpoint
        self._options = options
        self._client_name = client_name

    @property
    def address(self) -> str:
        return self._endpoint.address

    async def dial(self) -> Dialed:
        if self._endpoint.tls:
            _check_readable(self._options)
        timeout_ms = self._options.connect_timeout_ms
        connection = self._connection(timeout_ms / 1000)
        try:
            with anyio.fail_after(timeout_ms / 1000):
                await connection.connect()  # type: ignore[no-untyped-call]
                history = await _history(connection) if self.primary else ""
            reader, writer = connection._reader, connection._writer
            if reader is None or writer is None:
                raise Disconnected("the server hung up during the handshake")
            connection._reader = connection._writer = None  # or it closes them when collected
            return Dialed(reader, writer, history)
        except (OSError, ssl.SSLError, foreign.ValkeyError) as error:
            raise _translated(error, self._endpoint, timeout_ms) from error
        finally:
            # Does nothing after the hand-over.
            connection._close()  # type: ignore[no-untyped-call]

    def _connection(self, timeout_s: float) -> AbstractConnection:
        endpoint = self._endpoint
        common: dict[str, Any] = {
            "db": endpoint.db,
            "username": endpoint.username or None,
            "password": endpoint.password.reveal() or None,
            "socket_timeout": None,
            "socket_connect_timeout": timeout_s,
            "retry": None,
            "retry_on_timeout": False,
            "health_check_interval": 0,
            "client_name": self._client_name,
            "lib_name": "forebay",
            "lib_version": None,
            "protocol": 2,
        }
        if endpoint.path:
            # This class shakes hands while connecting; once is enough.
            return UnixDomainSocketConnection(
                path=endpoint.path, valkey_connect_func=_nothing, **common
            )
        common |= {
            "host": endpoint.host,
            "port": endpoint.port,
            "socket_keepalive": True,
            "socket_keepalive_options": _KEEPALIVE,
        }
        return SSLConnection(**common, **self._tls()) if endpoint.tls else Connection(**common)

    def _tls(self) -> dict[str, Any]:
        options = self._options
        return {
            "ssl_ca_certs": options.tls_ca_file or None,
            "ssl_certfile": options.tls_cert_file or None,
            "ssl_keyfile": options.tls_key_file or None,
            "ssl_cert_reqs": "none" if options.tls_insecure else "required",
            "ssl_check_hostname": not options.tls_insecure,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }


async def _history(connection: AbstractConnection) -> str:
    await connection.send_command(*ASK_HISTORY)
    return history_of(bytes(await connection.read_response()))


def _nothing(_: AbstractConnection) -> None:
    return None


def _check_readable(options: Valkey) -> None:
    """The ssl module does not say which of its files is missing."""
    for name in ("tls_ca_file", "tls_cert_file", "tls_key_file"):
        path: str = getattr(options, name)
        try:
            if path:
                check_readable(path)
        except OSError as error:
            problem = f"TLS: {name} {path} cannot be read: {error.strerror}"
            raise Disconnected(problem) from error


def _translated(error: BaseException, endpoint: Endpoint, timeout_ms: int) -> ForebayError:
    for cause in _chain(error):
        found = _from_server(cause) or _from_network(cause, endpoint.address, timeout_ms)
        if found:
            return found
    hint = "" if endpoint.tls or endpoint.path else "; does it want TLS?"
    return Disconnected(f"{endpoint.address} hung up during the handshake{hint}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the origin first."""
    if (origin := error.__cause__ or error.__context__) is not None:
        yield from _chain(origin)
    yield error


def _from_server(error: BaseException) -> ForebayError | None:
    """valkey-py drops the code of those errors that it knows."""
    text = str(error)
    match error:
        case foreign.AuthenticationError():
            codes = {"invalid": "WRONGPASS", "Authentication": "NOAUTH"}
            return ServerRefused(codes.get(text.partition(" ")[0], "ERR"), text, "AUTH")
        case foreign.NoPermissionError():
            return ServerRefused("NOPERM", text, "the handshake")
        case foreign.BusyLoadingError():
            return Unavailable(f"the server is not ready: {text}")
        case foreign.ResponseError():
            # "DENIED Valkey is running in ..." still has its code, "DB index is out of
            # range" has lost it; no code is so short that the two could be confused.
            code, _, rest = text.partition(" ")
            if not (code.isupper() and len(code) > 3):
                code, rest = "ERR", text
            return ServerRefused(code, rest, "the handshake")
        case foreign.ConnectionError() if text.startswith("max number of clients"):
            return Unavailable(f"the server is full: {text}")
    return None


def _from_network(error: BaseException, address: str, timeout_ms: int) -> ForebayError | None:
    match error:
        case ssl.SSLCertVerificationError():
            return Disconnected(f"TLS: certificate of {address}: {error.verify_message}")
        case ssl.SSLError():
            reason = (error.reason or str(error)).replace("_", " ").lower()
            return Disconnected(f"TLS with {address} failed: {reason}")
        case socket.gaierror():
            return Disconnected(f"host name of {address} is unknown: {error.strerror}")
        case TimeoutError() | foreign.TimeoutError():
            return TimedOut(timeout_ms, outcome_unknown=False)
        case FileNotFoundError():
            return Disconnected(f"there is no socket at {address}")
        case OSError():
            # Several addresses that all refused come as one error without a number.
            refused = isinstance(error, ConnectionRefusedError) or "Errno 111" in str(error)
            reason = error.strerror or str(error)
            return Disconnected(f"{address} {'refused the connection' if refused else reason}")
    return None


ASK_HISTORY = ("INFO", "replication")


def read_info(reply: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def history_of(reply: bytes) -> str:
    """The history, as a primary answers ``ASK_HISTORY``.

    Raises:
        ServerRefused: a replica answered.
    """
    info = read_info(reply)
    if info.get("role") == "slave":
        leader = f"{info.get('master_host')}:{info.get('master_port')}"
        raise ServerRefused("READONLY", f"it is a replica of {leader}", " ".join(ASK_HISTORY))
    return info.get("master_replid", "")


def was_promoted(reply: bytes) -> bool:
    """Whether the id came with a promotion, as a primary answers ``ASK_HISTORY``."""
    return bool(read_info(reply).get("master_replid2", "").strip("0"))


_DOUBLINGS_MAX = 30


class Backoff:
    __slots__ = ("_jitter_s", "_max_s", "_rng", "_tries")

    def __init__(self, rng: random.Random, *, jitter_ms: int, max_ms: int) -> None:
        self._rng = rng
        self._jitter_s = jitter_ms / 1000
        self._max_s = max_ms / 1000
        self._tries = 0

    def next_s(self) -> float:
        """The wait before the next try, which is counted by asking."""
        tries, self._tries = self._tries, self._tries + 1
        if tries == 0:
            return self._rng.uniform(0, self._jitter_s)
        wait = min(self._max_s, self._jitter_s * (1 << min(tries, _DOUBLINGS_MAX)))
        return wait / 2 + self._rng.uniform(0, wait / 2)

    def lasted(self, seconds: float) -> None:
        """Tell how long the connection held that was just lost."""
        if seconds >= self._max_s:
            self._tries = 0

"""Valkey's wire, as much of it as a program in any language needs: RESP2 over a socket.

Blocking, one command at a time. After any OSError the connection is closed, and the next call
makes a new one; whether the interrupted command was carried out is not known then.
``valkey://``, ``redis://``, their TLS forms, and ``unix:///path?db=n`` are understood.
Only the standard library is used, on purpose: this is the demo's outsider.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

__all__ = ["Refused", "Wire"]

_TIMEOUT_S = 5.0
_LINE_BYTES_MAX = 65_536
_BULK_BYTES_MAX = 67_108_864
_PLAIN, _TLS = ("valkey", "redis"), ("valkeys", "rediss")
_PASSING = ("LOADING", "BUSY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN", "READONLY", "OOM")


class Refused(Exception):
    """Raised when the server answered with an error; ``passing`` if it may not last."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.passing = message.partition(" ")[0] in _PASSING


class Wire:
    """A connection, made when it is first needed."""

    def __init__(self, url: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._parts = urlsplit(url)
        if self._parts.scheme not in (*_PLAIN, *_TLS, "unix"):
            raise ValueError("write valkey://HOST:PORT/DB or unix:///PATH")
        self._db = _database(self._parts)
        self._port = self._parts.port or 6379
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._buffer = b""

    def call(self, *words: str | int) -> Any:
        """The reply: str for a status, bytes, int, list or None.

        Raises:
            Refused: the server answered with an error.
            OSError: no answer came.
        """
        try:
            if self._socket is None:
                self._connect()
            return self._ask(*words)
        except OSError:
            self.close()
            raise
        except Refused as refused:
            if refused.passing:  # another connection may lead to a server that takes it
                self.close()
            raise

    def text(self, *words: str | int) -> str:
        """A reply that is text."""
        reply = self.call(*words)
        return reply.decode() if isinstance(reply, bytes) else str(reply)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._buffer = None, b""

    def _connect(self) -> None:
        self._socket = self._opened()
        try:
            if self._parts.password:
                credentials = (self._parts.username or "default", self._parts.password)
                self._ask("AUTH", *map(unquote, credentials))
            if self._db:
                self._ask("SELECT", self._db)
        except Refused:
            self.close()
            raise

    def _opened(self) -> socket.socket:
        if self._parts.scheme == "unix":
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(self._timeout_s)
            try:
                stream.connect(unquote(self._parts.path))
            except OSError:
                stream.close()
                raise
            return stream
        host = self._parts.hostname or "127.0.0.1"
        stream = socket.create_connection((host, self._port), self._timeout_s)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._parts.scheme in _TLS:
            return ssl.create_default_context().wrap_socket(stream, server_hostname=host)
        return stream

    def _ask(self, *words: str | int) -> Any:
        parts = [str(word).encode() for word in words]
        frame = [b"*%d\r\n" % len(parts)]
        frame += [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]
        assert self._socket is not None
        self._socket.sendall(b"".join(frame))
        return self._reply()

    def _reply(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise Refused(rest.decode(errors="replace"))
        if kind == b"+":
            return rest.decode()
        size = _number(rest)
        if kind == b":":
            return size
        if kind == b"$":
            return None if size < 0 else self._exactly(size + 2)[:-2]
        if kind == b"*":
            return None if size < 0 else [self._reply() for _ in range(size)]
        raise ConnectionError(f"not RESP: {line[:40]!r}")

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            if len(self._buffer) > _LINE_BYTES_MAX:
                raise ConnectionError("a line without an end")
            self._receive()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _exactly(self, size: int) -> bytes:
        if size > _BULK_BYTES_MAX:
            raise ConnectionError(f"a reply of {size} bytes")
        while len(self._buffer) < size:
            self._receive()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _receive(self) -> None:
        assert self._socket is not None
        chunk = self._socket.recv(65_536)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        self._buffer += chunk


def _number(digits: bytes) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ConnectionError(f"not RESP: {digits[:40]!r}") from None


def _database(parts: SplitResult) -> int:
    text = parse_qs(parts.query).get("db", ["0"])[0]
    if parts.scheme != "unix":
        text = parts.path.lstrip("/") or text
    return int(text)

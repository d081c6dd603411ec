"""Real servers for tests, as objects that can be started, frozen and killed.

I1  A server keeps its port, its socket and its files over ``stop``, ``kill9`` and
    ``restart``; ``close`` takes all of it away.
I2  ``start`` returns when the server answers, be it by asking for a password.

Everything here is synchronous: these calls are short, and it must work in any fixture.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import valkey

from forebay.coordinator.valkey.embedded import bound_to_owner, find_binary

Flavour = Literal["valkey", "redis7"]
Words = str | Sequence[str]

_START_LIMIT_S = 10.0
_STOP_LIMIT_S = 10.0
_PORT_TRIES = 5


def program(flavour: Flavour) -> str | None:
    """The path of the server program, if it is on this machine."""
    if flavour == "redis7":
        return shutil.which("redis-server")
    found = find_binary()
    return str(found.path) if found and found.kind == "valkey" else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def pings_of(server: ValkeyServer) -> int:
    """How many PINGs it has answered."""
    lines = server.execute("INFO", "commandstats").decode().splitlines()
    counts = [line for line in lines if line.startswith("cmdstat_ping:")]
    return int(counts[0].partition("calls=")[2].partition(",")[0]) if counts else 0


class ValkeyServer:
    """``with ValkeyServer(config={"requirepass": "x"}) as server: server.url``"""

    def __init__(
        self,
        flavour: Flavour = "valkey",
        *,
        config: Mapping[str, Words] | None = None,
        acl: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.flavour = flavour
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="forebay-test-"))
        self.socket_path = str(self.directory / "s")
        self._config = dict(config or {})
        self._environ = dict(environ or {})
        self._process: subprocess.Popen[bytes] | None = None
        if acl:
            users = self.directory / "users.acl"
            users.write_text("\n".join(acl) + "\n")
            self._config["aclfile"] = str(users)

    def __repr__(self) -> str:
        return f"<ValkeyServer {self.flavour} pid={self.pid} port={self.port}>"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    @property
    def socket_url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def password(self) -> str:
        return str(self._config.get("requirepass", ""))

    def execute(self, *words: str | bytes | int) -> Any:
        """Run one command from outside, as the default user; the raw reply."""
        with valkey.Valkey(
            unix_socket_path=self.socket_path, password=self.password or None
        ) as client:
            client.response_callbacks.clear()
            return client.execute_command(*words)

    def start(self) -> None:
        first = not (self.directory / "log").exists()
        for left in reversed(range(_PORT_TRIES if first else 1)):
            self._spawn()
            if self._answers_in_time():
                return
            said = (self.directory / "log").read_text(errors="replace")[-2_000:]
            self.kill9()
            if not left or "in use" not in said:
                raise RuntimeError(f"{self!r} did not start; it said:\n{said}")
            self.port = free_port()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill9(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def sigstop(self) -> None:
        self._signal(signal.SIGSTOP)

    def sigcont(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill9()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _spawn(self) -> None:
        binary = program(self.flavour)
        if binary is None:
            raise RuntimeError(f"there is no server program for {self.flavour}")
        command = bound_to_owner([binary, *self._options()], signal.SIGKILL)
        with (self.directory / "log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=self._environ,
                process_group=0,
            )

    def _options(self) -> list[str]:
        options: dict[str, Words] = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": self.socket_path,
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "save": "",
            "appendonly": "no",
            "enable-debug-command": "local",
        }
        words: list[str] = []
        for name, value in (options | self._config).items():
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
        return words

    def _answers_in_time(self) -> bool:
        give_up_at = time.monotonic() + _START_LIMIT_S
        while self._process and self._process.poll() is None and time.monotonic() < give_up_at:
            if self._answers():
                return True
            time.sleep(0.002)
        return False

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(1.0)
            stream.connect(self.socket_path)
            stream.sendall(b"PING\r\n")
            reply = stream.recv(64)
            return bool(reply) and not reply.startswith(b"-LOADING")
        return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(_STOP_LIMIT_S)
        self._process = None

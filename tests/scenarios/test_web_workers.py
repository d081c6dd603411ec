"""Web servers with several worker processes, and what a node in each of them says."""

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

import pytest

from forebay.coordinator.embedded import bound_to_owner
from forebay.coordinator.private_server import FIX
from noded import PATIENCE_S, environ, until
from valkeyd import ValkeyServer, free_port


class Uvicorn:
    """``with Uvicorn(directory, "--workers", "2") as web: web.get("/")``"""

    def __init__(self, directory: Path, *options: str, **variables: str) -> None:
        self.port = free_port()
        self._log = directory / "uvicorn.log"
        self._temporary = tempfile.mkdtemp(prefix="fb-")  # short: there are sockets in it
        command = [sys.executable, "-m", "uvicorn", "--lifespan", "on", "--port", str(self.port)]
        # What a service has that nobody tests: no trace of pytest.
        kept = {name: text for name, text in environ().items() if not name.startswith("PYTEST_")}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                bound_to_owner([*command, *options, "private_app:app"], signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env={**kept, "FOREBAY_LOG__FORMAT": "json", "TMPDIR": self._temporary, **variables},
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


def private(web: Uvicorn) -> list[dict[str, Any]]:
    return [each for each in web.events("backend.finding") if each["name"] == "private_server"]


def test_several_workers_with_a_private_server_each_are_told(tmp_path: Path) -> None:
    """Each worker says it in the log and in the detail of its readiness, with the fix."""
    with Uvicorn(tmp_path, "--workers", "2") as web:
        found = until(lambda: len(private(web)) == 2 and private(web), what="both warnings")
        assert all("uvicorn runs 2 workers" in each["problem"] for each in found)
        assert {each["fix"] for each in found} == {FIX}
        check = web.get("/readyz")["private_server"]
        assert check["status"] == "warn"
        assert "uvicorn runs 2 workers" in check["detail"]
        assert check["detail"].endswith(FIX)


@pytest.mark.parametrize("options", [(), ("--reload",)])
def test_a_single_worker_is_well(options: tuple[str, ...], tmp_path: Path) -> None:
    """One process, or one behind a reloader, may have a private server."""
    with Uvicorn(tmp_path, *options) as web:
        until(lambda: web.events("node.running") and web.listens(), what="a running node")
        assert web.get("/readyz")["private_server"]["status"] == "pass"
        assert private(web) == []


def test_several_workers_with_one_server_are_well(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    """With a URL they share what any of them writes, and there is nothing to warn of."""
    with Uvicorn(tmp_path, "--workers", "2", VALKEY_URL=valkey_server.url) as web:
        until(lambda: len(web.events("node.running")) == 2, what="two running nodes")
        assert web.get("/put/7")["value"] == 7
        assert {web.get("/")["value"] for _ in range(12)} == {7}
        assert "private_server" not in web.get("/readyz")
        assert private(web) == []

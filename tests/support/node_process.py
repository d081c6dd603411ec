"""Node processes for tests: `forebay run` with the application in shop.py, as users run it.

I1  ``start`` returns when the endpoint listens and the node is ready.
I2  Whatever happens, ``close`` leaves no process behind.
I3  Nothing of the settings around the test gets in: no FOREBAY_ or VALKEY_ variable.

Everything here is synchronous: the other side is another process.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from forebay.coordinator.valkey.embedded import bound_to_owner
from support.eventually import wait_until

T = TypeVar("T")
TESTS = Path(__file__).parents[1]
PATIENCE_S = 40.0  #: for whatever has to come; not what is promised
_FOREIGN = ("FOREBAY_", "VALKEY_", "SHOP_", "CACHE_VER", "RATE_")


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def stands_still(pid: int) -> bool:
    """Whether a process that was told to stop has stopped; see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def environ(**more: str) -> dict[str, str]:
    """The environment without settings; the modules of the tests can be imported."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}


class NodeProcess:
    """``with NodeProcess(directory, url=server.url) as node: node.get("/readyz")``"""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "node",
        app: str = "support.shop:node",
        environ: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        """Settings are named with ``__`` for the dot: valkey__url."""
        self.name = name
        self.url = ""
        self._directory = directory
        self._log = directory / f"{name}.log"
        self._environ = environ or {}
        self._command = [sys.executable, "-m", "forebay.nodes.cli", "run", "--app", app]
        settings = {"http__port": 0, "log__format": "json", **settings}
        for setting, value in settings.items():
            self._command += ["--set", f"{setting.replace('__', '.')}={value}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0

    def __repr__(self) -> str:
        return f"<NodeProcess {self.name} pid={self.pid} {self.url}>"

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

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

    def spawn(self) -> Self:
        """Start the process, and do not wait for it."""
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                bound_to_owner(self._command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._directory,
                env=environ(SHOP_DIR=str(self._directory), **self._environ),
                process_group=0,
            )
        return self

    def start(self) -> Self:
        return self.spawn().until_ready()

    def until_ready(self) -> Self:
        self.url = wait_until(lambda: self.event("node.started"), what="node.started")["url"]
        wait_until(lambda: self.get("/readyz").status == 200, what=f"readiness of {self.name}")
        return self

    def said(self) -> str:
        """What this run of the process wrote."""
        return self._log.read_bytes()[self._log_from :].decode(errors="replace")

    def event(self, name: str) -> dict[str, Any]:
        """The first log line of this name; {} while there is none."""
        for line in self.said().splitlines():
            if line.startswith("{") and line.endswith("}"):
                found: dict[str, Any] = json.loads(line)
                if found.get("event") == name:
                    return found
        assert self._process is not None
        assert self._process.poll() is None, f"{self!r} has ended; it said:\n{self.said()}"
        return {}

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, *events: object) -> Answer:
        body = msgspec.json.encode(list(events))
        return self.request("POST", "/v1/events", body, content_type="application/json")

    def stats(self) -> Any:
        return self.get("/stats").json

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(PATIENCE_S)

    def stop(self) -> int:
        """Drain it; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Shop:
    """The files of shop.py, and nodes that run it: ``shop.node("one").start()``."""

    def __init__(self, directory: Path, namespace: str, **settings: object) -> None:
        self.directory = directory
        self.namespace = namespace
        self.stream = f"forebay:{namespace}:events"
        self._settings = settings
        self._nodes = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._nodes.close()

    def node(self, name: str = "node", *, sink: str = "", **settings: object) -> NodeProcess:
        """One that is not started yet; it ends with the shop."""
        node = NodeProcess(
            self.directory,
            name=name,
            environ={"SHOP_SINK": sink},
            node__namespace=self.namespace,
            **{**self._settings, **settings},
        )
        self._nodes.callback(node.close)
        return node

    def price(self, id: int, price: int) -> None:
        """Change the source, which tells nobody."""
        aside = self.directory / f"{id}.new"
        aside.write_text(str(price))
        aside.rename(self.directory / f"{id}")

    @property
    def sink_reached(self) -> bool:
        return (self.directory / "reached").exists()

    def sunk(self) -> list[Any]:
        """What the sink got, in its order."""
        path = self.directory / "sunk.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [msgspec.json.decode(line) for line in lines if line.endswith(b"\n")]

    def stored(self) -> dict[str, int]:
        """What a database behind the sink would hold: each key's price of the newest version."""
        newest = sorted(self.sunk(), key=lambda write: write["version"])
        return {write["key"]: write["value"]["price"] for write in newest}

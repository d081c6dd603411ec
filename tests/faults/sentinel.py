"""A sentinel, which promotes a replica when its primary is gone."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import valkey

from forebay.coordinator.valkey.embedded import bound_to_owner
from support.eventually import wait_until
from support.valkey_server import ValkeyServer, free_port, program

_NAME = "watched"
_DOWN_AFTER_MS = 500


class Sentinel:
    """``with Sentinel() as sentinel: sentinel.watch(primary)``; a quorum of one."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="forebay-sentinel-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        binary = program("valkey")
        assert binary is not None
        config = self.directory / "sentinel.conf"
        config.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.directory}\n")
        with (self.directory / "log").open("ab") as output:
            self._process = subprocess.Popen(
                bound_to_owner([binary, str(config), "--sentinel"], signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        wait_until(self._answers, what="the sentinel")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def watch(self, primary: ValkeyServer) -> None:
        """From now on; returns when its replica is known."""
        self._execute("SENTINEL", "MONITOR", _NAME, "127.0.0.1", primary.port, 1)
        self._execute("SENTINEL", "SET", _NAME, "down-after-milliseconds", _DOWN_AFTER_MS)
        self._execute("SENTINEL", "SET", _NAME, "failover-timeout", 5_000)
        wait_until(self._knows_replica, what="the replica at the sentinel")

    def forget(self) -> None:
        self._execute("SENTINEL", "REMOVE", _NAME)

    def primary_port(self) -> int:
        return int(self._execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", _NAME)[1])

    def _knows_replica(self) -> bool:
        found = self._execute("SENTINEL", "REPLICAS", _NAME)
        return any(b"master-link-status" in each and b"ok" in each for each in found)

    def _answers(self) -> bool:
        try:
            return bool(self._execute("PING"))
        except valkey.ConnectionError:
            return False

    def _execute(self, *words: str | int) -> Any:
        with valkey.Valkey(port=self.port) as client:
            client.response_callbacks.clear()
            return client.execute_command(*words)

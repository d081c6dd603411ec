"""Web servers with several worker processes, and what a node in each of them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forebay.coordinator.valkey.private_server import FIX
from support.eventually import wait_until
from support.uvicorn_server import Uvicorn
from support.valkey_server import ValkeyServer


def private(web: Uvicorn) -> list[dict[str, Any]]:
    return [each for each in web.events("backend.finding") if each["name"] == "private_server"]


def test_several_workers_with_a_private_server_each_are_told(tmp_path: Path) -> None:
    """Each worker says it in the log and in the detail of its readiness, with the fix."""
    with Uvicorn(tmp_path, "--workers", "2") as web:
        found = wait_until(lambda: len(private(web)) == 2 and private(web), what="both warnings")
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
        wait_until(lambda: web.events("node.running") and web.listens(), what="a running node")
        assert web.get("/readyz")["private_server"]["status"] == "pass"
        assert private(web) == []


def test_several_workers_with_one_server_are_well(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    """With a URL they share what any of them writes, and there is nothing to warn of."""
    with Uvicorn(tmp_path, "--workers", "2", VALKEY_URL=valkey_server.url) as web:
        wait_until(lambda: len(web.events("node.running")) == 2, what="two running nodes")
        assert web.get("/put/42/7")["value"] == 7
        assert {web.get("/42")["value"] for _ in range(12)} == {7}
        assert "private_server" not in web.get("/readyz")
        assert private(web) == []

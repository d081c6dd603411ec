"""A real Prometheus with the shipped configuration, pointed at one node, every second."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import anyio

from support.programs import tool
from support.valkey_server import free_port

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
TARGET = "127.0.0.1:8642"


@asynccontextmanager
async def prometheus_on(target: str, directory: Path) -> AsyncGenerator[aiohttp.ClientSession]:
    """Scrapes ``host:port``; gives a client of its API."""
    text = CONFIG.read_text()
    for shipped, ours in {TARGET: target, "interval: 5s": "interval: 1s", ": 3s": ": 1s"}.items():
        assert text.count(shipped) == 1
        text = text.replace(shipped, ours)
    config = directory / "prometheus.yml"
    config.write_text(text)
    address = f"127.0.0.1:{free_port()}"
    command = [
        tool("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    ]
    async with (
        await anyio.open_process(command, stdout=subprocess.DEVNULL, stderr=None) as process,
        aiohttp.ClientSession(f"http://{address}") as session,
    ):
        try:
            yield session
        finally:
            process.terminate()
            with anyio.move_on_after(10, shield=True):
                await process.wait()


async def query(session: aiohttp.ClientSession, expression: str) -> float | None:
    """The single value of an expression; None while there is none."""
    try:
        async with session.get("/api/v1/query", params={"query": expression}) as response:
            found = (await response.json())["data"]["result"] if response.status == 200 else []
    except aiohttp.ClientConnectionError:
        return None
    return float(found[0]["value"][1]) if found else None

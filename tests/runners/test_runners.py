"""The same story under every way to run a loop, where a library has brought sniffio along.

``anyio.run`` and anyio's plugin for pytest say beforehand which library runs the loop; asyncio,
uvloop, uvicorn, aiohttp and pytest-asyncio do not. Each way has a process of its own.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forebay.coordinator.valkey.embedded import bound_to_owner
from runners.story import EXPECTED
from support.eventually import wait_until
from support.node_process import environ
from support.valkey_server import ValkeyServer

HERE = Path(__file__).parent
PROGRAMS = {
    "asyncio.run": "asyncio.run(told())",
    "uvloop": "asyncio.Runner(loop_factory=uvloop.new_event_loop).run(told())",
    "anyio.run": "anyio.run(told)",
    "a thread": "threaded(lambda: asyncio.run(told()))",
}
BEFORE = """
import asyncio, concurrent.futures, anyio, sniffio, uvloop
from runners.story import told

def threaded(function):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()

"""
SERVERS = {
    "uvicorn": ["uvicorn", "--port", "0", "--loop", "asyncio", "runners.story:app"],
    "uvicorn with uvloop": ["uvicorn", "--port", "0", "--loop", "uvloop", "runners.story:app"],
    "aiohttp": ["aiohttp.web", "-H", "127.0.0.1", "-P", "0", "runners.story:make_app"],
}


@pytest.fixture
def env(valkey_server: ValkeyServer, namespace: str) -> dict[str, str]:
    assert valkey_server.socket_url
    return environ(
        STORY_URL=valkey_server.socket_url, STORY_NAMESPACE=namespace, PYTHONUNBUFFERED="1"
    )


@pytest.mark.parametrize("way", PROGRAMS)
def test_program(way: str, env: dict[str, str]) -> None:
    """A node works in an event loop that the program runs itself."""
    program = f"{BEFORE}\nprint('told', {PROGRAMS[way]}.decode())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = re.findall(r"^told (.*)$", done.stdout, re.MULTILINE)
    assert json.loads(told) == EXPECTED
    assert "never awaited" not in done.stderr


@contextmanager
def served(command: list[str], log: Path, env: dict[str, str]) -> Iterator[str]:
    """The URL of a web server that listens; SIGTERM stops it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            bound_to_owner([sys.executable, "-m", *command], signal.SIGKILL),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            process_group=0,
        )
    try:

        def url() -> str:
            assert process.poll() is None, log.read_text()
            found = re.search(r"unning on (http://\S*:[1-9]\d*)", log.read_text())
            return found[1] if found else ""

        yield wait_until(url, what="the server")
        process.terminate()
        process.wait(30)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("way", SERVERS)
def test_web_server(way: str, env: dict[str, str], tmp_path: Path) -> None:
    """A node works if a web server starts and stops it, and its requests use it."""
    log = tmp_path / "log"
    with (
        served(SERVERS[way], log, env) as url,
        urllib.request.urlopen(url, timeout=40) as response,
    ):
        assert json.load(response) == EXPECTED, log.read_text()
    text = log.read_text()
    assert text.count('"node.stopped"') == 2, text
    assert "never awaited" not in text
    assert "Traceback" not in text, text


def test_pytest_asyncio(env: dict[str, str], tmp_path: Path) -> None:
    """A node works under pytest-asyncio with its own configuration."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nfilterwarnings = error\n"
        "asyncio_default_fixture_loop_scope = function\n"
    )
    (tmp_path / "test_story.py").write_text(
        '''"""A user's own tests."""
import pytest
import pytest_asyncio
from runners.story import EXPECTED, Story


@pytest_asyncio.fixture
async def in_block():
    story = Story()
    async with story.running():
        yield story


@pytest_asyncio.fixture
async def started():
    story = Story()
    for node in story.nodes:
        await node.start()
    async with story.nodes[-1].serving() as story.url:
        yield story
    for node in story.nodes:
        await node.stop()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared():
    story = Story()
    async with story.running():
        yield story


async def test_fixture_with_a_block(in_block):
    assert await in_block.tell() == EXPECTED


async def test_fixture_that_starts_and_stops(started):
    assert await started.tell() == EXPECTED


@pytest.mark.asyncio(loop_scope="module")
async def test_fixture_of_the_module(shared):
    assert await shared.tell() == EXPECTED
'''
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:anyio", "-p", "no:valkey"]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin"]
    done = _run(command, tmp_path, {**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def _run(command: list[str], cwd: Path, env: dict[str, str]) -> Any:
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=50, check=False
    )

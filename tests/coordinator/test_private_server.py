"""The warning of a private server in each process of one application: P1-P5."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
from structlog.testing import capture_logs

from forebay.coordinator.background import background_tasks
from forebay.coordinator.valkey.embedded import bound_to_owner
from forebay.coordinator.valkey.private_server import (
    FIX,
    PrivateServer,
    Supervisor,
    announced,
    others,
    supervisor_of,
)
from support.node_process import environ

PYTHON = "/usr/bin/python3.11"
GUNICORN_TITLE = "gunicorn: master [shop.web:app]"


@pytest.mark.parametrize(
    "parent, variables, expected",
    [
        ([PYTHON, "/opt/bin/uvicorn", "a:app", "--workers", "4"], {}, Supervisor("uvicorn", 4)),
        ([PYTHON, "-m", "uvicorn", "--workers=2", "a:app"], {}, Supervisor("uvicorn", 2)),
        (
            [PYTHON, "-X", "dev", "-m", "uvicorn", "a", "--workers", "4"],
            {},
            Supervisor("uvicorn", 4),
        ),
        (["/opt/bin/uvicorn", "a:app"], {"WEB_CONCURRENCY": "3"}, Supervisor("uvicorn", 3)),
        ([PYTHON, "/opt/bin/gunicorn", "-w", "4", "a:app"], {}, Supervisor("gunicorn", 4)),
        (["gunicorn", "-w4", "a:app"], {}, Supervisor("gunicorn", 4)),
        (["gunicorn", "a:app"], {"GUNICORN_CMD_ARGS": "--workers 5"}, Supervisor("gunicorn", 5)),
        ([GUNICORN_TITLE], {"WEB_CONCURRENCY": "2"}, Supervisor("gunicorn", 2)),
        (["gunicorn", "--reload", "-w", "2", "a:app"], {}, Supervisor("gunicorn", 2)),
        # one worker, or a reloader
        ([PYTHON, "-m", "uvicorn", "a:app"], {}, None),
        ([PYTHON, "-m", "uvicorn", "a:app", "--workers", "1"], {"WEB_CONCURRENCY": "4"}, None),
        (["uvicorn", "a:app", "--reload"], {"WEB_CONCURRENCY": "4"}, None),
        (["uvicorn", "a:app", "--reload", "--workers", "4"], {}, None),
        (["gunicorn", "a:app"], {}, None),
        (["gunicorn", "-w", "many", "a:app"], {}, None),
        # no supervisor
        (["bash", "-c", "uvicorn a:app --workers 4"], {}, None),
        ([PYTHON, "-m", "forebay.nodes.cli", "dev"], {}, None),
        ([PYTHON, "-m", "pytest", "-n", "4"], {"WEB_CONCURRENCY": "4"}, None),
        ([PYTHON, "-c", "import uvicorn", "--workers", "4"], {}, None),
        (["make", "-w"], {}, None),
        ([PYTHON], {}, None),
        ([], {"WEB_CONCURRENCY": "4"}, None),
    ],
)
def test_a_supervisor_is_known_by_its_command_line(
    parent: list[str], variables: dict[str, str], expected: Supervisor | None
) -> None:
    """P2: uvicorn and gunicorn with several workers, however they were started."""
    assert supervisor_of(parent, variables) == expected


def test_a_supervisor_is_known_by_what_it_gave_to_a_spawned_process() -> None:
    """P2: also where a program calls uvicorn.run(..., workers=4); a reloader is none."""
    from uvicorn import Config

    script = [PYTHON, "main.py"]
    assert supervisor_of(script, {}, Config("a:app", workers=4)) == Supervisor("uvicorn", 4)
    assert supervisor_of(script, {}, Config("a:app", workers=1)) is None
    assert supervisor_of(script, {}, Config("a:app", workers=4, reload=True)) is None
    assert supervisor_of(script, {}, SimpleNamespace(workers="four")) is None


@contextmanager
def process(namespace: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has announced its private server."""
    code = (
        "import sys; from pathlib import Path\n"
        "from forebay.coordinator.valkey.private_server import announced\n"
        f"with announced({namespace!r}, Path({str(directory)!r})):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    command = bound_to_owner([sys.executable, "-c", code], signal.SIGKILL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environ()) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
            yield started
        finally:
            started.kill()


def test_other_processes_are_found_while_they_live(tmp_path: Path) -> None:
    """P3: those of the namespace, and none that was killed; nothing is left of these."""
    (tmp_path / "forebay-node-nonsense").write_text("{}")
    with announced("shop", tmp_path), process("shop", tmp_path) as one:
        with process("other", tmp_path) as other:
            assert others("shop", tmp_path) == [one.pid]
            assert others("other", tmp_path) == [other.pid]
        one.kill()
        one.wait()
        assert others("shop", tmp_path) == []
        assert others("other", tmp_path) == []
        assert len(list(tmp_path.iterdir())) == 1  # ours
    assert list(tmp_path.iterdir()) == []


def test_a_spoilt_announcement_is_passed_over(tmp_path: Path) -> None:
    """P5: what other programs leave in that directory is no evidence, and no fault."""
    (tmp_path / "forebay-node-dir").mkdir()
    (tmp_path / "forebay-node-link").symlink_to("/etc/passwd")
    with process("shop", tmp_path), process("shop", tmp_path) as spoilt:
        for path in tmp_path.glob("forebay-node-*"):
            if path.is_file() and str(spoilt.pid) in path.read_text():
                path.write_bytes(b"\xff" * 1_000)
        assert spoilt.pid not in others("shop", tmp_path)


async def test_a_process_that_starts_later_is_found(tmp_path: Path) -> None:
    """P2: what the first of several processes could not see at its start is logged once."""
    server = PrivateServer("shop", kind="embedded server", environ={}, directory=tmp_path)
    with capture_logs() as lines, ExitStack() as stack:
        async with background_tasks() as tasks:
            await tasks.start(server.run)
            assert (server.problem, lines) == ("", [])
            other = stack.enter_context(process("shop", tmp_path))
            with anyio.fail_after(30):
                while not server.problem:
                    await anyio.sleep(0.01)
    assert f"other processes ({other.pid}) have one of their own for 'shop'" in server.problem
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("backend.finding", "warning")
    assert (line["name"], line["problem"], line["fix"]) == ("private_server", server.problem, FIX)


@pytest.mark.parametrize("writable", [True, False])
async def test_a_worker_of_a_supervisor_warns_alone(tmp_path: Path, writable: bool) -> None:
    """P2, P5: it needs to see no other process, and no directory for temporary files."""
    directory = tmp_path if writable else tmp_path / "none"
    server = PrivateServer(
        "shop",
        kind="fake server",
        environ={},
        directory=directory,
        supervisor=Supervisor("uvicorn", 4),
    )
    async with background_tasks() as tasks:
        await tasks.start(server.run)
        assert "a private fake server, but uvicorn runs 4 workers: they share" in server.problem


async def test_nothing_is_looked_for_under_pytest(tmp_path: Path) -> None:
    """P4: workers of pytest-xdist have a server each, and want it."""
    variables = {"PYTEST_XDIST_WORKER": "gw0"}
    server = PrivateServer(
        "shop",
        kind="embedded server",
        environ=variables,
        directory=tmp_path,
        supervisor=Supervisor("gunicorn", 2),
    )
    with process("shop", tmp_path):
        async with background_tasks() as tasks:
            await tasks.start(server.run)
            assert server.problem == ""

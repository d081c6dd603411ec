"""`forebay dev` as a newcomer runs it: whole processes, from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support.eventually import wait_until
from support.valkey_server import ValkeyServer, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DEV = [sys.executable, "-m", "forebay.nodes.cli", "dev", "--port", "0"]
CHECKS = {
    "backlog_drained",
    "rows_equal_the_data_set",
    "boards_show_the_final_state",
    "order_kept",
    "no_dead_letters",
    "no_board_went_back",
    "nodes_ended_cleanly",
    "no_orphan_process",
}


VALKEY_LINE = r"valkey +(redis://127\.0\.0\.1:\d+)"


def environ(mark: str) -> dict[str, str]:
    """Without the settings of whoever runs the tests; marked, so that children are found."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FOREBAY_", "VALKEY_"))}
    return {**kept, "TEST_RUN_MARK": mark}


def processes_of(mark: str) -> list[str]:
    """Command lines of the living processes that inherited the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"TEST_RUN_MARK={mark}" in _text(entry / "environ"):
                found.append(_text(entry / "cmdline").replace("\0", " "))
    return [line for line in found if line.strip()]


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def listens(address: str) -> bool:
    """Whether Valkey is there; its environment is empty, so the mark does not show it."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def played(mark: str, directory: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [*DEV, "--once", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        env=environ(mark),
        cwd=directory,
        check=False,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@contextmanager
def running(mark: str, directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`forebay dev` in a process group of its own, as a shell starts it; ended afterwards."""
    with (directory / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*DEV, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environ(mark),
            cwd=directory,
            process_group=0,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if match := re.search(pattern, line):
            return match
    pytest.fail(f"it ended without {pattern!r}:\n{''.join(said)}")


def test_a_day_played_once(namespace: str, tmp_path: Path) -> None:
    """Exit 0, one JSON document, all checks true, all events seen, no process left."""
    code, outcome, stderr = played(namespace, tmp_path, "--duration", "5")

    assert (code, outcome.get("problems")) == (0, {}), stderr
    assert outcome["checks"] == dict.fromkeys(CHECKS, True)
    assert outcome["ok"] is True
    assert outcome["killed"] is False
    assert (outcome["counts"]["flights"], outcome["counts"]["events"]) == (842, 1194)
    assert outcome["counts"]["boards_compared"] == 3 * 90
    assert outcome["counts"]["reads"] > 100
    assert outcome["nodes"] == {"node-1": [0], "node-2": [0], "node-3": [0]}
    assert processes_of(namespace) == []


def test_a_day_with_a_node_killed(namespace: str, tmp_path: Path) -> None:
    """kill -9 of one of three nodes half-way: nothing is lost, and the order is kept."""
    code, outcome, stderr = played(namespace, tmp_path, "--kill", "--duration", "6")

    assert (code, outcome.get("problems")) == (0, {}), stderr
    assert outcome["checks"] == dict.fromkeys(CHECKS, True)
    assert outcome["killed"] is True
    assert outcome["nodes"] == {"node-1": [-9, 0], "node-2": [0], "node-3": [0]}
    assert processes_of(namespace) == []


def test_a_server_that_is_given(
    namespace: str, tmp_path: Path, make_server: Callable[..., ValkeyServer]
) -> None:
    """With a URL nothing is embedded, and a password is not shown to anybody."""
    server = make_server("valkey", config={"requirepass": "correct-horse"})
    url = f"valkey://:correct-horse@127.0.0.1:{server.port}/0"
    code, outcome, stderr = played(
        namespace, tmp_path, "--url", url, "--namespace", namespace, "--duration", "3"
    )

    assert (code, outcome.get("problems")) == (0, {}), stderr
    assert outcome["backend"]["why"] == "valkey.url is set (flag --url)"
    assert "correct-horse" not in json.dumps(outcome) + stderr
    assert server.execute("EXISTS", f"forebay:{namespace}:events") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(namespace: str, tmp_path: Path, number: int) -> None:
    """While boards are read and flights depart: exit 0, and nothing is left."""
    with running(namespace, tmp_path, "--duration", "20") as process:
        address = read_until(process, VALKEY_LINE)[1]
        read_until(process, r"event \d+ of 1194")
        assert len(processes_of(namespace)) >= 6
        process.send_signal(number)
        process.communicate(timeout=60)

    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert processes_of(namespace) == []
    assert not listens(address)


def test_a_signal_while_starting(namespace: str, tmp_path: Path) -> None:
    """Before the nodes are ready: exit 0, and nothing is left."""
    with running(namespace, tmp_path) as process:
        wait_until(lambda: any("demo.app:node" in line for line in processes_of(namespace)))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)

    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert processes_of(namespace) == []


def test_a_second_signal_ends_it_at_once(namespace: str, tmp_path: Path) -> None:
    """A node that cannot drain, since it is frozen, does not hold up an impatient user."""
    with running(namespace, tmp_path, "--duration", "20", "--data-dir", "data") as process:
        address = read_until(process, VALKEY_LINE)[1]
        read_until(process, r"event \d+ of 1194")
        (frozen, *_) = _pids(namespace, "demo.app:node")
        os.kill(frozen, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not _pids(namespace, "dev.replayer"))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)

    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert processes_of(namespace) == []
    assert not listens(address)


def _pids(mark: str, words: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            ours = entry.name.isdigit() and f"TEST_RUN_MARK={mark}" in _text(entry / "environ")
            if ours and words in _text(entry / "cmdline").replace("\0", " "):
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_killed_itself_it_leaves_nothing(namespace: str, tmp_path: Path) -> None:
    """kill -9 of the command: the nodes, the programs and Valkey end with it."""
    with running(namespace, tmp_path, "--duration", "20") as process:
        address = read_until(process, VALKEY_LINE)[1]
        read_until(process, r"event \d+ of 1194")
        process.kill()
        process.wait(10)

        wait_until(lambda: processes_of(namespace) == [] and not listens(address), limit_s=10)


def test_the_printed_lines_do_what_they_say(namespace: str, tmp_path: Path) -> None:
    """The curl that is printed, pasted into a shell, puts a flight on the board of JFK."""
    with running(namespace, tmp_path, "--duration", "60") as process:
        look = read_until(process, r"^  (curl .*board:JFK)$")[1]
        publish = read_until(process, r"^  (curl .*/v1/events.*)$")[1]
        read_until(process, r"event \d+ of 1194")

        def board() -> str:
            return subprocess.run(
                look,
                shell=True,
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        assert "FB 1" not in board()
        subprocess.run(publish, shell=True, capture_output=True, check=True)
        wait_until(lambda: "FB 1" in board(), limit_s=10)


def test_a_closed_port_is_one_line(namespace: str, tmp_path: Path) -> None:
    """Exit 3, the setting and its origin, no traceback, no document."""
    url = f"valkey://127.0.0.1:{free_port()}/0"
    patience = "valkey.startup_timeout_ms=1500"
    code, outcome, stderr = played(namespace, tmp_path, "--url", url, "--set", patience)

    assert (code, outcome) == (3, {})
    assert stderr.count("\n") == 1
    assert "valkey.url" in stderr
    assert "flag --url" in stderr
    assert processes_of(namespace) == []


def test_fakeredis_is_refused(namespace: str, tmp_path: Path) -> None:
    """A fake lives in one process, the demo in several: exit 2, and what to do."""
    code, outcome, stderr = played(namespace, tmp_path, "--set", "valkey.fake=true")

    assert (code, outcome) == (2, {})
    assert "valkey.fake" in stderr


def test_json_without_once_is_usage(namespace: str, tmp_path: Path) -> None:
    """There is no document of a day that does not end."""
    done = subprocess.run(
        [*DEV, "--json"],
        capture_output=True,
        text=True,
        env=environ(namespace),
        cwd=tmp_path,
        check=False,
        timeout=30,
    )

    assert done.returncode == 2
    assert "--once" in done.stderr

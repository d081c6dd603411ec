"""`forebay health` against a real HTTP server that says what the test wants."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result

from forebay.nodes.cli.health import command
from support.valkey_server import free_port

ANSWERS = {
    "/readyz": (503, b"valkey: not reached\nsecond line\n"),
    "/livez": (200, b"ok\n"),
    "/startupz": (200, b""),
    "/base/readyz": (200, b"ok \x1b[2Jpast\xff" + b"." * 5_000),
}


class Node(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Node) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def health(*words: str) -> Result:
    return CliRunner().invoke(command, words, standalone_mode=False)


@pytest.mark.parametrize(
    "check,code,line",
    [
        ("ready", 1, "ready: 503 valkey: not reached\n"),
        ("live", 0, "live: ok\n"),
        ("start", 0, "start: ok\n"),
    ],
)
def test_answer_of_the_node_decides(url: str, check: str, code: int, line: str) -> None:
    """I1: one line, and an exit code for the probe; a no goes to stderr."""
    result = health("--url", url, "--check", check)

    assert (result.return_value, result.output) == (code, line)
    assert result.stdout == ("" if code else line)


def test_json_says_the_same(url: str) -> None:
    """--json: which check, whether it passed, and in what words."""
    result = health("--url", url, "--json")

    expected = {"check": "ready", "ok": False, "detail": "503 valkey: not reached"}
    assert (result.return_value, json.loads(result.stdout)) == (1, expected)


def test_line_is_printable_and_short(url: str) -> None:
    """What the node says cannot move a cursor or fill a log."""
    result = health("--url", f"{url}/base/")

    assert result.return_value == 0
    assert result.stdout.startswith("ready: ok ?[2Jpast")
    assert result.stdout.strip().isprintable()
    assert len(result.stdout) < 250


def test_nobody_listens() -> None:
    """No node there: exit 1 and where it was looked for."""
    port = free_port()
    result = health("--url", f"http://127.0.0.1:{port}")

    assert result.return_value == 1
    assert result.stderr == f"ready: 127.0.0.1:{port}: Connection refused\n"


def test_silence_is_no_answer() -> None:
    """A node that accepts and says nothing is not well."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        result = health("--url", f"http://127.0.0.1:{port}", "--timeout", "0.05")

    assert result.return_value == 1
    assert result.stderr == f"ready: no answer from 127.0.0.1:{port} within 0.05 s\n"


def test_another_protocol_is_no_answer() -> None:
    """Something else on that port: exit 1, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def talk() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-x\r\n")
                connection.recv(1_000)

        thread = Thread(target=talk)
        thread.start()
        result = health("--url", f"http://127.0.0.1:{port}")
        thread.join()

    assert result.return_value == 1
    assert result.stderr == f"ready: 127.0.0.1:{port} does not speak HTTP\n"


def settings_say(where: str, port: int, tmp_path: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """The words of the command, where the port is set in this place."""
    patch.chdir(tmp_path)
    if where in ("environment", "--set"):
        patch.setenv("FOREBAY_HTTP__PORT", str(port if where == "environment" else 1))
        return ["--set", f"http.port={port}"] if where == "--set" else []
    file = tmp_path / ("forebay.toml" if where == "file" else "other.toml")
    file.write_text(f'[http]\nhost = "0.0.0.0"\nport = {port}\n[valkey]\npasswort = "x"\n')
    return ["--config", str(file)] if where == "--config" else []


@pytest.mark.parametrize("where", ["environment", "--set", "file", "--config"])
def test_the_node_is_where_its_settings_say(
    url: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: the port of environment, file or flag, as for `forebay run`; nothing else is read."""
    monkeypatch.setenv("FOREBAY_VALKEY__PASSWORD_FILE", str(tmp_path / "gone"))
    port = int(url.rpartition(":")[2])
    result = health("--check", "live", *settings_say(where, port, tmp_path, monkeypatch))

    assert (result.return_value, result.output) == (0, "live: ok\n")


@pytest.mark.parametrize(
    "words,said",
    [
        (["--set", "http.port=70000"], "must be a whole number from 0 to 65535"),
        (["--set", "http.prot=1"], "did you mean http.port?"),
        (["--set", "http.port=0"], "give --url"),
        (["--set", "http.enabled=false"], "give --url"),
        (["--config", "/nowhere.toml"], "No such file"),
    ],
)
def test_settings_that_lead_to_no_node(words: list[str], said: str) -> None:
    """I2: wrong usage, and not a node that is not well."""
    result = CliRunner().invoke(command, words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8642", "https://h", "http://", "http://h:x", "http://[", "http://u@h"]
)
def test_url_that_cannot_be_asked(url: str) -> None:
    """What is no plain HTTP address is wrong usage."""
    result = CliRunner().invoke(command, ["--url", url])

    assert result.exit_code == 2
    assert "write http://HOST:PORT" in result.output


def test_a_probe_imports_no_logging(url: str) -> None:
    """I3: what logs takes longer to import than all else that a probe needs."""
    program = "import sys, forebay.nodes.cli.main as m; sys.argv[1:] = ['health', '--url', %r];"
    code = f"{program % url}\ntry: m.main()\nfinally: print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "'click'" in loaded
    assert not [
        name for name in ("structlog", "aiohttp", "anyio", "msgspec") if f"'{name}'" in loaded
    ]

"""Files with secrets: which are refused, which warn, and that nothing shows what they hold."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.pretty import pretty_repr

import forebay
from forebay.coordinator.valkey.dialer import _check_readable
from forebay.nodes.cli.sources import load
from forebay.nodes.logs import configure_logs
from forebay.nodes.secret_files import exposed_secrets
from forebay.nodes.web.access import LOOK_S, BearerToken
from forebay.schemas.errors import ConfigError, Disconnected
from forebay.schemas.settings import Http, Log, Settings, Valkey
from forebay.schemas.settings_env import Found
from forebay.schemas.settings_sources import FileSource
from forebay.schemas.urls import endpoint_of
from support.clock import ManualClock
from support.node_process import environ
from support.valkey_server import ValkeyServer

PASSWORD = "hunter2hunter2"
URL = f"valkey://app:{PASSWORD}@db:6379/0"


def secret(directory: Path, mode: int, text: str = f"{PASSWORD}\n") -> str:
    path = directory / "secret"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def warned(found: dict[str, str], config: str | None = None) -> list[tuple[str, str]]:
    """The setting and the problem of each warning, with these settings in the environment."""
    resolved = load(config, environ={"FOREBAY_URL": "valkeys://h", **found})
    return [(each.setting, each.problem) for each in exposed_secrets(resolved)]


@pytest.mark.parametrize("mode,may", [(0o644, "read"), (0o606, "write"), (0o640, ""), (0o400, "")])
def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path, mode: int, may: str) -> None:
    """Password, token, certificate key, and a configuration file with a password in it."""
    path = secret(tmp_path, mode)
    expected = [f"other users of this machine may {may} {path}"] if may else []
    for variable, setting in (
        ("FOREBAY_VALKEY__PASSWORD_FILE", "valkey.password"),
        ("VALKEY_PASSWORD_FILE", "valkey.password"),
        ("FOREBAY_HTTP__TOKEN_FILE", "http.token_file"),
    ):
        assert warned({variable: path}) == [(setting, each) for each in expected]
    both = {"FOREBAY_VALKEY__TLS_CERT_FILE": path, "FOREBAY_VALKEY__TLS_KEY_FILE": path}
    assert warned(both) == [("valkey.tls_key_file", each) for each in expected]
    secret(tmp_path, mode, URL.replace("valkey:", "valkeys:"))
    assert warned({"FOREBAY_URL": "", "FOREBAY_URL_FILE": path}) == [
        ("valkey.password", each) for each in expected
    ]
    for text in (
        f'[valkey]\nurl = "valkey://h"\npassword = "{PASSWORD}"',
        f'[valkey]\nurl = "{URL}"',
    ):
        secret(tmp_path, mode, text)
        assert warned({"FOREBAY_URL": ""}, config=path) == [
            ("valkey.password", each) for each in expected
        ]


def test_a_configuration_file_without_a_secret_may_be_read_by_all(tmp_path: Path) -> None:
    """So is one whose password another source overrides."""
    path = secret(tmp_path, 0o644, "[http]\nport = 1")
    assert warned({}, config=path) == []
    path = secret(tmp_path, 0o644, f'[valkey]\npassword = "{PASSWORD}"')
    assert warned({"VALKEY_PASSWORD": "x", "FOREBAY_VALKEY__PASSWORD": "y"}, config=path) == []


async def test_a_node_logs_it_when_it_starts(
    tmp_path: Path, valkey_server: ValkeyServer, namespace: str
) -> None:
    """Also for settings made in code; the line names setting, file and fix."""
    path = secret(tmp_path, 0o644, "a-token-of-some-length")
    settings = Settings(valkey=Valkey(url=valkey_server.socket_url), http=Http(token_file=path))
    with io.StringIO() as stream:
        configure_logs(Log(format="json"), instance="t", stream=stream)
        async with forebay.Node(namespace, settings=settings):
            lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [each for each in lines if each["event"] == "setting.exposed"]
    assert (line["level"], line["setting"]) == ("warning", "http.token_file")
    assert line["fix"].startswith(f"chmod o-rw {path}")


@pytest.mark.parametrize(
    "variable",
    [
        "FOREBAY_VALKEY__PASSWORD_FILE",
        "FOREBAY_URL_FILE",
        "FOREBAY_CONFIG",
        "FOREBAY_VALKEY__TLS_CA_FILE",
        "FOREBAY_VALKEY__TLS_KEY_FILE",
    ],
)
def test_a_fifo_does_not_hang_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Nobody writes to it; the error names the setting, the file and what it is."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo(path := "fifo.pem")
    found = {"FOREBAY_VALKEY__TLS_CERT_FILE": sys.executable} if "KEY_FILE" in variable else {}
    found |= {} if "URL" in variable else {"FOREBAY_URL": "valkeys://h"}
    with pytest.raises(ConfigError, match="it is a FIFO, not a regular file") as caught:
        load(environ={**found, variable: path})
    assert path in str(caught.value)


def test_a_fifo_does_not_hang_the_loop(tmp_path: Path) -> None:
    """A node that runs looks at the token again, and opens certificates at each connection."""
    path = tmp_path / "token"
    path.write_text("a-token-of-some-length")

    clock = ManualClock()
    bearer = BearerToken(path, clock)
    path.unlink()
    os.mkfifo(path)
    clock.now_s += LOOK_S
    assert bearer.accepts(["Bearer a-token-of-some-length"])
    with pytest.raises(Disconnected, match=r"tls_ca_file .* it is a FIFO"):
        _check_readable(Valkey(tls_ca_file=str(path)))


def test_config_check_says_what_is_wrong_with_a_token_file(tmp_path: Path) -> None:
    """Without it the node starts as far as the endpoint, and ends there."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path / "none", secret(tmp_path, 0o600, "short")):
        command = [sys.executable, "-m", "forebay.nodes.cli", "config", "check"]
        command += ["--set", f"http.token_file={path}"]
        done = subprocess.run(command, cwd=tmp_path, env=environ(), capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"Error: http.token_file = {path} ")


def test_no_text_of_settings_shows_the_password_of_a_url() -> None:
    """repr, str, format, and rich, which shows the locals of a traceback by it."""
    valkey = Valkey(url=URL, reader_url=f"redis://:{PASSWORD}@r")
    settings = Settings(valkey=valkey)
    found = Found(name="valkey.url", value=URL, origin="x", rank=1)
    file = FileSource(path="f", text=URL)
    shown = [settings, valkey, found, file, endpoint_of(valkey), [settings], {"a": valkey}]
    texts = [text for each in shown for text in (repr(each), str(each), f"{each}")]
    texts += [pretty_repr(each) for each in shown]

    assert [text for text in texts if PASSWORD in text] == []
    assert "valkey://app:***@db:6379/0" in repr(settings)
    assert valkey.url == URL
    with io.StringIO() as stream:
        configure_logs(Log(format="json"), instance="t", stream=stream)
        forebay.nodes.logs.structlog.get_logger().info("x.y", settings=settings, url=URL)
        assert PASSWORD not in stream.getvalue()

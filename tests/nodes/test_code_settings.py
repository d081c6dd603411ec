"""Settings and namespaces that an application gives in its code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import forebay
from forebay.schemas.settings import (
    CacheDefaults,
    Log,
    NodeSettings,
    Secret,
    Settings,
    Valkey,
)
from forebay.schemas.settings import Workers as WorkerSettings
from forebay.schemas.settings_sources import Resolved
from support.valkey_server import ValkeyServer

MakeNode = Callable[..., forebay.Node]


@pytest.mark.parametrize("namespace", ["", "a b", "a:b", "{a}", "x" * 64, "-a"])
def test_namespace_that_cannot_be_is_refused(namespace: str) -> None:
    """I2: a namespace given in code is checked like one from outside."""
    with pytest.raises(forebay.ConfigError, match="namespace") as caught:
        forebay.Node(namespace)
    assert caught.value.origin == "the code"


def test_settings_in_code_are_checked() -> None:
    """I2: a value outside its limits, or a pair that does not go together, is refused."""
    for settings in (
        Settings(cache=CacheDefaults(max_staleness_ms=-5)),
        Settings(workers=WorkerSettings(beat_ms=2_000, ownership_ttl_ms=1_000)),
        Settings(log=Log(level="loud")),  # type: ignore[arg-type]
        Settings(valkey=Valkey(url="nonsense")),
    ):
        with pytest.raises(forebay.ConfigError) as caught:
            forebay.Node(settings=settings)
        assert caught.value.origin == "the code"


def test_password_in_a_url_in_code_is_not_shown(valkey_server: ValkeyServer) -> None:
    """It is taken out of the URL, as it is of one from outside."""
    url = valkey_server.url.replace("//", "//user:hunter2@")
    node = forebay.Node(settings=Settings(valkey=Valkey(url=url)))

    assert node._in_code.settings.valkey.password == Secret("hunter2")
    assert "hunter2" not in node._in_code.settings.valkey.url


@pytest.mark.parametrize(
    "in_code,outside,expected",
    [(None, None, "default"), ("code", None, "code"), ("code", "env", "env"), (None, "env", "env")],
)
async def test_namespace_from_outside_goes_before_the_one_in_code(
    valkey_server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    in_code: str | None,
    outside: str | None,
    expected: str,
) -> None:
    """I2: without settings in code, the environment decides; the argument is a default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_URL", valkey_server.socket_url)
    if outside:
        monkeypatch.setenv("FOREBAY_NAMESPACE", outside)
    async with forebay.Node(in_code) as node:
        assert node.namespace == expected
        assert repr(node) == f"<Node {expected} {node.instance} running>"


async def test_namespace_in_settings_goes_before_the_argument(make_node: MakeNode) -> None:
    """I2: the argument is a default for settings in code as well."""
    async with make_node("argument", node=NodeSettings(namespace="settings", shards=4)) as node:
        assert node.namespace == "settings"


def test_settings_from_the_command_line_replace_those_in_code(make_node: MakeNode) -> None:
    """configure: what `forebay run` found is in force, and a line says what is not."""
    node = make_node()
    with capture_logs() as lines:
        node._configure(Resolved(settings=Settings(), origins={}))

    assert [line["event"] for line in lines] == ["node.settings_replaced"]
    assert node._settings().settings.valkey.url == ""


async def test_what_is_set_and_not_used_is_logged(
    valkey_server: ValkeyServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that starts with a reader, or with an address beside VALKEY_FAKE, says so."""
    monkeypatch.setenv("VALKEY_WRITER_ENDPOINT", "127.0.0.1")
    monkeypatch.setenv("VALKEY_WRITER_PORT", str(valkey_server.port))
    monkeypatch.setenv("VALKEY_READER_ENDPOINT", "127.0.0.2")
    with capture_logs() as lines:
        async with forebay.Node(namespace):
            pass
    (line,) = [line for line in lines if line["event"] == "setting.unused"]
    assert (line["log_level"], line["setting"]) == ("warning", "valkey.reader_url")
    assert line["origin"] == "environment VALKEY_READER_ENDPOINT"


async def test_settings_in_code_warn_too(valkey_server: ValkeyServer, namespace: str) -> None:
    """A reader that is set in code is as unused as any."""
    valkey = Valkey(url=valkey_server.url, reader_url="valkey://127.0.0.2")
    with capture_logs() as lines:
        async with forebay.Node(namespace, settings=Settings(valkey=valkey)):
            pass
    (line,) = [line for line in lines if line["event"] == "setting.unused"]
    assert (line["setting"], line["origin"]) == ("valkey.reader_url", "the code")

"""`forebay locks` and `forebay limits` on a real server, beside a node."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anyio.to_thread
import pytest

import forebay
from forebay.nodes.cli.main import main
from forebay.schemas.errors_locks import LeaseLost
from support.valkey_server import ValkeyServer, free_port


class Ended(NamedTuple):
    code: int
    out: str
    err: str


MakeNode = Callable[..., forebay.Node]
Forebay = Callable[..., Ended]


@pytest.fixture
def command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    valkey_server: ValkeyServer,
    namespace: str,
) -> Forebay:
    """The command, in an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("FOREBAY_", "VALKEY_", "CACHE_", "RATE_", "CREDENTIALS_")):
            monkeypatch.delenv(name)

    def run(*words: str, url: str | None = valkey_server.url) -> Ended:
        there = ["--url", url] if url else []
        shards = ["--set", "node.shards=4"]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--namespace", namespace, *shards, *there])
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


async def test_locks_are_shown_and_released_by_force(make_node: MakeNode, command: Forebay) -> None:
    """The holder is cancelled; the second time nobody has it, which is exit code 1."""

    async def run(*words: str) -> Ended:
        return await anyio.to_thread.run_sync(lambda: command(*words))

    async with make_node() as node:
        with pytest.raises(LeaseLost) as lost:
            async with node.lock("rebuild", meta={"why": "nightly"}) as lease:
                listed = await run("locks", "ls", "--json")
                (view,) = json.loads(listed.out.splitlines()[-1])
                assert (view["name"], view["holders"][0]["token"]) == ("rebuild", lease.token)
                shown = await run("locks", "show", "rebuild")
                assert f"rebuild: a lock, held by {node._parts.node_id}, 0 wait" in shown.out
                assert '{"why":"nightly"}' in shown.out
                ended = await run("locks", "release", "rebuild")
                assert (ended.code, ended.out.splitlines()[-1]) == (0, "rebuild: taken from 1")
                await anyio.sleep(20)
        assert lost.value.reason == "forced"
        again = await run("locks", "release", "rebuild")
        assert (again.code, again.out.splitlines()[-1]) == (1, "rebuild: nobody held it")


def test_limits_are_shown_and_taken_of(command: Forebay, tmp_path: Path) -> None:
    """Those of the configuration; to look charges nothing, and a refusal is exit code 1."""
    (tmp_path / "forebay.toml").write_text("[limits.api]\nrate = 1\nper = 3600\nburst = 5\n")
    listed = command("limits", "ls")
    assert (listed.code, listed.err) == (0, "")
    assert listed.out.splitlines()[0] == "api: 1 in 3600 s, 5 at once"

    took = command("limits", "take", "api", "user-1", "--cost", "4", "--json")
    assert (took.code, json.loads(took.out)["remaining"]) == (0, 1)
    assert command("limits", "show", "api", "user-1").out.startswith("api: 1 left")
    refused = command("limits", "take", "api", "user-1", "--cost", "2")
    assert refused.code == 1
    assert refused.out.startswith("api: refused, try again in ")
    part = command("limits", "take", "api", "user-1", "--cost", "2", "--partial", "--json")
    assert (part.code, json.loads(part.out)["granted"]) == (0, 1)


@pytest.mark.parametrize(
    "words",
    [
        ("locks", "show", "two words"),
        ("locks", "release", "a{b}"),
        ("limits", "take", "nothing", "u"),
        ("limits", "take", "default", "u", "--cost", "0"),
        ("limits", "take", "default", ""),
        ("limits", "show", "default", "a{b"),
    ],
)
def test_bad_input_is_wrong_usage(command: Forebay, words: tuple[str, ...]) -> None:
    """Exit code 2, with the reason and without a traceback."""
    ended = command(*words)

    assert (ended.code, ended.out) == (2, "")
    assert "Error: " in ended.err
    assert "defect" not in ended.err


def test_a_namespace_that_nobody_uses_is_a_typing_error(command: Forebay) -> None:
    """Exit code 2: an empty list would hide it."""
    ended = command("locks", "ls")

    assert (ended.code, ended.out) == (2, "")
    assert "no node has ever run in it" in ended.err


@pytest.mark.parametrize("words", [("locks", "ls"), ("limits", "ls")])
def test_without_a_server(command: Forebay, words: tuple[str, ...]) -> None:
    """Exit code 3 where none answers; 2 where none is named."""
    quick = ["--set", "valkey.startup_timeout_ms=200", "--set", "valkey.connect_timeout_ms=100"]
    away = command(*words, *quick, url=f"valkey://127.0.0.1:{free_port()}")
    unnamed = command(*words, url=None)

    assert (away.code, away.out) == (3, "")
    assert unnamed.code == 2
    assert "there is no server that others use" in unnamed.err

"""The command `forebay` as a whole: finding commands, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pytest

from forebay.nodes.cli import main as command_line
from forebay.schemas.errors import (
    ConfigError,
    Disconnected,
    ForebayError,
    InvalidKey,
    StartupError,
)

FIELDS = {
    "setting": "valkey.url",
    "value": "valkey://h:1",
    "origin": "flag --url",
    "problem": "refused",
    "fix": "start it",
}
DEFECT = RuntimeError("at valkey://u:secret@h")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Forebay = Callable[..., Ended]
Plant = Callable[[Callable[[], object]], None]


@pytest.fixture
def forebay(capsys: pytest.CaptureFixture[str]) -> Forebay:
    """Run a command line in this process."""

    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            command_line.main(words)
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Put a function in the place of `forebay health`."""

    def put(function: Callable[[], object]) -> None:
        module = ModuleType("planted")
        module.command = click.command("health")(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "planted", module)
        listed = command_line.Listed("planted:command", "planted")
        monkeypatch.setitem(command_line.COMMANDS, "health", listed)

    return put


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error,code",
    [
        (ConfigError(**FIELDS), 2),
        (StartupError(**FIELDS), 3),
        (InvalidKey("key", "a b", "holds ' '"), 1),
        (Disconnected("gone", outcome_unknown=True), 1),
        (ForebayError("two\nlines"), 1),
        (DEFECT, 1),
        (ExceptionGroup("tasks", [Disconnected("gone"), StartupError(**FIELDS)]), 3),
        (ExceptionGroup("tasks", [ExceptionGroup("more", [InvalidKey("key", "", "x")])]), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_is_one_line_and_its_exit_code(
    forebay: Forebay, plant: Plant, error: Exception, code: int
) -> None:
    """I2: one line on stderr, nothing on stdout, no traceback, no password."""
    plant(raising(error))
    ended = forebay("health")

    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("Error: ")
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err
    assert "secret" not in ended.err


def test_debug_lets_the_error_through(plant: Plant) -> None:
    """--debug: the interpreter shows the traceback."""
    plant(raising(DEFECT))

    with pytest.raises(RuntimeError, match="secret"):
        command_line.main(["--debug", "health"])


@pytest.mark.parametrize(
    "function,code",
    [
        (lambda: None, 0),
        (lambda: 0, 0),
        (lambda: 4, 4),
        (lambda: click.get_current_context().exit(3), 3),
        (lambda: sys.exit(4), 4),
        (raising(click.UsageError("no")), 2),
        (raising(click.ClickException("no")), 1),
        (raising(KeyboardInterrupt()), 130),
    ],
)
def test_command_decides_its_exit_code(
    forebay: Forebay, plant: Plant, function: Callable[[], object], code: int
) -> None:
    """I4: what it returns, or how it asks click to end."""
    plant(function)

    assert forebay("health").code == code


@pytest.mark.parametrize(
    "words,meant",
    [
        (["confg", "show"], "'config'"),
        (["publsh"], "'publish'"),
        (["config", "chek"], "'check'"),
        (["health", "--chek", "live"], "--check"),
        (["health", "--check", "liev"], "live"),
    ],
)
def test_mistyped_word_is_answered_with_the_right_one(
    forebay: Forebay, words: list[str], meant: str
) -> None:
    """Commands, options and choices: exit 2, and what was probably meant."""
    ended = forebay(*words)

    assert ended.code == 2
    assert meant in ended.err


def test_help_lists_commands_and_exit_codes(forebay: Forebay) -> None:
    """What a program that calls us has to know stands in --help."""
    ended = forebay("--help")

    assert ended.code == 0
    assert all(f"\n  {name} " in ended.out for name in command_line.COMMANDS)
    for code in (0, 1, 2, 3, 4):
        assert f"\n    {code}  " in ended.out


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_listed_command_is_there_under_its_name(forebay: Forebay, name: str) -> None:
    """The table of commands leads to commands that can say what they do."""
    ended = forebay(name, "--help")

    assert ended.code == 0
    assert ended.out.startswith(f"Usage: forebay {name} ")


@pytest.mark.parametrize("option,level", [("-v", "debug"), ("-q", "error")])
def test_verbosity_is_a_setting(forebay: Forebay, option: str, level: str) -> None:
    """-v and -q, before the command, set the level of the log."""
    ended = forebay(option, "config", "show", "--changed", "--json")
    rows = {row["name"]: row["value"] for row in json.loads(ended.out)}

    assert rows["log.level"] == level


def test_reader_that_goes_away_is_not_told_off(tmp_path: Path) -> None:
    """I3: a closed pipe ends the command, and nothing is said about it."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "forebay.nodes.cli", "config", "show"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, timeout=30)
    os.close(writer)

    assert (done.returncode, done.stderr) == (1, b"")


def helps(command: click.Command, *names: str) -> Iterator[tuple[str, str]]:
    """The help of a command and of all below it, with what it is called."""
    context = click.Context(command, info_name=" ".join(names), max_content_width=100)
    yield " ".join(names), command.get_help(context)
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        _, found, _ = command.resolve_command(context, [name])
        assert found is not None
        yield from helps(found, *names, name)


def test_no_help_shows_what_is_meant_for_the_formatter() -> None:
    """Its mark against rewrapping is one character, not a backslash and a letter."""
    found = dict(helps(command_line.root, "forebay"))
    assert {"forebay publish write", "forebay explain", "forebay warm"} <= found.keys()
    assert [name for name, text in found.items() if "\\b" in text or "\b" in text] == []
    assert "  forebay warm --app shop.cache:node product --keys-from" in found["forebay warm"]
    assert """forebay publish write product:42 '{"price": 7}'""" in found["forebay publish write"]

"""`forebay config`: the files it finds, what it prints, how it fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forebay.nodes.cli import sources
from forebay.nodes.cli.config import command
from forebay.schemas.settings_names import FIELDS

CANARY = "canary-7f3a"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("FOREBAY_", "VALKEY_", "CACHE_", "RATE_", "CREDENTIALS_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sources, "DEFAULT_FILES", (Path("forebay.toml"), tmp_path / "etc.toml"))


def run(*args: str, **environ: str) -> Result:
    return CliRunner().invoke(command, args, env=environ)


def rows(result: Result) -> dict[str, dict[str, str]]:
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)}


def test_show_lists_every_setting_with_its_origin() -> None:
    """One line for each setting: name, value, where it came from."""
    result = run("show", "--namespace", "shop", FOREBAY_HTTP__PORT="0")

    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert set(lines) == set(FIELDS)
    assert lines["node.namespace"] == ["shop", "flag", "--namespace"]
    assert lines["http.port"] == ["0", "environment", "FOREBAY_HTTP__PORT"]
    assert lines["valkey.url"] == ['""', "default"]


def test_show_json_and_changed() -> None:
    """--json is for machines; --changed leaves the defaults out."""
    result = run("show", "--json", "--changed", "--set", "log.level=debug", "--url", "redis://h")

    assert rows(result) == {
        "log.level": {"name": "log.level", "value": "debug", "origin": "flag --set log.level"},
        "valkey.url": {"name": "valkey.url", "value": "redis://h:6379/0", "origin": "flag --url"},
    }
    assert set(rows(run("show", "--json"))) == set(FIELDS)


def test_the_file_is_searched_in_order(tmp_path: Path) -> None:
    """--config, then FOREBAY_CONFIG, then ./forebay.toml, then the one in /etc."""
    for number, name in enumerate(("flag", "env", "forebay", "etc"), start=1):
        (tmp_path / f"{name}.toml").write_text(f"[http]\nport = {number}\n")

    def origin(*args: str, **environ: str) -> tuple[str, str]:
        row = rows(run("show", "--json", *args, **environ))["http.port"]
        return row["value"], row["origin"]

    assert origin("--config", "flag.toml", FOREBAY_CONFIG="env.toml") == ("1", "file flag.toml")
    assert origin(FOREBAY_CONFIG="env.toml") == ("2", "file env.toml")
    assert origin(FOREBAY_CONFIG="") == ("3", "file forebay.toml")
    (tmp_path / "forebay.toml").unlink()
    assert origin() == ("4", f"file {tmp_path / 'etc.toml'}")


def test_secrets_are_read_from_files_and_never_shown(tmp_path: Path) -> None:
    """A password from a file or a credential is in force, and stars in every output."""
    (tmp_path / "valkey_password").write_text(CANARY + "\n")
    (tmp_path / "bad.toml").write_text(f"[valkey]\npasswort = '{CANARY}'")
    server = {"FOREBAY_URL": "redis://h"}
    by_name = {**server, "VALKEY_PASSWORD_FILE": str(tmp_path / "valkey_password")}
    by_credential = {**server, "CREDENTIALS_DIRECTORY": str(tmp_path)}

    results = [
        run(*args, **environ)
        for environ in (by_name, by_credential, {"FOREBAY_URL": f"redis://:{CANARY}@h"})
        for args in (("show",), ("show", "--json"), ("check", "--json"))
    ]
    bad = [
        run("check", "--config", "bad.toml"),
        run("check", "--url", f"redis://u:{CANARY}@h:x"),
        run("check", "--json", "--set", f"valkey.url=redis:{CANARY}@h"),
    ]

    assert [result.exit_code for result in results + bad] == [0] * 9 + [2] * 3
    assert all(CANARY not in result.output for result in results + bad)
    assert all("***" in result.output for result in bad)
    assert rows(results[1])["valkey.password"]["value"] == "***"
    assert rows(results[4])["valkey.password"]["origin"] == f"file {tmp_path / 'valkey_password'}"


def test_check_counts_what_it_accepts() -> None:
    """Exit 0, and how many settings came from where."""
    result = run("check", VALKEY_FAKE="1")

    assert result.exit_code == 0
    total = len(FIELDS)
    assert result.stdout == f"ok: {total} settings, {total - 1} from default, 1 from environment\n"
    assert json.loads(run("check", "--json").stdout) == {
        "ok": True,
        "settings": total,
        "from": {"default": total},
        "warnings": [],
    }


def test_check_tells_what_it_refuses_as_json() -> None:
    """Exit 2, with the fields of the error on stdout."""
    result = run("check", "--json", FOREBAY_HTTP__PORT="99999")

    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "ok": False,
        "setting": "http.port",
        "value": "99999",
        "origin": "environment FOREBAY_HTTP__PORT",
        "problem": "must be a whole number from 0 to 65535",
        "fix": "change it, or remove it for the default, 8642",
    }


@pytest.mark.parametrize("verb", ["show", "check"])
@pytest.mark.parametrize(
    "args, environ, says",
    [
        (["--config", "none.toml"], {}, "none.toml (from flag --config): it cannot be read: No"),
        ([], {"FOREBAY_CONFIG": "none.toml"}, "(from environment FOREBAY_CONFIG): it cannot"),
        (["--config", "."], {}, "Is a directory"),
        (["--config", "bytes.toml"], {}, "not UTF-8"),
        (["--config", "large.toml"], {}, "too large"),
        (["--config", "broken.toml"], {}, "is not TOML"),
        (
            ["--config", "typo.toml"],
            {},
            "http.prot = *** (from file typo.toml): is no setting; did",
        ),
        (["--set", "http.prot=1"], {}, "did you mean http.port?"),
        (["--set", "http.port"], {}, "write --set NAME=VALUE"),
        (["--url", "localhost:6379"], {}, "has no scheme"),
        ([], {"FOREBAY_URL": "valkey://h", "VALKEY_FAKE": "1"}, "cannot go with valkey.url"),
        ([], {"FOREBAY_HTTP_PORT": "1"}, "did you mean FOREBAY_HTTP__PORT?"),
        ([], {"VALKEY_PASSWORD_FILE": "large.toml"}, "cannot be read: it is too large"),
        (
            ["--url", "valkeys://h", "--set", "valkey.tls_ca_file=none.pem"],
            {},
            "valkey.tls_ca_file = none.pem (from flag --set valkey.tls_ca_file): it cannot be read",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_2(
    verb: str, args: list[str], environ: dict[str, str], says: str, tmp_path: Path
) -> None:
    """I2: no traceback, nothing on stdout, the reason on stderr."""
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "large.toml").write_text("#" * 1_048_577)
    (tmp_path / "broken.toml").write_text("[http")
    (tmp_path / "typo.toml").write_text("[http]\nprot = 1")

    result = run(verb, *args, **environ)

    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert says in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Not root, who may read everything, for the time of one test."""
    user_id = os.geteuid()
    if user_id == 0:
        os.seteuid(65_534)
    yield
    os.seteuid(user_id)


@pytest.mark.parametrize("locked", ["forebay.toml", "."])
def test_a_default_file_that_may_not_be_read_is_told(
    locked: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """I1: a file that is there but unreadable, or behind a locked door, is not passed over."""
    (tmp_path / "forebay.toml").write_text("")
    tmp_path.chmod(0o755)
    (tmp_path / locked).chmod(0)
    request.addfinalizer(lambda: tmp_path.chmod(0o755))
    request.getfixturevalue("unprivileged")

    result = run("check")

    assert result.exit_code == 2
    assert "Permission denied" in result.stderr


def test_a_default_place_that_is_no_file_is_told(tmp_path: Path) -> None:
    """I1: a directory in place of the file is an error, not a reason to look further."""
    (tmp_path / "forebay.toml").mkdir()

    result = run("check")

    assert result.exit_code == 2
    assert (
        "forebay.toml (from the default place): it cannot be read: Is a directory" in result.stderr
    )


def test_a_secret_in_a_place_that_does_not_exist_is_not_there(tmp_path: Path) -> None:
    """read_secret says None for a missing file and for a path through a file."""
    (tmp_path / "file").write_text("x")

    assert sources.read_secret(str(tmp_path / "none")) is None
    assert sources.read_secret(str(tmp_path / "file" / "below")) is None
    assert sources.read_secret(str(tmp_path / "file")) == "x"


def test_check_finds_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be known only when the first cache is declared."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    result = run("check", "--set", "cache.compression=zstd")
    assert result.exit_code == 2
    assert "cache.compression = zstd (from flag --set cache.compression)" in result.output
    assert "pip install 'forebay[zstd]'" in result.output


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_check_warns_of_a_url_that_is_overridden(form: tuple[str, ...]) -> None:
    """It is not in force, and would be refused as soon as it is; no password is shown."""
    bad = f"http://u:{CANARY}@h"
    result = run("check", "--url", "redis://h", *form, FOREBAY_URL=bad)
    assert result.exit_code == 0
    assert "valkey.url = http://" in result.output
    assert CANARY not in result.output
    assert "http://" not in run("check", "--url", "redis://h", *form).output


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_check_finds_misspelt_neutral_names(form: tuple[str, ...]) -> None:
    """They are no error, since others may read them; the closest name is suggested."""
    result = run("check", *form, VALKEY_HOST="h", VALKEY_USERNMAE=CANARY, CACHE_VR=CANARY)
    assert result.exit_code == 0
    assert "environment CACHE_VR: nothing reads it; did you mean CACHE_VER?" in result.output
    assert "VALKEY_USERNMAE: nothing reads it; did you mean VALKEY_USERNAME?" in result.output
    assert CANARY not in result.output


def test_check_warns_of_addresses_that_are_not_used() -> None:
    """A reader, and an address beside VALKEY_FAKE."""
    server = {"VALKEY_WRITER_ENDPOINT": "p", "VALKEY_READER_ENDPOINT": "r"}
    result = run("check", **server)
    assert result.exit_code == 0
    assert result.stderr == (
        "Warning: valkey.reader_url = valkey://r:6379/0 (from environment VALKEY_READER_ENDPOINT): "
        "it is not used: all reads go to valkey.url, since a replica may lag behind; unset it\n"
    )
    result = run("check", VALKEY_FAKE="1", **server)
    assert result.exit_code == 0
    assert "Warning: valkey.url = valkey://p/0" in result.stderr
    assert "since valkey.fake is set (environment VALKEY_FAKE)" in result.stderr


@pytest.mark.parametrize("verb", ["show", "check"])
def test_a_server_without_an_address_is_exit_2(verb: str) -> None:
    """No other server is used instead of one that is described."""
    result = run(verb, VALKEY_USER="app", VALKEY_DB="3")
    assert result.exit_code == 2
    assert "valkey.url = (not set) (from environment VALKEY_DB, VALKEY_USER)" in result.stderr

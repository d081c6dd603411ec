"""What is shipped is what stands in the tree; and what a newcomer gets from it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest

import forebay
from forebay.schemas.extras import DISTRIBUTION, Extra, pip_install

ROOT = Path(__file__).parents[1]
SHIPPED = ("schemas", "coordinator", "nodes")
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
HEAVY = {"aiohttp", "anyio", "asyncio", "msgspec", "prometheus_client", "structlog", "valkey"}


def python(*words: str, cwd: Path, path: Path | None = None) -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that nothing is left in the tree."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, place / "copy", ignore=NOT_COPIED)
    (place / "copy/tests").mkdir()
    (place / "copy/tests/test_left_out.py").write_text("")
    python("-c", BUILD, str(place), cwd=place / "copy")
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "unpacked")
    return wheel.parent / "unpacked"


def in_tree() -> set[str]:
    files = [path for each in SHIPPED for path in (ROOT / each).rglob("*") if path.is_file()]
    relative = [path.relative_to(ROOT) for path in files]
    kept = [p for p in relative if not any(s == "__pycache__" or s[0] == "." for s in p.parts)]
    return {f"forebay/{path.as_posix()}" for path in kept} | {
        "forebay/__init__.py",
        "forebay/py.typed",
    }


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Each file below the layers is shipped, data too; tests, docs and deploy/ are not."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert names == in_tree()


def test_wheel_works_where_it_is_unpacked(unpacked: Path) -> None:
    """Scripts are found beside the code, and the command runs."""
    code = (
        "import forebay; from forebay.coordinator.valkey.scripting import load_scripts; "
        "print(forebay.__file__); print(len(load_scripts()))"
    )
    place, scripts = python("-c", code, cwd=unpacked.parent, path=unpacked).splitlines()
    version = python("-m", "forebay.nodes.cli", "--version", cwd=unpacked.parent, path=unpacked)

    assert Path(place).is_relative_to(unpacked)
    assert int(scripts) == len(list((ROOT / "coordinator/scripts").glob("[!_]*.lua")))
    assert version == f"forebay, version {forebay.__version__}\n"


def test_metadata_names_version_licence_and_command(unpacked: Path) -> None:
    """The version is written once, in ``__init__``."""
    (info,) = unpacked.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()

    assert f"\nVersion: {forebay.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "forebay = forebay.nodes.cli.main:main" in (info / "entry_points.txt").read_text()


def test_installed_script_says_its_version() -> None:
    """`forebay --version`, as installed beside this interpreter, or as a module."""
    script = Path(sys.executable).parent / "forebay"
    words = [str(script)] if script.exists() else [sys.executable, "-m", "forebay.nodes.cli"]
    done = subprocess.run([*words, "--version"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, f"forebay, version {forebay.__version__}\n")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_command_line_answers_without_loading_anything_heavy(unpacked: Path, option: str) -> None:
    """What makes it quick to start: no event loop, no client, no codec."""
    code = (
        "import sys; from forebay.nodes.cli.main import root; "
        f"root.main([{option!r}], standalone_mode=False); "
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    output = python("-c", code, cwd=unpacked.parent, path=unpacked)

    assert output.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", forebay.__all__)
def test_public_name_can_be_imported(name: str) -> None:
    """Each name of the public face leads somewhere."""
    assert getattr(forebay, name) is not None


def test_unknown_public_name_is_an_attribute_error() -> None:
    """The lazy face answers as an ordinary module does."""
    with pytest.raises(AttributeError, match="has no attribute 'Nod'"):
        forebay.Nod  # noqa: B018


def test_every_requirement_is_pinned_in_the_constraints() -> None:
    """What is asked for was tested in a known version, which satisfies the lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))

    for requirement in asked:
        name, least = _parsed(requirement)
        if name != "forebay":
            assert _version(pinned[name]) >= _version(least), requirement


def _parsed(requirement: str) -> tuple[str, str]:
    found = re.match(r"([a-z0-9-]+)(?:\[[a-z,]+\])?(?:>=([0-9.]+))?", requirement)
    assert found is not None, requirement
    return found[1], found[2] or "0"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def hints(text: str) -> list[tuple[str, list[str]]]:
    """The name and the extras of each requirement with extras of ours."""
    found = re.findall(r"(?<![\w'])('?)(forebay|\.)\[([\w,]+)\]('?)", text)
    return [(f"{a}{name}{b}", extras.split(",")) for a, name, extras, b in found]


def test_hints_name_what_can_be_installed() -> None:
    """The distribution and its extras, quoted for the shell, in code and documents alike."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    files = [f for d in SHIPPED for f in (ROOT / d).rglob("*.py")]
    files += [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for file in files:
        for name, extras in hints(file.read_text()):
            assert name in ("'forebay'", "'.'"), f"{file}: {name}{extras} is not quoted"
            assert set(extras) <= set(project["optional-dependencies"]), file
    assert set(get_args(Extra)) <= set(project["optional-dependencies"])
    assert hints("pip install forebay[a,b], 'forebay[c]'") == [
        ("forebay", ["a", "b"]),
        ("'forebay'", ["c"]),
    ]


def test_a_hint_adds_what_the_extra_needs(tmp_path: Path) -> None:
    """Where Forebay is installed, pip finds it by this name and asks no index for it."""
    words = shlex.split(pip_install("zstd"))[1:]
    said = python("-m", "pip", *words, "--dry-run", "--no-index", cwd=tmp_path)
    assert f"Requirement already satisfied: {DISTRIBUTION}[zstd]" in said


def test_make_help_lists_all_targets() -> None:
    """Each has a line that says what it is for."""
    done = subprocess.run(
        ["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True
    )
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert sorted(lines) == sorted(phony[1].split())

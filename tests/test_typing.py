"""A type checker finds every fault in a file that uses Forebay, and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from programs import installed

TESTS = Path(__file__).parent
FILE = TESTS / "users_file.py"
EXPECTED = {
    number
    for number, line in enumerate(FILE.read_text().splitlines(), start=1)
    if line.endswith("# error")
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the file, in which the package is found as an installed one would be."""
    made = tmp_path_factory.mktemp("project")
    (made / "src").mkdir()
    (made / "src" / "forebay").symlink_to(TESTS.parent)
    (made / FILE.name).write_bytes(FILE.read_bytes())
    (made / "pyrightconfig.json").write_text(json.dumps({"extraPaths": ["src"]}))
    return made


def run(project: Path, *command: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", *command, FILE.name],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "MYPYPATH": "src"},
        timeout=170,
    )
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return found.stdout


def by_mypy(project: Path) -> dict[int, str]:
    """Faults by line, in the words of mypy --strict."""
    output = run(project, "mypy", "--strict", "--no-error-summary", "--follow-imports=silent")
    faults = re.findall(rf"^{re.escape(FILE.name)}:(\d+): error: (.*)$", output, re.MULTILINE)
    assert len(faults) == output.count(": error: "), output  # none in the package itself
    return {int(line): words for line, words in faults}


def by_basedpyright(project: Path) -> dict[int, str]:
    """Faults by line, in the words of basedpyright."""
    found = json.loads(run(project, "basedpyright", "--outputjson", "--level", "error"))
    faults = [each for each in found["generalDiagnostics"] if each["severity"] == "error"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in faults}


def test_mypy_finds_each_fault_of_a_user_and_no_other(project: Path) -> None:
    """Wrong arguments, items of many and values of writers; a return inside a lock is a return."""
    installed("mypy")
    assert len(EXPECTED) == 17
    faults = by_mypy(project)
    assert set(faults) == EXPECTED, faults


def test_basedpyright_finds_each_fault_of_a_user_and_no_other(project: Path) -> None:
    """As mypy does."""
    installed("basedpyright")
    faults = by_basedpyright(project)
    assert set(faults) == EXPECTED, faults

"""The documents say what is true: their code compiles, and what is marked for it runs.

A block is run when the line before its fence is ``<!-- run -->``, as a reader runs what was copied
to a file: ``python block.py``, or ``sh`` with ``forebay`` on the path. It gets an empty directory,
a real server in FOREBAY_URL, and a namespace of its own; it has to end with 0 in time. A Python
block that is not run is a fragment of a service, so it may await.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from support.valkey_server import ValkeyServer

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RUN_LIMIT_S = 40


class Block(NamedTuple):
    document: str
    line: int
    language: str
    text: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(name: str, text: str) -> list[Block]:
    """Fenced blocks at the left margin."""
    pattern = re.compile(r"^(<!-- run -->\n)?```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(name, text[: found.start(2)].count("\n") + 1, found[2], found[3], bool(found[1]))
        for found in pattern.finditer(text)
    ]


def blocks() -> list[Block]:
    return [block for path in DOCUMENTS for block in blocks_of(path.name, path.read_text())]


def fault_of(block: Block) -> str:
    """Why the block cannot be what it says it is, or nothing."""
    try:
        if block.language == "python":
            fragment = 0 if block.runs else ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            compile(block.text, str(block), "exec", flags=fragment)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language in ("sh", "bash"):
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    except (SyntaxError, ValueError, subprocess.CalledProcessError) as error:
        return f"{block}: {error}"
    return ""


def test_every_block_is_of_its_language() -> None:
    """Python compiles, JSON and TOML can be read, the shell accepts its commands."""
    assert [fault for fault in map(fault_of, blocks()) if fault] == []


@pytest.mark.parametrize(
    "language,text", [("python", "def"), ("python", "await main()"), ("json", "{"), ("toml", "=")]
)
def test_broken_block_is_found_when_planted(language: str, text: str) -> None:
    """The check of blocks notices a broken one, and where it is."""
    (block,) = blocks_of("X.md", f"words\n\n<!-- run -->\n```{language}\n{text}\n```\n")

    assert block.runs
    assert fault_of(block).startswith("X.md:4: ")


@pytest.mark.parametrize("block", [block for block in blocks() if block.runs], ids=str)
def test_marked_block_runs(
    block: Block, tmp_path: Path, valkey_server: ValkeyServer, namespace: str
) -> None:
    """What a reader copies works as it stands."""
    script = tmp_path / ("block.py" if block.language == "python" else "block.sh")
    script.write_text(block.text)
    program = [sys.executable] if block.language == "python" else ["bash", "-euo", "pipefail"]
    environment = os.environ | {
        "FOREBAY_URL": valkey_server.url,
        "FOREBAY_NAMESPACE": namespace,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*program, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_begins_with_run_and_test() -> None:
    """A newcomer's first two commands."""
    shell = [block for block in blocks() if block.language in ("sh", "bash")]
    readme = [block.text for block in shell if block.document == "README.md"]
    commands = [line.split("#")[0].strip() for line in "".join(readme).splitlines()]

    assert [each for each in commands if each.startswith("make ")][:2] == ["make run", "make test"]


def anchors_of(text: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", each.lower()).replace(" ", "-") for each in headings}


def dead_links(path: Path, text: str) -> list[str]:
    """Links to files and headings that are not there."""
    dead = []
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", text):
        name, _, anchor = target.partition("#")
        found = path.parent / name if name else path
        lost = bool(name) and not found.exists()
        if lost or (anchor and anchor not in anchors_of(found.read_text() if name else text)):
            dead.append(f"{path.name}: {target}")
    return dead


def test_links_between_documents_lead_somewhere() -> None:
    """No link to a file or a heading that is not there."""
    assert [dead for path in DOCUMENTS for dead in dead_links(path, path.read_text())] == []


def test_dead_link_is_found_when_planted() -> None:
    """The check of links notices a lost file and a lost heading, and lets the others pass."""
    text = "# A heading\n[1](#a-heading) [2](#another) [3](no/file.md) [4](README.md#forebay)"

    assert dead_links(ROOT / "X.md", text) == ["X.md: #another", "X.md: no/file.md"]


def lost_paths(text: str) -> list[str]:
    """Paths of source files in backticks that do not exist, from the root or from a layer."""
    roots = [ROOT, ROOT / "nodes", ROOT / "coordinator"]
    paths = re.findall(r"`([a-z_]+/[a-z_/]*\.(?:py|lua|md|acl))`", text)
    return [path for path in paths if not any((root / path).exists() for root in roots)]


def test_source_files_in_documents_exist() -> None:
    """Every path of a source file that a document names leads to a file."""
    assert {path.name: lost_paths(path.read_text()) for path in DOCUMENTS} == {
        path.name: [] for path in DOCUMENTS
    }


def test_a_lost_path_is_found_when_planted() -> None:
    """The check of paths finds a file that does not exist, and accepts those that do."""
    text = "`nodes/node.py`, `cache/read.py`, `nodes/gone.py` and `scripts/_change.lua`"
    assert lost_paths(text) == ["nodes/gone.py"]

"""Type checkers find every fault in files that use Forebay, and no other: D2 of declarations."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.programs import installed

TESTS = Path(__file__).parent
FILE = TESTS / "support/users_file.py"
EXPECTED = {
    number
    for number, line in enumerate(FILE.read_text().splitlines(), start=1)
    if line.endswith("# error")
}
#: What is revealed and refused here is compared word by word.
TYPED = """
import forebay
from msgspec import Struct

class Product(Struct):
    id: int

node = forebay.Node("shop")
node.sink("order:{id}", forebay.SqlSink("sqlite+aiosqlite:///x.db", table="orders", key=("id",)))

@node.cached("product:{id}/{lang}", ttl=60)
async def product(id: int, lang: str = "en") -> Product:
    return Product(id)

@node.sink("product:{id}/{lang}")
async def save(writes: list[forebay.Write[Product]]) -> None:
    reveal_type(writes[0].value)

@node.on_start
async def warm() -> int:
    return 1

async def main() -> None:
    async with node as same:
        reveal_type(same)
    reveal_type(product)
    reveal_type(await product(42))
    reveal_type(await product(id=42, lang="de"))
    reveal_type((await product.get_with_info(42)).value)
    reveal_type(save)
    reveal_type(warm)
    await product("42")
    await product()
    await product.invalidate(42, 43)
    await node.invalidate(42)
    forebay.Node(42)

@node.cached("price:{id}", ttl=60)
def price(id: int) -> int:
    return id

@node.sink("price:{id}")
async def wrong(writes: list[int]) -> None: ...
"""
REVEALED = [
    "service.Product | None",
    "forebay.nodes.node.Node",
    "forebay.nodes.cache.cached.Cached[[id: int, lang: str =], service.Product]",
    "service.Product",
    "service.Product",
    "service.Product",
    (
        "def (writes: list[forebay.nodes.sinks.base.Write[service.Product]]) -> "
        "typing.Coroutine[Any, Any, None]"
    ),
    "def () -> typing.Coroutine[Any, Any, int]",
]
REFUSED = [
    'Argument 1 to "__call__" of "Cached" has incompatible type "str"; expected "int"',
    'Missing positional argument "id" in call to "__call__" of "Cached"',
    'Argument 2 to "invalidate" of "Cached" has incompatible type "int"; expected "str"',
    (
        'Argument 1 to "invalidate" of "Node" has incompatible type "int"; '
        'expected "Sequence[str] | None"'
    ),
    'Argument 1 to "Node" has incompatible type "int"; expected "str | None"',
    'Argument 1 has incompatible type "Callable[[int], int]"',
    'Value of type variable "S" of function cannot be "Callable[[list[int]], ',
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the file, in which the package is found as an installed one would be."""
    made = tmp_path_factory.mktemp("project")
    (made / "src").mkdir()
    (made / "src" / "forebay").symlink_to(TESTS.parent)
    (made / FILE.name).write_bytes(FILE.read_bytes())
    (made / "service.py").write_text(TYPED)
    (made / "pyrightconfig.json").write_text(json.dumps({"extraPaths": ["src"]}))
    return made


def run(project: Path, *command: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "MYPYPATH": "src"},
        timeout=170,
    )
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return found.stdout


def by_mypy(project: Path) -> str:
    """What mypy --strict says of both files, in one run: it takes no longer than one would."""
    return run(
        project,
        *("mypy", "--strict", "--no-error-summary", "--hide-error-codes"),
        *("--follow-imports=silent", FILE.name, "service.py"),
    )


def told(output: str, file: str) -> list[tuple[int, str, str]]:
    """The lines about a file: number, note or error, and the words."""
    found = re.findall(rf"^{re.escape(file)}:(\d+): (note|error): (.*)$", output, re.MULTILINE)
    return [(int(line), kind, words) for line, kind, words in found]


def by_basedpyright(project: Path) -> dict[int, str]:
    """Faults by line, in the words of basedpyright."""
    found = json.loads(run(project, "basedpyright", "--outputjson", "--level", "error", FILE.name))
    faults = [each for each in found["generalDiagnostics"] if each["severity"] == "error"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in faults}


def test_mypy_finds_each_fault_of_a_user_and_no_other(project: Path) -> None:
    """D2: wrong arguments, items of many, values of writers; it sees types through decorators."""
    installed("mypy")
    assert len(EXPECTED) == 17
    output = by_mypy(project)
    faults = [(line, words) for line, kind, words in told(output, FILE.name) if kind == "error"]
    assert sorted(line for line, _ in faults) == sorted(EXPECTED), faults

    of_service = told(output, "service.py")
    revealed = [
        words.split('"', 1)[1].rstrip('"') for _, kind, words in of_service if kind == "note"
    ]
    refused = [words for _, kind, words in of_service if kind == "error"]
    assert revealed == REVEALED, output
    assert len(refused) == len(REFUSED), output
    assert [text for text, begin in zip(refused, REFUSED, strict=True) if begin not in text] == []
    assert output.count(": error: ") == len(faults) + len(refused)  # none in the package itself


def test_basedpyright_finds_each_fault_of_a_user_and_no_other(project: Path) -> None:
    """As mypy does."""
    installed("basedpyright")
    faults = by_basedpyright(project)
    assert set(faults) == EXPECTED, faults

"""What holds for the whole of the source, read from its syntax trees.

Each rule is a function from a file to the places that break it. Each is tried on a planted
offence too: a rule that finds nothing anywhere would not be noticed otherwise.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from statistics import quantiles
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("schemas", "coordinator", "nodes")
FILE_LINES_MAX, FUNCTION_LINES_MAX, FUNCTION_LINES_P90_MAX = 500, 60, 25


class Source(NamedTuple):
    path: PurePosixPath  #: from the root of the repository
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def layer(self) -> str:
        return self.path.parts[0] if len(self.path.parts) > 1 else ""

    @property
    def module(self) -> str:
        """Its name below ``forebay``: "nodes.cli.main", or "nodes" for an __init__."""
        return ".".join(self.path.with_suffix("").parts).removesuffix("__init__").rstrip(".")


Rule = Callable[[Source], Iterator[str]]


def source(path: str, text: str) -> Source:
    return Source(PurePosixPath(path), text)


def read(path: Path) -> Source:
    return source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def package() -> list[Source]:
    paths = [ROOT / "__init__.py", *(p for each in LAYERS for p in (ROOT / each).rglob("*.py"))]
    return [read(path) for path in sorted(paths)]


def files_of_tests() -> list[Source]:
    return [read(path) for path in sorted((ROOT / "tests").rglob("*.py"))]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without decorators and docstring, which are not read to follow the code."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Dotted names that are used, with their lines: ``os.environ``, ``print``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield node.lineno, ast.unparse(node)


# Imports


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(body: list[ast.stmt], *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run; ``lazy``: also those inside functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_for_types_only(node) or (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy
        ):
            continue
        else:
            for _, inner in ast.iter_fields(node):
                if isinstance(inner, list):
                    statements = [each for each in inner if isinstance(each, ast.stmt)]
                    yield from import_nodes(statements, lazy=lazy)


def imported(file: Source, *, lazy: bool = True) -> Iterator[tuple[int, str]]:
    """Modules below ``forebay`` that the file imports; both readings of ``from x import y``."""
    parents = file.path.parent.parts
    for node in import_nodes(file.tree.body, lazy=lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "forebay":
                    yield node.lineno, alias.name.removeprefix("forebay").lstrip(".")
            continue
        base = node.module.split(".") if node.module else []
        if node.level:
            base = [*parents[: len(parents) - node.level + 1], *base]
        elif base[:1] == ["forebay"]:
            base = base[1:]
        else:
            continue
        yield node.lineno, ".".join(base)
        for alias in node.names:
            yield node.lineno, ".".join([*base, alias.name])


def upward_imports(file: Source) -> Iterator[str]:
    """schemas <- coordinator <- nodes"""
    for line, module in imported(file):
        target = module.split(".")[0]
        known = file.layer in LAYERS and target in LAYERS
        if known and LAYERS.index(target) > LAYERS.index(file.layer):
            yield f"{file.path}:{line}: {file.layer} imports from {target}"


def absolute_imports(file: Source) -> Iterator[str]:
    """Inside the package imports are relative."""
    if EXAMPLE(file):
        return
    for node in import_nodes(file.tree.body, lazy=True):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        absolute = not getattr(node, "level", 0)
        if absolute and any(name.split(".")[0] in ("forebay", *LAYERS) for name in names):
            yield f"{file.path}:{node.lineno}: write a relative import"


def impure_schemas(file: Source) -> Iterator[str]:
    """schemas: msgspec, a codec, and of the standard library nothing that does I/O."""
    if file.layer != "schemas":
        return
    for node in import_nodes(file.tree.body, lazy=True):
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        for name in names:
            if name.split(".")[0] not in PURE:
                yield f"{file.path}:{node.lineno}: {name} does not belong into schemas"


PURE = frozenset(
    "__future__ collections contextlib copy dataclasses difflib enum functools hashlib ipaddress "
    "itertools json math msgspec operator re string struct tomllib typing urllib zlib "
    "zstandard".split()
)


def cycle_of(files: list[Source]) -> list[str]:
    """Modules that import each other in a circle when loaded, or nothing."""
    known = {file.module for file in files}
    graph = {
        file.module: {
            target
            for _, target in imported(file, lazy=False)
            if target in known and target != file.module
        }
        for file in files
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


# Words and calls


def within(*allowed: str) -> Callable[[Source], bool]:
    return lambda file: any(file.path.is_relative_to(each) for each in allowed)


IN_CLI = within("nodes/cli")
CLI_OR_EXAMPLE = within("nodes/cli", "nodes/demo/app.py")
CLOCK = within("coordinator/clock.py", "nodes/dev/replayer.py")
REPLAYER = within("nodes/dev/replayer.py")  # a process of its own, as a stranger would write it
EXAMPLE = within("nodes/demo/app.py", "nodes/demo/fastapi_app.py", "nodes/demo/aiohttp_app.py")
NOWHERE = within()

FORBIDDEN: Mapping[str, tuple[re.Pattern[str], Callable[[Source], bool]]] = {
    "the wall clock": (
        re.compile(
            r"(time\.(time|time_ns|localtime|gmtime)|(datetime\.)?(datetime|date)\.(now|utcnow|today))"
        ),
        NOWHERE,
    ),
    "the machine's clock": (re.compile(r"time\.(monotonic|perf_counter)(_ns)?"), CLOCK),
    "blocking sleep": (re.compile(r"time\.sleep"), REPLAYER),
    "another library's sleep": (re.compile(r"asyncio\.sleep"), NOWHERE),
    "the environment": (re.compile(r"os\.(environb?|getenvb?|putenv)(\..*)?"), CLI_OR_EXAMPLE),
    "print": (re.compile(r"print"), IN_CLI),
    "code from data": (re.compile(r"eval|exec|(pickle|marshal|yaml|shelve|dill)(\..*)?"), NOWHERE),
}
CODE_FROM_DATA = frozenset({"dill", "marshal", "pickle", "shelve", "yaml"})
IMPORTED_NAMES = {
    "time": {"time", "time_ns", "sleep", "monotonic", "perf_counter"},
    "os": {"environ", "environb", "getenv"},
    "asyncio": {"sleep"},
}


def forbidden_names(file: Source) -> Iterator[str]:
    """Clocks, sleeps, environment and output are injected; nothing decodes into code."""
    for line, name in names_of(file.tree):
        for what, (pattern, allowed) in FORBIDDEN.items():
            if pattern.fullmatch(name) and not allowed(file):
                yield f"{file.path}:{line}: {name}: {what}"
    for node in import_nodes(file.tree.body, lazy=True):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & CODE_FROM_DATA
        else:
            names = {node.module or ""} & CODE_FROM_DATA
            hidden = IMPORTED_NAMES.get(node.module or "", set())
            if not (CLOCK(file) or IN_CLI(file)):
                names |= {alias.name for alias in node.names} & hidden
        for name in names:
            yield f"{file.path}:{node.lineno}: imports {name}"


def broad_catches(file: Source) -> Iterator[str]:
    """Libraries raise RuntimeError for anything: catching it hides the actual fault."""
    broad = re.compile(r"\bRuntimeError\b")
    for node in ast.walk(file.tree):
        caught = node.type if isinstance(node, ast.ExceptHandler) else None
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = node
        if caught is not None and broad.search(ast.unparse(caught)):
            yield f"{file.path}:{caught.lineno}: {ast.unparse(caught)}"


def vague_names(file: Source) -> Iterator[str]:
    """A name says what a thing is."""
    vague = re.compile(r"(?i)(^|_)(manager|helper|util)s?(_|$)|(Manager|Helper|Util)s?$")
    names = [(1, file.path.stem)]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.append((node.lineno, node.name))
    for line, name in names:
        if vague.search(name):
            yield f"{file.path}:{line}: {name}"


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError")
THIS_FILE = PurePosixPath("tests/test_architecture.py")


def unfinished(file: Source) -> Iterator[str]:
    """What is here is whole. This file has to name the words."""
    if file.path == THIS_FILE:
        return
    for line, text in enumerate(file.text.splitlines(), 1):
        if UNFINISHED.search(text):
            yield f"{file.path}:{line}: {text.strip()}"


def too_long(file: Source) -> Iterator[str]:
    count = len(file.text.splitlines())
    if count > FILE_LINES_MAX:
        yield f"{file.path}: {count} lines"
    for function in functions(file.tree):
        if lines_of(function) > FUNCTION_LINES_MAX:
            yield f"{file.path}:{function.lineno}: {function.name}: {lines_of(function)} lines"


def without_contract(file: Source) -> Iterator[str]:
    """A module with code begins with its contract."""
    if file.text.strip() and not ast.get_docstring(file.tree):
        yield f"{file.path}: no docstring"


# Tests


def without_sentence(file: Source) -> Iterator[str]:
    for function in functions(file.tree):
        if function.name.startswith("test_") and not ast.get_docstring(function):
            yield f"{file.path}:{function.lineno}: {function.name}"


_ASSERTS = r"\bassert\b|raises|warns|check|expect|verify|until\(|eventually\(|fail\("


def asserts_nothing(file: Source) -> Iterator[str]:
    for function in functions(file.tree):
        if function.name.startswith("test_"):
            code = "\n".join(ast.unparse(each) for each in function.body)
            if not re.search(_ASSERTS, code):
                yield f"{file.path}:{function.lineno}: {function.name}"


RULES: list[tuple[Rule, str, str]] = [
    (upward_imports, "schemas/a.py", "from ..nodes.node import Node"),
    (upward_imports, "coordinator/a.py", "def f():\n    from ..nodes import node"),
    (upward_imports, "schemas/a.py", "from .. import coordinator"),
    (absolute_imports, "nodes/cache/a.py", "from forebay.schemas import keys"),
    (absolute_imports, "nodes/a.py", "import schemas.keys"),
    (impure_schemas, "schemas/a.py", "import socket"),
    (impure_schemas, "schemas/a.py", "from anyio import sleep"),
    (forbidden_names, "nodes/a.py", "import time\nx = time.time()"),
    (forbidden_names, "nodes/a.py", "from time import monotonic"),
    (forbidden_names, "nodes/a.py", "import datetime\nx = datetime.datetime.now()"),
    (forbidden_names, "nodes/a.py", "import asyncio\nasync def f():\n    await asyncio.sleep(1)"),
    (forbidden_names, "nodes/a.py", "import os\nx = os.environ.get('X')"),
    (forbidden_names, "coordinator/a.py", "import os\nx = os.getenv('X')"),
    (forbidden_names, "nodes/a.py", "print('x')"),
    (forbidden_names, "nodes/cli/a.py", "import pickle"),
    (forbidden_names, "nodes/cli/a.py", "from yaml import load"),
    (forbidden_names, "nodes/a.py", "eval('1')"),
    (broad_catches, "nodes/a.py", "try: ...\nexcept (ValueError, RuntimeError): ..."),
    (broad_catches, "nodes/a.py", "with suppress(RuntimeError): ..."),
    (vague_names, "nodes/helpers.py", ""),
    (vague_names, "nodes/a.py", "class CacheManager: ..."),
    (unfinished, "nodes/a.py", "x = 1  # TODO: more"),
    (too_long, "nodes/a.py", "x = 1\n" * (FILE_LINES_MAX + 1)),
    (too_long, "nodes/a.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
    (without_contract, "nodes/a.py", "x = 1"),
]
TEST_RULES: list[tuple[Rule, str, str]] = [
    (without_sentence, "tests/test_a.py", "def test_a():\n    assert True"),
    (asserts_nothing, "tests/test_a.py", "def test_a():\n    '''It works.'''\n    print(1)"),
    (unfinished, "tests/test_a.py", "raise NotImplementedError"),
]


def distinct(rules: list[tuple[Rule, str, str]]) -> list[Rule]:
    return list(dict.fromkeys(rule for rule, _, _ in rules))


@pytest.mark.parametrize("rule", distinct(RULES), ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule: Rule) -> None:
    """No file of the package breaks the rule."""
    places = [place for file in package() for place in rule(file)]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("rule", distinct(TEST_RULES), ids=lambda rule: rule.__name__)
def test_tests_keep_the_rule(rule: Rule) -> None:
    """No file of the tests breaks the rule."""
    places = [place for file in files_of_tests() for place in rule(file)]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("rule,path,text", RULES + TEST_RULES)
def test_rule_finds_a_planted_offence(rule: Rule, path: str, text: str) -> None:
    """Each rule notices what it is there for."""
    assert list(rule(source(path, text)))


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Every module can be loaded first."""
    assert cycle_of(package()) == []


def test_circle_is_found_when_planted() -> None:
    """The search for circles finds one, also by way of a relative import of a module."""
    one = source("nodes/one.py", "from . import two")
    two = source("nodes/two.py", "from .one import x")
    assert set(cycle_of([one, two])) == {"nodes.one", "nodes.two"}


def test_what_is_imported_for_types_only_makes_no_circle() -> None:
    """An import under TYPE_CHECKING does not run."""
    one = source("nodes/one.py", "if TYPE_CHECKING:\n    from .two import y")
    two = source("nodes/two.py", "from .one import x")
    assert cycle_of([one, two]) == []


def test_functions_are_short() -> None:
    """Nine in ten functions fit at a glance."""
    lengths = [lines_of(each) for file in package() for each in functions(file.tree)]
    assert quantiles(lengths, n=10)[-1] <= FUNCTION_LINES_P90_MAX


def test_nothing_stands_at_the_root_but_the_public_face() -> None:
    """The root is the package: another .py file there would be shipped."""
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]

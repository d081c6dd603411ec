"""`forebay import`: what another service has stored becomes entries; nothing newer is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay.nodes.cli.import_ import OldNames
from forebay.schemas.errors import InvalidKey
from forebay.schemas.keys import KeyTemplate, Names
from forebay.schemas.settings import Http, NodeSettings, Settings, Valkey, Workers
from support.valkey_server import ValkeyServer

APP = """
import forebay
node = forebay.Node("shop")

@node.cached("product:{id}", ttl=60)
async def product(id: int) -> dict[str, int]:
    raise LookupError(id)
"""


def store(server: ValkeyServer, namespace: str, count: int) -> None:
    for each in range(count):
        value: Any = {"n": each}
        wrapped = {"value": value, "stale_at": 9e9}
        text = json.dumps(wrapped if each % 2 else value)
        server.execute("SET", f"{namespace}:product:{each}", text, "PX", 3_600_000)


async def run(
    server: ValkeyServer, namespace: str, folder: Path, cli: Any, *more: str
) -> dict[str, int]:
    (folder / "importing.py").write_text(APP)
    outcome = await cli(
        "import",
        "--app=importing:node",
        f"--match={namespace}:product:*",
        "--as=product:{id}",
        "--json",
        f"--url={server.socket_url}",
        f"--namespace={namespace}",
        "--set=node.shards=4",
        "--set=http.enabled=false",
        *more,
    )
    assert outcome[0] == 0, outcome
    counts: dict[str, int] = json.loads(outcome[1])
    return {name: count for name, count in counts.items() if count}


@pytest.fixture
def cli(tmp_path: Path):
    """Run the command line in a process of its own: exit code, stdout, stderr."""
    import sys

    import anyio

    async def command(*args: str) -> tuple[int, str, str]:
        done = await anyio.run_process(
            [sys.executable, "-m", "forebay.nodes.cli", *args], check=False, cwd=tmp_path
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return command


async def test_it_counts_stores_once_and_keeps_what_is_newer(
    valkey_server, namespace, tmp_path, cli
) -> None:
    """A dry run stores nothing; a second run finds entries; a changed key stays changed."""
    store(valkey_server, namespace, 20)
    valkey_server.execute("SET", f"{namespace}:product:x", "1")
    valkey_server.execute("SET", f"{namespace}:product:99", "no JSON")
    names = Names(namespace, 4)

    async def again(*more: str) -> dict[str, int]:
        return await run(valkey_server, namespace, tmp_path, cli, *more)

    seen = {"used": 20, "unreadable": 1, "no_key": 1}
    assert await again("--dry-run") == {"dry_run": True, **seen}
    assert valkey_server.execute("EXISTS", names.entry("product:1")) == 0
    assert await again() == seen
    assert 3_500_000 < valkey_server.execute("PTTL", names.entry("product:1")) <= 3_600_000

    settings = Settings(
        node=NodeSettings(namespace=namespace, shards=4),
        valkey=Valkey(url=valkey_server.socket_url),
        http=Http(enabled=False),
        workers=Workers(enabled=False),
    )
    async with forebay.Node(settings=settings) as node:
        await node.invalidate(["product:1"])
    assert await again() == {"present": 19, "outdated": 1, "unreadable": 1, "no_key": 1}
    assert valkey_server.execute("EXISTS", names.entry("product:1")) == 0


@pytest.mark.parametrize("pattern", ["v1:*:*", "v1:product", "v1:[ab]:*", "v?:*"])
def test_a_pattern_that_does_not_fit_is_refused(pattern: str) -> None:
    """One star for each field, and no other wildcard."""
    with pytest.raises(InvalidKey, match="--match"):
        OldNames(pattern, KeyTemplate("product:{id}"))


def test_names_are_told_apart_by_what_stands_between_stars() -> None:
    """Two fields: the text is escaped in the key, and a name with one field too many is none."""
    names = OldNames("v1/*:*", KeyTemplate("of:{a}:{b}"))
    assert names.legacy_key == "v1/{a}:{b}"
    assert names.key_of(b"v1/x y:7") == "of:x%20y:7"
    for name in (b"v1/x:y:7", b"v1/:7", b"\xff", b"v2/x:7"):
        with pytest.raises(InvalidKey):
            names.key_of(name)

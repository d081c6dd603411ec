"""`forebay explain` on a real server, with and without a node."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from forebay.nodes.cli.main import main
from support.node_process import Shop
from support.valkey_server import ValkeyServer, free_port


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Explain = Callable[..., Ended]


@pytest.fixture
def shop(valkey_server: ValkeyServer, tmp_path: Path, namespace: str) -> Iterator[Shop]:
    with Shop(tmp_path, namespace, valkey__url=valkey_server.url) as shop:
        yield shop


@pytest.fixture
def explain(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    valkey_server: ValkeyServer,
    namespace: str,
) -> Explain:
    """The command, in an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("FOREBAY_", "VALKEY_", "CACHE_", "RATE_", "CREDENTIALS_")):
            monkeypatch.delenv(name)

    def run(*words: str, url: str | None = valkey_server.url) -> Ended:
        there = ["--url", url] if url else []
        with pytest.raises(SystemExit) as ended:
            main(["explain", "--namespace", namespace, *there, *words])
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


def test_words_and_document_agree_about_a_running_node(shop: Shop, explain: Explain) -> None:
    """The command and the node's endpoint tell the same: who has a copy, and where it is from."""
    shop.price(42, 7)
    node = shop.node().start()
    assert node.get("/v1/cache/product:42").status == 200
    told, document = explain("product:42"), explain("product:42", "--json")
    asked = node.get("/v1/explain/product:42").json
    text = node.get("/v1/explain/product:42?words").body.decode()

    assert (told.code, told.err, document.code) == (0, "", 0)
    verdict = told.out.splitlines()[0]
    assert verdict.startswith("product:42 would be served fresh from the near cache of node ")
    assert json.loads(document.out)["verdict"] == verdict == asked["verdict"]
    assert text.startswith(verdict)
    assert "product product:{id}, ttl 10 min; sink save" in told.out


def test_without_a_node_only_the_shared_part(
    explain: Explain, valkey_server: ValkeyServer, namespace: str
) -> None:
    """It needs the server alone; what only nodes know is said to be unknown."""
    valkey_server.execute("HSET", f"forebay:{namespace}:meta", "shards", 64)
    ended = explain("product:42")

    assert ended.code == 0
    assert ended.out.startswith(
        "product:42 would be loaded: the shared tier has no entry; no node runs\n"
    )
    assert "not known: no node has told" in ended.out


def test_what_is_no_key_is_wrong_usage(explain: Explain) -> None:
    """Exit 2, before anything is connected."""
    ended = explain("two words", url="valkey://127.0.0.1:1")

    assert (ended.code, ended.out) == (2, "")
    assert "must be percent-encoded" in ended.err


def test_without_a_server(explain: Explain) -> None:
    """Exit 3 and one line where none answers; 2 where none is named."""
    quick = ["--set", "valkey.startup_timeout_ms=200", "--set", "valkey.connect_timeout_ms=100"]
    away = explain("a", *quick, url=f"valkey://127.0.0.1:{free_port()}")
    unnamed = explain("a", url=None)

    assert (away.code, away.out, away.err.count("\n")) == (3, "", 1)
    assert unnamed.code == 2
    assert "there is no server that others use, to look at" in unnamed.err


def test_a_namespace_that_no_node_has_used_is_told(explain: Explain) -> None:
    """I3: rather than that nothing is stored."""
    ended = explain("product:42")
    assert (ended.code, ended.out) == (2, "")
    assert "no node has ever run in it" in ended.err

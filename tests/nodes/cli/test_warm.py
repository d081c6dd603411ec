"""`forebay warm` as a process, with the application in tests/support/shop.py."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.nodes.cache.warming import WarmReport
from forebay.nodes.cli.warm_view import PlainView
from support.eventually import wait_until
from support.node_process import environ
from support.valkey_server import ValkeyServer, free_port

Warm = Callable[..., "subprocess.CompletedProcess[str]"]


def words_of(server_url: str, namespace: str, *words: str) -> list[str]:
    start = [sys.executable, "-m", "forebay.nodes.cli", "warm", "--app", "support.shop:node"]
    return [*start, "--url", server_url, "--namespace", namespace, *words]


@pytest.fixture
def warm(valkey_server: ValkeyServer, namespace: str, tmp_path: Path) -> Warm:
    def run(*words: str, lines: str | bytes = "", **options: Any) -> Any:
        raw = lines.encode() if isinstance(lines, str) else lines
        return subprocess.run(
            words_of(valkey_server.url, namespace, *words),
            input=raw,
            timeout=40,
            cwd=tmp_path,
            env=environ(SHOP_DIR=str(tmp_path)),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    return run


def test_keys_are_loaded_and_found_fresh_the_next_time(warm: Warm) -> None:
    """From words, then from lines; the summary is on stdout alone."""
    first = warm("product", "product:1", "product:2", "product:1")
    again = warm(
        "product", "--json", "--keys-from", "-", lines="product:1\n\n  product:2\r\nproduct:3"
    )

    assert (first.returncode, first.stderr) == (0, b"")
    assert first.stdout.startswith(b"product: 2 keys in ")
    assert first.stdout.endswith(b": 2 loaded, 0 were fresh, 0 failed\n")
    told = json.loads(again.stdout)
    assert (told["asked"], told["loaded"], told["fresh"], told["failed"]) == (3, 1, 2, 0)


def test_failures_are_told_and_end_with_1(warm: Warm) -> None:
    """The keys and the reasons go to stderr, or into the document."""
    words = warm("broken", *(f"broken:{n}" for n in range(12)))
    document = warm("broken", "broken:1", "--json")

    assert (words.returncode, document.returncode) == (1, 1)
    assert b"broken:0: RuntimeError: no database\n" in words.stderr
    assert words.stderr.endswith(b"and 2 more\n")
    assert json.loads(document.stdout)["failures"] == [
        {"key": "broken:1", "problem": "RuntimeError: no database"}
    ]


@pytest.mark.parametrize(
    "words,lines,said",
    [
        (("product",), "", "name at least one KEY"),
        (("nope", "a"), "", "has no cache 'nope'; it has product, broken"),
        (
            ("product", "product:1", "broken:2"),
            "",
            "KEY 2: key 'broken:2' does not match product:{id}",
        ),
        (
            ("product", "--keys-from", "-"),
            "product:1\n\nproduct:x\n",
            "<stdin>, line 3: key 'product:x'",
        ),
        (("product", "--keys-from", "-"), "product:1\n" + "x" * 600, "line 2: over 576 bytes"),
        (("product", "--keys-from", "-"), b"\xff\n", "line 1: is not valid UTF-8"),
        (("product", "a", "--concurrency", "0"), "", "--concurrency"),
        (("product", "a", "--per-second", "0"), "", "--per-second"),
        (("product", "--keys-from", "no-such-file"), "", "no-such-file"),
    ],
)
def test_what_cannot_be_warmed_is_named_and_nothing_is_loaded(
    warm: Warm,
    valkey_server: ValkeyServer,
    namespace: str,
    words: tuple[str, ...],
    lines: str | bytes,
    said: str,
) -> None:
    """I1, I2: exit 2, and the place of what is wrong; the namespace is not even born."""
    ended = warm(*words, lines=lines)

    assert (ended.returncode, ended.stdout) == (2, b"")
    assert said in ended.stderr.decode()
    assert valkey_server.execute("EXISTS", f"forebay:{namespace}:meta") == 0


def test_without_a_server(namespace: str, tmp_path: Path) -> None:
    """Exit 3 and one line."""
    words = words_of(f"valkey://127.0.0.1:{free_port()}", namespace, "product", "product:1")
    quick = ["--set", "valkey.startup_timeout_ms=200", "--set", "valkey.connect_timeout_ms=100"]
    ended = subprocess.run(
        [*words, *quick], capture_output=True, cwd=tmp_path, timeout=40, env=environ(SHOP_DIR=".")
    )

    assert (ended.returncode, ended.stderr.count(b"\n")) == (3, 1)


def test_terminal_gets_a_bar_and_stdout_stays_clean(warm: Warm) -> None:
    """I4: with rich, on a terminal, the bar goes to stderr."""
    ours, theirs = pty.openpty()
    lines = "\n".join(f"product:{n}" for n in range(150))
    ended = warm("product", "--keys-from", "-", lines=lines, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 65_536)
    os.close(ours)

    assert ended.returncode == 0
    assert ended.stdout.startswith(b"product: 150 keys")
    assert b"\x1b[" in shown


def test_interrupted_it_ends_soon(
    valkey_server: ValkeyServer, namespace: str, tmp_path: Path
) -> None:
    """Ctrl-C in the middle: exit 130, and no traceback, long before the keys would be done."""
    keys = tmp_path / "keys"
    keys.write_text("\n".join(f"product:{n}" for n in range(20_000)))  # for 1,000 s
    words = words_of(
        valkey_server.url, namespace, "product", "--keys-from", str(keys), "--per-second", "20"
    )
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environ(SHOP_DIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads
    )
    try:
        pattern = f"{{{namespace}:*}}:e0:product:*"
        wait_until(lambda: valkey_server.execute("KEYS", pattern), what="the first entry")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=45)
    finally:
        process.kill()
        process.communicate()

    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


def test_plain_progress_is_a_line_at_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal a log gets a line every few seconds, not one a key."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    clock = Hand()
    with PlainView("product", 9, clock) as view:
        for asked in range(1, 10):
            clock.at += 2
            view.update(WarmReport(asked=asked, failed=1))

    assert said.getvalue().splitlines() == [
        "product: 3 of 9 keys, 1 failed",
        "product: 6 of 9 keys, 1 failed",
        "product: 9 of 9 keys, 1 failed",
    ]


class Hand:
    at = 10.0

    def monotonic(self) -> float:
        return self.at

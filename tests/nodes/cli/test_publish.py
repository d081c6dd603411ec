"""`forebay publish` on a real server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from forebay.nodes.cli.main import main
from forebay.schemas.events import Event, Invalidate, Refresh, Write, read_event
from forebay.schemas.keys import Names
from support.valkey_server import ValkeyServer, free_port

Publish = Callable[..., "Ended"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Publish:
    """The command, in an empty directory and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("FOREBAY_", "VALKEY_", "CACHE_", "RATE_", "CREDENTIALS_")):
            monkeypatch.delenv(name)

    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(["publish", *words])
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def there(valkey_server: ValkeyServer, namespace: str) -> list[str]:
    """A namespace that a node has run in."""
    valkey_server.execute("HSET", f"forebay:{namespace}:meta", "shards", 64)
    return ["--url", valkey_server.url, "--namespace", namespace]


def published(server: ValkeyServer, namespace: str) -> list[tuple[str, Event]]:
    """The entries of the ingress stream, read as a node reads them."""
    entries = server.execute("XRANGE", f"forebay:{namespace}:events", "-", "+")
    return [
        (entry_id.decode(), read_event(fields[1], bytes_max=65_536))
        for entry_id, fields in entries
        if fields[0] == b"event"
    ]


@pytest.mark.parametrize(
    "words,body",
    [
        (["invalidate", "a", "b"], Invalidate(keys=("a", "b"))),
        (
            ["invalidate", "--tag", "x", "--tag", "y", "--soft"],
            Invalidate(tags=("x", "y"), soft=True),
        ),
        (["refresh", "a:1"], Refresh(keys=("a:1",))),
        (
            ["write", "a", '{"n": 12345678901234567890.10}'],
            Write(key="a", value=b'{"n": 12345678901234567890.10}'),  # type: ignore[arg-type]
        ),
        (["write", "a", "null", "--ttl", "1.5"], Write(key="a", value=b"null", ttl=1.5)),  # type: ignore[arg-type]
    ],
)
def test_event_arrives_as_it_was_meant(
    publish: Publish,
    there: list[str],
    valkey_server: ValkeyServer,
    namespace: str,
    words: list[str],
    body: object,
) -> None:
    """What a node reads from the stream is what was asked for, to the letter of the JSON."""
    ended = publish(*words, *there)
    ((entry_id, event),) = published(valkey_server, namespace)

    assert ended == (0, f"{entry_id}\n", "")
    if isinstance(event.body, Write):
        assert bytes(event.body.value) == bytes(body.value)  # type: ignore[attr-defined]
        assert (event.body.key, event.body.ttl) == (body.key, body.ttl)  # type: ignore[attr-defined]
    else:
        assert event.body == body


def test_id_of_the_event_is_passed_on(
    publish: Publish, there: list[str], valkey_server: ValkeyServer, namespace: str
) -> None:
    """--id lets nodes notice a repetition; --json names the stream and the entry."""
    ended = publish("refresh", "a", "--id", "e-1", "--json", *there)
    ((entry_id, event),) = published(valkey_server, namespace)

    assert json.loads(ended.out) == {"stream": f"forebay:{namespace}:events", "id": entry_id}
    assert event.id == "#e-1"


@pytest.mark.parametrize(
    "words,said",
    [
        (["invalidate"], "KEY or --tag"),
        (["invalidate", "a b"], "percent-encoded"),
        (["refresh"], "KEY..."),
        (["write", "a", "{"], "not JSON"),
        (["write", "a", "1,2"], "not JSON"),
        (["write", "a", "1", "--ttl", "0"], "ttl"),
        (["write", "a", json.dumps("x" * 70_000)], "oversized"),
    ],
)
def test_event_that_no_node_would_take_is_not_sent(
    publish: Publish,
    there: list[str],
    valkey_server: ValkeyServer,
    namespace: str,
    words: list[str],
    said: str,
) -> None:
    """I1: wrong usage, told before anything is connected."""
    ended = publish(*words, *there)

    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert published(valkey_server, namespace) == []


def test_a_write_that_no_sink_would_take_is_not_sent(
    publish: Publish, there: list[str], valkey_server: ValkeyServer, namespace: str
) -> None:
    """I1: the live members of the namespace say which sinks there are."""
    now_ms = int(valkey_server.execute("TIME")[0]) * 1000
    names, record = Names(namespace, 64), b'1 active 60000 0 {"sinks":["order:{id}"]}'
    valkey_server.execute("ZADD", names.nodes, now_ms, "worker")
    valkey_server.execute("HSET", names.members, "worker", record)
    refused, sent = (publish("write", key, "1", *there) for key in ("nobody:1", "order:1"))

    assert (refused.code, refused.out, sent.code) == (2, "", 0)
    assert "no_sink at key: no live member declares a sink for 'nobody:1'" in refused.err
    assert len(published(valkey_server, namespace)) == 1


def test_full_stream_refuses(
    publish: Publish, there: list[str], valkey_server: ValkeyServer, namespace: str
) -> None:
    """I2: at its bound the stream takes no more; nothing in it is dropped."""
    bounded = [*there, "--set", "durable.events_max=1"]
    first, second = publish("refresh", "a", *bounded), publish("refresh", "b", *bounded)

    assert (first.code, second.code) == (0, 1)
    assert (
        second.err
        == f"Error: forebay:{namespace}:events holds 1 of 1 entries; slow down and try again\n"
    )
    assert len(published(valkey_server, namespace)) == 1


def test_without_a_server_that_others_use(publish: Publish) -> None:
    """I3: an embedded server would forget the event."""
    ended = publish("refresh", "a")

    assert ended.code == 2
    assert "give --url, or set FOREBAY_URL" in ended.err


def test_server_that_is_not_there(publish: Publish) -> None:
    """Exit 3 and one line with the setting, the masked value, its origin and the fix."""
    port = free_port()
    url = f"valkey://me:secret@127.0.0.1:{port}/0"
    words = ["--set", "valkey.startup_timeout_ms=200", "--set", "valkey.connect_timeout_ms=100"]
    ended = publish("refresh", "a", "--url", url, *words)

    assert (ended.code, ended.out, ended.err.count("\n")) == (3, "", 1)
    assert f"valkey.url = redis://me:***@127.0.0.1:{port}" in ended.err.replace(
        "valkey://", "redis://"
    )
    assert "flag --url" in ended.err
    assert "secret" not in ended.err


@pytest.mark.parametrize("named", [True, False])
def test_a_namespace_that_no_node_has_used_is_a_mistake(
    publish: Publish, valkey_server: ValkeyServer, namespace: str, named: bool
) -> None:
    """I3: also the default one, where --namespace was left out; nothing is sent there."""
    where = ["--namespace", namespace] if named else []
    ended = publish("invalidate", "a", "--url", f"{valkey_server.url.rstrip('/0')}/9", *where)
    name, origin = (namespace, "flag --namespace") if named else ("default", "default")
    assert (ended.code, ended.out) == (2, "")
    assert f"node.namespace = {name} (from {origin}): no node has ever run in it" in ended.err
    assert "--namespace" in ended.err
    assert published(valkey_server, namespace) == []

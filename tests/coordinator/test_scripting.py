"""Running scripts: coordinator/valkey/scripting.py, on every kind of backend."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay.coordinator.valkey.backend import Backend
from forebay.coordinator.valkey.scripting import Call, Script, load_scripts, run, run_many
from forebay.schemas.errors import ServerRefused
from forebay.schemas.settings import Valkey

SET = Script.of("value_set", 'redis.call("SET", KEYS[1], ARGV[1])\nreturn ARGV[1]')
GET = Script.of("value_get", 'return redis.call("GET", KEYS[1])')
FAIL = Script.of("value_fail", 'return redis.error_reply("WRONGTURN at " .. KEYS[1])')


@pytest.fixture
async def backend(backend_settings: Valkey) -> AsyncIterator[Backend]:
    async with Backend(backend_settings, client_name="test") as backend:
        await backend.link.call("SCRIPT", "FLUSH")
        yield backend


async def test_a_script_unknown_to_the_server_is_sent_in_full(
    backend: Backend, namespace: str
) -> None:
    """I2: the caller does not notice whether the server knew it."""
    for _ in range(2):
        assert await run(backend.link, SET, [namespace], ["value"]) == b"value"
    assert await backend.link.call("SCRIPT", "EXISTS", SET.sha) == [1]


async def test_after_a_flush_it_is_sent_again(backend: Backend, namespace: str) -> None:
    """I2: also in the middle of a process's life, as after a restart of the server."""
    await run(backend.link, SET, [namespace], [b"\xff\x00"])
    await backend.link.call("SCRIPT", "FLUSH")
    assert await run(backend.link, GET, [namespace]) == b"\xff\x00"


async def test_an_error_of_the_script_is_not_repeated(backend: Backend, namespace: str) -> None:
    """Only NOSCRIPT leads to a second try; what the script refuses is told to the caller."""
    for _ in range(2):
        with pytest.raises(ServerRefused) as caught:
            await run(backend.link, FAIL, [namespace])
        assert caught.value.code == "WRONGTURN"


async def test_many_come_back_in_order(backend: Backend, namespace: str) -> None:
    """Known, unknown and failing scripts in one batch: each reply is in its place."""
    await run(backend.link, SET, [namespace], [0])
    calls = [
        Call(script=SET, keys=[namespace], args=[1]),
        Call(script=GET, keys=[namespace]),
        Call(script=FAIL, keys=[namespace]),
        Call(script=GET, keys=[namespace]),
        Call(script=SET, keys=[namespace], args=[2]),
    ]
    for _ in range(2):
        first, one, failed, same, last = await run_many(backend.link, calls)
        assert isinstance(failed, ServerRefused)
        assert (first, last, one) == (b"1", b"2", same)


async def test_a_script_learned_in_a_batch_is_sent_in_full_once(
    backend: Backend, namespace: str
) -> None:
    """A hundred runs of an unknown script cost one source, not a hundred."""
    calls = [Call(script=SET, keys=[namespace], args=[n]) for n in range(100)]
    before = backend.link.statistics().calls
    assert await run_many(backend.link, calls) == [str(n).encode() for n in range(100)]
    assert backend.link.statistics().calls - before == 200
    assert await run_many(backend.link, []) == []


async def test_the_servers_agree_on_the_name_of_every_script(backend: Backend) -> None:
    """All of ours compile, and our SHA-1 is the server's."""
    for script in load_scripts().values():
        assert await backend.link.call("SCRIPT", "LOAD", script.source) == script.sha.encode()


def test_shared_text_comes_before_those_that_ask_for_it(tmp_path: Path) -> None:
    """I1: and is no script itself."""
    (tmp_path / "_shared.lua").write_text("local function one() return 1 end\n")
    (tmp_path / "a_one.lua").write_text("-- One.\n-- With _shared.lua.\n\nreturn one()\n")
    (tmp_path / "b_two.lua").write_text("-- Two.\n\n-- With _shared.lua.\nreturn 2\n")
    (tmp_path / "notes.txt").write_text("no script")

    scripts = load_scripts(tmp_path)

    assert list(scripts) == ["a_one", "b_two"]
    assert len(scripts) == 2
    assert scripts["a_one"].source.startswith("local function one()")
    assert scripts["b_two"].source == "-- Two.\n\n-- With _shared.lua.\nreturn 2\n"
    source = scripts["a_one"].source.encode()
    assert scripts["a_one"].sha == hashlib.sha1(source).hexdigest()

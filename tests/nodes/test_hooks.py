"""The hooks that an application runs when its node starts and stops."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest
from structlog.testing import capture_logs

import forebay
from forebay.nodes import lifespan as hooks

MakeNode = Callable[..., forebay.Node]


async def squared(id: int) -> int:
    return id * id


async def test_hooks_run_in_order_and_can_use_the_node(make_node: MakeNode) -> None:
    """Start hooks run in order once the node works; stop hooks in reverse while it still works."""
    node = make_node()
    cached = node.cached("a:{id}", ttl=60)(squared)
    told: list[object] = []

    for number in (1, 2):

        @node.on_start
        async def begin(number: int = number) -> None:
            await node.invalidate(["a:7"])
            told.append(("start", number, await cached(7), node.is_running))

        @node.on_stop
        async def end(number: int = number) -> None:
            await node.invalidate(["a:7"])
            told.append(("stop", number, await cached(7), node._parts.drained))

    async with node:
        told.append("body")

    assert told == [
        ("start", 1, 49, True),
        ("start", 2, 49, True),
        "body",
        ("stop", 2, 49, True),
        ("stop", 1, 49, True),
    ]


class Oops(Exception):
    """Raised by the application."""


async def test_start_hook_that_fails_stops_the_start(make_node: MakeNode) -> None:
    """H1: the error is raised unchanged; later start hooks do not run, all stop hooks do."""
    node = make_node()
    told: list[str] = []

    @node.on_start
    async def begin() -> None:
        raise Oops("database")

    @node.on_start
    async def never() -> None:
        told.append("never")

    @node.on_stop
    async def end() -> None:
        told.append("end")

    with pytest.raises(Oops, match="database"):
        async with node:
            told.append("body")
    assert told == ["end"]
    assert not node.is_running


async def test_stop_hooks_that_fail_stop_nobody(make_node: MakeNode) -> None:
    """H1, H3: the others run; the first error is raised, unless the body raised one."""
    node = make_node()
    told: list[str] = []

    @node.on_stop
    async def last() -> None:
        told.append("last")

    @node.on_stop
    async def second() -> None:
        raise Oops("second")

    @node.on_stop
    async def first() -> None:
        raise Oops("first")

    with capture_logs() as lines, pytest.raises(Oops, match="first"):
        async with node:
            told.append("body")
    assert [str(line["exc_info"]) for line in lines if line["event"] == "hook.failed"] == ["second"]

    with capture_logs() as lines, pytest.raises(ZeroDivisionError):
        async with node:
            _ = 1 / 0
    failures = [line["exc_info"] for line in lines if line["log_level"] == "error"]
    assert sorted(map(str, failures)) == ["first", "second"]
    assert told == ["body", "last", "last"]


async def test_stop_hook_that_hangs_is_given_up(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H2: a stop hook is cancelled after its limit, and that is an error."""
    monkeypatch.setattr(hooks, "LIMIT_S", 0.05)
    node = make_node()

    @node.on_stop
    async def hang() -> None:
        await anyio.sleep_forever()

    with pytest.raises(forebay.ForebayError, match="took longer"):
        async with node:
            pass
    assert not node.is_running

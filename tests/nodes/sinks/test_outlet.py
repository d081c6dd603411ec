"""The one way to a sink: O1-O3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import pytest

from forebay.nodes.sinks.base import SinkBatch, Write
from forebay.nodes.sinks.serialized import Outlet
from forebay.schemas.errors import FatalSinkError

ONE = SinkBatch(writes=(Write(key="k:1", params={}, value=1, version=1),))


class Gated:
    """A sink that tells what was done with it, and waits for its gate in between."""

    name = "gated"

    def __init__(self) -> None:
        self.said: list[str] = []
        self.inside = anyio.Event()
        self.gate = anyio.Event()
        self.fault: Exception | None = None

    async def open(self, namespace: str = "") -> None:
        if self.fault is not None:
            raise self.fault
        self.said.append(f"open {namespace}")

    async def write(self, batch: SinkBatch) -> None:
        self.said.append("begin")
        self.inside.set()
        await self.gate.wait()
        self.said.append("end")

    async def progress(self, shards: Sequence[int]) -> Mapping[int, str]:
        self.said.append("progress")
        return {}

    async def aclose(self) -> None:
        self.said.append("close")


@pytest.fixture
def sink() -> Gated:
    return Gated()


@pytest.fixture
def outlet(sink: Gated) -> Outlet:
    return Outlet(sink, namespace="shop")


async def test_one_batch_at_a_time(sink: Gated, outlet: Outlet) -> None:
    """O1, O2: the second begins when the first is over; closing waits for both."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outlet.write, ONE)
        await sink.inside.wait()
        tasks.start_soon(outlet.write, ONE)
        tasks.start_soon(outlet.aclose)
        await anyio.wait_all_tasks_blocked()
        assert sink.said == ["open shop", "begin"]
        sink.gate.set()
    assert sink.said == ["open shop", "begin", "end", "begin", "end", "close"]


async def test_it_is_opened_once_whoever_asks(sink: Gated, outlet: Outlet) -> None:
    """O2: and closed once; what was never opened is not closed."""
    await outlet.aclose()
    await outlet.open()
    await outlet.open("another")
    await outlet.progress([1])
    await outlet.aclose()
    await outlet.aclose()
    assert sink.said == ["open shop", "progress", "close"]


async def test_after_the_close_it_is_opened_anew(sink: Gated, outlet: Outlet) -> None:
    """O2: for a hook that writes when the workers are gone."""
    sink.gate.set()
    for _ in range(2):
        await outlet.write(ONE)
        await outlet.aclose()
    assert sink.said == ["open shop", "begin", "end", "close"] * 2


async def test_what_fails_to_open_is_tried_again(sink: Gated, outlet: Outlet) -> None:
    """The error is the sink's own, and nothing was written."""
    sink.gate.set()
    sink.fault = FatalSinkError("no such table")
    with pytest.raises(FatalSinkError) as caught:
        await outlet.write(ONE)
    assert caught.value is sink.fault
    sink.fault = None
    await outlet.write(ONE)
    assert sink.said == ["open shop", "begin", "end"]


async def test_cancelled_while_waiting_nothing_is_written(sink: Gated, outlet: Outlet) -> None:
    """O3: the next in line has the turn."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outlet.write, ONE)
        await sink.inside.wait()
        async with anyio.create_task_group() as others:
            others.start_soon(outlet.write, ONE)
            await anyio.wait_all_tasks_blocked()
            others.cancel_scope.cancel()
        sink.gate.set()
    await outlet.write(ONE)
    assert sink.said == ["open shop", "begin", "end", "begin", "end"]


async def test_a_sink_that_takes_several_gets_them_beside_each_other(sink: Gated) -> None:
    """O1: a batch that waits beside holds up only other such batches; closing waits for all."""
    sink.concurrency = 3  # type: ignore[attr-defined]
    outlet = Outlet(sink, namespace="shop")
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(outlet.write_beside, ONE)
        await anyio.wait_all_tasks_blocked()
        assert sink.said == ["open shop", "begin", "begin"]
        tasks.start_soon(outlet.write, ONE)
        tasks.start_soon(outlet.write, ONE)
        await anyio.wait_all_tasks_blocked()
        assert sink.said.count("begin") == 3
        tasks.start_soon(outlet.aclose)
        await anyio.wait_all_tasks_blocked()
        assert "close" not in sink.said
        sink.gate.set()
    assert sink.said.count("end") == 5
    assert sink.said[-1] == "close"


async def test_a_sink_that_takes_one_gets_one_whatever_is_beside(
    sink: Gated, outlet: Outlet
) -> None:
    """O1: without ``concurrency`` both ways are one."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outlet.write_beside, ONE)
        tasks.start_soon(outlet.write, ONE)
        await anyio.wait_all_tasks_blocked()
        assert sink.said == ["open shop", "begin"]
        sink.gate.set()
    assert sink.said.count("end") == 2

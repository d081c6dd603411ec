"""What becomes of the errors of an application's function, and of its time."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from forebay.nodes.sinks.base import Progress, SinkBatch, Write
from forebay.nodes.sinks.callables import CallableSink
from forebay.schemas.errors import (
    FatalSinkError,
    Fenced,
    PoisonSinkError,
    SinkError,
    TransientSinkError,
)

WRITE: Write[object] = Write(key="flight:1", params={"id": "1"}, value={"gate": "A1"}, version=1)
BATCH = SinkBatch(writes=[WRITE], progress=[Progress(shard=3, epoch=1, position="1-0")])


def failing(error: Exception) -> CallableSink:
    async def save(writes: list[Write[Any]]) -> None:
        raise error

    return CallableSink("save", save)


async def test_function_gets_the_writes_of_the_batch() -> None:
    """I1: one call for a batch; a batch without writes needs none."""
    calls: list[list[Write[Any]]] = []

    async def save(writes: list[Write[Any]]) -> None:
        calls.append(writes)

    sink = CallableSink("save", save)
    await sink.open()
    await sink.write(BATCH)
    await sink.write(SinkBatch(writes=[], progress=BATCH.progress))
    await sink.aclose()
    assert calls == [[WRITE]]
    assert await sink.progress([3]) == {}


@pytest.mark.parametrize(
    "error",
    [
        TransientSinkError("later"),
        PoisonSinkError("never"),
        FatalSinkError("stop"),
        SinkError("as the application calls it"),
        Fenced("flights", 1, 2),
    ],
)
async def test_errors_meant_for_the_worker_pass(error: Exception) -> None:
    """I2: the function may say itself what is to be done."""
    with pytest.raises(type(error)) as raised:
        await failing(error).write(BATCH)
    assert raised.value is error


@pytest.mark.parametrize(
    "error,verdict",
    [
        (ValueError("no such airport"), PoisonSinkError),
        (TypeError("not a number"), PoisonSinkError),
        (KeyError("gate"), PoisonSinkError),
        (msgspec.ValidationError("Expected int"), PoisonSinkError),
        (OSError("no route"), TransientSinkError),
        (TimeoutError("the application's own"), TransientSinkError),
        (RuntimeError("?"), TransientSinkError),
        (ExceptionGroup("tasks", [ExceptionGroup("more", [ValueError("x")])]), PoisonSinkError),
        (ExceptionGroup("tasks", [ValueError("x"), OSError("y")]), TransientSinkError),
        (ExceptionGroup("tasks", [FatalSinkError("stop")]), FatalSinkError),
    ],
)
async def test_other_errors_are_judged_by_their_class(
    error: Exception, verdict: type[Exception]
) -> None:
    """I2: what a value is to blame for is poison; anything else is tried again."""
    with pytest.raises(verdict) as raised:
        await failing(error).write(BATCH)
    assert type(raised.value) is verdict
    assert raised.value.__cause__ is error


async def test_text_keeps_name_class_and_words() -> None:
    """Who reads the dead letter sees what the function said."""
    with pytest.raises(PoisonSinkError, match=r"^save: ValueError: no such airport$"):
        await failing(ValueError("no such airport")).write(BATCH)


async def test_function_that_takes_too_long_is_cancelled() -> None:
    """I2: running out of time is transient."""
    ended: list[str] = []

    async def save(writes: list[Write[Any]]) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("save")

    with pytest.raises(TransientSinkError, match="longer than 10 ms"):
        await CallableSink("save", save, timeout_ms=10).write(BATCH)
    assert ended == ["save"]


async def test_cancellation_reaches_the_function_and_is_no_error() -> None:
    """I3: a drain that gives up is not a failure of the sink."""
    started = anyio.Event()

    async def save(writes: list[Write[Any]]) -> None:
        started.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(CallableSink("save", save).write, BATCH)
        await started.wait()
        tasks.cancel_scope.cancel()
    assert tasks.cancel_scope.cancelled_caught


async def test_function_that_is_not_async_is_fatal() -> None:
    """No value is to blame: the sink stops, and nothing goes to the dead letters."""
    sink = CallableSink("save", lambda writes: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(FatalSinkError, match="async def"):
        await sink.write(BATCH)


@pytest.mark.parametrize(
    "error, unknown",
    [
        (ConnectionError("reset"), True),
        (RuntimeError("who knows"), True),
        (ValueError("no such colour"), False),
        (TransientSinkError("before anything was sent"), False),
    ],
)
async def test_an_error_says_whether_the_batch_may_be_stored(
    error: Exception, unknown: bool
) -> None:
    """What the function did before it failed is known to nobody, unless it says so."""
    with pytest.raises(SinkError) as raised:
        await failing(error).write(BATCH)
    assert raised.value.outcome_unknown is unknown


async def test_running_out_of_time_leaves_the_outcome_unknown() -> None:
    """It may have been stored, and the answer late."""
    sink = CallableSink("save", lambda writes: anyio.sleep_forever(), timeout_ms=1)
    with pytest.raises(TransientSinkError) as raised:
        await sink.write(BATCH)
    assert raised.value.outcome_unknown

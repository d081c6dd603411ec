"""Deliveries to a sink that does what the test tells it: V1-V4, without a server or a wait."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from forebay.coordinator.instruments import Instruments
from forebay.nodes.sinks.base import Progress, SinkBatch, Write
from forebay.nodes.workers.delivery import Delivery, Outage, Refused
from forebay.schemas.errors import (
    BusySinkError,
    FatalSinkError,
    Fenced,
    PoisonSinkError,
    TransientSinkError,
    Unavailable,
)
from support.clock import ManualClock
from support.workers import Table

PROGRESS = (Progress(shard=3, epoch=7, position="5-0"),)


class Longest(random.Random):
    """The longest delay that there can be."""

    def uniform(self, a: float, b: float) -> float:
        return b


def delivery_to(
    sink: Table, clock: ManualClock, *, attempts_max: int = 3, rng: random.Random | None = None
) -> Delivery:
    return Delivery(
        sink,
        attempts_max=attempts_max,
        clock=clock,
        rng=rng or Longest(),
        instruments=Instruments(CollectorRegistry()),
        sleep=clock.sleep,
    )


def writes_of(*values: object, version: int = 1) -> list[Write[object]]:
    return [Write(key=f"k:{v}", params={}, value=v, version=version) for v in values]


def batch_of(*values: object) -> SinkBatch:
    return SinkBatch(writes=writes_of(*values), progress=PROGRESS)


def always() -> bool:
    return True


@pytest.fixture
def table() -> Table:
    return Table()


async def test_a_batch_goes_to_the_sink_as_it_is() -> None:
    """One call, with its progress, and nothing handed back."""
    sink = Table()
    batch = batch_of(1, 2)
    assert await delivery_to(sink, ManualClock()).deliver(batch, ours=always) == []
    assert sink.batches == [batch]


async def test_transient_failures_are_tried_again_with_growing_jittered_waits() -> None:
    """V1: the same batch, after waits that double up to five seconds, in steps."""
    sink, clock = Table(), ManualClock()
    sink.faults = [TransientSinkError("away")] * 12
    delivery = delivery_to(sink, clock)
    assert await delivery.deliver(batch_of(1), ours=always) == []
    assert sink.batches == [batch_of(1)] * 13
    assert clock.now_s - 100 == pytest.approx(sum(min(5.0, 0.05 * 2**n) for n in range(1, 13)))
    assert max(clock.slept) <= 0.25  # so that giving up takes no longer


async def test_waits_are_drawn_between_zero_and_the_limit() -> None:
    """V1: full jitter, so that many nodes do not come back at once."""
    sink, clock = Table(), ManualClock()
    sink.faults = [TransientSinkError("away")] * 50
    await delivery_to(sink, clock, rng=random.Random(5)).deliver(batch_of(1), ours=always)
    assert 0 < clock.now_s - 100 < 50 * 5.0 * 0.7


async def test_an_outage_of_days_does_not_break_the_counting() -> None:
    """V1: for ever means for ever; the number of tries is not what ends it."""
    sink, clock = Table(), ManualClock()
    sink.faults = [TransientSinkError("away")] * 3_000
    clock.sleep = _skip(clock)  # type: ignore[method-assign]
    assert await delivery_to(sink, clock).deliver(batch_of(1), ours=always) == []
    assert len(sink.batches) == 3_001


def _skip(clock: ManualClock) -> Callable[[float], object]:
    async def sleep(seconds: float) -> None:
        clock.now_s += 10.0

    return sleep


@pytest.mark.parametrize("error", [TransientSinkError("away"), FatalSinkError("no table")])
async def test_work_that_is_not_ours_any_more_is_given_up_while_waiting(error: Exception) -> None:
    """V1: a pause ends soon after the work was lost, without another try."""
    sink, clock = Table(), ManualClock()
    sink.faults = [error] * 9
    with pytest.raises(Fenced):
        await delivery_to(sink, clock).deliver(batch_of(1), ours=lambda: not sink.batches)
    assert len(sink.batches) == 1
    assert clock.now_s - 100 <= 0.25


async def test_work_that_was_never_ours_is_not_tried() -> None:
    """V1: it is asked before the first try, too."""
    sink = Table()
    with pytest.raises(Fenced):
        await delivery_to(sink, ManualClock()).deliver(batch_of(1), ours=lambda: False)
    assert sink.batches == []


async def test_the_writes_at_fault_are_handed_back_and_the_others_stored() -> None:
    """V2: whatever else was in the batch is stored; the reason comes with what is not."""
    sink = Table()
    sink.poison = {3, 9}
    refused = await delivery_to(sink, ManualClock()).deliver(batch_of(*range(12)), ours=always)
    assert sorted(each.write.value for each in refused) == [3, 9]
    assert refused[0].problem == "will not take k:3"
    assert sorted(sink.values().values()) == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1))),
    )
)
def test_bisecting_finds_exactly_the_poison(case: tuple[int, set[int]]) -> None:
    """V2: whatever is at fault, from nothing to all of it."""
    size, poison = case

    async def deliver() -> tuple[Table, list[Refused]]:
        sink = Table()
        sink.poison = set(poison)
        delivery = delivery_to(sink, ManualClock())
        return sink, await delivery.deliver(batch_of(*range(size)), ours=always)

    sink, refused = anyio.run(deliver)
    assert {each.write.value for each in refused} == poison
    assert set(sink.values().values()) == set(range(size)) - poison


async def test_a_write_at_fault_is_tried_as_often_as_set() -> None:
    """V2: ``attempts_max`` tries of the write by itself, then it is handed back."""
    sink = Table()
    sink.poison = {2}
    await delivery_to(sink, ManualClock(), attempts_max=4).deliver(batch_of(1, 2), ours=always)
    alone = [batch for batch in sink.batches if [each.value for each in batch.writes] == [2]]
    assert len(alone) == 4


async def test_a_write_that_recovers_is_not_handed_back() -> None:
    """V2: what was at fault for a moment (a constraint on another row) is stored after all."""
    sink = Table()
    sink.faults = [PoisonSinkError("not yet"), PoisonSinkError("not yet")]
    assert await delivery_to(sink, ManualClock()).deliver(batch_of(1), ours=always) == []
    assert sink.values() == {"k:1": 1}


async def test_many_writes_at_fault_wait_no_longer_than_one() -> None:
    """V2: the healthy ones are stored first, and the waits are shared."""

    async def waited(poison: Sequence[int]) -> float:
        sink, clock = Table(), ManualClock()
        sink.poison = set(poison)
        await delivery_to(sink, clock, attempts_max=5).deliver(batch_of(*range(64)), ours=always)
        return clock.now_s

    assert await waited(range(0, 64, 2)) == await waited([7])


async def test_healthy_writes_are_stored_before_the_first_wait() -> None:
    """V2: nobody waits for somebody else's fault."""
    sink, clock = Table(), ManualClock()
    sink.poison = {5}
    stored_by_then: list[int] = []
    sleep = clock.sleep

    async def look(seconds: float) -> None:
        stored_by_then.append(len(sink.rows))
        await sleep(seconds)

    clock.sleep = look  # type: ignore[method-assign]
    await delivery_to(sink, clock).deliver(batch_of(*range(16)), ours=always)
    assert stored_by_then[0] == 15


async def test_progress_comes_last_and_parts_carry_the_epoch_alone() -> None:
    """V3: a part claims nothing; the whole range is claimed once all of it is done."""
    sink = Table()
    sink.poison = {2}
    await delivery_to(sink, ManualClock()).deliver(batch_of(1, 2, 3), ours=always)
    first, *parts, last = sink.batches
    assert (first.progress, last.progress, last.writes) == (PROGRESS, PROGRESS, ())
    assert parts
    for part in parts:
        assert [(each.shard, each.epoch, each.position) for each in part.progress] == [
            (3, 7, "0-0")
        ]


async def test_a_late_owner_is_refused_in_the_middle_of_bisecting() -> None:
    """V3: the sink sees the epoch of every part, and fences it."""
    sink, clock = Table(), ManualClock()
    sink.poison = {2}
    stolen = clock.sleep

    async def take_over(seconds: float) -> None:
        sink.epochs[3] = 8
        await stolen(seconds)

    clock.sleep = take_over  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        await delivery_to(sink, clock).deliver(batch_of(1, 2), ours=always)


async def test_a_fatal_failure_stops_the_sink_and_says_why_until_it_works() -> None:
    """V4: shown, tried again after ten seconds, and forgotten once it works."""
    sink, clock = Table(), ManualClock()
    sink.faults = [FatalSinkError("no such table"), FatalSinkError("no such table")]
    delivery = delivery_to(sink, clock)
    shown: list[str] = []
    sleep = clock.sleep

    async def look(seconds: float) -> None:
        shown.append(delivery.stopped)
        await sleep(seconds)

    delivery._sleep = look
    assert await delivery.deliver(batch_of(1), ours=always) == []
    assert set(shown) == {"no such table"}
    assert clock.now_s - 100 == pytest.approx(20.0)
    assert delivery.stopped == ""
    assert "ok" in repr(delivery)


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError("disk"), Unavailable("gone"), asyncio.CancelledError()]
)
async def test_a_sink_that_raises_what_it_must_not_is_stopped_not_the_node(
    error: BaseException,
) -> None:
    """V4: also when a cancellation that nobody asked for gets out of it."""
    sink, clock = Table(), ManualClock()
    sink.faults = [error]  # type: ignore[list-item]
    assert await delivery_to(sink, clock).deliver(batch_of(1), ours=always) == []
    assert clock.now_s - 100 == pytest.approx(10.0)
    assert sink.values() == {"k:1": 1}


async def test_poison_without_a_write_is_fatal() -> None:
    """V4: there is nothing to halve, so it is tried again, not split for ever."""
    sink, clock = Table(), ManualClock()
    sink.faults = [PoisonSinkError("odd")]
    empty = SinkBatch(writes=(), progress=PROGRESS)
    assert await delivery_to(sink, clock).deliver(empty, ours=always) == []
    assert len(sink.batches) == 2
    assert clock.now_s - 100 == pytest.approx(10.0)


async def test_cancelling_a_delivery_cancels_the_sink_and_nothing_is_made_of_it() -> None:
    """A cancellation that was asked for passes at once."""
    sink = Table()
    sink.hang_at = 1
    delivery = delivery_to(sink, ManualClock())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: delivery.deliver(batch_of(1), ours=always))
        await sink.hanging.wait()
        tasks.cancel_scope.cancel()
    assert delivery.stopped == ""
    assert len(sink.batches) == 1


async def test_a_sink_is_opened_before_the_first_batch_and_tried_until_it_opens() -> None:
    """V1, V4: opening fails in the same ways as writing."""
    sink, opened = Table(), []

    async def open_late(namespace: str = "") -> None:
        opened.append(len(sink.batches))
        if len(opened) < 3:
            raise TransientSinkError("not yet")

    sink.open = open_late  # type: ignore[method-assign]
    delivery = delivery_to(sink, ManualClock())
    await delivery.deliver(batch_of(1), ours=always)
    await delivery.deliver(batch_of(2), ours=always)
    assert opened == [0, 0, 0]
    await delivery.aclose()
    assert sink.closed == 1


async def test_closing_never_raises_and_skips_what_was_never_open() -> None:
    """There is nobody who could do more about it."""
    sink = Table()
    delivery = delivery_to(sink, ManualClock())
    await delivery.aclose()
    assert sink.closed == 0
    await delivery.deliver(batch_of(1), ours=always)

    async def fail() -> None:
        sink.closed += 1
        raise OSError("already gone")

    sink.aclose = fail  # type: ignore[method-assign]
    await delivery.aclose()
    assert sink.closed == 1


async def test_a_locked_row_of_several_shards_is_given_back_at_once(table: Table) -> None:
    """V2: the holder of the batch splits it by shard, and does not wait."""
    clock = ManualClock()
    table.locked = {"k:2"}
    with pytest.raises(BusySinkError):
        await delivery_to(table, clock).deliver(batch_of(1, 2), ours=always)
    assert clock.slept == []
    assert len(table.batches) == 1


async def test_a_locked_row_is_named_and_waits_while_the_others_are_stored(table: Table) -> None:
    """V2: the batch is halved, the key logged with its table, and never handed back."""
    clock = ManualClock()
    delivery = delivery_to(table, clock)
    table.locked = {"k:5"}
    stored_by_then: list[int] = []
    seen: list[str] = []

    async def unlock_later(seconds: float) -> None:
        stored_by_then.append(len(table.rows))
        seen.extend(each.table for each in delivery.locked.values())
        if len(stored_by_then) == 200:
            table.locked.clear()
        await clock.sleep(seconds)

    delivery._sleep = unlock_later
    with capture_logs() as lines:
        assert await delivery.deliver(batch_of(*range(16)), ours=always, alone=True) == []
    assert set(stored_by_then) == {15}
    assert len(table.rows) == 16
    assert table.batches[-1].progress == PROGRESS
    assert set(seen) == {"table"}
    assert delivery.locked == {}
    named = [line for line in lines if line["event"] == "sink.row_locked"]
    assert (named[0]["table"], named[0]["key"], named[0]["shard"]) == ("table", "k:5", 3)
    assert [each["log_level"] for each in named].count("warning") == 1  # for less than a minute
    assert [each["event"] for each in lines if each["log_level"] == "info"] == ["sink.row_unlocked"]


async def test_a_row_that_was_locked_and_then_is_poison_has_all_its_attempts(table: Table) -> None:
    """V2: waiting for a lock does not count as an attempt."""
    delivery = delivery_to(table, ManualClock(), attempts_max=3)
    table.faults = [BusySinkError("locked")] * 9
    table.poison = {1}
    (refused,) = await delivery.deliver(batch_of(1), ours=always, alone=True)
    assert refused.problem == "will not take k:1"
    assert len([batch for batch in table.batches if batch.writes]) == 9 + 3


async def test_a_locked_row_is_given_up_when_the_work_is_not_ours_any_more(table: Table) -> None:
    """V1: soon, and health does not list it as waiting here any more."""
    clock = ManualClock()
    delivery = delivery_to(table, clock)
    table.locked = {"k:1"}
    with pytest.raises(Fenced):
        await delivery.deliver(batch_of(1), ours=lambda: clock.now_s < 103, alone=True)
    assert clock.now_s < 104
    assert delivery.locked == {}


async def test_a_day_without_the_database_is_a_line_a_minute(table: Table) -> None:
    """V1: start, attempt and error are available at any time; the log has them once a minute."""
    clock = ManualClock()
    delivery = delivery_to(table, clock, rng=random.Random(3))
    table.faults = [TransientSinkError("connection refused")] * 400
    shown: list[Outage] = []

    async def look(seconds: float) -> None:
        assert delivery.paused is not None
        shown.append(delivery.paused)
        await clock.sleep(seconds)

    delivery._sleep = look
    with capture_logs() as lines:
        await delivery.deliver(batch_of(1), ours=always)
    assert {(each.since, each.error) for each in shown} == {(100.0, "connection refused")}
    assert [each.attempt for each in shown] == sorted(each.attempt for each in shown)
    assert shown[-1].attempt == 400
    assert delivery.paused is None
    paused = [each for each in lines if each["log_level"] == "warning"]
    minutes = (clock.now_s - 100) / 60
    assert minutes - 2 <= len(paused) <= minutes + 1
    told = sum(each.get("left_out", 0) for each in paused) + len(paused)
    assert 350 < told <= 400
    (resumed,) = [each for each in lines if each["event"] == "sink.resumed"]
    assert resumed["after_s"] == pytest.approx(clock.now_s - 100, abs=0.1)

"""The node's clock and its idea of the server's: coordinator/clock.py and clock_sync.py."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from forebay.coordinator.clock import ServerClock, SystemClock
from forebay.coordinator.instruments import Instruments
from forebay.coordinator.log.clock_sync import JUMP_S, ClockSync
from forebay.coordinator.valkey.link import Arg, Reply
from forebay.schemas.errors import Disconnected
from support.clock import ManualClock
from support.links import link_to, running
from support.shard_logs import Between
from support.valkey_server import ValkeyServer

EPOCH_S = 1_700_000_000.0


def look(
    clock: ServerClock, at: float, *, out_s: float, back_s: float, ahead_s: float = EPOCH_S
) -> float:
    """A round trip: the server, ``ahead_s`` ahead of us, looked ``out_s`` after sending."""
    server_us = round((at + out_s + ahead_s) * 1e6)
    return clock.observe(server_us, sent_at=at, received_at=at + out_s + back_s)


class ToldTimes:
    """Commands whose TIME is what the test says: no real server's clock can be set."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.ahead_s = EPOCH_S
        self.takes_s = 0.002
        self.asked = 0
        self.away = False

    async def call(self, *args: Arg, timeout_ms: int | None = None) -> Reply:
        assert args == ("TIME",)
        self.asked += 1
        await anyio.sleep(0)
        if self.away:
            raise Disconnected("not now")
        self.clock.now_s += self.takes_s / 2
        seconds, rest = divmod(self.clock.now_s + self.ahead_s, 1.0)
        self.clock.now_s += self.takes_s / 2
        return [str(int(seconds)).encode(), str(int(rest * 1e6)).encode()]

    async def call_many(self, *args: object, **options: object) -> list[Reply]:
        raise AssertionError("only the time is asked for")


def test_our_clock_is_monotonic_and_in_seconds() -> None:
    """I1: it never goes back, and has nothing to do with the date."""
    clock = SystemClock()
    readings = [clock.monotonic() for _ in range(100)]
    assert readings == sorted(readings)


def test_nothing_is_known_before_the_first_look() -> None:
    """What was never looked at has no estimate; the first look is no jump."""
    ours = ManualClock(50.0)
    clock = ServerClock(ours)
    assert not clock.known
    assert look(clock, 50.0, out_s=0.001, back_s=0.001) == 0.0
    assert clock.known
    assert clock.now_ms() == int((50.0 + EPOCH_S) * 1000)


def test_the_estimate_is_taken_at_the_middle_of_the_round_trip() -> None:
    """I2: so it is wrong by half the round trip at most."""
    ours = ManualClock(10.0)
    clock = ServerClock(ours)
    look(clock, 10.0, out_s=0.0, back_s=0.2)
    assert clock.offset_s == pytest.approx(EPOCH_S - 0.1)


def test_the_fastest_look_of_late_counts() -> None:
    """I2: a slower one that agrees changes nothing; after a minute any is better than none."""
    clock = ServerClock(ManualClock())
    look(clock, 0.0, out_s=0.005, back_s=0.005)
    assert look(clock, 5.0, out_s=0.09, back_s=0.01) == 0.0
    assert clock.offset_s == pytest.approx(EPOCH_S)
    moved_s = look(clock, 10.0, out_s=0.001, back_s=0.003)
    assert moved_s == pytest.approx(-0.001, abs=1e-5)
    assert look(clock, 69.0, out_s=0.09, back_s=0.01) == 0.0
    assert look(clock, 71.0, out_s=0.09, back_s=0.01) == pytest.approx(0.041, abs=1e-5)


@pytest.mark.parametrize("by_s", [3_600.0, 0.5, -0.5, -3_600.0])
def test_a_clock_that_was_set_is_followed_at_once(by_s: float) -> None:
    """I3: the first look after it is enough, though it was slow, and says by how much."""
    clock = ServerClock(ManualClock())
    look(clock, 0.0, out_s=0.001, back_s=0.001)
    moved_s = look(clock, 5.0, out_s=0.1, back_s=0.1, ahead_s=EPOCH_S + by_s)
    assert moved_s == pytest.approx(by_s, abs=0.001)
    assert clock.offset_s == pytest.approx(EPOCH_S + by_s, abs=0.001)


@given(
    ahead_s=st.floats(-1e9, 2e9),
    trips=st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=20),
)
def test_the_estimate_is_right_to_half_the_fastest_round_trip(
    ahead_s: float, trips: list[tuple[float, float]]
) -> None:
    """I2: whatever delays the network has on the way there or back."""
    clock = ServerClock(ManualClock())
    for at, (out_s, back_s) in enumerate(trips):
        look(clock, float(at), out_s=out_s, back_s=back_s, ahead_s=ahead_s)
    fastest_s = min(out_s + back_s for out_s, back_s in trips)
    assert abs(clock.offset_s - ahead_s) <= fastest_s / 2 + 1e-5


@given(
    jumps=st.lists(
        st.tuples(st.floats(-1e5, 1e5), st.floats(0, 0.5), st.floats(0, 0.5)), max_size=20
    )
)
def test_after_any_look_the_estimate_agrees_with_it(
    jumps: list[tuple[float, float, float]],
) -> None:
    """I3: however often the server's clock is set."""
    clock, fastest_s = ServerClock(ManualClock()), 0.5
    for at, (ahead_s, out_s, back_s) in enumerate(jumps):
        look(clock, float(at), out_s=out_s, back_s=back_s, ahead_s=ahead_s)
        assert abs(clock.offset_s - ahead_s) <= out_s + back_s + fastest_s + 1e-5


async def test_it_follows_a_real_server(valkey_server: ValkeyServer) -> None:
    """I2: between two answers of the server, the estimate lies between what they say."""
    link = link_to(valkey_server.socket_url)
    ours = SystemClock()
    clock = ServerClock(ours)
    async with running(link), anyio.create_task_group() as tasks:
        between = Between(link)
        await tasks.start(ClockSync(between, clock, ours, Instruments(CollectorRegistry())).run)
        assert link.statistics().calls >= 3
        margin_ms = clock._round_trip_s * 500 + 1
        for _ in range(50):
            before, now_ms, after = await time_ms(link), clock.now_ms(), await time_ms(link)
            assert before - margin_ms <= now_ms <= after + margin_ms
        tasks.cancel_scope.cancel()


async def time_ms(link: object) -> float:
    seconds, micros = await link.call("TIME")  # type: ignore[attr-defined]
    return int(seconds) * 1_000 + int(micros) / 1_000


async def test_a_jump_of_the_server_s_clock_is_reported() -> None:
    """Lifetimes stamped before it are off; small corrections are nobody's business."""
    ours = ManualClock()
    told = ToldTimes(ours)
    clock = ServerClock(ours)
    instruments = Instruments(CollectorRegistry())
    sync = ClockSync(told, clock, ours, instruments)
    with capture_logs() as logs:
        await sync.look()
        told.ahead_s += JUMP_S / 2
        await sync.look()
        assert logs == []
        told.ahead_s -= 60.0
        await sync.look()
        await sync.look()
    assert instruments.counts["time_anomalies", "server_clock_jumped"] == 1
    assert [(each["event"], each["by_s"]) for each in logs] == [("clock.jumped", -60.0)]
    assert clock.offset_s == pytest.approx(EPOCH_S + JUMP_S / 2 - 60.0, abs=0.002)


async def test_a_server_that_is_away_costs_no_more_than_the_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The estimate stays what it was, and the looking goes on."""
    monkeypatch.setattr("forebay.coordinator.log.clock_sync._EVERY_S", 0.001)
    ours = ManualClock()
    told = ToldTimes(ours)
    clock = ServerClock(ours)
    async with anyio.create_task_group() as tasks:
        await tasks.start(ClockSync(told, clock, ours, Instruments(CollectorRegistry())).run)
        told.away, asked = True, told.asked
        with anyio.fail_after(10):
            while told.asked < asked + 3:
                await anyio.sleep(0.001)
        assert clock.offset_s == pytest.approx(EPOCH_S, abs=1e-5)
        told.away, told.ahead_s = False, EPOCH_S + 5
        with anyio.fail_after(10):
            while clock.offset_s < EPOCH_S + 4:
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()


async def test_it_does_not_start_without_an_estimate() -> None:
    """Who relies on the server's time at the start learns that there is none."""
    ours = ManualClock()
    told = ToldTimes(ours)
    told.away = True
    clock = ServerClock(ours)
    with pytest.raises(Disconnected):
        await ClockSync(told, clock, ours, Instruments(CollectorRegistry())).run()
    assert not clock.known

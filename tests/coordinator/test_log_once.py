"""A lasting failure is logged once a minute: F1-F5."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from forebay.coordinator.log_once import EVERY_S, Failing, LogOnce
from forebay.schemas.errors import BreakerOpen, Disconnected, ForebayError, ServerRefused, TimedOut
from support.clock import ManualClock

log = structlog.get_logger(__name__)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_000.0)


@pytest.fixture
def once(clock: ManualClock) -> LogOnce:
    return LogOnce(clock, connection=True)


def said(once: LogOnce, *errors: Exception, event: str = "x.failed", **fields: Any) -> list[Any]:
    with capture_logs() as lines:
        for error in errors:
            once.say(log, event, error, **fields)
    return lines


def test_first_failure_is_a_warning_and_the_same_again_is_not(once: LogOnce) -> None:
    """F1: the line has the error's text and the fields of its caller."""
    first, again = said(once, Disconnected("a"), Disconnected("b"), of="y")
    assert first == {
        "event": "x.failed",
        "error": "valkey is unavailable: a",
        "of": "y",
        "log_level": "warning",
    }
    assert again["log_level"] == "debug"


def test_five_minutes_of_failures_are_five_lines(once: LogOnce, clock: ManualClock) -> None:
    """F1: each but the first tells how many were left out, and none is left uncounted."""
    lines = []
    for _ in range(300):
        lines += said(once, TimedOut(1))
        clock.now_s += 1.0
    shown = [line for line in lines if line["log_level"] == "warning"]
    assert [line.get("left_out") for line in shown] == [None, 59, 59, 59, 59]
    assert clock.now_s - 1_000 == 5 * EVERY_S


def test_an_unreachable_server_is_one_kind_and_each_refusal_another(once: LogOnce) -> None:
    """F2: an outage alternates between no answer, no connection and an open breaker."""
    errors: list[ForebayError] = [
        Disconnected("gone"),
        TimedOut(5),
        Disconnected("gone"),
        ServerRefused("OOM", "full", "SET"),
        ServerRefused("MISCONF", "no disk", "SET"),
        ServerRefused("OOM", "still full", "SET"),
    ]
    levels = [line["log_level"] for line in said(once, *errors)]
    assert levels == ["warning", "debug", "debug", "warning", "warning", "debug"]
    assert said(once, TimedOut(5), event="y.failed")[0]["log_level"] == "warning"


def test_what_fails_after_it_worked_is_news(once: LogOnce) -> None:
    """F3: at once, without a count of the outage before."""
    said(once, Disconnected("a"), Disconnected("a"))
    assert once.failing == Failing(1_000.0, 2, "valkey is unavailable: a")
    once.over()
    assert once.failing is None
    [line] = said(once, Disconnected("a"))
    assert line["log_level"] == "warning"
    assert "left_out" not in line


def test_remembered_kinds_are_bounded(once: LogOnce) -> None:
    """F5: the oldest is forgotten first, so it is a warning again."""
    said(once, *(ServerRefused(f"E{n}", "x", "GET") for n in range(101)))
    newest, oldest = said(once, ServerRefused("E100", "x", "GET"), ServerRefused("E0", "x", "GET"))
    assert (newest["log_level"], oldest["log_level"]) == ("debug", "warning")


def test_the_level_is_the_callers(once: LogOnce) -> None:
    """F1: a sink that stopped is an error, not a warning."""
    assert said(once, TimedOut(1), level="error")[0]["log_level"] == "error"


def test_without_a_connection_only_the_connection_repeats(clock: ManualClock) -> None:
    """F4: an outage is one line a minute, and not one for each loop; silence is each loop's own."""
    once = LogOnce(clock)
    levels = []
    for error in (TimedOut(1), Disconnected("x"), BreakerOpen("primary", 5), TimedOut(1)):
        levels += [line["log_level"] for line in said(once, error)]
        clock.now_s += EVERY_S
    assert levels == ["warning", "debug", "debug", "warning"]

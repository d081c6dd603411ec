"""What repeats during an outage is told once."""

from __future__ import annotations

import structlog
from structlog.testing import capture_logs

from forebay.nodes.first_of_kind import FirstOfKind
from forebay.schemas.errors import Disconnected, TimedOut

log = structlog.get_logger(__name__)


def test_each_kind_is_a_warning_once_until_it_is_over() -> None:
    """F1: another kind, or the same after it worked again, is news."""
    first = FirstOfKind()
    with capture_logs() as lines:
        for error in (Disconnected("a"), Disconnected("b"), TimedOut(1), TimedOut(2)):
            first.say(log, "x.failed", error, of="y")
        first.over()
        first.say(log, "x.failed", TimedOut(3))
    levels = [line["log_level"] for line in lines]
    assert levels == ["warning", "debug", "warning", "debug", "warning"]
    assert lines[0] == {
        "event": "x.failed",
        "error": "valkey is unavailable: a",
        "of": "y",
        "log_level": "warning",
    }

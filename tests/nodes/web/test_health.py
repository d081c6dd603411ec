"""Probes, and the delay of the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

from forebay.nodes.web.health import BEAT_S, STALLED_S, WINDOW_S, Heartbeat
from forebay.nodes.web.protocols import Check, Gate, State
from support.clock import ManualClock

if TYPE_CHECKING:
    from tests.nodes.web.conftest import FakeNode

JSON = {"Accept": "application/json"}


def check(name: str, state: State, *gates: Gate, detail: str = "") -> Check:
    return Check(name=name, state=state, detail=detail, gates=frozenset(gates))


async def test_a_probe_that_passes_says_ok(client: aiohttp.ClientSession) -> None:
    """Without a fault each probe answers ``ok``, and forbids caching."""
    for path in ("/livez", "/readyz", "/startupz", "/healthz"):
        async with client.get(path) as response:
            assert (response.status, await response.text()) == (200, "ok\n")
            assert response.headers["Cache-Control"] == "no-store"


async def test_a_failing_check_fails_only_its_own_probes(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """H1, H2: a node without Valkey is alive, but not ready, and reports why."""
    fake_node.listed = [check("valkey", "fail", "ready", detail="no reply for 3 s")]

    answers = {}
    for path in ("/livez", "/startupz", "/readyz", "/healthz"):
        async with client.get(path) as response:
            answers[path] = (response.status, await response.text())

    assert answers["/livez"] == answers["/startupz"] == (200, "ok\n")
    assert answers["/readyz"] == (503, "[-]valkey failed: no reply for 3 s\n")
    assert answers["/healthz"][0] == 503


async def test_verbose_lists_every_check_of_the_probe(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """``?verbose`` names passed checks too, in the order of the node."""
    fake_node.listed = [
        check("valkey", "pass", "ready"),
        check("sink", "warn", "ready", detail="paused"),
        check("shards", "pass", "start"),
    ]
    async with client.get("/readyz?verbose") as response:
        assert await response.text() == "[+]valkey ok\n[!]sink warn: paused\n"
        assert response.status == 200


async def test_json_has_the_verdict_and_all_checks(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """H3: /healthz shows the breaker as a warning, not as a failure."""
    fake_node.listed = [check("breaker:link", "fail", detail="open, next try in 400 ms")]

    async with client.get("/healthz", headers=JSON) as response:
        body = await response.json()

    assert (response.status, body["status"]) == (200, "warn")
    assert body["checks"]["breaker:link"] == {
        "status": "fail",
        "detail": "open, next try in 400 ms",
    }
    assert body["checks"]["event_loop"]["status"] == "pass"


async def test_one_check_can_be_asked_for(
    client: aiohttp.ClientSession, fake_node: FakeNode
) -> None:
    """``/readyz/<check>`` has the status of that check, and 404 for an unknown check."""
    fake_node.listed = [check("valkey", "pass", "ready"), check("sink", "fail", "ready")]

    statuses = {}
    for name in ("valkey", "sink", "nothing"):
        async with client.get(f"/readyz/{name}") as response:
            statuses[name] = response.status

    assert statuses == {"valkey": 200, "sink": 503, "nothing": 404}


async def test_the_longest_delay_is_of_the_last_15_seconds() -> None:
    """H5: the maximum covers the window: more than the latest beat, and no older stall."""
    clock = ManualClock()
    heartbeat = Heartbeat(clock)
    with heartbeat.beating():
        for late_s in (0.1, 0.7, 0.2):
            clock.now_s += BEAT_S + late_s
            heartbeat._beat()
        assert heartbeat.lag_max_s() == pytest.approx(0.7)
        for _ in range(int(WINDOW_S / BEAT_S) + 1):
            clock.now_s += BEAT_S
            heartbeat._beat()
        assert heartbeat.lag_max_s() == 0


async def test_the_heartbeat_fails_when_it_is_long_overdue() -> None:
    """H5: the delay counts from when the next beat was due, and only a long one fails."""
    clock = ManualClock()
    heartbeat = Heartbeat(clock)
    with heartbeat.beating():
        assert (heartbeat.lag_max_s(), heartbeat.check().state) == (0.0, "pass")
        clock.now_s += BEAT_S + 0.5
        assert heartbeat.lag_max_s() == pytest.approx(0.5)
        assert heartbeat.check().state == "pass"
        clock.now_s += STALLED_S
        assert heartbeat.check().state == "fail"

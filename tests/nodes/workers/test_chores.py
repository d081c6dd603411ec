"""The leader's leader_metrics: the cluster's own figures, from one node at a time."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from forebay.nodes.workers import leader_metrics as chores_module
from forebay.nodes.workers.leader_metrics import LEADER, LeaderMetrics
from forebay.schemas.errors import Unavailable
from support.eventually import until
from support.workers import at_work, workshop, write


def leader_metrics(shop: Any, **options: Any) -> LeaderMetrics:
    parts = shop.parts
    limits = {"log_retain": 10_000, "round_s": 0.02} | options
    return LeaderMetrics(shop.link, shop.names, parts.locks, parts.server_clock, **limits)


def figures(made: LeaderMetrics) -> dict[tuple[str, ...], float]:
    return {(name, *labels): value for name, labels, value in made.gauges()}


async def test_one_node_leads_and_the_next_takes_over(valkey_server, namespace) -> None:
    """C2: of two, one gives figures; when it stops, the other does."""
    async with workshop(valkey_server, namespace) as shop:
        one, two = leader_metrics(shop), leader_metrics(shop)
        async with at_work(one):
            await until(lambda: one.leading)
            async with at_work(two):
                await anyio.wait_all_tasks_blocked()
                assert not two.leading
                assert figures(two) == {}
        assert figures(one) == {}
        async with at_work(two):
            await until(lambda: two.leading)
            assert ("dead_letter_entries",) in figures(two)


async def test_what_waits_is_counted_over_all_shards(valkey_server, namespace) -> None:
    """Also how long the oldest has waited; what is done does not wait."""
    async with workshop(valkey_server, namespace) as shop:
        made = leader_metrics(shop)
        await made.round()
        assert {name: value for name, value in figures(made).items() if value} == {}
        ids = await shop.publish(write("flight:1", 1), write("flight:2", 2))
        for shard in range(shop.names.shards):
            await shop.link.call("XADD", shop.names.part(shard, "writes"), "1-1", "j", "x")
        await shop.link.call("XADD", shop.names.part(0, "dead"), "*", "reason", "x")
        await made.round()
        found = figures(made)
        assert found["stream_lag_events", "events"] == 2
        assert found["stream_lag_events", "writes"] == shop.names.shards
        assert found["stream_oldest_undelivered_age_seconds", "writes"] > 1_000_000
        assert found["dead_letter_entries",] == 1
        done = shop.names.part(-1, "done")
        await shop.link.call("HSET", done, "events", ids[-1])
        await made.round()
        assert figures(made)["stream_lag_events", "events"] == 0


async def test_a_leader_that_is_released_stops_and_another_begins(valkey_server, namespace) -> None:
    """C2: whoever lost the lock gives no figures, until it leads again."""
    async with workshop(valkey_server, namespace) as shop:
        made = leader_metrics(shop, round_s=0.2)
        async with at_work(made):
            await until(lambda: made.leading)
            await shop.parts.locks.force_release(LEADER)
            await until(lambda: not made.leading)
            await until(lambda: made.leading)


async def test_a_round_that_fails_is_tried_again(valkey_server, namespace, monkeypatch) -> None:
    """C3: the node goes on leading, with what it found before."""
    async with workshop(valkey_server, namespace) as shop:
        made = leader_metrics(shop)
        failures = [Unavailable("away")] * 3
        ask = made._asked

        async def asked(commands: Any) -> Any:
            if failures:
                raise failures.pop()
            return await ask(commands)

        monkeypatch.setattr(made, "_asked", asked)
        async with at_work(made):
            await until(lambda: made.leading)
        assert failures == []


async def test_a_log_that_nobody_trims_is_told(
    valkey_server, namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trimming is its owner's; that it does not happen is everybody's business."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        chores_module.log,
        "warning",
        lambda event, **fields: told.append({"event": event, **fields}),
    )
    async with workshop(valkey_server, namespace) as shop:
        made = leader_metrics(shop, log_retain=1)
        await made.round()
        assert told == []
        for _ in range(6):
            await shop.node.invalidate(["flight:1"])
        await made.round()
    assert [(each["event"], each["shard"]) for each in told] == [
        ("log.overgrown", shop.names.shard("flight:1"))
    ]

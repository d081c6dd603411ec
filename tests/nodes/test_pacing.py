"""A rate that several nodes share."""

from __future__ import annotations

import anyio

from forebay.nodes.pacing import Pacing


async def test_two_nodes_share_a_pace(make_node) -> None:
    """Operations of one node count for the other; another name is another rate."""
    one, two = make_node(), make_node()
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await anyio.sleep(seconds)

    async with one, two:
        paces = [Pacing(each._parts.limiter, sleep=sleep) for each in (one, two)]
        await paces[0].turn("warm.rows", 2, per_second=5, burst=2)
        assert waited == []
        await paces[1].turn("warm.pages", 2, per_second=5, burst=2)
        assert waited == []
        await paces[1].turn("warm.rows", 2, per_second=5, burst=2)
        assert sum(waited) > 0


async def test_any_cache_may_be_paced(make_node) -> None:
    """Names of caches are longer than those of limits may be; no two of them share a pace."""
    async with make_node() as node:
        pacing = Pacing(node._parts.limiter)
        with anyio.fail_after(5):
            for name in ("warm." + "c" * 100 + "1", "warm." + "c" * 100 + "2", "warm.Größe x"):
                await pacing.turn(name, 2, per_second=0.001, burst=2)
        assert len(node._parts.limiter.limits) == 3 + 1  # and the default one

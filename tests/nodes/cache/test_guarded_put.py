"""A put under a lock: a holder that lost the lock cannot replace the value of the next holder."""

from __future__ import annotations

import pytest

from forebay.schemas.errors_locks import LeaseLost, StaleToken


async def test_a_put_after_a_lost_lock_is_refused(make_node, source) -> None:
    """entry_put I4: the value of the next holder stays on all nodes."""
    one, two = make_node(), make_node()
    for each in (one, two):

        @each.cached("row:{id}", ttl=600)
        async def row(id: int) -> str:
            return str(await source.get(id))

        each.row = row
    async with one, two:
        async with one.lock("row:1", on_loss="event") as former:
            old = former.token
            await one.row.put(1, "first", token=former)
            await two.locks.force_release("row:1")
            async with two.lock("row:1") as lease:
                assert lease.token > old
                await two.row.put(1, "second", token=lease)
                with pytest.raises(StaleToken) as refused:
                    await one.row.put(1, "late", token=old)
        assert (refused.value.token, refused.value.highest) == (old, lease.token)
        assert await one.row(1) == await two.row(1) == "second"
        with pytest.raises(LeaseLost):
            await two.row.put(1, "after the block", token=lease)
        assert await one.row(1) == "second"

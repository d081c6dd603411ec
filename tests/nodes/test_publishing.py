"""An object given to ``node.publish`` becomes JSON as it is, or is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

import forebay


@pytest.mark.parametrize("value", [math.nan, {"price": [1.0, -math.inf]}, {(1, 2): 3}])
async def test_an_event_that_json_cannot_express_is_not_published(
    make_node: Callable[..., forebay.Node], value: object
) -> None:
    """A NaN would become a null, and a null in a write event deletes."""
    async with make_node() as node:
        good = {"type": "write", "key": "price:1", "value": 1.0}
        with pytest.raises(forebay.InvalidEvent, match=r"events\[1\]"):
            await node.publish([good, {**good, "value": value}])
        assert await node.parts.backend.link.call("XLEN", node.parts.names.events) == 0

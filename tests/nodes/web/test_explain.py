"""GET /v1/explain/{key}, over a fake node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest
from yarl import URL

from forebay.schemas.errors import Backpressure, Disconnected

if TYPE_CHECKING:
    from tests.nodes.web.conftest import FakeNode


async def test_document_is_json_unless_words_are_asked_for(client: aiohttp.ClientSession) -> None:
    """The answer is JSON by default, and text on request."""
    async with client.get("/v1/explain/product:1") as response:
        assert response.content_type == "application/json"
        document = await response.json()
    assert (document["key"], document["entry"]["state"]) == ("product:1", "absent")

    asked = [("?words", {}), ("", {"Accept": "text/plain"})]
    for query, headers in asked:
        async with client.get(f"/v1/explain/product:1{query}", headers=headers) as response:
            assert response.content_type == "text/plain"
            assert (await response.text()).startswith("product:1 would be loaded\n\nentry ")


@pytest.mark.parametrize(
    ("failure", "path", "status", "code"),
    [
        (None, "a%20b", 400, "invalid_key"),
        (None, "%ff", 400, "invalid_key"),
        (Backpressure("explain", 4, 4), "a", 429, "backpressure"),
        (Disconnected("hunter2"), "a", 503, "unavailable"),
    ],
)
async def test_what_cannot_be_explained_is_refused(
    client: aiohttp.ClientSession,
    fake_node: FakeNode,
    failure: Exception | None,
    path: str,
    status: int,
    code: str,
) -> None:
    """Each error has its status and its stable code."""
    fake_node.failure = failure
    async with client.get(URL(f"/v1/explain/{path}", encoded=True)) as response:
        body = await response.text()

    assert response.status == status
    assert f'"code":"{code}"' in body
    assert "hunter2" not in body

"""The token of http.token_file while the node runs: nodes/web/access.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forebay.nodes.web.access import LOOK_S, BearerToken
from support.clock import ManualClock

FIRST, SECOND = "first-token-of-them", "second-token-of-them"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "token"
    made.write_text(f"{FIRST}\n")
    return made


def replace(path: Path, text: str) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.rename(path)


def accepts(bearer: BearerToken, token: str) -> bool:
    return bearer.accepts([f"Bearer {token}"])


def test_a_replaced_file_counts_soon(path: Path, clock: ManualClock) -> None:
    """B3: after LOOK_S the old token is refused."""
    bearer = BearerToken(path, clock)
    replace(path, SECOND)
    assert accepts(bearer, FIRST)
    clock.now_s += LOOK_S
    assert accepts(bearer, SECOND)
    assert not accepts(bearer, FIRST)


@pytest.mark.parametrize("spoilt", ["", "short", "two tokens in a line", "a" * 5_000, None])
def test_a_file_that_is_spoilt_leaves_the_token(
    path: Path, clock: ManualClock, spoilt: str | None
) -> None:
    """B3: an invalid file neither admits a client nor locks one out."""
    bearer = BearerToken(path, clock)
    if spoilt is None:
        os.remove(path)
    else:
        replace(path, spoilt)
    clock.now_s += LOOK_S
    assert accepts(bearer, FIRST)
    assert not accepts(bearer, "")
    assert not accepts(bearer, spoilt or "")
    replace(path, SECOND)
    clock.now_s += LOOK_S
    assert accepts(bearer, SECOND)


def test_only_one_header_with_the_token_is_accepted(path: Path, clock: ManualClock) -> None:
    """The scheme is case-insensitive; further text or a second header is refused."""
    bearer = BearerToken(path, clock)
    assert bearer.accepts([f"bEARER {FIRST}"])
    for headers in (
        [],
        [""],
        [FIRST],
        [f"Basic {FIRST}"],
        [f"Bearer {FIRST} x"],
        [f"Bearer {FIRST}", f"Bearer {FIRST}"],
        ["Bearer \udcff"],
    ):
        assert not bearer.accepts(headers)
    assert FIRST not in repr(bearer)

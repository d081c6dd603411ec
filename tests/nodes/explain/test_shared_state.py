"""What a reader would make of stored bytes, tags and leases."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.nodes.cache.policy import Load, Serve, ServeStale, decide
from forebay.nodes.cache.tags import Standing
from forebay.nodes.explain.document import TAGS_SHOWN_MAX, LeaseState
from forebay.nodes.explain.shared_state import (
    entry_state,
    lease_state,
    notice_line,
    read_stored,
    tag_state,
)
from forebay.schemas.entry import MAGIC, Entry, EntryMeta, make_tail
from forebay.schemas.errors import ServerRefused
from forebay.schemas.notices import Bumped, Changed, Dropped, Extended, write_notice

NOW_MS = 1_000_000


def entry(**changed: object) -> Entry:
    fields = {
        "version": 5_000,
        "soft_at_ms": NOW_MS + 10,
        "hard_at_ms": NOW_MS + 20,
        "kind": "v",
        "codec": "m",
        "payload": b"\x01",
        "meta": EntryMeta(),
    }
    return Entry(**{**fields, **changed})


@pytest.mark.parametrize(
    "soft_ms,hard_ms,error_ms,pending,doomed,tag",
    list(
        product(
            (-1, 0, 1), (-1, 0, 1), (0, 1), (0, 7), (False, True), ("fresh", "stale", "invalid")
        )
    ),
)
def test_verdict_is_that_of_the_read_path(
    soft_ms: int, hard_ms: int, error_ms: int, pending: int, doomed: bool, tag: Standing
) -> None:
    """J1: whatever ``decide`` does with an entry, the words say the same."""
    found = entry(
        soft_at_ms=NOW_MS + soft_ms,
        hard_at_ms=NOW_MS + hard_ms,
        pending=pending,
        doomed=doomed,
        meta=EntryMeta(error_ms=error_ms),
    )
    tags = [tag_state("t", 5, {"fresh": b"5", "stale": b"6 5", "invalid": b"6"}[tag])]
    told = entry_state(found, size=1, now_ms=NOW_MS, kept_ms=-1, tags=tags).state
    kind = {
        "fresh": Serve,
        "stale": ServeStale,
        "doomed": Load,
        "outdated": Load,
        "expired": Load,
        "kept": Load,
    }[told]

    decision = decide(found, now_ms=NOW_MS, tags=tag)
    assert isinstance(decision, kind)
    assert (told == "kept") is (isinstance(decision, Load) and decision.fallback is not None)


@pytest.mark.parametrize(
    "value,state",
    [
        (b"5", "holds"),
        (b"4", "holds"),
        (b"6", "invalid"),
        (b"6 5", "stale"),
        (b"5 5", "holds"),
        (b"7 6", "invalid"),
        (None, "lost"),
        (b"x", "lost"),
        (b"", "lost"),
        (b"1 2 3", "lost"),
        (ServerRefused("WRONGTYPE", "a list"), "lost"),
    ],
)
def test_both_forms_of_a_tags_value_are_read(value: object, state: str) -> None:
    """J2: below the hard version it is invalid, below the version stale; without one, lost."""
    assert tag_state("t", 5, value).state == state


def test_tags_are_bounded_and_the_worst_come_first() -> None:
    """X2: of very many tags, those are told that matter."""
    tags = [tag_state(f"t{n}", 5, b"5") for n in range(TAGS_SHOWN_MAX + 5)]
    told = entry_state(
        entry(), size=1, now_ms=NOW_MS, kept_ms=9, tags=[*tags, tag_state("bad", 5, b"6")]
    )

    assert (len(told.tags), told.tags_omitted) == (TAGS_SHOWN_MAX, 6)
    assert told.tags[0].tag == "bad"


@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_a_reason(raw: bytes) -> None:
    """Nothing that somebody stores makes the command fail."""
    assert isinstance(read_stored(raw, 100), Entry | str)


def test_reasons_name_what_is_wrong() -> None:
    """Damage inside a compressed value is found, too; the server's own refusals are passed on."""
    tail = make_tail(b"no zlib", kind="v", codec="z", meta=EntryMeta())
    damaged = MAGIC + b"c" + b"0" * 58 + tail

    assert read_stored(None, 100) is None
    assert read_stored(damaged, 100) == "bad_value: zlib"
    assert "WRONGTYPE" in str(read_stored(ServerRefused("WRONGTYPE", "a list"), 100))


def test_lease_of_each_kind() -> None:
    """A token, the mark of a source that fails, or nothing; odd tokens are made printable."""
    assert lease_state(None, -2) == LeaseState()
    assert lease_state(b"!", 700) == LeaseState(state="failing", left_ms=700)
    assert lease_state(b"ab12", 700) == LeaseState(state="held", left_ms=700, token="ab12")
    assert lease_state(b"\x1b[2J" * 99, 1).token.isprintable()


@pytest.mark.parametrize(
    "notice,kind,about",
    [
        (Changed("a", "n1"), "changed", ("a",)),
        (Dropped(("x", "a", "y"), soft=True), "dropped", ("a",)),
        (Extended("a", 1, 2, 3), "extended", ("a",)),
        (Bumped(("x", "t2", "t1")), "bumped", ("t2", "t1")),
        (Changed("b"), None, ()),
        (Changed("t1"), None, ()),
        (Changed("t1", outdates=True), "changed", ("t1",)),
        (Bumped(("a",)), None, ()),
        (Dropped(("b", "t1")), "dropped", ("t1",)),
        (Extended("t1", 1, 2, 3), None, ()),
    ],
)
def test_notices_that_concern_the_key_or_its_tags(
    notice: object, kind: str | None, about: tuple[str, ...]
) -> None:
    """A change of a key outdates the tag named after it; a bump leaves the key of that name."""
    fields = {b"v": b"999000000", b"n": write_notice(notice)}
    line = notice_line(3, b"7-2", fields, key="a", tags=["t1", "t2"], now_ms=NOW_MS)

    assert (line and line.kind) == kind
    if line:
        assert (line.shard, line.id, line.about, line.age_ms) == (3, "7-2", about, 1_000)


@pytest.mark.parametrize(
    "fields", [{}, {b"v": b"1", b"n": b"junk"}, {b"v": b"x", b"n": write_notice(Changed("a"))}]
)
def test_log_entry_that_says_nothing(fields: dict[bytes, bytes]) -> None:
    """What others appended, or a newer version, is passed over."""
    assert notice_line(0, b"1-1", fields, key="a", tags=[], now_ms=NOW_MS) is None

"""The document in words."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from forebay.nodes.explain.document import (
    EntryState,
    Explanation,
    LeaseState,
    LogState,
    NearState,
    NodesState,
    NoticeLine,
    TagState,
)
from forebay.nodes.explain.renderer import span, verdict, words

FRESH = EntryState(
    state="fresh",
    version=17_000_000,
    age_ms=3_200,
    fresh_ms=56_800,
    left_ms=356_800,
    kept_ms=356_800,
    size=139,
    codec="msgpack",
    tags=(TagState(tag="catalog", embedded=9, version=9, hard_version=9, state="holds"),),
)
ABSENT = EntryState()
OUTDATED = structs.replace(
    FRESH,
    state="outdated",
    tags=(TagState(tag="catalog", embedded=9, version=12, hard_version=12, state="invalid"),),
)


def near(node: str, state: str = "absent", **more: Any) -> NearState:
    about = {"cache": "product", "template": "product:{id}", "ttl_ms": 60_000}
    return NearState(node=node, state=state, **{**about, **more})


def document(entry: EntryState = FRESH, *nodes: NearState, **more: Any) -> Explanation:
    return Explanation(
        **{
            "key": "product:42",
            "namespace": "shop",
            "shard": 9,
            "shards": 64,
            "cache_version": "0",
            "server": "valkey 9.1.2",
            "entry": entry,
            "lease": LeaseState(),
            "log": LogState(),
            "nodes": NodesState(answers=nodes),
            **more,
        }
    )


@pytest.mark.parametrize(
    "found,said",
    [
        (
            document(FRESH, near("a")),
            "would be served fresh from the shared tier; node a has no near copy",
        ),
        (
            document(FRESH, near("a", "fresh"), near("b", "fresh")),
            "would be served fresh from the near cache of nodes a, b",
        ),
        (
            document(FRESH, near("a", "fresh"), near("b")),
            "would be served fresh from the shared tier; node a would serve from the near cache",
        ),
        (
            document(OUTDATED, near("a", "behind", tag="catalog")),
            (
                "would be loaded: tag catalog outdates the entry in the shared tier; "
                "node a has no near copy that may be served"
            ),
        ),
        (
            document(ABSENT, lease=LeaseState(state="held", left_ms=9)),
            "would be loaded: the shared tier has no entry; a load is under way; no node runs",
        ),
        (
            document(ABSENT, nodes=NodesState(silent=2)),
            "would be loaded: the shared tier has no entry; no node answered",
        ),
        (
            document(structs.replace(FRESH, negative=True), near("a", "no_cache")),
            (
                "would be served as a known absence from the shared tier; "
                "no node that runs declares a cache for it"
            ),
        ),
        (
            document(FRESH, *(near(each) for each in "abcde")),
            (
                "would be served fresh from the shared tier; "
                "nodes a, b, c and 2 more have no near copy"
            ),
        ),
    ],
)
def test_verdict_says_what_a_reader_would_get(found: Explanation, said: str) -> None:
    """One sentence, which names the tier and the nodes that differ."""
    assert verdict(found) == f"product:42 {said}"


def test_words_tell_each_thing_once_and_aligned() -> None:
    """The verdict comes first; names stand in a column of their own."""
    notice = NoticeLine(
        shard=9,
        id="7-1",
        version=17,
        age_ms=3_200,
        kind="changed",
        about=("product:42",),
        origin="a",
    )
    told = words(
        document(OUTDATED, near("a", sink="sql"), log=LogState(notices=(notice,), looked_at=4))
    )

    assert told == [
        (
            "product:42 would be loaded: tag catalog outdates the entry in the shared tier; "
            "node a has no near copy"
        ),
        "",
        "entry   outdated, 3.2 s old, version 17000000; 139 bytes, msgpack",
        "        fresh for 56.8 s, served for 5 min at most, kept by the server for 5 min",
        "tags    catalog outdates the entry: captured at 9, 12 now",
        "lease   free: nobody loads",
        "log     3.2 s ago changed product:42 by a (shard 9, 7-1)",
        "        found among all 4 entries",
        "cache   product product:{id}, ttl 60.0 s; sink sql",
        "node a  no near copy",
        "place   shard 9 of 64 in shop, cache version 0; valkey 9.1.2",
    ]


@pytest.mark.parametrize(
    "found,said",
    [
        (
            document(structs.replace(FRESH, pending=8, doomed=True)),
            "waits for the sink, then dropped",
        ),
        (document(structs.replace(FRESH, soft_dropped=True)), "made stale by an invalidation"),
        (document(structs.replace(FRESH, fresh_ms=-50)), "stale since 50 ms ago"),
        (document(structs.replace(FRESH, fresh_ms=None, left_ms=None)), "fresh for ever"),
        (document(EntryState(state="unreadable", why="bad_magic", size=9)), "bad_magic; 9 bytes"),
        (document(lease=LeaseState(state="failing", left_ms=500)), "left alone for 500 ms more"),
        (
            document(ABSENT, near("a", loading=True), lease=LeaseState(state="held", token="ab")),
            "held for 0 ms more, probably by node a; token ab",
        ),
        (document(ABSENT, near("a", reserved=2)), "a read, a write or a refresh is under way"),
        (
            document(FRESH, near("a", breaker="open", on_disconnected="stale")),
            "the breaker is open: its policy is stale",
        ),
        (
            document(FRESH, near("a", connected=False, on_disconnected="fail")),
            "it is not connected: its policy is fail",
        ),
        (document(FRESH, near("a", cache_version="3")), "cache version 3, not 0"),
        (document(FRESH, near("a", "reset", version=7, size=80)), "before its shard was reset"),
        (document(FRESH, near("a", "not_current")), "not known to be current"),
        (document(FRESH, near("a", "past", left_ms=-2_000)), "past since 2.0 s"),
        (document(nodes=NodesState(unasked="refused")), "could not be asked: refused"),
        (document(nodes=NodesState(silent=3)), "3 did not answer in time"),
    ],
)
def test_each_state_has_its_words(found: Explanation, said: str) -> None:
    """Whatever is the matter is named on a line."""
    assert any(said in line for line in words(found)), "\n".join(words(found))


def test_what_others_wrote_cannot_steer_the_terminal() -> None:
    """Control characters in a tag or a node's name are written out."""
    evil = TagState(tag="\x1b[2J", embedded=1, version=1, hard_version=1, state="holds")
    told = words(document(structs.replace(FRESH, tags=(evil,)), near("a\nb")))

    assert all(line.isprintable() for line in told)


@pytest.mark.parametrize(
    "ms,said",
    [(0, "0 ms"), (999, "999 ms"), (1_000, "1.0 s"), (119_900, "119.9 s"), (120_000, "2 min")],
)
def test_durations_are_said_in_a_fitting_unit(ms: int, said: str) -> None:
    """Short ones exactly, long ones roughly."""
    assert span(ms) == said
    assert (span(7_200_000), span(172_800_000)) == ("2 h", "2 days")

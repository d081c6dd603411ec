"""What a loader may ask and say of its load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import forebay
from forebay.nodes.cache.loading import NOT_MODIFIED, Loading, loading, under_way
from forebay.schemas.entry import Entry, EntryMeta
from forebay.schemas.errors import (
    ConfigError,
    ForebayError,
    InvalidEntry,
    InvalidKey,
    LoaderError,
)


def entry(kind: Any = "v", **meta: Any) -> Entry:
    return Entry(
        version=7,
        soft_at_ms=1,
        hard_at_ms=2,
        kind=kind,
        codec="m",
        payload=b"\x05",
        meta=EntryMeta(**meta),
    )


def load_of(previous: Entry | None = None) -> Loading:
    return Loading("page", "page:1", previous, value_of)


def value_of(entry: Entry) -> int | None:
    return None if entry.negative else entry.payload[0]


def test_it_knows_what_is_stored() -> None:
    """The value and its etag, whatever may be wrong with them; nothing where there is none."""
    load = load_of(entry(etag="e1"))
    assert (load.cache, load.key, load.previous, load.etag) == ("page", "page:1", 5, "e1")
    load = load_of()
    assert (load.previous, load.etag) == (None, "")
    assert repr(load) == "<Loading page page:1>"


def test_what_cannot_be_read_is_no_previous_value() -> None:
    """As anywhere: it is a miss."""

    def unreadable(entry: Entry) -> Any:
        raise InvalidEntry("bad_value")

    assert Loading("page", "page:1", entry(), unreadable).previous is None


def test_lifetimes_are_seconds_and_only_those_that_are_given_count() -> None:
    """A1: and nothing that was said is taken back by what is said later of something else."""
    load = load_of()
    assert (load.ttl_ms, load.stale_ms, load.stored, load.new_etag) == (None, None, True, None)
    load.keep(ttl=1.5, etag="e2")
    assert (load.ttl_ms, load.stale_ms, load.stored, load.new_etag) == (1_500, None, True, "e2")
    load.keep(stale_for=0, store=False)
    assert (load.ttl_ms, load.stale_ms, load.stored, load.new_etag) == (1_500, 0, False, "e2")
    load.keep(ttl=0.5)
    assert (load.ttl_ms, load.stored, load.new_etag) == (500, False, "e2")


@pytest.mark.parametrize("etag", [5, b"e1", ["e1"]])
def test_an_etag_is_a_string(etag: Any) -> None:
    """It would be stored, and make the entry one that no node can read."""
    load = load_of()
    with pytest.raises(LoaderError, match="etag"):
        load.keep(etag=etag)
    assert load.new_etag is None


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        *[("ttl", each) for each in (0, -1, 1e-9, 1e12, float("nan"), "60", True)],
        *[("stale_for", each) for each in (-1, 1e12, float("nan"), "60", True)],
    ],
)
def test_lifetimes_are_checked_like_those_of_a_declaration(name: str, seconds: Any) -> None:
    """A1: what cannot be meant changes nothing."""
    load = load_of()
    with pytest.raises(ConfigError, match=name):
        load.keep(**{name: seconds, "store": False})
    assert (load.ttl_ms, load.stale_ms, load.stored) == (None, None, True)


def test_tags_and_dependencies_are_kept_in_order() -> None:
    """Of as many calls as the loader makes."""
    load = load_of()
    load.tag("a", "b")
    load.depends_on("k:1")
    load.tag("c")
    load.tag()
    assert (load.tags, load.dependencies) == (["a", "b", "c"], ["k:1"])


@pytest.mark.parametrize("bad", ["", "a b", "x" * 2_000, "a\n"])
def test_what_cannot_be_a_tag_or_key_is_refused(bad: str) -> None:
    """It says which of the two it was to be; nothing of the call is taken."""
    load = load_of()
    with pytest.raises(InvalidKey, match=r"^tag "):
        load.tag("good", bad)
    with pytest.raises(InvalidKey, match=r"^key "):
        load.depends_on("good", bad)
    assert (load.tags, load.dependencies) == ([], [])


def test_tags_and_dependencies_are_a_hundred_at_most() -> None:
    """Both together: each costs a look at the server, and room in the entry."""
    load = load_of()
    load.tag(*[f"t{n}" for n in range(60)])
    load.depends_on(*[f"k{n}" for n in range(40)])
    with pytest.raises(LoaderError, match="over 100"):
        load.tag("one more")
    with pytest.raises(LoaderError, match="over 100"):
        load.depends_on("one more")
    assert (len(load.tags), len(load.dependencies)) == (60, 40)


def test_what_was_not_modified_lives_on_as_it_is() -> None:
    """A3: with the etag and the tags that it has, unless others are named."""
    load = load_of(entry(etag="e1", tags={"a": 5, "b": 6}))
    assert load.not_modified() is NOT_MODIFIED
    assert repr(NOT_MODIFIED) == "NOT_MODIFIED"
    assert (load.new_etag, load.kept) == ("e1", ["a", "b"])
    load = load_of(entry(etag="e1"))
    load.keep(etag="e2")
    load.not_modified()
    assert load.new_etag == "e2"


def test_an_etag_is_not_that_of_another_value() -> None:
    """A3: a loader that returns a new one and names none has none."""
    assert load_of(entry(etag="e1")).new_etag is None


@pytest.mark.parametrize("previous", [None, entry("n")])
def test_where_nothing_is_stored_nothing_is_unmodified(previous: Entry | None) -> None:
    """A3: a known absence is no value either."""
    with pytest.raises(LoaderError, match="there is nothing"):
        load_of(previous).not_modified()


def test_it_is_there_while_a_loader_runs() -> None:
    """And of the innermost one."""
    outer, inner = load_of(), load_of()
    with pytest.raises(ForebayError, match="for loaders of one key"):
        loading()
    with under_way(outer):
        assert loading() is outer
        with under_way(inner):
            assert loading() is inner
        with under_way(None), pytest.raises(ForebayError):
            loading()
        assert loading() is outer
    with pytest.raises(ForebayError):
        forebay.loading()


async def test_each_task_has_its_own() -> None:
    """Two loaders that take turns do not speak of each other's load."""

    async def load(own: Loading) -> bool:
        with under_way(own):
            for _ in range(5):
                await asyncio.sleep(0)
                assert loading() is own
        return True

    assert await asyncio.gather(*[load(load_of()) for _ in range(3)]) == [True] * 3

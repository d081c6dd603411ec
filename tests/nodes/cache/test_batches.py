"""One call for many keys: who shares one, and whatever may become of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
import pytest

from forebay.coordinator.background import BackgroundTasks, background_tasks
from forebay.nodes.cache.batches import Batches
from forebay.nodes.cache.loading import Loading, loading, under_way
from forebay.nodes.request_scope import current, request_scope
from forebay.schemas.errors import ForebayError, LoaderError, TimedOut, Unavailable


class Source:
    """A batch loader that writes down what it is asked, and answers when it is let."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.missing: set[Any] = set()
        self.answers: dict[Any, Any] = {}
        self.result: Any = None  #: instead of the mapping
        self.gate = anyio.Event()
        self.gate.set()

    async def load(self, items: list[Any]) -> Mapping[Any, Any]:
        self.calls.append(items)
        gate, result = self.gate, self.result
        await gate.wait()
        if isinstance(result, BaseException):
            raise result
        if result is not None:
            found: Mapping[Any, Any] = result
            return found
        return {
            item: self.answers.get(item, f"value of {item}")
            for item in items
            if item not in self.missing
        }


@pytest.fixture
async def tasks() -> AsyncIterator[BackgroundTasks]:
    async with background_tasks() as group:
        yield group


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def batches(source: Source, tasks: BackgroundTasks) -> Batches:
    return batches_of(source, tasks)


def batches_of(source: Source, tasks: BackgroundTasks, **options: Any) -> Batches:
    return Batches("product", source.load, tasks, **{"limit_s": 20.0, **options})


async def together(*loads: Any) -> list[Any]:
    with anyio.fail_after(20):
        return await asyncio.gather(*loads, return_exceptions=True)


async def settled() -> None:
    for _ in range(5):  # what the loop is to call is no task yet
        await asyncio.sleep(0)
    await anyio.wait_all_tasks_blocked()


async def test_loads_of_one_tick_share_a_call(batches: Batches, source: Source) -> None:
    """G1: and those of the next tick share the next."""
    for _ in range(2):
        assert await together(*[batches.load(n) for n in range(3)]) == [
            f"value of {n}" for n in range(3)
        ]
    assert source.calls == [[0, 1, 2]] * 2


async def test_loads_of_a_group_share_a_call_however_late_they_are(
    batches: Batches, source: Source
) -> None:
    """G1: the last one sends them all; loads of no group do not wait for it."""
    group = batches.group(3)
    members = [group.member() for _ in range(3)]
    assert repr(group) == "<Group of 0, 3 outstanding>"
    first = [asyncio.ensure_future(batches.load(n, members[n])) for n in range(2)]
    await settled()
    assert source.calls == []
    assert await together(batches.load("single")) == ["value of single"]
    assert await together(*first, batches.load(2, members[2])) == [
        "value of 0", "value of 1", "value of 2",
    ]  # fmt: skip
    assert source.calls == [["single"], [0, 1, 2]]


async def test_who_leaves_a_group_holds_up_nobody(batches: Batches, source: Source) -> None:
    """G1: whoever has to wait elsewhere, or found what it wanted; also the last one."""
    group = batches.group(3)
    early, asking, late = (group.member() for _ in range(3))
    early.leave()
    early.leave()
    load = asyncio.ensure_future(batches.load("a", asking))
    await settled()
    assert source.calls == []
    late.leave()
    asking.leave()
    assert await together(load) == ["value of a"]
    assert source.calls == [["a"]]


async def test_a_group_that_all_have_left_makes_no_call(batches: Batches, source: Source) -> None:
    """G1: there is nothing to ask for."""
    group = batches.group(2)
    for _ in range(2):
        group.member().leave()
    await settled()
    assert source.calls == []


async def test_who_has_left_is_loaded_with_those_of_its_tick(
    batches: Batches, source: Source
) -> None:
    """G1: it got its lease in the end; a member that has asked before is one of those, too."""
    group = batches.group(3)
    one, two, three = (group.member() for _ in range(3))
    one.leave()
    two.leave()
    got = await together(batches.load("a", one), batches.load("b", two), batches.load("c", three))
    assert got == ["value of a", "value of b", "value of c"]
    assert sorted(source.calls) == [["a", "b"], ["c"]]
    assert await together(batches.load("d", three)) == ["value of d"]


async def test_what_is_not_returned_is_absent(batches: Batches, source: Source) -> None:
    """G2: for those who asked for it."""
    source.missing, source.answers = {"b"}, {"c": None}
    assert await together(*map(batches.load, "abc")) == ["value of a", None, None]


async def test_keys_that_nobody_asked_for_are_an_error(batches: Batches, source: Source) -> None:
    """G2: a mapping by text instead of numbers is not taken for many absences."""
    source.result = {1: "one"}
    for error in await together(*map(batches.load, "ab")):
        assert isinstance(error, LoaderError)
        assert "returned 1, of type int" in error.problem
        assert "given: 'a'" in error.problem
        assert error.key in "ab"


async def test_an_error_of_the_call_names_each_key(batches: Batches, source: Source) -> None:
    """G2: what is no mapping at all is told for the item that each caller asked for."""
    source.result = ["one"]
    errors = await together(*map(batches.load, "ab"))
    assert [error.key for error in errors] == ["a", "b"]


async def test_an_exception_as_a_value_fails_one_key(batches: Batches, source: Source) -> None:
    """G2: each who asked for it gets one of its own."""
    error = TimedOut(250)
    source.answers = {"b": error}
    got = await together(*map(batches.load, "abb"))
    assert got[0] == "value of a"
    assert all(type(each) is TimedOut and each.timeout_ms == 250 for each in got[1:])
    assert len({id(each) for each in [error, *got[1:]]}) == 3


async def test_an_exception_fails_all_keys(batches: Batches, source: Source) -> None:
    """G2: each with an object of its own; the next call is made all the same."""
    source.result = ValueError("no")
    got = await together(*map(batches.load, "abc"))
    assert [repr(each) for each in got] == ["ValueError('no')"] * 3
    assert len({id(each) for each in [source.result, *got]}) == 4
    source.result = None
    assert await together(batches.load("a")) == ["value of a"]


@pytest.mark.parametrize("result", [["a", "b"], "ab", 5, {"a", "b"}])
async def test_what_is_no_mapping_is_the_loader_s_fault(
    batches: Batches, source: Source, result: Any
) -> None:
    """G2: it is told for each key, with the type that came instead."""
    source.result = result
    got = await together(*map(batches.load, "ab"))
    assert all(isinstance(each, LoaderError) and each.cache == "product" for each in got)
    assert f"returned {type(result).__name__}, and no mapping" in str(got[0])
    assert got[0] is not got[1]


class Broken(dict[Any, Any]):
    def get(self, item: Any, default: Any = None) -> Any:
        raise RuntimeError("broken")


async def test_a_mapping_that_breaks_fails_all_keys(batches: Batches, source: Source) -> None:
    """G2: as if the loader had raised it."""
    source.result = Broken()
    got = await together(*map(batches.load, "ab"))
    assert [type(each) for each in got] == [RuntimeError] * 2


@pytest.mark.parametrize("grouped", [True, False])
async def test_a_call_is_for_so_many_keys_at_most(
    source: Source, tasks: BackgroundTasks, grouped: bool
) -> None:
    """G3: the calls run at the same time, and each key gets its own value."""
    batches = batches_of(source, tasks, batch_max=3)
    group = batches.group(8)
    members = [group.member() if grouped else None for _ in range(8)]
    source.gate = anyio.Event()
    loads = [asyncio.ensure_future(batches.load(n, members[n])) for n in range(8)]
    await settled()
    assert sorted(source.calls) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    source.gate.set()
    assert await together(*loads) == [f"value of {n}" for n in range(8)]


async def test_a_call_that_takes_too_long_is_ended(source: Source, tasks: BackgroundTasks) -> None:
    """G3: with an error for each key that says so."""
    batches = batches_of(source, tasks, limit_s=0.01)
    source.gate = anyio.Event()
    got = await together(*map(batches.load, "ab"))
    assert all(isinstance(each, LoaderError) for each in got)
    assert "longer than its lease" in str(got[0])
    assert got[0] is not got[1]
    source.gate.set()
    assert await together(batches.load("a")) == ["value of a"]


async def test_cancelling_one_load_leaves_the_call_to_the_others(
    batches: Batches, source: Source
) -> None:
    """G4: also the one that sent it; and if it is cancelled before, its key is not asked for."""
    source.gate = anyio.Event()
    loads = [asyncio.ensure_future(batches.load(key)) for key in "abc"]
    await asyncio.sleep(0)
    loads[1].cancel()
    await settled()
    assert source.calls == [["a", "c"]]
    loads[0].cancel()
    await settled()
    source.gate.set()
    got = await together(*loads)
    assert [type(each) for each in got] == [asyncio.CancelledError] * 2 + [str]
    assert source.calls == [["a", "c"]]


async def test_cancelling_all_loads_lets_the_call_end_by_itself(
    batches: Batches, source: Source, tasks: BackgroundTasks
) -> None:
    """G4: what it brings is nobody's, and no error either."""
    source.gate = anyio.Event()
    with anyio.move_on_after(0.01):
        await batches.load("a")
    source.gate.set()
    await settled()
    assert not tasks.closed
    assert await together(batches.load("b")) == ["value of b"]


async def test_a_loader_that_is_cancelled_from_inside_does_not_end_the_node(
    batches: Batches, source: Source, tasks: BackgroundTasks
) -> None:
    """G4: it waited for something that was cancelled: that is its failure."""
    source.result = asyncio.CancelledError()
    got = await together(*map(batches.load, "ab"))
    assert all(isinstance(each, LoaderError) for each in got)
    assert "cancelled from inside" in str(got[0])
    await settled()
    assert not tasks.closed
    source.result = None
    assert await together(batches.load("a")) == ["value of a"]


async def test_the_end_of_the_node_ends_the_waiting(source: Source) -> None:
    """G4: with Unavailable, not with a cancellation; and so for whoever comes afterwards."""
    async with background_tasks() as tasks:
        batches = batches_of(source, tasks)
        source.gate = anyio.Event()
        loads = [asyncio.ensure_future(batches.load(key)) for key in "ab"]
        await settled()
        tasks.close()
    got = await together(*loads, batches.load("c"))
    assert [type(each) for each in got] == [Unavailable] * 3


async def test_a_call_that_never_got_to_run_ends_the_waiting_too(source: Source) -> None:
    """G4: the node may stop between the start of a task and its first step."""
    async with background_tasks() as tasks:
        batches = batches_of(source, tasks)
        source.gate = anyio.Event()
        load = asyncio.ensure_future(batches.load("a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks.close()
    got = await together(load)
    assert [type(each) for each in got] == [Unavailable]


@pytest.mark.parametrize("grouped", [True, False])
async def test_a_batch_loader_runs_for_no_single_key(tasks: BackgroundTasks, grouped: bool) -> None:
    """Loading: what it would say of its load would be said of one key, whichever came first."""
    got: list[Any] = []

    async def load(items: list[Any]) -> dict[Any, Any]:
        try:
            got.append(loading())
        except ForebayError as error:
            got.append(error)
        return {}

    batches = Batches("product", load, tasks, limit_s=20)
    group = batches.group(1)
    own = Loading("product", "k", None, lambda entry: entry)
    with under_way(own):
        await batches.load("k", group.member() if grouped else None)
        assert loading() is own
    assert [type(each) for each in got] == [ForebayError]


@pytest.mark.parametrize("last", ["asks", "leaves"])
async def test_a_batch_loader_sees_no_request(tasks: BackgroundTasks, last: str) -> None:
    """G5: what it returns is for everyone, whoever lets the call go."""
    scopes = []

    async def load(items: list[Any]) -> Mapping[Any, Any]:
        scopes.append(current())
        return {}

    batches = Batches("product", load, tasks, limit_s=20.0)
    group = batches.group(2)
    first, second = group.member(), group.member()
    asked = asyncio.ensure_future(batches.load("a", first))
    await settled()
    async with request_scope():
        assert current() is not None
        if last == "asks":
            await together(batches.load("b", second))
        second.leave()
        assert await together(asked) == [None]
    assert scopes == [None]

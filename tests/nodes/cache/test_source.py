"""The source behind a cache: when it is asked, by whom of the cluster, and who is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.coordinator.background import BackgroundTasks, background_tasks
from forebay.coordinator.valkey.breaker import Breaker
from forebay.nodes.cache.source import Source
from forebay.schemas.errors import Disconnected, LoaderError, ServerRefused, SourceFailing
from forebay.schemas.keys import Names
from support.clock import ManualClock

FAILURES, RECOVERY_MS = 3, 1_000
NAMES = Names("shop", 4)


class Cluster:
    """Nodes that ask one source, and the server between them."""

    def __init__(self, tasks: BackgroundTasks) -> None:
        self.clock = ManualClock()
        self.tasks = tasks
        self.right: tuple[bytes, float] | None = None  #: to probe: whose, and until when
        self.error: Exception | None = None
        self.said: list[str] = []
        self.sent: list[tuple[Any, ...]] = []
        self.gate = anyio.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.down: BaseException | None = None
        self.load_gate = anyio.Event()
        self.load_gate.set()

    async def call(self, *args: Any, timeout_ms: int | None = None) -> Any:
        self.sent.append(args)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if args[0] == "PUBLISH":
            assert args[1] == NAMES.work
            self.said.append(args[2])
            return 1
        if args == ("PTTL", NAMES.failing("product")):
            return RECOVERY_MS if self.right is not None else -2
        command, name, node, *more = args
        assert (command, name, more) == ("SET", NAMES.failing("product"), ["NX", "PX", RECOVERY_MS])
        if self.right is not None and self.clock.now_s < self.right[1]:
            return None
        self.right = node, self.clock.now_s + RECOVERY_MS / 1000
        return b"OK"

    def node(self, name: str = "one", **options: Any) -> Source:
        breaker = Breaker(
            "loader product", failures=FAILURES, recovery_ms=RECOVERY_MS, clock=self.clock
        )
        commands: Any = self
        return Source(
            "product",
            breaker,
            commands,
            NAMES,
            self.tasks,
            node_id=name,
            recovery_ms=RECOVERY_MS,
            **options,
        )

    def later(self, seconds: float = RECOVERY_MS / 1000) -> None:
        self.clock.now_s += seconds

    def loader(self, key: str) -> Callable[[], Awaitable[str]]:
        async def load() -> str:
            self.asked.append(key)
            await self.load_gate.wait()
            if self.down is not None:
                raise self.down
            return f"value of {key}"

        return load

    async def ask(self, source: Source, *keys: str) -> list[Any]:
        """What becomes of each: the value, or the exception."""
        got: list[Any] = []
        for key in keys:
            try:
                got.append(await source.ask(key, self.loader(key)))
            except Exception as error:
                got.append(error)
        await anyio.wait_all_tasks_blocked()
        return got


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with background_tasks() as tasks:
        yield Cluster(tasks)


async def failing(cluster: Cluster, name: str = "one", **options: Any) -> Source:
    source = cluster.node(name, **options)
    cluster.down = ConnectionError("down")
    await cluster.ask(source, "a", "b", "c")
    assert source.breaker.state == "open"
    cluster.asked.clear()
    cluster.said.clear()
    return source


async def test_what_works_is_asked_and_nobody_told(cluster: Cluster) -> None:
    """It costs nothing on the wire."""
    source = cluster.node()
    assert await cluster.ask(source, "a", "b") == ["value of a", "value of b"]
    source.refuse("a")
    assert cluster.sent == []


async def test_failures_in_a_row_of_different_keys_are_the_source_s(cluster: Cluster) -> None:
    """O1: everybody is told once; from then on nobody asks it."""
    source = cluster.node()
    cluster.down = ConnectionError("down")
    got = await cluster.ask(source, "a", "b")
    assert cluster.said == []
    source.refuse("c")
    got += await cluster.ask(source, "c", "d", "e")
    assert [type(each) for each in got] == [ConnectionError] * 3 + [SourceFailing] * 2
    assert cluster.asked == ["a", "b", "c"]
    assert cluster.said == ["f product"]
    with pytest.raises(SourceFailing) as caught:
        source.refuse("f")
    assert (caught.value.cache, caught.value.key) == ("product", "f")
    assert caught.value.retry_after_ms == RECOVERY_MS
    assert repr(source) == "<Source of product open>"


async def test_one_key_that_fails_again_and_again_counts_once(cluster: Cluster) -> None:
    """O1: it may be that key's fault."""
    source = cluster.node()
    cluster.down = ConnectionError("down")
    await cluster.ask(source, *"a" * 20)
    assert source.breaker.statistics().failures == 1
    await cluster.ask(source, "b", "b", "a")
    assert source.breaker.state == "open"


async def test_a_success_ends_the_row(cluster: Cluster) -> None:
    """O1: whatever failed before it is no neighbour of what fails after it."""
    source = cluster.node()
    for _ in range(5):
        cluster.down = ConnectionError("down")
        await cluster.ask(source, "a", "b")
        cluster.down = None
        await cluster.ask(source, "c")
    cluster.down = ConnectionError("down")
    await cluster.ask(source, "b", "a", "b")
    assert source.breaker.state == "open"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "+"]), max_size=30))
async def test_the_row_is_what_the_contract_says(row: list[str]) -> None:
    """O1: against the plainest account of it."""
    async with background_tasks() as tasks:
        cluster = Cluster(tasks)
        source = cluster.node()
        count, last = 0, ""
        for each in row:
            if count >= FAILURES:
                break
            cluster.down = None if each == "+" else ConnectionError("down")
            await cluster.ask(source, each)
            if each == "+":
                count, last = 0, ""
            elif each != last:
                count, last = count + 1, each
            assert source.breaker.closed == (count < FAILURES)
        tasks.close()


async def test_harmless_errors_say_nothing_of_the_source(cluster: Cluster) -> None:
    """O4: they neither count, nor end the row."""
    source = cluster.node(harmless=(KeyError,))
    for down in (ConnectionError("down"), KeyError("no")):
        cluster.down = down
        await cluster.ask(source, "a", "b")
    assert source.breaker.statistics().failures == 2
    cluster.down = KeyError("no")
    assert all(isinstance(each, KeyError) for each in await cluster.ask(source, *"abcdefg"))
    cluster.down = ConnectionError("down")
    await cluster.ask(source, "c")
    assert source.breaker.state == "open"


async def test_cancellation_says_nothing_of_the_source(cluster: Cluster) -> None:
    """O4: a load under way that is cancelled neither counts nor ends the row."""
    source = cluster.node()
    cluster.down = ConnectionError("down")
    await cluster.ask(source, "a", "b")
    cluster.load_gate = anyio.Event()
    for key in "defg":
        with anyio.move_on_after(0.001):
            await source.ask(key, cluster.loader(key))
    assert source.breaker.statistics().failures == 2


async def test_one_probe_is_let_through_in_the_whole_cluster(cluster: Cluster) -> None:
    """O2: the others go on refusing for another recovery time, without asking the server."""
    nodes = [await failing(cluster, name) for name in ("one", "two", "three")]
    cluster.later(0.5)
    assert [type(each) for node in nodes for each in await cluster.ask(node, "x")] == [
        SourceFailing
    ] * 3
    assert cluster.sent[3:] == []
    cluster.later(0.5)
    got = [each for node in nodes for each in await cluster.ask(node, "x", "y")]
    assert [type(each) for each in got] == [ConnectionError, *[SourceFailing] * 5]
    assert cluster.asked == ["x"]
    assert all(node.breaker.retry_after_ms == RECOVERY_MS for node in nodes)
    assert cluster.said == []


async def test_a_probe_that_succeeds_is_told_to_all(cluster: Cluster) -> None:
    """O3: and loads go on everywhere."""
    nodes = [await failing(cluster, name) for name in ("one", "two")]
    cluster.later()
    cluster.down = None
    assert await cluster.ask(nodes[0], "x") == ["value of x"]
    assert cluster.said == ["o product"]
    assert isinstance((await cluster.ask(nodes[1], "x"))[0], SourceFailing)
    for node in nodes:
        node.heard(failing=False)
        assert await cluster.ask(node, "y") == ["value of y"]
        assert node.breaker.statistics().failures == 0


async def test_a_word_that_was_missed_is_found_out_by_a_probe(cluster: Cluster) -> None:
    """O3: in the next recovery time."""
    nodes = [await failing(cluster, name) for name in ("one", "two")]
    cluster.later()
    cluster.down = None
    await cluster.ask(nodes[0], "x")
    await cluster.ask(nodes[1], "x")
    cluster.later()
    assert await cluster.ask(nodes[1], "x") == ["value of x"]
    assert nodes[1].breaker.closed


async def test_a_harmless_error_of_a_probe_is_an_answer(cluster: Cluster) -> None:
    """O3, O4: the source is back, though it does not know this key."""
    source = await failing(cluster, harmless=(KeyError,))
    cluster.later()
    cluster.down = KeyError("no")
    assert isinstance((await cluster.ask(source, "x"))[0], KeyError)
    assert source.breaker.closed
    assert cluster.said == ["o product"]


async def test_one_probe_at_a_time(cluster: Cluster) -> None:
    """O2: who comes while it is out is refused at once, and is told so beforehand or then."""
    source = await failing(cluster)
    cluster.later()
    cluster.down, cluster.load_gate = None, anyio.Event()
    cluster.tasks.start_soon(cluster.ask, source, "x")
    await anyio.wait_all_tasks_blocked()
    assert isinstance((await cluster.ask(source, "y"))[0], SourceFailing)
    assert cluster.asked == ["x"]
    cluster.load_gate.set()
    await anyio.wait_all_tasks_blocked()
    assert source.breaker.closed


@pytest.mark.parametrize("stage", ["asking for the right", "loading"])
async def test_a_cancelled_probe_leaves_the_next_one_to_others(
    cluster: Cluster, stage: str
) -> None:
    """O4: it neither closes nor prolongs; the right is this node's until it ends."""
    source = await failing(cluster)
    cluster.later()
    gate = anyio.Event()
    if stage == "loading":
        cluster.load_gate = gate
    else:
        cluster.gate = gate
    with anyio.move_on_after(0.001) as scope:
        await source.ask("x", cluster.loader("x"))
    assert scope.cancelled_caught
    assert source.breaker.state == "half_open"
    gate.set()
    cluster.down = None
    got = await cluster.ask(source, "y")
    if stage == "loading":
        assert isinstance(got[0], SourceFailing)
        cluster.later()
        got = await cluster.ask(source, "y")
    assert got == ["value of y"]
    assert source.breaker.closed


@pytest.mark.parametrize("error", [Disconnected("gone"), ServerRefused("OOM", "full")])
async def test_without_valkey_each_node_probes_for_itself(
    cluster: Cluster, error: Exception
) -> None:
    """And words that cannot be said are not missed."""
    nodes = [await failing(cluster, name) for name in ("one", "two")]
    cluster.error = error
    cluster.later()
    got = [each for node in nodes for each in await cluster.ask(node, "x")]
    assert [type(each) for each in got] == [ConnectionError] * 2
    cluster.later()
    cluster.down = None
    for node in nodes:
        assert await cluster.ask(node, "x") == ["value of x"]


async def test_a_failing_source_that_others_found_out_is_left_alone(cluster: Cluster) -> None:
    """O1: from the word on; repeated words change nothing, so that nobody is kept from probing."""
    source = cluster.node()
    source.heard(failing=True)
    assert isinstance((await cluster.ask(source, "x"))[0], SourceFailing)
    cluster.later(0.75)
    source.heard(failing=True)
    assert source.breaker.retry_after_ms == 250
    cluster.later(0.25)
    assert await cluster.ask(source, "x") == ["value of x"]


async def test_a_word_while_the_right_is_asked_for_is_heeded(cluster: Cluster) -> None:
    """O3: another's probe has just succeeded: this load is one like any other."""
    source = await failing(cluster)
    cluster.right = b"another", cluster.clock.now_s + 99
    cluster.later()
    cluster.down, cluster.gate = None, anyio.Event()
    got: list[Any] = []

    async def ask() -> None:
        got.append(await source.ask("x", cluster.loader("x")))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        source.heard(failing=False)
        cluster.gate.set()
    assert got == ["value of x"]
    assert source.breaker.statistics().failures == 0


async def test_a_node_that_stops_tells_nobody() -> None:
    """Its task group is closed; the loader's error is what is raised."""
    async with background_tasks() as tasks:
        cluster = Cluster(tasks)
    source = cluster.node()
    cluster.down = ConnectionError("down")
    with pytest.raises(ConnectionError):
        for key in "abc":
            try:
                await source.ask(key, cluster.loader(key))
            except ConnectionError:
                if key == "c":
                    raise
    assert source.breaker.state == "open"
    assert cluster.said == []


async def test_a_refusal_is_a_loader_error(cluster: Cluster) -> None:
    """So that it is handled where those are, with the time of the next try."""
    source = await failing(cluster)
    (error,) = await cluster.ask(source, "x")
    assert isinstance(error, LoaderError)
    assert error.retry_after_ms == RECOVERY_MS
    assert error.__cause__ is None


@pytest.mark.parametrize("down", [None, ConnectionError("down")])
async def test_a_load_from_before_does_not_speak_for_the_probe(cluster: Cluster, down: Any) -> None:
    """O2, O4: it neither closes while the probe is out, nor has it out for nothing."""
    source = cluster.node()
    late, cluster.load_gate = cluster.load_gate, anyio.Event()
    cluster.tasks.start_soon(cluster.ask, source, "old")
    await anyio.wait_all_tasks_blocked()
    old, cluster.load_gate, cluster.down = cluster.load_gate, late, ConnectionError("down")
    await cluster.ask(source, "a", "b", "c")
    cluster.later()
    cluster.load_gate = anyio.Event()
    cluster.tasks.start_soon(cluster.ask, source, "probe")
    await anyio.wait_all_tasks_blocked()
    cluster.down = down
    old.set()
    await anyio.wait_all_tasks_blocked()
    assert source.breaker.state == "half_open"
    cluster.down = None
    cluster.load_gate.set()
    await anyio.wait_all_tasks_blocked()
    assert source.breaker.closed
    assert cluster.said == ["f product", "o product"]

"""Two nodes on a real server beside a simple model: whatever order things happen in.

The model knows the versions of the source, what was invalidated and when that was acknowledged,
how old the entries are, and whether the source answers. It says what a read may return:

- never a version from before an invalidation that this node acknowledged, has heard of, or that
  lies further back than ``max_staleness``; softly invalidated, only if it is flagged;
- never one that is older than what the same node returned before;
- flagged only while the lifetimes allow it, and what is kept for errors only if there are some;
- one load for each reason to load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import Struct, field

import forebay
from forebay.nodes.cache import shared_lookup as looks_module
from forebay.nodes.cache import tags as tags_module
from forebay.nodes.cache.cached import Cached
from forebay.nodes.cache.near import NearCache
from forebay.nodes.cache.tags import TagTable
from forebay.schemas.notices import Position
from support.valkey_server import ValkeyServer

TTL_S, STALE_S, ERROR_S = 100.0, 100.0, 300.0
AGE_S = 110.0  #: one step of ageing: stale after one, for errors only after two, gone after three
PATIENCE_S = 20.0

Step = tuple[str, int, int]


class Floor(Struct):
    """An invalidation: versions below this one are out."""

    version: int
    soft: bool
    known: set[int]  #: to these nodes
    acked_at: float


class Row(Struct):
    """What the model knows of one key."""

    source: int = 1
    floors: list[Floor] = field(default_factory=list)
    seen: list[int] = field(default_factory=lambda: [0, 0])  #: by each node
    entry: int = 0  #: its version; 0: there is none
    age_s: float = 0.0
    soft: bool = False  #: the entry was invalidated softly
    invalid: bool = False  #: its tag was bumped
    may_load: int = 1

    @property
    def usable(self) -> bool:
        """At least if the source fails."""
        return self.entry > 0 and not self.invalid and self.age_s < ERROR_S

    def floor(self, node: int, now: float, bound_s: float, *, stale: bool) -> int:
        """The oldest version that the node may return."""
        due = [
            each.version
            for each in self.floors
            if (node in each.known or now > each.acked_at + bound_s) and not (stale and each.soft)
        ]
        return max(due, default=0)

    def may_be_stale(self, *, failing: bool) -> bool:
        old = self.age_s >= TTL_S or self.soft
        return self.usable and old and (failing or self.age_s < TTL_S + STALE_S)


class World:
    """The nodes, and the model of what they may say."""

    def __init__(self, nodes: list[forebay.Node]) -> None:
        self.nodes = nodes
        self.reads = self.stale = self.refused = 0  # so that it shows what was tried
        self.rows: dict[int, Row] = {}
        self.asked: dict[int, int] = {}
        self.failing = False
        self._first = 0
        self.caches = [self._declare(node) for node in nodes]

    def _declare(self, node: forebay.Node) -> Cached[Any, int]:
        @node.cached(
            "row:{id}",
            ttl=TTL_S,
            stale_for=STALE_S,
            stale_if_error=ERROR_S,
            tags=["of:{id}"],
            harmless=(ConnectionError,),
        )
        async def row(id: int) -> int:
            version = self.rows[id].source
            await asyncio.sleep(0)
            if self.failing:
                raise ConnectionError("down")
            self.asked[id] += 1
            return version

        return row

    async def run(self, program: list[Step]) -> None:
        """Each program has keys of its own, so that nothing has to be cleared."""
        self._first += 10
        self.failing = False
        ids = [self._first, self._first + 1]
        self.rows = {each: Row() for each in ids}
        self.asked = dict.fromkeys(ids, 0)
        for name, node, key in program:
            await getattr(self, name)(node, ids[key])
            for each, row in self.rows.items():
                assert self.asked[each] <= row.may_load, f"{each} was loaded too often"
        self.failing = False
        await self.quiet()

    async def read(self, node: int, id: int) -> None:
        await self.quiet()
        row, parts = self.rows[id], self.nodes[node]._parts
        bound_s = parts.settings.cache.max_staleness_ms / 1000
        began = parts.clock.monotonic()
        try:
            hit = await self.caches[node].get_with_info(id)
        except ConnectionError:
            assert self.failing, "the error of a source that answers"
            assert not row.usable, "there was something to serve"
            self.refused += 1
            return
        self.reads += 1
        self.stale += hit.stale
        floor = row.floor(node, began, bound_s, stale=hit.stale)
        assert floor <= hit.value <= row.source, f"{hit} on node {node}, {floor} was due"
        assert hit.value >= row.seen[node], f"{hit} on node {node} is older than what it had"
        assert not hit.stale or row.may_be_stale(failing=self.failing), f"{hit} of {row}"
        row.seen[node] = hit.value

    async def crowd(self, node: int, id: int) -> None:
        """All at once, on both nodes."""
        readers = [cached(id) for cached in self.caches * 5]
        await asyncio.gather(*readers, return_exceptions=True)

    async def change(self, node: int, id: int) -> None:
        """At the source; nobody is told."""
        self.rows[id].source += 1

    async def drop(self, node: int, id: int) -> None:
        await self._invalidate(node, id, soft=False, keys=[f"row:{id}"])

    async def drop_softly(self, node: int, id: int) -> None:
        await self._invalidate(node, id, soft=True, keys=[f"row:{id}"])

    async def bump(self, node: int, id: int) -> None:
        await self._invalidate(node, id, soft=False, tags=[f"of:{id}"])

    async def bump_softly(self, node: int, id: int) -> None:
        await self._invalidate(node, id, soft=True, tags=[f"of:{id}"])

    async def _invalidate(self, node: int, id: int, *, soft: bool, **names: Any) -> None:
        await self.quiet()  # or a load from before could be one too many
        row = self.rows[id]
        row.source += 1
        await self.nodes[node].invalidate(**names, soft=soft)
        acked_at = self.nodes[node]._parts.clock.monotonic()
        row.floors.append(Floor(row.source, soft, {node}, acked_at))
        row.soft, row.invalid = row.soft or soft, row.invalid or not soft
        row.may_load = self.asked[id] + 1

    async def hear(self, node: int, id: int) -> None:
        """Until both nodes have heard of all that was said of the key."""
        names = self.nodes[0]._parts.names
        for shard in {names.shard(f"row:{id}"), names.shard(f"of:{id}")}:
            log = await self.link.call("XREVRANGE", names.part(shard, "log"), "+", "-", "COUNT", 1)
            end = Position.parse(bytes(log[0][0]))
            for each in self.nodes:
                with anyio.fail_after(PATIENCE_S):
                    while each._parts.follower.views[shard].position < end:
                        await anyio.sleep(0.002)
        for floor in self.rows[id].floors:
            floor.known |= {0, 1}

    async def age(self, node: int, id: int) -> None:
        """What is stored lives for a step more, in the eyes of both."""
        await self.quiet()
        row, name = self.rows[id], self.nodes[0]._parts.names.entry(f"row:{id}")
        raw = await self.link.call("GET", name)
        if raw is None:
            return
        raw = bytes(raw)
        for start, end in ((20, 33), (33, 46)):  # soft_at_ms and hard_at_ms
            at_ms = max(0, int(raw[start:end]) - int(AGE_S * 1000))
            raw = raw[:start] + b"%013d" % at_ms + raw[end:]
        await self.link.call("SET", name, raw, "KEEPTTL")
        for cached in self.caches:
            cached._cache.path.near.clear()
        row.age_s += AGE_S
        row.may_load = self.asked[id] + 1

    async def fail(self, node: int, id: int) -> None:
        await self.quiet()
        self.failing = True

    async def heal(self, node: int, id: int) -> None:
        """And the time has passed for which failed keys are left alone."""
        await self.quiet()
        self.failing = False
        for each in self.rows:
            name = self.nodes[0]._parts.names.lease(f"row:{each}")
            if await self.link.call("GET", name) == b"!":
                await self.link.call("DEL", name)

    async def quiet(self) -> None:
        """No load and no refresh is under way, and what they stored is known."""
        leases = [self.nodes[0]._parts.names.lease(f"row:{each}") for each in self.rows]
        with anyio.fail_after(PATIENCE_S):
            while (
                any(cached._cache.path._refreshes._asking for cached in self.caches)
                or any(len(cached._cache.path.flights) for cached in self.caches)
                or any(found not in (None, b"!") for found in await self.link.call("MGET", *leases))
            ):
                await anyio.sleep(0.002)
        for each, row in self.rows.items():
            raw = await self.link.call("GET", self.nodes[0]._parts.names.entry(f"row:{each}"))
            version = 0 if raw is None else int(bytes(raw)[4:20])
            if version != row.entry:
                row.entry, row.age_s, row.soft, row.invalid = version, 0.0, False, False

    @property
    def link(self) -> Any:
        return self.nodes[0]._parts.backend.link


NAMES = [
    "read", "read", "read", "crowd", "change", "drop", "drop_softly", "bump", "bump_softly",
    "hear", "age", "fail", "heal",
]  # fmt: skip
Programs = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 1), st.integers(0, 1)),
    min_size=15,
    max_size=40,
)


@pytest.fixture
def world(make_node, valkey_server: ValkeyServer) -> Iterator[tuple[BlockingPortal, World]]:
    nodes = [make_node(jitter=0.0, lease_ms=60_000, throttle_ms=60_000) for _ in range(2)]
    made = World(nodes)
    with start_blocking_portal() as portal, ExitStack() as stack:
        for node in nodes:
            stack.enter_context(portal.wrap_async_context_manager(node))
        yield portal, made


def explore(portal: BlockingPortal, world: World, *, examples: int, phases: Any = None) -> None:
    """Run programs until one contradicts the model."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases or (Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(Programs)
    def programs(program: list[Step]) -> None:
        portal.call(world.run, program)

    programs()


def test_no_order_of_events_contradicts_the_model(world) -> None:
    """Near cache, shared tier, flights, leases, tags and fallbacks together."""
    portal, made = world
    explore(portal, made, examples=80)
    assert made.reads > 300
    assert made.stale > 10
    assert made.refused > 5


FAULTS = {
    "near cache forgets nothing": (NearCache, "drop", lambda cache, key, version: None),
    "tags are not heard of": (TagTable, "bump", lambda table, tag, version, *, soft=False: None),
    "all tags are soft": (tags_module, "standing", lambda embedded, current: "stale"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(world, monkeypatch, fault: str) -> None:
    """The control: a model that finds nothing would not be noticed otherwise."""
    portal, made = world
    where, name, by = FAULTS[fault]
    monkeypatch.setattr(where, name, by)
    if where is tags_module:
        monkeypatch.setattr(looks_module, name, by)
    with pytest.raises(AssertionError):
        explore(portal, made, examples=200, phases=(Phase.generate,))

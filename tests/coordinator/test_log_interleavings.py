"""Whatever happens to bells, logs and connections: no notice is skipped in silence.

Stories are drawn at random and told to a follower on a real server; the journal's checker
decides. The same stories are told to followers with a planted fault each: a checker that
passes these would prove nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any
from uuid import uuid4

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay.coordinator.log.follower import Follower
from forebay.coordinator.log.shard_view import ShardView
from forebay.coordinator.valkey.link import Arg
from forebay.schemas.notices import Notification, read_notification
from support.links import link_to, running
from support.shard_logs import Between, Broken, Journal, Shelf
from support.valkey_server import ValkeyServer

SHARDS = 2
Step = tuple[str, int, tuple["Step", ...]]
Story = Sequence[Step]

_numbers = count(1)
_run = uuid4().hex[:8]


def steps(names: Sequence[str]) -> st.SearchStrategy[Step]:
    return st.tuples(st.sampled_from(names), st.integers(0, 7), st.just(()))


#: Most steps write or ring: losses alone would reset everything, and hide what is skipped.
SMALL = ["write", "write", "write", "ring", "ring", "ring next", "ring next"]
RARE = ["trim", "lose log", "lose all", "reconnect", "new run"]
INSIDE = st.lists(steps([*SMALL, "trim", "lose log", "reconnect"]), max_size=4).map(tuple)
SWEEP = st.tuples(st.just("sweep"), st.just(0), INSIDE)
STORIES = st.lists(st.one_of(steps(SMALL), steps([*SMALL, *RARE]), SWEEP), max_size=25)


class Telling:
    """One story: bells are kept here, and rung in any order, again, or never."""

    def __init__(self, shelf: Shelf, between: Between, journal: Journal) -> None:
        self.shelf = shelf
        self.between = between
        self.run = 0
        self.bells: list[bytes] = []
        self.next_bell = 0
        self.follower: Follower

    async def run_id(self) -> str:
        return f"run-{self.run}"

    async def tell(self, story: Story) -> None:
        for name, number, inside in story:
            await self._step(name, number, inside)

    async def _step(self, name: str, number: int, inside: Story) -> None:
        shelf, shard = self.shelf, number % SHARDS
        match name:
            case "write":
                self.bells.append(await shelf.write(shard))
            case "ring" if self.bells:
                self.follower.bell(self.bells[-1 - number % len(self.bells)])
            case "ring next" if self.next_bell < len(self.bells):
                self.follower.bell(self.bells[self.next_bell])
                self.next_bell += 1
            case "sweep":
                self.between.then = lambda commands: self._meanwhile(commands, inside)
                await self.follower.sweep()
                self.between.then = None
            case "trim":
                await shelf.trim(shard, left=number // SHARDS)
            case "lose log":
                await shelf.lose(shard, "log")
            case "lose all":
                await shelf.lose(shard, "log", "head")
            case "reconnect":
                self.follower.connection_changed()
            case "new run":
                await shelf.rewind(shard, left=1 + number // SHARDS)
                self.run += 1
                self.follower.connection_changed()

    async def _meanwhile(self, commands: Sequence[Sequence[Arg]], inside: Story) -> None:
        """Between the server's answer to a read and the follower's hearing of it."""
        if commands[0][0] == "XREAD":
            self.between.then = None
            await self.tell(inside)


def check_story(server: ValkeyServer, story: Story, kind: type[Follower] = Follower) -> None:
    """Tell a story from the beginning, read to the end, and check the journal."""

    async def told() -> None:
        link = link_to(server.socket_url)
        async with running(link):
            shelf = Shelf(link, f"story-{_run}-{next(_numbers)}", SHARDS)
            journal = Journal(shelf)
            between = Between(link)
            telling = Telling(shelf, between, journal)
            telling.follower = journal.follower(between, run_id=telling.run_id, kind=kind)
            try:
                await telling.follower.sweep()
                await telling.tell(story)
                await telling.follower.sweep()
                assert not telling.follower.statistics().suspect
                journal.check()
            finally:
                await link.call("EVAL", CLEAN, 0, f"{{{shelf.names.namespace}:*")

    try:
        anyio.run(told)
    except BaseExceptionGroup as group:
        broken, rest = group.split(Broken)
        if broken is None or rest is not None:
            raise
        raise Broken(str(broken.exceptions[0])) from None


CLEAN = "for _, key in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('UNLINK', key) end"

QUICK = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(story=STORIES)
def test_each_notice_is_applied_once_in_order_or_its_shard_was_reset(
    valkey_server: ValkeyServer, story: Story
) -> None:
    """I2: whatever is dropped, repeated, delayed, overtaken, trimmed, deleted or reconnected."""
    check_story(valkey_server, story)


# Negative controls


class NoGaps(Follower):
    """Takes whatever is later than what it knows."""

    def bell(self, payload: bytes) -> None:
        message = read_notification(payload)
        assert isinstance(message, Notification)
        view = self.views[message.shard]
        if message.position > view.position:
            view.start_over(message.position)
            self._take_in(view, message.version, message.notice)


class NoMemory(Follower):
    """Applies what a bell brings though it was read already."""

    def bell(self, payload: bytes) -> None:
        message = read_notification(payload)
        assert isinstance(message, Notification)
        view = self.views[message.shard]
        view.tell(message.position, message.version)
        self._take_in(view, message.version, message.notice)


class NoVerification(Follower):
    """Goes on after a reconnect as if nothing had been."""

    def connection_changed(self) -> None:
        self._suspect(self.views)


class NoLoss(Follower):
    """Does not look whether the logs are still there."""

    async def _find_ends(self, strayed: Sequence[ShardView], empty: Sequence[ShardView]) -> bool:
        return False


class Trusting(Follower):
    """Never asks whether what a bell told was so."""


FAULTS: dict[type[Follower], dict[str, Any]] = {
    NoGaps: {"follows": lambda view, position: position > view.position},
    NoMemory: {},
    NoVerification: {},
    NoLoss: {},
    Trusting: {"tell": lambda view, position, version: view.start_over(position)},
}
TRIMMED: Story = [
    *(("sweep", 0, (("ring", 0, ()), ("reconnect", 2, ()), ("ring next", 5, ()))),),
    ("sweep", 0, ()),
    ("sweep", 0, (("write", 7, ()), ("write", 3, ()), ("write", 7, ()), ("trim", 1, ()))),
    *(("reconnect", 7, ()), ("write", 6, ()), ("sweep", 0, ())),
    ("sweep", 0, (("ring next", 5, ()), ("write", 0, ()))),
]
#: Stories that a search found once: a search on a busy machine may find others by chance.
SHOWN_BY: dict[type[Follower], Story] = {
    NoGaps: TRIMMED,
    NoMemory: [
        (
            "sweep",
            0,
            (("ring", 0, ()), ("reconnect", 2, ()), ("ring next", 5, ()), ("ring", 2, ())),
        ),
        ("sweep", 0, ()),
        ("sweep", 0, (("ring next", 5, ()), ("write", 0, ()))),
        *(("reconnect", 7, ()), ("write", 6, ()), ("sweep", 0, ())),
        ("sweep", 0, (("ring next", 5, ()), ("write", 0, ()))),
    ],
    NoVerification: [
        *(("new run", 5, ()), ("write", 7, ()), ("ring next", 6, ()), ("ring next", 5, ())),
        ("sweep", 0, (("ring next", 4, ()), ("trim", 2, ()))),
        *(("write", 5, ()), ("write", 7, ()), ("new run", 0, ()), ("new run", 5, ())),
    ],
    NoLoss: TRIMMED,
    Trusting: [
        ("sweep", 0, (("reconnect", 3, ()), ("ring next", 0, ()))),
        *(("write", 4, ()), ("write", 0, ())),
        ("sweep", 0, (("write", 3, ()), ("write", 2, ()), ("ring", 7, ()), ("write", 0, ()))),
        ("ring", 4, ()),
        ("sweep", 0, (("write", 4, ()), ("ring", 5, ()))),
        *(("sweep", 0, ()), ("write", 5, ()), ("new run", 5, ())),
        ("sweep", 0, (("ring", 6, ()),)),
        ("new run", 0, ()),
        ("sweep", 0, (("write", 5, ()), ("lose log", 7, ()))),
        *(("ring next", 1, ()), ("ring next", 7, ()), ("write", 4, ()), ("sweep", 0, ())),
    ],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_checker_finds_a_planted_fault(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, kind: type[Follower]
) -> None:
    """Negative control: a story shows that this follower skips, repeats or misses."""
    story = SHOWN_BY[kind]
    with monkeypatch.context() as planted:
        for name, fault in FAULTS[kind].items():
            planted.setattr(ShardView, name, fault)
        with pytest.raises(Broken):
            check_story(valkey_server, story, kind)
    check_story(valkey_server, story)

"""Following the shard logs, on a real server: coordinator/log/follower.py.

The rule for all interleavings of bells and sweeps is in test_log_interleavings.py.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from conftest import MakeServer
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.log.follower import Follower
from forebay.coordinator.valkey.dialer import ASK_HISTORY, history_of
from forebay.coordinator.valkey.link import Arg, Link
from forebay.coordinator.valkey.pubsub import PubSub
from forebay.schemas.errors import ForebayError, ServerRefused
from forebay.schemas.notices import Dropped, write_notice
from support.clock import ManualClock
from support.eventually import until
from support.links import doorbell_to, link_to, running
from support.shard_logs import SCRIPTS, Between, Journal, Shelf
from support.valkey_server import ValkeyServer, free_port

NEVER = float("-inf")


class Scene:
    """A namespace of three shards, a link, and a follower that is swept by hand."""

    def __init__(self, link: Link, namespace: str, *, staleness_ms: int = 500) -> None:
        self.link = link
        self.shelf = Shelf(link, namespace, 3)
        self.journal = Journal(self.shelf)
        self.between = Between(link)
        self.clock = ManualClock()
        self.follower = self.journal.follower(
            self.between, clock=self.clock, staleness_ms=staleness_ms
        )

    @property
    def gaps(self) -> dict[str, int]:
        counts = self.follower._instruments.counts
        return {labels[1]: n for labels, n in counts.items() if labels[0] == "log_gaps" and n}


@pytest.fixture
async def scene(valkey_server: ValkeyServer, namespace: str) -> AsyncIterator[Scene]:
    link = link_to(valkey_server.socket_url)
    async with running(link):
        scene = Scene(link, namespace)
        await scene.follower.sweep()
        yield scene


@asynccontextmanager
async def following(
    server: ValkeyServer, namespace: str, *, staleness_ms: int = 500
) -> AsyncIterator[tuple[Shelf, Journal, Follower, Link, PubSub]]:
    """A follower at work, with link and pubsub of its own; another link does the writing."""
    link, writer, bell = (
        link_to(server.socket_url, command_timeout_ms=300, connect_timeout_ms=300),
        link_to(server.socket_url),
        doorbell_to(server.socket_url, interval_s=0.2),
    )
    shelf = Shelf(writer, namespace, 3)
    journal = Journal(shelf)
    follower = journal.follower(link, clock=SystemClock(), staleness_ms=staleness_ms)
    async with running(link, writer, bell), anyio.create_task_group() as tasks:
        bell.on_message(lambda _, payload: follower.bell(payload))
        bell.on_state(follower.doorbell_changed)
        bell.subscribe(shelf.names.bell.encode())
        link.on_state(lambda _: follower.connection_changed())
        await bell.ready()
        await tasks.start(follower.run)
        yield shelf, journal, follower, link, bell
        tasks.cancel_scope.cancel()


def is_live(follower: Follower) -> bool:
    return follower.live_until > SystemClock.monotonic()


# In order, once


async def test_bells_and_sweeps_together_apply_each_notice_once(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """I2: a notice that comes both ways is applied the first time only, with its version."""
    async with following(valkey_server, namespace, staleness_ms=20) as (
        shelf,
        journal,
        follower,
        *_,
    ):

        async def write(shard: int) -> None:
            for _ in range(150):
                await shelf.write(shard)

        async with anyio.create_task_group() as writers:
            for shard in range(3):
                writers.start_soon(write, shard)
        await until(lambda: journal.count >= 450)
        await follower.sweep()
        journal.check()
        assert journal.applied == {shard: list(range(150)) for shard in range(3)}
        assert journal.versions == shelf.versions
        assert journal.resets == []
        assert follower.statistics().sweeps > 3
        assert follower.statistics().notices == 450


async def test_sweeps_at_the_same_time_apply_each_notice_once(scene: Scene) -> None:
    """I2: the second does not mistake the first one's notices for those of another server."""
    for _ in range(3):
        await scene.shelf.write(0)
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(scene.follower.sweep)
    assert scene.journal.applied == {0: [0, 1, 2]}
    assert scene.journal.resets == []


async def test_the_next_bell_is_applied_without_asking_the_server(scene: Scene) -> None:
    """I3: what the pubsub brings in order needs no read, and proves nothing either."""
    live_until = scene.follower.live_until
    bells = [await scene.shelf.write(0) for _ in range(3)]
    calls = scene.link.statistics().calls
    for bell in (*bells, bells[0], bells[2]):
        scene.follower.bell(bell)
    assert scene.journal.applied == {0: [0, 1, 2]}
    assert scene.link.statistics().calls == calls
    assert scene.follower.live_until == live_until


async def test_more_than_a_page_is_read_to_its_end(scene: Scene) -> None:
    """A follower that is far behind is live only when it has read everything."""
    for _ in range(30):
        async with anyio.create_task_group() as writers:
            for _ in range(100):
                writers.start_soon(scene.link.call, *scene_write(scene.shelf))
    seen: list[float] = []

    async def note(_: Sequence[Sequence[Arg]]) -> None:
        seen.append(scene.follower.views[1].live_until)

    scene.follower._suspect(scene.follower.views)
    scene.between.then = note
    await scene.follower.sweep()
    assert scene.follower.statistics().notices == 3_000
    assert scene.journal.resets == []
    assert len(seen) == 2
    assert set(seen) == {NEVER}
    assert scene.follower.live_until == scene.clock.now_s + 0.5


def scene_write(shelf: Shelf) -> list[Arg]:
    """An invalidation of nothing, as a command."""
    part = shelf.names.part
    keys = [part(1, name) for name in ("head", "log", "e0:x", "l:x", "t:x")]
    notice = write_notice(Dropped(()))
    source = SCRIPTS["entries_invalidate"].source
    return ["EVAL", source, 5, *keys, notice, shelf.names.bell, 1, "", 0, 60_000]


# Gaps


async def test_a_lost_bell_makes_its_shard_suspect_and_a_sweep_brings_both(scene: Scene) -> None:
    """I3: at once, only that shard; nothing is applied out of order, and nothing is reset."""
    await scene.shelf.write(1)
    scene.follower.bell(await scene.shelf.write(1))
    assert scene.journal.applied == {}
    assert [view.live_until == NEVER for view in scene.follower.views] == [False, True, False]
    assert scene.follower.live_until == NEVER
    assert scene.follower.statistics().suspect == 1

    await scene.follower.sweep()
    assert scene.journal.applied == {1: [0, 1]}
    assert scene.journal.resets == []
    assert scene.follower.live_until == scene.clock.now_s + 0.5
    assert scene.follower.statistics().suspect == 0


async def test_a_read_sent_before_the_doubt_does_not_end_it(scene: Scene) -> None:
    """I3: the reply to an older question says nothing of the notice whose bell was lost."""
    seen: list[float] = []

    async def write_unseen(_: Sequence[Sequence[Arg]]) -> None:
        seen.append(scene.follower.views[2].live_until)
        if len(seen) == 1:
            await scene.shelf.write(2)
            scene.follower.bell(await scene.shelf.write(2))

    scene.between.then = write_unseen
    await scene.follower.sweep()
    assert seen == [scene.clock.now_s + 0.5, NEVER]
    assert scene.journal.applied == {2: [0, 1]}
    assert scene.follower.live_until == scene.clock.now_s + 0.5


async def test_a_bell_during_a_read_is_not_applied_again_by_its_reply(scene: Scene) -> None:
    """I2: the reply holds what bells brought while it was under way."""
    bells = [await scene.shelf.write(0) for _ in range(3)]

    async def ring(_: Sequence[Sequence[Arg]]) -> None:
        scene.follower.bell(bells[0])
        scene.follower.bell(bells[1])

    scene.between.then = ring
    await scene.follower.sweep()
    assert scene.journal.applied == {0: [0, 1, 2]}
    assert scene.journal.resets == []


async def test_a_log_trimmed_past_the_position_resets_its_shard_alone(scene: Scene) -> None:
    """I2: what is left is applied after the reset; the other shards notice nothing."""
    for _ in range(20):
        await scene.shelf.write(0)
    await scene.shelf.write(2)
    await scene.shelf.trim(0, left=5)
    await scene.follower.sweep()
    assert scene.journal.resets == [0]
    assert scene.journal.applied == {0: [15, 16, 17, 18, 19], 2: [0]}
    assert [view.generation for view in scene.follower.views] == [1, 0, 0]
    assert scene.gaps["trimmed"] == 1
    scene.journal.check()


async def test_a_log_trimmed_to_its_end_resets_its_shard_if_it_was_not_read(
    scene: Scene,
) -> None:
    """I2: nothing follows from an empty log, be there no further notice for ever."""
    for shard in range(2):
        await scene.shelf.write(shard)
    await scene.follower.sweep()
    await scene.shelf.write(0)
    for shard in range(2):
        await scene.shelf.trim(shard, left=0)
    await scene.follower.sweep()
    assert scene.journal.resets == [0]
    scene.journal.check()
    for shard in range(2):
        await scene.shelf.write(shard)
    await scene.follower.sweep()
    assert scene.journal.applied == {0: [0, 2], 1: [0, 1]}
    assert scene.journal.resets == [0]


async def test_trimming_what_was_read_is_no_gap(scene: Scene) -> None:
    """I2: what is gone was applied before; only what comes next counts."""
    for _ in range(3):
        await scene.shelf.write(0)
    await scene.follower.sweep()
    await scene.shelf.write(0)
    await scene.shelf.trim(0, left=1)
    await scene.follower.sweep()
    assert scene.journal.applied == {0: [0, 1, 2, 3]}
    assert scene.journal.resets == []


@pytest.mark.parametrize("lost", [("log",), ("head", "log")])
@pytest.mark.parametrize("rung", [True, False], ids=["bell", "sweep"])
async def test_a_log_begun_anew_resets_its_shard(
    scene: Scene, lost: tuple[str, ...], rung: bool
) -> None:
    """I2: a later epoch, however it is learned of; even in the log's first moments."""
    await scene.shelf.write(0)
    await scene.shelf.write(1)
    await scene.shelf.lose(0, *lost)
    bell = await scene.shelf.write(0)
    if rung:
        scene.follower.bell(bell)
        assert scene.journal.applied == {}
        assert scene.follower.live_until == NEVER
    await scene.follower.sweep()
    assert scene.journal.resets == [0]
    assert scene.journal.applied == {0: [1], 1: [0]}
    assert scene.gaps["epoch"] == 1
    scene.journal.check()


async def test_a_flush_resets_every_shard_though_nothing_is_written(
    make_server: MakeServer, namespace: str
) -> None:
    """I2: who empties the server means the copies in the nodes too; then all goes on."""
    async with following(make_server(), namespace) as (shelf, journal, follower, link, _):
        await shelf.write(0)
        await until(lambda: journal.count == 1)
        await link.call("FLUSHALL")
        await until(lambda: sorted(journal.resets) == [0, 1, 2] and is_live(follower))
        for shard in range(3):
            await shelf.write(shard)
        await until(lambda: journal.count == 4)
        assert sorted(journal.resets) == [0, 1, 2]
        journal.check()


async def test_a_head_that_was_lost_is_no_loss(scene: Scene) -> None:
    """C2: the log itself says where it goes on, and with which version."""
    await scene.shelf.write(0)
    await scene.shelf.lose(0, "head")
    await scene.shelf.write(0)
    await scene.follower.sweep()
    assert scene.journal.applied == {0: [0, 1]}
    assert scene.journal.resets == []
    assert sorted(set(scene.journal.versions[0])) == scene.journal.versions[0]


@pytest.mark.parametrize("rung", [True, False], ids=["bell", "sweep"])
@pytest.mark.parametrize(
    "notice", [b"", b"\xc1", b"\x91\xa1?", b"\x92\xa1d\x01", write_notice(Dropped(()))[:-1]]
)
async def test_a_notice_of_an_unknown_kind_resets_its_shard(
    scene: Scene, notice: bytes, rung: bool
) -> None:
    """I2: a newer node wrote it; what it changed is not known, so all of it may be old."""
    bell = await scene.shelf.write(1, notice)
    if rung:
        scene.follower.bell(bell)
    await scene.follower.sweep()
    scene.follower.bell(await scene.shelf.write(1))
    assert scene.journal.resets == [1]
    assert scene.journal.applied == {1: [0]}
    assert scene.gaps["newer"] == 1


@pytest.mark.parametrize("fields", [["a", "b"], ["v", "x", "n", "y"], ["v", "-1"], ["n", ""]])
async def test_what_a_stranger_puts_into_the_log_resets_its_shard(
    scene: Scene, fields: list[str]
) -> None:
    """I2: it stops nobody."""
    await scene.shelf.write(0)
    await scene.link.call("XADD", scene.shelf.names.part(0, "log"), "*", *fields)
    await scene.shelf.write(0)
    await scene.follower.sweep()
    assert scene.journal.resets == [0]
    assert scene.journal.applied == {0: [0, 1]}


@pytest.mark.parametrize("payload", [b"", b"0", b"x 1 2 3 4", b"9 1 2 3 n", b"-1 1 2 3 n", b"\xff"])
async def test_what_a_stranger_rings_is_ignored(scene: Scene, payload: bytes) -> None:
    """A bell that is none changes nothing."""
    live_until = scene.follower.live_until
    scene.follower.bell(payload)
    assert scene.follower.live_until == live_until


@pytest.mark.parametrize("there", [True, False], ids=["another notice", "none"])
async def test_a_bell_that_no_read_confirms_resets_its_shard(scene: Scene, there: bool) -> None:
    """I3: it came late, or from a server that is not in charge; the log has the last word."""
    shard, epoch, seq, version, _ = (await scene.shelf.write(1)).split(b" ", 4)
    await scene.follower.sweep()
    position, notice = int(seq) + 1, write_notice(Dropped(()))
    if there:
        await scene.shelf.write(1)
    false = (shard, epoch, b"%d" % position, b"%d" % (int(version) + 1), notice)
    scene.follower.bell(b" ".join(false))
    assert scene.follower.views[1].seq == position
    assert scene.journal.resets == []
    await scene.follower.sweep()
    assert scene.journal.resets == [1]
    assert scene.gaps["false_bell"] == 1
    scene.follower.bell(await scene.shelf.write(1))
    await scene.follower.sweep()
    assert scene.journal.applied == {1: [0, 1, 2] if there else [0, 1]}
    assert scene.journal.resets == [1]
    scene.journal.check()


async def test_more_bells_than_can_be_kept_are_left_to_a_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bells told is remembered until it was read, and so has a limit."""
    monkeypatch.setattr("forebay.coordinator.log.shard_view._TOLD_MAX", 3)
    for _ in range(5):
        scene.follower.bell(await scene.shelf.write(0))
    assert scene.journal.applied == {0: [0, 1, 2]}
    assert scene.follower.live_until == NEVER
    await scene.follower.sweep()
    assert scene.journal.applied == {0: [0, 1, 2, 3, 4]}
    assert scene.journal.resets == []


@pytest.mark.parametrize("rung", [True, False], ids=["bell", "sweep"])
async def test_a_notice_that_cannot_be_applied_resets_its_shard(scene: Scene, rung: bool) -> None:
    """I2: a fault of ours must not make the notice disappear."""
    scene.journal.broken = True
    bell = await scene.shelf.write(0)
    if rung:
        scene.follower.bell(bell)
    await scene.follower.sweep()
    scene.journal.broken = False
    scene.follower.bell(await scene.shelf.write(0))
    assert scene.journal.resets == [0]
    assert scene.journal.applied == {0: [1]}
    assert scene.gaps["failed"] == 1


# The promise


async def test_the_promise_counts_from_sending(scene: Scene) -> None:
    """I1: the time that the reply took is taken off."""

    async def take_long(_: Sequence[Sequence[Arg]]) -> None:
        scene.clock.now_s += 0.3

    scene.clock.now_s += 10.0
    sent_at = scene.clock.now_s
    scene.between.then = take_long
    await scene.follower.sweep()
    assert scene.follower.live_until == sent_at + 0.5
    assert scene.follower.staleness_s() == pytest.approx(0.3)
    assert scene.follower.statistics().suspect == 0
    scene.clock.now_s += 0.2
    assert scene.follower.statistics().suspect == 3


async def test_a_read_that_failed_proves_nothing(scene: Scene) -> None:
    """I1: an error reply is no reply; sweeps say so to whoever asked."""
    for number in range(3):
        log_name = scene.shelf.names.part(number, "log")
        await scene.link.call("DEL", log_name)
        await scene.link.call("SET", log_name, "no stream")
    live_until = scene.follower.live_until
    scene.clock.now_s += 1.0
    with pytest.raises(ServerRefused) as caught:
        await scene.follower.sweep()
    assert caught.value.code == "WRONGTYPE"
    assert scene.follower.live_until == live_until
    assert scene.follower.staleness_s() == pytest.approx(1.0)


async def test_a_frozen_server_ends_the_promise_until_it_answers_again(
    make_server: MakeServer, namespace: str
) -> None:
    """I1: staleness grows while it is silent; what it took in before is applied afterwards."""
    server = make_server()
    async with following(server, namespace, staleness_ms=200) as (shelf, journal, follower, *_):
        await shelf.write(0)
        await until(lambda: journal.count == 1)
        server.sigstop()
        try:
            await until(lambda: not is_live(follower))
            first = follower.staleness_s()
            await until(lambda: follower.staleness_s() > first + 0.5)
            assert not is_live(follower)
            assert follower.statistics().suspect == 3
        finally:
            server.sigcont()
        await until(lambda: is_live(follower))
        await shelf.write(0)
        await until(lambda: journal.count == 2)
        assert journal.resets == []
        journal.check()


# Connections and runs of the server


async def test_a_new_connection_is_not_believed_before_it_was_verified(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """I4: bells are not applied meanwhile; then all goes on from the position, without reset."""
    async with following(valkey_server, namespace) as (shelf, journal, follower, link, _):
        await shelf.write(0)
        await until(lambda: journal.count == 1)
        asked, answer, ask = anyio.Event(), anyio.Event(), follower._run_id

        async def ask_slowly() -> str:
            run_id = await ask()
            asked.set()
            await answer.wait()
            return run_id

        follower._run_id = ask_slowly
        clients = (await shelf.commands.call("CLIENT", "LIST")).decode().splitlines()
        (ours,) = [line for line in clients if " cmd=info " in line]
        await shelf.commands.call("CLIENT", "KILL", "ID", ours.split()[0].removeprefix("id="))
        await until(lambda: follower.live_until == NEVER)
        with anyio.fail_after(10):
            await asked.wait()
        for _ in range(3):
            follower.bell(await shelf.write(0))
        assert journal.count == 1
        assert follower.live_until == NEVER
        answer.set()
        await until(lambda: is_live(follower))
        assert journal.applied == {0: [0, 1, 2, 3]}
        assert journal.resets == []
        assert link.statistics().reconnects == 1


async def test_a_reply_that_outlived_its_connection_is_not_taken(scene: Scene) -> None:
    """I4: nor is the next one, before the run id was compared again."""
    await scene.shelf.write(0)
    follower, log = scene.follower, []
    ask = follower._run_id

    async def ask_noted() -> str:
        log.append(("asked", scene.journal.count))
        return await ask()

    async def lose(commands: Sequence[Sequence[Arg]]) -> None:
        if commands[0][0] == "XREAD" and len(log) < 2:
            log.append(("read", scene.journal.count))
            follower.connection_changed()  # lost
            follower.connection_changed()  # and there again

    follower._run_id = ask_noted
    scene.between.then = lose
    await follower.sweep()
    assert log == [("read", 0), ("asked", 0)]
    assert scene.journal.applied == {0: [0]}
    assert follower.live_until == scene.clock.now_s + 0.5


async def test_a_connection_lost_while_it_is_verified_is_verified_again(scene: Scene) -> None:
    """I4: the run id that was learned belongs to a connection that is gone."""
    follower, asked = scene.follower, []
    ask = follower._run_id

    async def ask_and_lose() -> str:
        run_id = await ask()
        asked.append(run_id)
        if len(asked) < 3:
            follower.connection_changed()
        return run_id

    follower._run_id = ask_and_lose
    follower.connection_changed()
    await follower.sweep()
    assert len(asked) == 3
    assert scene.journal.resets == []


async def test_a_replica_proves_nothing(make_server: MakeServer, namespace: str) -> None:
    """I5: it answers reads, and may have been cut off from the primary long ago."""
    server = make_server()
    link = link_to(server.socket_url)
    async with running(link):
        scene = Scene(link, namespace)
        await scene.follower.sweep()
        live_until = scene.follower.live_until
        server.execute("REPLICAOF", "127.0.0.1", free_port())
        scene.clock.now_s += 10
        with pytest.raises(ServerRefused, match="READONLY it is a replica of"):
            await scene.follower.sweep()
        assert scene.follower.live_until == live_until


async def test_a_server_that_was_demoted_and_promoted_may_have_lost_what_was_read(
    make_server: MakeServer, namespace: str
) -> None:
    """I5: the connection is the same, and the run id; ids are given to other notices again."""
    server = make_server(config={"repl-diskless-sync-delay": "0"})
    other = make_server(config={"repl-diskless-sync-delay": "0"})
    link = link_to(server.socket_url)
    async with running(link):
        scene = Scene(link, namespace)
        scene.follower._check = link.check_primary
        scene.follower._run_id = lambda: history(link)
        link.on_state(lambda _: scene.follower.connection_changed())
        await scene.follower.sweep()
        follow(other, server)
        other.execute("REPLICAOF", "NO", "ONE")
        await scene.shelf.write(0)  # this is lost
        await scene.follower.sweep()
        resets = len(scene.journal.resets)
        follow(server, other)
        server.execute("REPLICAOF", "NO", "ONE")
        await scene.follower.sweep()
        assert sorted(scene.journal.resets[resets:]) == [0, 1, 2]
        assert link.statistics().connects == 1


async def history(link: Link) -> str:
    return history_of(await link.call(*ASK_HISTORY))


def follow(server: ValkeyServer, leader: ValkeyServer) -> None:
    """Return when it has all that its leader has."""
    server.execute("REPLICAOF", "127.0.0.1", leader.port)
    for _ in range(2_000):
        if b"master_link_status:up" in server.execute("INFO", "replication"):
            return
        time.sleep(0.005)
    raise AssertionError("the replica does not follow")


async def test_another_run_of_the_server_resets_every_shard(
    make_server: MakeServer, namespace: str
) -> None:
    """I4: even where the log has the same ids again, for other notices."""
    server = make_server(config={"save": ["3600", "1000000"]})
    async with following(server, namespace) as (shelf, journal, follower, *_):
        for _ in range(3):
            await shelf.write(0)
        await shelf.commands.call("SAVE")
        for _ in range(2):
            await shelf.write(0)  # these are lost
        await until(lambda: journal.count == 5)
        position = follower.views[0].position
        server.kill9()
        await until(lambda: follower.live_until == NEVER)
        server.start()
        with anyio.fail_after(10):
            await shelf.commands.ready()  # type: ignore[attr-defined]
        for _ in range(2):
            bell = await shelf.write(0)
        await until(lambda: sorted(journal.resets) == [0, 1, 2] and is_live(follower))
        assert follower.views[0].position == position
        assert bell.split()[1:3] == str(position).encode().split(b"-")
        await shelf.write(0)
        await until(lambda: journal.applied[0][-1] == 7)
        journal.check()


async def test_a_namespace_may_be_joined_while_memory_is_full(
    make_server: MakeServer, namespace: str
) -> None:
    """A log can be begun then, too, so later notices do not look like a gap."""
    server = make_server(config={"maxmemory": "1", "maxmemory-policy": "noeviction"})
    link = link_to(server.socket_url)
    async with running(link):
        scene = Scene(link, namespace)
        for _ in range(2):
            await scene.follower.sweep()
        assert scene.follower.live_until == scene.clock.now_s + 0.5
        assert scene.journal.resets == []
        await link.call("CONFIG", "SET", "maxmemory", "0")
        await scene.shelf.write(0)
        await scene.follower.sweep()
        assert scene.journal.resets == []
        assert scene.journal.applied == {0: [0]}


@pytest.mark.parametrize("joined", [False, True])
async def test_a_log_of_another_type_costs_its_shard_only(
    valkey_server: ValkeyServer, namespace: str, joined: bool
) -> None:
    """I6: the others are followed and stay live; the shard is reset until its log is one again."""
    link = link_to(valkey_server.socket_url)
    async with running(link):
        scene = Scene(link, namespace)
        if joined:
            await scene.follower.sweep()
        name = scene.shelf.names.part(1, "log")
        await link.call("SET", name, "text")
        await scene.shelf.write(0)
        for _ in range(2):
            scene.clock.now_s += 0.2
            await scene.follower.sweep()
            assert scene.follower.live_until == scene.clock.now_s + 0.5
        assert scene.journal.applied[0][-1:] == ([0] if joined else [])
        assert set(scene.journal.resets) == {1}
        assert name in scene.follower.views[1].refused
        await link.call("DEL", name)
        await scene.follower.sweep()
        await scene.shelf.write(1)
        await scene.follower.sweep()
        assert not scene.follower.views[1].refused
        assert scene.follower.statistics().suspect == 0
        assert scene.journal.applied[1] == [0]


async def test_it_starts_only_once_it_is_current(scene: Scene) -> None:
    """Whoever starts a follower may rely on the logs right after; failures are waited out."""
    journal = Journal(scene.shelf)
    follower = journal.follower(scene.between)
    failures = 2

    async def fail(_: Sequence[Sequence[Arg]]) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise ForebayError("not now")

    scene.between.then = fail
    async with anyio.create_task_group() as tasks:
        await tasks.start(follower.run)
        assert failures == 0
        assert is_live(follower)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "entry_id",
    ["99999999999999999-0", "18446744073709551615-0", "18446744073709551615-18446744073709551615"],
)
@pytest.mark.parametrize("swept", [True, False], ids=["swept", "not swept"])
async def test_an_id_in_a_log_that_is_ahead_stops_no_change(
    scene: Scene, entry_id: str, swept: bool
) -> None:
    """I2, _change C2: the next change begins an epoch past it, which the follower takes in."""
    shelf, journal = scene.shelf, scene.journal
    await shelf.write(1)
    await scene.follower.sweep()
    await scene.link.call("XADD", shelf.names.part(1, "log"), entry_id, "v", "1", "n", "x")
    if swept:
        await scene.follower.sweep()
    for _ in range(3):
        scene.follower.bell(await shelf.write(1))
        await scene.follower.sweep()
    journal.check()
    assert journal.applied[1][-2:] == [2, 3]
    assert set(journal.resets) == {1}
    assert scene.follower.live_until > scene.clock.now_s


@pytest.mark.parametrize(
    "fields",
    [("v", "9" * 5_000, "n", "x"), ("v", "-1", "n", ""), ("\xff", "1"), ("n", "\x91" * 5_000)],
)
async def test_a_spoilt_notice_resets_its_shard_and_no_more(
    scene: Scene, fields: Sequence[str]
) -> None:
    """I2: it is named in the log, and the others are followed."""
    await scene.link.call("XADD", scene.shelf.names.part(1, "log"), "*", *fields)
    await scene.follower.sweep()
    assert scene.gaps == {"newer": 1}
    assert [view.generation for view in scene.follower.views] == [0, 1, 0]

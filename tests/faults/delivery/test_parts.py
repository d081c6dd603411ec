"""The parts of a delivery run: events, the plan, and the contents of a lost tail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from faults.delivery.history import Answered, History, Sent, read_history
from faults.delivery.nemesis import KINDS, plan
from faults.delivery.tail import commands_in, lose_tail, lost_in
from faults.delivery.workload import EVENT_ID, KEY, by_call, gates, workload
from support.valkey_server import ValkeyServer

STREAM = "forebay:delivery:events"


def test_same_seed_gives_the_same_events_and_plan() -> None:
    """W1, N1: a run can be repeated by its arguments."""
    assert workload(1, 500) == workload(1, 500)
    assert plan(5, 1_000, 9) == plan(5, 1_000, 9)
    assert plan(5, 1_000, 9) != plan(6, 1_000, 9)


def test_events_of_a_key_have_one_publisher_and_rise() -> None:
    """W2: so the order in which they were published is known."""
    made = workload(1, 12_000)
    assert sum(len(events) for events in made.values()) >= 12_000
    publishers: dict[str, set[str]] = {}
    for name, events in made.items():
        seqs: Counter[str] = Counter()
        for event in events:
            publishers.setdefault(event.key, set()).add(name)
            seqs[event.key] += 1
            assert event.seq == seqs[event.key]
    assert all(len(names) == 1 for names in publishers.values())


def test_days_two_to_seven_are_published_and_again_under_fresh_keys() -> None:
    """The data is that of six days; a second pass over it makes other keys."""
    keys = {event.key for events in workload(1, 12_000).values() for event in events}
    flights = {key.partition(":")[2] for key in keys if "latest" not in key and "bad" not in key}
    assert {flight.split("-")[1] for flight in flights if flight.startswith("0-")} == set("234567")
    assert sum(flight.startswith("0-") for flight in flights) == 5_257
    assert any(flight.startswith("1-") for flight in flights)


def test_poison_has_a_key_of_its_own_and_every_kind_comes() -> None:
    """W3: a later event of its key would hide it."""
    events = [event for each in workload(1, 2_000).values() for event in each]
    of_key = Counter(event.key for event in events)
    poison = [event for event in events if event.poison]
    assert {event.poison for event in poison} == {"row", "type", "json"}
    assert all(of_key[event.key] == 1 for event in poison)


def test_bytes_of_an_event_tell_its_id_and_key() -> None:
    """W4: a dead letter and a lost command are told apart by their bytes."""
    for events in (*workload(1, 300).values(), gates(10)):
        for event in events:
            assert set(EVENT_ID.findall(event.raw.encode())) == {event.event.encode()}
            assert set(KEY.findall(event.raw.encode())) == {event.key.encode()}


def test_plan_deploys_once_and_spreads_the_faults() -> None:
    """N1: the other kinds come again and again, each before the last event."""
    faults = plan(1, 50_000, 18)
    assert Counter(fault.kind for fault in faults)["deploy"] == 1
    assert {fault.kind for fault in faults} == set(KINDS)
    at = [fault.at_event for fault in faults]
    assert at == sorted(at)
    assert at[-1] < 50_000


@pytest.mark.parametrize("seed", range(20))
def test_six_faults_are_one_of_each_kind(seed: int) -> None:
    """N1: for every seed."""
    assert {fault.kind for fault in plan(seed, 6_000, 6)} == set(KINDS)


def test_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    """H4: a last line that was cut short is left out."""
    lines = [
        Sent(t_ns=1, event="node-0000001", key="flight:1", seq=1),
        Answered(t_ns=2, event="node-0000001", outcome="accepted"),
    ]
    history = History(tmp_path, "one")
    history.write(*lines)
    history.close()
    with (tmp_path / "one.delivery.jsonl").open("ab") as file:
        file.write(b'{"type":"sent","t_ns":3')
    assert read_history(tmp_path) == lines


def resp(*words: str) -> bytes:
    parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    return f"*{len(words)}\r\n{parts}".encode()


def test_lost_commands_tell_what_was_lost() -> None:
    """T2: an acceptance is an entry of the ingress stream, or the job of a write_behind."""
    tail = b"".join(
        [
            resp("XADD", STREAM, "1-1", "event", '{"id":"node-0000001","key":"flight:1"}'),
            resp("XADD", "{delivery:03}:writes", "1-2", "v", "7", "j", "flight:2 service-0000002"),
            resp("XADD", "{delivery:03}:writes", "1-3", "v", "7", "j", "flight:3 python-0000003"),
            resp("XADD", "{delivery:03}:dead", "1-4", "event", "flight:4 node-0000004"),
            resp("SET", "{delivery:03}:e:flight:5", "x"),
            resp("XADD", STREAM, "1-5", "event", "node-0000005")[:-5],
        ]
    )
    lost = lost_in(tail, STREAM)
    assert lost.accepted == ["node-0000001", "service-0000002"]
    assert lost.dead == ["node-0000004"]
    assert lost.keys == [f"flight:{number}" for number in range(1, 6)]
    assert len(list(commands_in(tail))) == 5


def test_what_calls_accept_is_told_from_what_the_stream_accepts() -> None:
    """T2: the job of an event from the stream is made again from it."""
    assert by_call("service-0000001")
    assert by_call("gates-0000002")
    assert not by_call("gates-0000003")
    assert not by_call("node-0000001")


@pytest.mark.parametrize("cut_bytes", [150, 1_000, 1_003, 1_050])
def test_server_that_lost_its_tail_has_the_rest(cut_bytes: int) -> None:
    """T1: the entries in the server and the lost ones together are exactly the added ones."""
    script = "redis.call('XADD', KEYS[1], '*', 'event', ARGV[1]) return redis.call('INCR', 'n')"
    with ValkeyServer(config={"appendonly": "yes", "auto-aof-rewrite-percentage": "0"}) as server:
        events = [f"node-{number:07}" for number in range(30)]
        for event in events:
            server.execute("EVAL", script, 1, STREAM, f"flight:1 {event}")
        server.kill9()
        lost = lose_tail(server, cut_bytes, STREAM)
        kept = [
            EVENT_ID.findall(fields[1])[0].decode()
            for _, fields in server.execute("XRANGE", STREAM, "-", "+")
        ]
        assert kept + list(lost.accepted) == events
        assert lost.accepted
        assert lost.bytes >= cut_bytes

"""The replayer on a real server: it publishes all events in order, each counted once."""

from __future__ import annotations

import io
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from valkey import Valkey

from forebay.nodes.demo.flights import events_of, read_day
from forebay.nodes.dev.replayer import QUIET_MIN_MAX, Publisher, Replayer, main, offsets_s
from forebay.schemas.events import Write, read_event
from support.valkey_server import ValkeyServer

DAY = read_day()
EVENTS = events_of(DAY)


def in_stream(server: ValkeyServer, key: str) -> list[dict[str, Any]]:
    return [json.loads(fields[1]) for _, fields in server.execute("XRANGE", key, "-", "+")]


def replayed(server: ValkeyServer, key: str, *arguments: str) -> list[dict[str, Any]]:
    out = io.StringIO()
    code = main(
        ["--url", server.socket_url, "--events-key", key, "--duration", "0", *arguments], out
    )
    assert code == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


class LossyProxy:
    """Forwards commands; at every n-th reply it drops the reply and the connection."""

    def __init__(self, target: str, *, lose_every: int) -> None:
        self._target = target
        self._lose_every = lose_every
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"valkey://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = 0
        self._commands = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        # close() alone does not wake a thread in accept().
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, socket.socket(socket.AF_UNIX) as server:
                    server.connect(self._target)
                    self._relay(client, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        # Each command and each reply of this test fits one segment.
        while command := client.recv(65_536):
            server.sendall(command)
            reply = server.recv(65_536)
            self._commands += 1
            if self._commands % self._lose_every == 0:
                self.lost += 1
                return
            client.sendall(reply)


@contextmanager
def lossy(server: ValkeyServer, *, lose_every: int) -> Iterator[LossyProxy]:
    proxy = LossyProxy(server.socket_path, lose_every=lose_every)
    try:
        yield proxy
    finally:
        proxy.close()


def test_the_stream_holds_the_day_in_order(valkey_server: ValkeyServer, namespace: str) -> None:
    """I1: the stream holds every event of the day once, in the order of the day."""
    reports = replayed(valkey_server, namespace)

    published = in_stream(valkey_server, namespace)
    assert [each["data"]["value"]["id"] for each in published] == [e.flight.id for e in EVENTS]
    assert [each["data"]["value"]["status"] for each in published] == [
        event.flight.status for event in EVENTS
    ]
    assert len({each["id"] for each in published}) == len(EVENTS)
    assert reports[-1]["done"] is True
    assert (reports[-1]["published"], reports[-1]["total"]) == (len(EVENTS), len(EVENTS))
    assert reports[-1]["clock"] == "+08:48"


def test_every_event_is_one_that_forebay_reads(valkey_server: ValkeyServer, namespace: str) -> None:
    """Each entry is a write of the flight that invalidates both boards."""
    replayed(valkey_server, namespace)

    for (_, fields), event in zip(
        valkey_server.execute("XRANGE", namespace, "-", "+"), EVENTS, strict=True
    ):
        read = read_event(fields[1], bytes_max=65_536)
        assert isinstance(read.body, Write)
        assert read.id
        assert read.body.key == f"flight:{event.flight.id}"
        assert read.body.invalidates.tags == tuple(f"airport:{a}" for a in event.flight.airports)


def test_lost_replies_lose_no_event(valkey_server: ValkeyServer, namespace: str) -> None:
    """I2: repeated events have the same id; without repetitions the stream is the day in order."""
    out = io.StringIO()
    with lossy(valkey_server, lose_every=100) as proxy:
        code = main(["--url", proxy.url, "--events-key", namespace, "--duration", "0"], out)

    assert code == 0
    published = in_stream(valkey_server, namespace)
    assert proxy.lost > 5
    assert len(published) == len(EVENTS) + proxy.lost
    once = dict.fromkeys(each["id"] for each in published)
    values = {each["id"]: each["data"]["value"] for each in published}
    assert [values[event_id]["id"] for event_id in once] == [e.flight.id for e in EVENTS]
    assert json.loads(out.getvalue().splitlines()[-1])["repeated"] == proxy.lost


def test_two_runs_have_different_ids(valkey_server: ValkeyServer, namespace: str) -> None:
    """I2: two runs use different ids, so the second run is not treated as a repetition."""
    replayed(valkey_server, namespace)
    replayed(valkey_server, namespace)

    ids = [each["id"] for each in in_stream(valkey_server, namespace)]
    assert len(set(ids)) == len(ids) == 2 * len(EVENTS)


def test_a_second_day_begins_with_its_timetable(
    valkey_server: ValkeyServer, namespace: str
) -> None:
    """Events reset the boards at the start of the next day."""
    replayed(valkey_server, namespace, "--days", "2")

    published = in_stream(valkey_server, namespace)
    reset = published[len(EVENTS) : len(EVENTS) + len(DAY)]
    assert {each["data"]["value"]["status"] for each in reset} == {"scheduled"}
    assert len(published) == 2 * len(EVENTS) + len(DAY)


def test_it_is_never_ahead_of_its_schedule() -> None:
    """I3: on a clock that only its sleep advances, each event is sent exactly when due."""
    slept = [0.0]
    sent_at = []

    class Sends(Publisher):
        def publish(self, event: str) -> str:
            sent_at.append(slept[0])
            return "0-1"

    def sleep(seconds: float) -> None:
        slept[0] += seconds

    replayer = Replayer(
        Sends(Valkey(), "unused"),
        duration_s=60,
        run="r",
        monotonic=lambda: slept[0],
        sleep=sleep,
    )
    list(replayer.play(DAY, [1]))

    assert sent_at == pytest.approx(offsets_s(EVENTS, 60))


def test_the_schedule_is_the_day_without_its_night() -> None:
    """Offsets rise from 0 to the duration, and long pauses are shortened."""
    offsets = offsets_s(EVENTS, 100)
    gaps = [later - earlier for earlier, later in itertools.pairwise(offsets)]

    assert offsets[0] == 0
    assert offsets[-1] == pytest.approx(100)
    assert min(gaps) >= 0
    whole_min = EVENTS[-1].at_min - EVENTS[0].at_min - 532 + QUIET_MIN_MAX
    assert max(gaps) == pytest.approx(100 * QUIET_MIN_MAX / whole_min)


def test_a_refused_event_ends_it(valkey_server: ValkeyServer, namespace: str) -> None:
    """An event that the server refuses is not repeated: exit code 1."""
    valkey_server.execute("SET", namespace, "a string")

    code = main(["--url", valkey_server.socket_url, "--events-key", namespace], io.StringIO())

    assert code == 1


def test_it_gives_up_on_a_server_that_stays_away() -> None:
    """A server that stays unavailable beyond the patience: exit code 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening, so connections are refused
        url = f"valkey://127.0.0.1:{taken.getsockname()[1]}"

        assert main(["--url", url, "--patience", "0"], io.StringIO()) == 1


def test_a_url_of_another_kind_is_usage() -> None:
    """An unsupported URL: exit code 2."""
    assert main(["--url", "http://127.0.0.1"], io.StringIO()) == 2


def test_the_url_may_hold_a_password_and_a_database(make_server: Any) -> None:
    """The replayer logs in and selects the database of its URL; a wrong password exits with 1."""
    server = make_server("valkey", config={"requirepass": "s p@ce"})
    to = ["--events-key", "events", "--duration", "0", "--patience", "0"]

    right = main(["--url", f"valkey://:s%20p%40ce@127.0.0.1:{server.port}/3", *to], io.StringIO())
    wrong = main(["--url", f"valkey://:wrong@127.0.0.1:{server.port}/3", *to], io.StringIO())

    with Valkey(port=server.port, db=3, password="s p@ce") as client:
        assert client.xlen("events") == len(EVENTS)
    assert (right, wrong) == (0, 1)

"""Replays the day: publishes its events to the stream in order, faster than real time.

    python -m forebay.nodes.dev.replayer --url valkey://127.0.0.1:6379 --duration 60

It stands for a publishing service, so it uses only a plain client: ``XADD <events key> * event
<JSON>``. From Forebay it imports only the data set; the events are CloudEvents made with the
standard library.

I1  The order in the stream is the order of the day: an event is sent after the previous one was
    acknowledged.
I2  No event is lost or counted twice: after a lost connection the same event is sent again
    with the same id, so the nodes recognise the repetition.
I3  The replayer is never ahead of its schedule. When it is late, it publishes as fast as the
    server replies.

It reports its progress on stdout, one JSON object per line. Exit codes: 0 everything is published,
1 the server refused an event or was unavailable for too long, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice, pairwise
from typing import Any, TextIO

from msgspec import Struct, structs
from valkey import Valkey
from valkey import exceptions as refused
from valkey.backoff import NoBackoff
from valkey.retry import Retry

from ..demo.flights import DayEvent, Flight, as_scheduled, events_of, read_day

SOURCE = "/forebay/demo/replayer"
QUIET_MIN_MAX = 30  #: a longer pause of the day, such as the night, is shortened to this
_REPORT_EVERY_S = 0.25
_PAUSE_S_MAX = 1.0
_TIMEOUT_S = 5.0
_TRANSIENT = (
    *(refused.ConnectionError, refused.TimeoutError, refused.ReadOnlyError),
    *(refused.OutOfMemoryError, refused.TryAgainError, refused.ClusterDownError),
    refused.MasterDownError,
)

Sleep = Callable[[float], None]
Monotonic = Callable[[], float]


class ReplayReport(Struct, frozen=True, kw_only=True):
    """The progress of the day."""

    day: int
    published: int
    total: int
    repeated: int  #: events sent again after a lost connection, over all days
    clock: str  #: time of the day, such as 18:35; the next morning is +08:48
    id: str  #: of the last entry in the stream
    done: bool = False


class Publisher:
    """Adds events to the stream, across lost connections."""

    def __init__(
        self,
        client: Valkey,
        events_key: str,
        *,
        patience_s: float = 30.0,
        monotonic: Monotonic = time.monotonic,
        sleep: Sleep = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.repeated = 0
        self._client = client
        self._events_key = events_key
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._uniform = uniform

    def publish(self, event: str) -> str:
        """Add one event and return the id of its entry.

        Raises:
            ValkeyError: the server refused it, or was unavailable for longer than ``patience_s``.
        """
        give_up_at = self._monotonic() + self._patience_s
        for attempt in count():
            try:
                entry_id: Any = self._client.xadd(self._events_key, {"event": event})
                return bytes(entry_id).decode()
            except refused.ValkeyError as error:
                if not _is_transient(error) or self._monotonic() > give_up_at:
                    raise
                # Another connection may lead to a server that accepts the event.
                self._client.connection_pool.disconnect()
            self.repeated += 1
            self._sleep(self._uniform(0, min(_PAUSE_S_MAX, 0.02 * 2 ** min(attempt, 10))))
        raise AssertionError("unreachable")


class Replayer:
    """Publishes days; from the second day on, its timetable is published first."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        duration_s: float,
        run: str,
        monotonic: Monotonic = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._publisher = publisher
        self._duration_s = duration_s
        self._run = run
        self._monotonic = monotonic
        self._sleep = sleep

    def play(self, flights: Sequence[Flight], days: Iterable[int]) -> Iterator[ReplayReport]:
        for day in days:
            if day > 1:
                for number, flight in enumerate(flights):
                    event_id = f"{self._run}-{day}-t{number}"
                    self._publisher.publish(cloud_event(as_scheduled(flight), event_id))
            yield from self._play_one(events_of(flights), day)

    def _play_one(self, events: Sequence[DayEvent], day: int) -> Iterator[ReplayReport]:
        started_at = reported_at = self._monotonic()
        due = zip(events, offsets_s(events, self._duration_s), strict=True)
        for number, (event, offset_s) in enumerate(due, 1):
            wait_s = started_at + offset_s - self._monotonic()
            if wait_s > 0:
                self._sleep(wait_s)
            event_id = f"{self._run}-{day}-{number - 1}"
            last_id = self._publisher.publish(cloud_event(event.flight, event_id))
            done = number == len(events)
            if done or self._monotonic() - reported_at >= _REPORT_EVERY_S:
                reported_at = self._monotonic()
                yield ReplayReport(
                    day=day,
                    published=number,
                    total=len(events),
                    repeated=self._publisher.repeated,
                    clock=_clock_text(event.at_min),
                    id=last_id,
                    done=done,
                )


def cloud_event(flight: Flight, event_id: str) -> str:
    """A write-behind of the flight, which also invalidates the boards of both airports."""
    key = f"flight:{flight.id}"
    envelope = {
        "specversion": "1.0",
        "type": "dev.forebay.cache.write.v1",
        "source": SOURCE,
        "id": event_id,
        "subject": key,
        "datacontenttype": "application/json",
        "data": {
            "key": key,
            "value": structs.asdict(flight),
            "invalidates": {"tags": [f"airport:{airport}" for airport in flight.airports]},
        },
    }
    return json.dumps(envelope, separators=(",", ":"))


def offsets_s(events: Sequence[DayEvent], duration_s: float) -> list[float]:
    """The due time of each event, in seconds after the first; the last is at ``duration_s``."""
    minutes = [0]
    for earlier, later in pairwise(events):
        minutes.append(minutes[-1] + min(later.at_min - earlier.at_min, QUIET_MIN_MAX))
    total = minutes[-1] or 1
    return [duration_s * each / total for each in minutes]


def main(arguments: Sequence[str] | None = None, stdout: TextIO | None = None) -> int:
    options = _parser().parse_args(arguments)
    out = stdout or sys.stdout
    url = sys.stdin.readline().strip() if options.url == "-" else options.url
    try:
        client = _connect(url)
    except ValueError as error:
        sys.stderr.write(f"--url: {error}\n")
        return 2
    publisher = Publisher(client, options.events_key, patience_s=options.patience)
    replayer = Replayer(
        publisher, duration_s=options.duration, run=options.run or uuid.uuid4().hex[:12]
    )
    try:
        for report in replayer.play(read_day(), islice(count(1), options.days or None)):
            out.write(json.dumps(structs.asdict(report)) + "\n")
            out.flush()
    except refused.ValkeyError as error:
        sys.stderr.write(f"gave up: {error}\n")
        return 1
    finally:
        client.connection_pool.disconnect()
    return 0


def _connect(url: str) -> Valkey:
    """A client that repeats nothing by itself: the publisher repeats, and counts."""
    return Valkey.from_url(
        url,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        lib_name=None,  # no handshake: a replayed event is one command
        lib_version=None,
    )


def _is_transient(error: refused.ValkeyError) -> bool:
    if isinstance(error, refused.AuthenticationError):  # a ConnectionError in valkey-py
        return False
    return isinstance(error, _TRANSIENT) or str(error).startswith("BUSY ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replayer", description="Replays a day of departures.")
    add = parser.add_argument
    add("--url", default="valkey://127.0.0.1:6379", help="URL of Valkey; - reads it from stdin")
    add("--events-key", default="forebay:flights:events", help="key of the stream")
    add("--duration", type=float, default=60.0, metavar="SECONDS", help="duration of one day")
    add("--days", type=int, default=1, help="number of days; 0: without end")
    add("--run", default="", help="prefix of the event ids; default: random")
    add("--patience", type=float, default=30.0, metavar="SECONDS", help="maximum outage")
    return parser


def _clock_text(at_min: int) -> str:
    days, minutes = divmod(at_min, 24 * 60)
    return f"{'+' if days else ''}{minutes // 60:02}:{minutes % 60:02}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)

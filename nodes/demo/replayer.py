"""Plays the day: publishes its events to the stream, in order, at their time, only faster.

    python -m forebay.nodes.demo.replayer --url valkey://127.0.0.1:6379 --duration 60

It stands for a service in any language, so it knows nothing but Valkey's wire: a socket, and
``XADD <events key> * event <JSON>``. Of Forebay it imports the data set only; the events
are CloudEvents made with the standard library.

I1  The order in the stream is the order of the day: an event is sent when the one before
    has been acknowledged.
I2  No event is lost, and none counts twice: after a lost connection the same event is sent
    again with the same id, by which the nodes recognise it.
I3  It is never ahead of its schedule. If it falls behind, it catches up as fast as the
    server answers.

On stdout it reports where it is, one JSON object a line. Exit 0 when all was published, 1
when the server refused an event or was away for too long, 2 for wrong usage.
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

from .flights import DayEvent, Flight, as_scheduled, events_of, read_day
from .wire import Refused, Wire

__all__ = ["Publisher", "Replayer", "Report", "cloud_event", "main", "offsets_s"]

SOURCE = "/forebay/demo/replayer"
QUIET_MIN_MAX = 30  #: a longer pause of the day, such as its night, is cut to this
_REPORT_EVERY_S = 0.25
_PAUSE_S_MAX = 1.0

Sleep = Callable[[float], None]
Monotonic = Callable[[], float]


class Report(Struct, frozen=True, kw_only=True):
    """How far the day is."""

    day: int
    published: int
    total: int
    repeated: int  #: sent again after a lost connection, over all days
    clock: str  #: of the day, such as 18:35; the next morning is +08:48
    id: str  #: of the last entry in the stream
    done: bool = False


class Publisher:
    """Puts one event into the stream, however often the connection is lost meanwhile."""

    def __init__(
        self,
        wire: Wire,
        events_key: str,
        *,
        patience_s: float = 30.0,
        monotonic: Monotonic = time.monotonic,
        sleep: Sleep = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.repeated = 0
        self._wire = wire
        self._events_key = events_key
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._uniform = uniform

    def publish(self, event: str) -> str:
        """The id of the entry.

        Raises:
            Refused: the server will never take it.
            OSError: the server was away for longer than our patience.
        """
        give_up_at = self._monotonic() + self._patience_s
        for attempt in count():
            try:
                return self._wire.text("XADD", self._events_key, "*", "event", event)
            except (OSError, Refused) as error:
                passing = isinstance(error, OSError) or error.passing
                if not passing or self._monotonic() > give_up_at:
                    raise
            self.repeated += 1
            self._sleep(self._uniform(0, min(_PAUSE_S_MAX, 0.02 * 2 ** min(attempt, 10))))
        raise AssertionError("unreachable")


class Replayer:
    """Publishes days, each with a timetable before it from the second one on."""

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

    def play(self, flights: Sequence[Flight], days: Iterable[int]) -> Iterator[Report]:
        for day in days:
            if day > 1:
                self._reset(flights, day)
            yield from self._play_one(events_of(flights), day)

    def _reset(self, flights: Sequence[Flight], day: int) -> None:
        """The boards of a new day begin with its timetable."""
        for number, flight in enumerate(flights):
            event_id = f"{self._run}-{day}-t{number}"
            self._publisher.publish(cloud_event(as_scheduled(flight), event_id))

    def _play_one(self, events: Sequence[DayEvent], day: int) -> Iterator[Report]:
        started_at = reported_at = self._monotonic()
        last_id = ""
        for number, (event, offset_s) in enumerate(
            zip(events, offsets_s(events, self._duration_s), strict=True)
        ):
            wait_s = started_at + offset_s - self._monotonic()
            if wait_s > 0:
                self._sleep(wait_s)
            last_id = self._publisher.publish(
                cloud_event(event.flight, f"{self._run}-{day}-{number}")
            )
            done = number + 1 == len(events)
            if done or self._monotonic() - reported_at >= _REPORT_EVERY_S:
                reported_at = self._monotonic()
                yield Report(
                    day=day,
                    published=number + 1,
                    total=len(events),
                    repeated=self._publisher.repeated,
                    clock=_clock_text(event.at_min),
                    id=last_id,
                    done=done,
                )


def cloud_event(flight: Flight, event_id: str) -> str:
    """A write-behind of the flight; when the database has it, its airports' boards are old."""
    body: dict[str, Any] = {
        "key": f"flight:{flight.id}",
        "value": structs.asdict(flight),
        "invalidates": {"tags": [f"airport:{airport}" for airport in flight.airports]},
    }
    envelope = {
        "specversion": "1.0",
        "type": "dev.forebay.cache.write.v1",
        "source": SOURCE,
        "id": event_id,
        "subject": body["key"],
        "datacontenttype": "application/json",
        "data": body,
    }
    return json.dumps(envelope, separators=(",", ":"))


def offsets_s(events: Sequence[DayEvent], duration_s: float) -> list[float]:
    """When each event is due, in seconds from the first; the last one at ``duration_s``."""
    minutes = [0]
    for earlier, later in pairwise(events):
        minutes.append(minutes[-1] + min(later.at_min - earlier.at_min, QUIET_MIN_MAX))
    whole = minutes[-1] or 1
    return [duration_s * each / whole for each in minutes]


def main(arguments: Sequence[str] | None = None, stdout: TextIO | None = None) -> int:
    options = _parser().parse_args(arguments)
    out = stdout or sys.stdout
    url = sys.stdin.readline().strip() if options.url == "-" else options.url
    try:
        wire = Wire(url)
    except ValueError as error:
        sys.stderr.write(f"--url: {error}\n")
        return 2
    publisher = Publisher(wire, options.events_key, patience_s=options.patience)
    replayer = Replayer(
        publisher, duration_s=options.duration, run=options.run or uuid.uuid4().hex[:12]
    )
    days = islice(count(1), options.days or None)
    try:
        for report in replayer.play(read_day(), days):
            out.write(json.dumps(structs.asdict(report)) + "\n")
            out.flush()
    except (Refused, OSError) as error:
        sys.stderr.write(f"gave up: {error}\n")
        return 1
    finally:
        wire.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replayer", description="Plays a day of departures.")
    add = parser.add_argument
    add("--url", default="valkey://127.0.0.1:6379", help="of Valkey; - reads it from stdin")
    add("--events-key", default="forebay:flights:events", help="the stream")
    add("--duration", type=float, default=60.0, metavar="SECONDS", help="of one day")
    add("--days", type=int, default=1, help="0: for ever")
    add("--run", default="", help="beginning of the event ids; default: a random one")
    add("--patience", type=float, default=30.0, metavar="SECONDS", help="with a server away")
    return parser


def _clock_text(at_min: int) -> str:
    days, minutes = divmod(at_min, 24 * 60)
    return f"{'+' if days else ''}{minutes // 60:02}:{minutes % 60:02}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)

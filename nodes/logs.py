"""Every log line of the process, ours and that of the libraries, on one stream.

I1  A line is one JSON object, or on a terminal one line for people; both hold timestamp
    (UTC), level, event and instance. A value never starts a second line and never moves
    a cursor; a traceback's lines are set off by a bar.
I2  No secret is written: ``Secret`` objects, passwords in URLs, fields with the name of a
    secret, and every occurrence of the secrets given to ``configure_logs``.
I3  An error that repeats is written 10 times in 10 s; the next one after that says how
    many were suppressed.
I4  Logging does not raise: what cannot be shown or written is replaced or dropped.
I5  Cache keys, in the fields ``key`` and ``keys``, appear as ``log.keys`` says. A hash
    lets lines about one key be found; it does not stop who can guess the key.

Calling it again replaces all of it. Whoever embeds a node need not call it at all: as long as the
application has not configured structlog, ``configure_embedded`` has our lines, and no others, go to
stderr in the same form and from the level that is set on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from ..coordinator.clock import Clock, SystemClock
from ..schemas.settings import Log, Secret
from .log_lines import json_line, pretty_line
from .log_values import Cleaner, Keys, Repeats

__all__ = ["configure_embedded", "configure_logs"]

_QUIET = ("aiohttp.access", "aiosqlite", "asyncio")  #: a line per request, or the values


def configure_logs(
    settings: Log,
    *,
    instance: str,
    stream: TextIO,
    secrets: Iterable[Secret] = (),
    color: bool = False,
    clock: Clock | None = None,
) -> None:
    """Send all logs to ``stream``; ``color`` counts for the pretty form only."""
    chain = _chain(settings, instance, stream, secrets, color, clock)
    lines = _Lines(stream)
    _configure(settings, chain, lambda *_: lines)
    _route_stdlib(_level_of(settings), chain, lines)


def configure_embedded(settings: Log, *, instance: str, secrets: Iterable[Secret] = ()) -> None:
    """Send our logs to stderr, if nobody has said anything else; those of others are theirs."""
    if not structlog.is_configured() or isinstance(
        structlog.get_config()["logger_factory"], _ToStderr
    ):
        chain = _chain(settings, instance, sys.stderr, secrets, color=False, clock=None)
        _configure(settings, chain, _ToStderr())


def _level_of(settings: Log) -> int:
    return logging.getLevelNamesMapping()[settings.level.upper()]


def _configure(
    settings: Log, chain: list[Processor], factory: Callable[..., WrappedLogger]
) -> None:
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(_level_of(settings)),
        logger_factory=factory,
        cache_logger_on_first_use=False,  # a cached one would not follow the next call
    )


def _chain(
    settings: Log,
    instance: str,
    stream: TextIO,
    secrets: Iterable[Secret],
    color: bool,
    clock: Clock | None,
) -> list[Processor]:
    pretty = settings.format == "pretty" or (settings.format == "auto" and _is_terminal(stream))
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        Repeats(clock or SystemClock()),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        Keys(settings.keys),
        Cleaner(secrets),
        _Instance(instance),
        pretty_line(color=color) if pretty else json_line,
    ]


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


class _Instance:
    """Says which process speaks; nothing in the event may claim otherwise."""

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["instance"] = self._instance
        return event


class _Lines:
    """Writes whole lines, from whatever thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = Lock()

    def msg(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (OSError, ValueError, AttributeError):  # its reader is gone, it is closed or None
            return

    debug = info = warning = error = critical = exception = msg


class _ToStderr:
    """Where lines go that nobody has sent elsewhere: to whatever stderr is by then."""

    def __call__(self, *_: object) -> _Lines:
        return _Lines(sys.stderr)


def _route_stdlib(level: int, chain: Sequence[Processor], lines: _Lines) -> None:
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old, _Route):
            root.removeHandler(old)
    root.addHandler(_Route(chain, lines))
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)


class _Route(logging.Handler):
    """Takes the records of stdlib loggers through our processors."""

    def __init__(self, chain: Sequence[Processor], lines: _Lines) -> None:
        super().__init__()
        self._chain = chain
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.msg(self._rendered(record))
        except structlog.DropEvent:
            return
        except Exception:
            self.handleError(record)

    def _rendered(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower() if record.levelname.isupper() else "info"
        event: Any = {"event": record.getMessage(), "logger": record.name}
        event["repeat_of"] = f"{record.name}:{record.msg}"
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for processor in self._chain:
            event = processor(None, level, event)
        return str(event)

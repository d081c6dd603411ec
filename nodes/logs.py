"""Log lines of the process, from Forebay and from the libraries, on one stream.

I1  A line is one JSON object, or on a terminal one readable line; both hold timestamp (UTC),
    level, event and instance. A value never starts a second line and never moves a cursor; the
    lines of a traceback begin with a bar.
I2  No secret is written: ``Secret`` objects, passwords in URLs, fields with the name of a
    secret, and every occurrence of the secrets given to ``configure_logs``.
I3  A repeated error is written 10 times in 10 s; the next one after that reports how many were
    suppressed. The counts are kept for a bounded number of event names.
I4  Logging does not raise: a value that cannot be shown or written is replaced or dropped.
I5  Cache keys, in the fields ``key`` and ``keys``, appear as ``log.keys`` says. A hash makes
    lines about one key searchable; it does not protect a key that can be guessed.
I6  After ``Cleaner`` an event holds only None, booleans, numbers, text, and lists and mappings of
    these, of bounded size.

A second call replaces the whole configuration. An application that embeds a node need not call it:
as long as it has not configured structlog, ``configure_embedded`` sends the lines of Forebay, and
no others, to stderr in the same form, from the configured level on.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from threading import Lock
from typing import Any, Literal, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from ..coordinator.clock import Clock, SystemClock
from ..schemas.masking import escape_controls, mask_urls_in
from ..schemas.settings import Log, Secret

_QUIET = ("aiohttp.access", "aiosqlite", "asyncio")  #: a line per request, or values
_FIRST = ("timestamp", "level", "event", "instance")
_COLORS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
_PLAIN = re.compile(r"[^\s\"'=]+\Z")
_encoder = msgspec.json.Encoder(enc_hook=str)
_TEXT_CHARS_MAX = 16_384
_HEAD_CHARS = 8_192
_ITEMS_MAX = 50
_DEPTH_MAX = 5
_INT_MAX = 2**63
_SECRET_CHARS_MIN = 4  #: masking shorter ones everywhere would reveal them
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:password|passwd|secret|token|authorization|api_key|credentials?)$", re.IGNORECASE
)
_NOT_SECRET = frozenset({"fencing_token", "owner_token"})


def configure_logs(
    settings: Log,
    *,
    instance: str,
    stream: TextIO,
    secrets: Iterable[Secret] = (),
    color: bool = False,
    clock: Clock | None = None,
) -> None:
    """Send all logs to ``stream``; ``color`` applies to the pretty form only."""
    chain = _chain(settings, instance, stream, secrets, color, clock)
    lines = _Lines(stream)
    _configure(settings, chain, lambda *_: lines)
    _route_stdlib(_level_of(settings), chain, lines)


def configure_embedded(settings: Log, *, instance: str, secrets: Iterable[Secret] = ()) -> None:
    """Send the logs of Forebay to stderr unless the application has configured structlog."""
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
        cache_logger_on_first_use=False,  # a cached logger would ignore the next call
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
        RepeatFilter(clock or SystemClock()),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        KeyForm(settings.keys),
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
    """Sets the process that writes the line; a field of the event cannot replace it."""

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["instance"] = self._instance
        return event


class _Lines:
    """Writes whole lines, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = Lock()

    def msg(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (
            OSError,
            ValueError,
            AttributeError,
        ):  # the reader is gone, or the stream is closed or None
            return

    debug = info = warning = error = critical = exception = msg


class _ToStderr:
    """The default: the stderr of the moment when the line is written."""

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
    """Passes the records of stdlib loggers through the same processors."""

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


# Values


class Cleaner:
    """Masks secrets and converts the other values to types that can be written."""

    def __init__(self, secrets: Iterable[Secret] = ()) -> None:
        known = {secret.reveal() for secret in secrets}
        usable = sorted((text for text in known if len(text) >= _SECRET_CHARS_MIN), key=len)
        pattern = "|".join(re.escape(text) for text in reversed(usable))
        self._secrets = re.compile(pattern) if pattern else None

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {self._text(name): self._named(name, value, 0) for name, value in event.items()}

    def _named(self, name: str, value: object, depth: int) -> object:
        is_secret = _SECRET_NAME.search(name) and name not in _NOT_SECRET
        if is_secret and value and not isinstance(value, int | float):
            return "***"
        return self._value(value, depth)

    def _value(self, value: object, depth: int) -> object:
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return int(value) if -_INT_MAX <= value < _INT_MAX else str(value)
        if isinstance(value, bytes):
            return self._text(value.decode("utf-8", "backslashreplace"))
        if isinstance(value, Mapping | list | tuple | set | frozenset) and depth < _DEPTH_MAX:
            return self._items(value, depth + 1)
        return self._text(_text_of(value))

    def _items(self, value: Any, depth: int) -> object:
        if isinstance(value, Mapping):
            some = list(value.items())[:_ITEMS_MAX]
            return {
                self._text(_text_of(name)): self._named(_text_of(name), each, depth)
                for name, each in some
            }
        items = [self._value(each, depth) for each in list(value)[:_ITEMS_MAX]]
        return (
            items if len(value) <= _ITEMS_MAX else [*items, f"and {len(value) - _ITEMS_MAX} more"]
        )

    def _text(self, text: str) -> str:
        if self._secrets is not None:
            text = self._secrets.sub("***", text)
        text = mask_urls_in(text)
        if len(text) > _TEXT_CHARS_MAX:
            cut = len(text) - _TEXT_CHARS_MAX  # from the middle: the end of a traceback matters
            text = f"{text[:_HEAD_CHARS]}... ({cut} characters) ...{text[_HEAD_CHARS + cut :]}"
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # raised by a foreign __str__
        return f"({type(value).__name__} that cannot be shown)"


class KeyForm:
    """Shows cache keys in full, as a hash, or not at all."""

    def __init__(self, form: Literal["full", "hash", "none"]) -> None:
        self._form = form

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        if self._form == "full":
            return event
        for name in ("key", "keys"):
            if name in event:
                event[name] = self._shown(event[name])
        return event

    def _shown(self, value: object) -> object:
        several = isinstance(value, list | tuple | set | frozenset)
        if self._form == "none":
            return f"({len(value)} keys)" if several else "(a key)"  # type: ignore[arg-type]
        if several:
            return [_hashed(each) for each in list(value)[: _ITEMS_MAX + 1]]  # type: ignore[call-overload]
        return _hashed(value)


def _hashed(key: object) -> str:
    content = key if isinstance(key, bytes) else _text_of(key).encode("utf-8", "backslashreplace")
    return "#" + blake2b(content, digest_size=8).hexdigest()


class _Window:
    __slots__ = ("began_at", "count")

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.count = 0


class RepeatFilter:
    """Drops an error that repeats too fast, and counts the dropped ones."""

    PASSED = 10
    WINDOW_S = 10.0
    NAMES_MAX = 1_000

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def __call__(self, _: WrappedLogger, method: str, event: EventDict) -> EventDict:
        name = str(event.pop("repeat_of", event.get("event", "")))
        if event.get("level", method) not in ("error", "critical", "exception"):
            return event
        now_s = self._clock.monotonic()
        window = self._windows.get(name)
        if window is None or now_s - window.began_at >= self.WINDOW_S:
            suppressed = max(0, window.count - self.PASSED) if window else 0
            window = self._begin(name, now_s)
            if suppressed:
                event["suppressed"] = suppressed
        window.count += 1
        if window.count > self.PASSED:
            raise structlog.DropEvent
        return event

    def _begin(self, name: str, now_s: float) -> _Window:
        self._windows.pop(name, None)
        if len(self._windows) >= self.NAMES_MAX:
            del self._windows[next(iter(self._windows))]
        window = self._windows[name] = _Window(now_s)
        return window


# Lines


def json_line(_: WrappedLogger, __: str, event: EventDict) -> str:
    ordered = {name: event.pop(name) for name in _FIRST if name in event}
    return _encoder.encode(ordered | dict(event)).decode()


def pretty_line(*, color: bool) -> Callable[[WrappedLogger, str, EventDict], str]:
    """A processor that writes a readable line."""

    def painted(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if color else text

    def line(_: WrappedLogger, __: str, event: EventDict) -> str:
        exception = event.pop("exception", None)
        time = str(event.pop("timestamp", ""))[11:23] + "Z"
        instance = escape_controls(str(event.pop("instance", "")))
        level = escape_controls(str(event.pop("level", "info")))
        name = escape_controls(str(event.pop("event", "")))
        fields = [
            f"{painted(escape_controls(str(key)), '2')}={_shown(value)}"
            for key, value in event.items()
        ]
        painted_level = painted(f"{level:<7}", _COLORS.get(level, "0"))
        first = f"{time} {painted_level} {painted(instance, '2')} {painted(name, '1')}"
        return "\n".join(["  ".join([first, *fields]), *_traceback_lines(exception)])

    return line


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
    text = escape_controls(text)
    if not isinstance(value, str) or _PLAIN.match(text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _traceback_lines(exception: object) -> list[str]:
    """The lines of a traceback; the bar separates them from log lines."""
    if not exception:
        return []
    return [f"  | {escape_controls(line)}" for line in str(exception).split("\n")]

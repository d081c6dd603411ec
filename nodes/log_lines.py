"""The two forms of a log line, from an event whose values are clean.

The pretty form is for eyes: time of day, level, instance, event, then name=value. Control
characters in values are written out, so that no value can forge a line or paint the
terminal. The JSON form is for machines, keys in a fixed order at its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from structlog.typing import EventDict, WrappedLogger

from ..schemas.masking import escape_controls

__all__ = ["json_line", "pretty_line"]

_FIRST = ("timestamp", "level", "event", "instance")
_COLORS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
_PLAIN = re.compile(r"[^\s\"'=]+\Z")

_encoder = msgspec.json.Encoder(enc_hook=str)


def json_line(_: WrappedLogger, __: str, event: EventDict) -> str:
    ordered = {name: event.pop(name) for name in _FIRST if name in event}
    return _encoder.encode(ordered | dict(event)).decode()


def pretty_line(*, color: bool) -> Callable[[WrappedLogger, str, EventDict], str]:
    """A processor that writes for people."""

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
        return "\n".join(["  ".join([first, *fields]), *_barred(exception)])

    return line


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
    text = escape_controls(text)
    if not isinstance(value, str) or _PLAIN.match(text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _barred(exception: object) -> list[str]:
    """The lines of a traceback; the bar tells them from lines of the log."""
    if not exception:
        return []
    return [f"  | {escape_controls(line)}" for line in str(exception).split("\n")]

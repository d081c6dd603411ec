"""What happens to a log event's values before it is written: processors for structlog.

I1  After ``Cleaner`` an event holds only None, truth values, numbers, text, and lists and
    mappings of these, of bounded size, and no secret that it was told of or can see.
I2  ``Repeats`` keeps count of a bounded number of event names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, WrappedLogger

from ..coordinator.clock import Clock
from ..schemas.masking import mask_urls_in
from ..schemas.settings import Secret

__all__ = ["Cleaner", "Keys", "Repeats"]

_TEXT_CHARS_MAX = 16_384
_HEAD_CHARS = 8_192
_ITEMS_MAX = 50
_DEPTH_MAX = 5
_INT_MAX = 2**63
_SECRET_CHARS_MIN = 4  #: replacing shorter ones everywhere would tell them
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:password|passwd|secret|token|authorization|api_key|credentials?)$", re.IGNORECASE
)
_NOT_SECRET = frozenset({"fencing_token", "owner_token"})


class Cleaner:
    """Masks what is secret and makes the rest writable."""

    def __init__(self, secrets: Iterable[Secret] = ()) -> None:
        told = {secret.reveal() for secret in secrets}
        usable = sorted((text for text in told if len(text) >= _SECRET_CHARS_MIN), key=len)
        pattern = "|".join(re.escape(text) for text in reversed(usable))
        self._secrets = re.compile(pattern) if pattern else None

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {self._text(name): self._named(name, value, 0) for name, value in event.items()}

    def _named(self, name: str, value: object, depth: int) -> object:
        named_so = _SECRET_NAME.search(name) and name not in _NOT_SECRET
        if named_so and value and not isinstance(value, int | float):
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
            return self._several(value, depth + 1)
        return self._text(_said_of(value))

    def _several(self, value: Any, depth: int) -> object:
        if isinstance(value, Mapping):
            some = list(value.items())[:_ITEMS_MAX]
            return {
                self._text(_said_of(name)): self._named(_said_of(name), each, depth)
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
            cut = len(text) - _TEXT_CHARS_MAX  # from the middle: a traceback's end matters
            text = f"{text[:_HEAD_CHARS]}... ({cut} characters) ...{text[_HEAD_CHARS + cut :]}"
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _said_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # somebody's __str__; a log line is no place to fail
        return f"({type(value).__name__} that cannot be shown)"


class Keys:
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
    content = key if isinstance(key, bytes) else _said_of(key).encode("utf-8", "backslashreplace")
    return "#" + blake2b(content, digest_size=8).hexdigest()


class _Window:
    __slots__ = ("began_at", "count")

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.count = 0


class Repeats:
    """Drops an error that repeats too fast, and counts what it dropped."""

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

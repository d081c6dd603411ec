"""Every error that Forebay raises, in one tree; those of rate limits are in ``errors_limits``.

Errors carry fields; the class builds the sentence. Whoever catches one decides on
the class or on a field, never on the text. Foreign errors (valkey-py, SQLAlchemy,
aiohttp, msgspec) are translated where they enter, with ``raise ... from``.

Values that may be secret are masked by whoever raises, before they get here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = [
    "RIGHTS",
    "Backpressure",
    "BreakerOpen",
    "BusySinkError",
    "CancelledInside",
    "ConfigError",
    "CoordinationError",
    "DeadLettered",
    "Disconnected",
    "EntryFault",
    "FatalSinkError",
    "Fenced",
    "ForebayError",
    "InvalidEntry",
    "InvalidEvent",
    "InvalidKey",
    "InvalidValue",
    "KeyBusy",
    "Level",
    "LoaderError",
    "NewerSchema",
    "NoJsonForm",
    "NotShareable",
    "PartialFailure",
    "PoisonSinkError",
    "ProcessFailed",
    "ServerRefused",
    "SinkError",
    "SourceFailing",
    "StartupError",
    "TimedOut",
    "TransientSinkError",
    "Unavailable",
    "Unconfirmed",
]

RIGHTS = "docs/operating.md#users-in-valkey"  #: the list of what users need in Valkey

Level = Literal["accepted", "replicated", "sink"]  #: how far a write has got
EventFault = Literal[
    "undecodable",
    "oversized",
    "unknown_type",
    "last_id",
    "wrong_field",
    "no_sink",
    "sink_refused",
    "server_refused",
]
EntryFault = Literal[
    "too_short",
    "bad_magic",
    "newer_format",
    "bad_header",
    "bad_codec",
    "oversized",
    "bad_value",
    "wrong_type",
]


class ForebayError(Exception):
    """The base of all errors raised on purpose."""


class ConfigError(ForebayError):
    """Raised when a setting cannot be used; the program exits with 2."""

    exit_code = 2

    def __init__(self, *, setting: str, value: str, origin: str, problem: str, fix: str) -> None:
        super().__init__(f"{setting} = {value} (from {origin}): {problem}; {fix}")
        self.setting = setting
        self.value = value
        self.origin = origin
        self.problem = problem
        self.fix = fix


class StartupError(ConfigError):
    """Raised when the configured server cannot serve us; the program exits with 3."""

    exit_code = 3


class CancelledInside(ForebayError):
    """Raised when code of the application was cancelled although its call was not."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} was cancelled from inside")
        self.what = what


class Unavailable(ForebayError):
    """Raised when Valkey did not answer.

    ``outcome_unknown`` is true when the command may have been carried out: repeat it
    only if it is idempotent.
    """

    def __init__(self, reason: str, *, outcome_unknown: bool = False) -> None:
        suffix = " (it may have been carried out)" if outcome_unknown else ""
        super().__init__(f"valkey is unavailable: {reason}{suffix}")
        self.reason = reason
        self.outcome_unknown = outcome_unknown


class Disconnected(Unavailable):
    """Raised when the connection went away before the reply, or is not there."""


class TimedOut(Unavailable):
    """Raised when no reply came within the deadline."""

    def __init__(self, timeout_ms: int, *, outcome_unknown: bool = True) -> None:
        super().__init__(f"no reply within {timeout_ms} ms", outcome_unknown=outcome_unknown)
        self.timeout_ms = timeout_ms


class BreakerOpen(Unavailable):
    """Raised at once, without trying, while the circuit breaker is open."""

    def __init__(self, name: str, retry_after_ms: int) -> None:
        super().__init__(f"the breaker of {name} is open, next try in {retry_after_ms} ms")
        self.name = name
        self.retry_after_ms = retry_after_ms


class NotShareable(ForebayError):
    """Raised for a command that would disturb the others on a shared connection; not sent."""

    def __init__(self, command: str, problem: str) -> None:
        super().__init__(f"{command} cannot share a connection: it {problem}")
        self.command = command
        self.problem = problem


_FIXES = {
    "OOM": "raise maxmemory, or remove data; workers go on emptying the streams",
    "WRONGTYPE": "rename or delete that key",
    "NOPERM": f"{RIGHTS} lists the rights that a user needs",
}


class ServerRefused(ForebayError):
    """Raised when the server answered with an error reply; nothing is retried blindly.

    ``key`` is the key at fault, as far as it is known.
    """

    def __init__(self, code: str, message: str, command: str = "", *, key: str = "") -> None:
        at = f", at {key}" if key else ""
        said = f"valkey refused {command or 'the command'}: {code} {message}{at}".rstrip()
        super().__init__(f"{said}; {_FIXES[code]}" if code in _FIXES else said)
        self.code = code
        self.message = message
        self.command = command
        self.key = key

    @property
    def of_type(self) -> bool:
        """Whether a key holds another type; some servers say so within an error of a script."""
        return "WRONGTYPE" in f"{self.code} {self.message}"

    @property
    def of_keys(self) -> bool:
        """Whether the keys of the command are at fault, and not the server as a whole."""
        return self.code in ("WRONGTYPE", "ERR")

    def at(self, key: str) -> ServerRefused:
        """The same, with the key named, unless it was named before."""
        return ServerRefused(self.code, self.message, self.command, key=self.key or key)


class Backpressure(ForebayError):
    """Raised when a stream is at its bound and the deadline for waiting has passed."""

    def __init__(self, stream: str, length: int, bound: int) -> None:
        super().__init__(f"{stream} holds {length} of {bound} entries; slow down and try again")
        self.stream = stream
        self.length = length
        self.bound = bound


class Unconfirmed(ForebayError):
    """Raised when a write was accepted, and what was asked for beyond that did not come in time.

    It may be there or still get there: repeat the write, with the same event id if it has one.
    """

    def __init__(self, level: Level, reached: Level, waited_ms: int) -> None:
        problem = f"{reached}, but not known to be {level} after {waited_ms} ms"
        super().__init__(f"{problem}; it may get there yet, repeat it")
        self.level: Level = level
        self.reached: Level = reached
        self.waited_ms = waited_ms


class KeyBusy(ForebayError):
    """Raised when others had a key for longer than the caller would wait; nothing was done."""

    def __init__(self, key: str, holder: Literal["lease", "write_behind"], waited_ms: int) -> None:
        what = {"lease": "a load or write", "write_behind": "a write-behind"}[holder]
        super().__init__(f"{what} of {key!r} is not over after {waited_ms} ms; try again")
        self.key = key
        self.holder = holder
        self.waited_ms = waited_ms


class DeadLettered(ForebayError):
    """Raised when a write-behind went to the dead letters: the source will never have it."""

    def __init__(self, key: str, job_id: str, reason: str, problem: str) -> None:
        super().__init__(f"the write of {key!r} is a dead letter ({reason}): {problem}")
        self.key = key
        self.job_id = job_id
        self.reason = reason
        self.problem = problem


class Fenced(ForebayError):
    """Raised when another owner has taken over: whatever was under way must stop."""

    def __init__(self, resource: str, epoch: int, current_epoch: int) -> None:
        super().__init__(f"{resource}: epoch {epoch} is over, {current_epoch} is in force")
        self.resource = resource
        self.epoch = epoch
        self.current_epoch = current_epoch


class CoordinationError(ForebayError):
    """The base of errors about what the cluster shares: locks, limits, ownership."""


class InvalidKey(ForebayError):
    """Raised for a key, tag or namespace that the key grammar does not allow, and for an argument
    of another type than its parameter is declared.
    """

    def __init__(self, name: str, value: str, problem: str) -> None:
        shown = value if len(value) <= 80 else value[:77] + "..."
        super().__init__(f"{name} {shown!r} {problem}")
        self.name = name
        self.value = value
        self.problem = problem


class InvalidEvent(ForebayError):
    """Raised for an event that can never be applied; it goes to the dead letters."""

    def __init__(self, fault: EventFault, problem: str, *, field: str = "", fix: str = "") -> None:
        where = f" at {field}" if field else ""
        super().__init__(f"{fault}{where}: {problem}" + (f"; {fix}" if fix else ""))
        self.fault: EventFault = fault
        self.problem = problem
        self.field = field
        self.fix = fix


class NewerSchema(ForebayError):
    """Raised for an event of a type that a newer version of Forebay knows; it is held."""

    def __init__(self, type_name: str) -> None:
        super().__init__(f"{type_name} is newer than this node")
        self.type_name = type_name


class UnreadableRecord(ForebayError):
    """Raised for a malformed record in Valkey, which Forebay did not write."""

    def __init__(self, name: str, found: object, problem: str) -> None:
        shown = ascii(found[:40] if isinstance(found, bytes | str) else type(found).__name__)
        super().__init__(f"{name} {problem}: {shown[:80]}; delete or repair it in Valkey")
        self.name = name
        self.found = shown[:80]
        self.problem = problem


class InvalidEntry(ForebayError):
    """Raised for stored bytes that are no readable entry; the reader counts a miss.

    And for a value that cannot be stored, before it is; users are told so by InvalidValue or
    LoaderError, with the key.
    """

    def __init__(self, fault: EntryFault, problem: str = "") -> None:
        super().__init__(f"{fault}: {problem}" if problem else fault)
        self.fault: EntryFault = fault
        self.problem = problem


class InvalidValue(ForebayError):
    """Raised for a value that no entry of its cache can hold: too large, or of another type."""

    def __init__(self, cache: str, key: str, problem: str, *, fix: str = "") -> None:
        suffix = f"; {fix}" if fix else ""
        super().__init__(f"{cache} cannot hold this value of {key!r}: {problem}{suffix}")
        self.cache = cache
        self.key = key
        self.problem = problem
        self.fix = fix


class NoJsonForm(ForebayError):
    """Raised when a value is requested as JSON, and JSON cannot hold it."""

    def __init__(self, cache: str, key: str, problem: str) -> None:
        super().__init__(f"JSON cannot hold the value of {key!r} in {cache}: {problem}")
        self.cache = cache
        self.key = key
        self.problem = problem


class LoaderError(ForebayError):
    """Raised to a caller when the loader failed and nothing stale could be served."""

    def __init__(self, cache: str, key: str, problem: str) -> None:
        super().__init__(f"the loader of {cache} failed for {key!r}: {problem}")
        self.cache = cache
        self.key = key
        self.problem = problem


class PartialFailure(ForebayError):
    """Raised by a bulk read of which a part failed; what was had is in ``values``."""

    def __init__(
        self, cache: str, values: Mapping[Any, Any], errors: Mapping[Any, Exception]
    ) -> None:
        item, first = next(iter(errors.items()))
        super().__init__(
            f"{len(errors)} of {len(errors) + len(values)} items of {cache} failed, "
            f"the first {item!r}: {type(first).__name__}: {first}"
        )
        self.cache = cache
        self.values = values
        self.errors = errors


class SourceFailing(LoaderError):
    """Raised at once, without a call of the loader, while its source is known to fail."""

    def __init__(self, cache: str, key: str, retry_after_ms: int) -> None:
        super().__init__(cache, key, f"its source fails, next try in {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms


class SinkError(ForebayError):
    """The base of what a sink raises; the class says what the worker does next.

    ``outcome_unknown`` is true when the batch may have been stored all the same.
    """

    def __init__(self, problem: str = "", *, outcome_unknown: bool = False) -> None:
        super().__init__(problem)
        self.outcome_unknown = outcome_unknown


class TransientSinkError(SinkError):
    """Raised when trying again later may work: the sink is paused and retried."""


class BusySinkError(TransientSinkError):
    """Raised when a row of the batch cannot be changed now, since another transaction holds it:
    the batch is split, and only the shard of that row waits.
    """

    def __init__(
        self, problem: str = "", *, table: str = "", outcome_unknown: bool = False
    ) -> None:
        super().__init__(problem, outcome_unknown=outcome_unknown)
        self.table = table


class PoisonSinkError(SinkError):
    """Raised when this batch can never work: it is bisected down to the entry at fault."""


class FatalSinkError(SinkError):
    """Raised when no batch can work (no such table, wrong password): the sink stops."""


class ProcessFailed(ForebayError):
    """Raised when a process that we started ended by itself, or never became ready."""

    def __init__(self, name: str, problem: str, *, said: str = "", exit_code: int = 1) -> None:
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem
        self.said = said  #: the end of its log
        self.exit_code = exit_code

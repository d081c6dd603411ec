"""What can be set, with its default and its limits. Finding the values is settings_sources.

I1  Every setting has exactly one default: the one in this file.
I2  A value outside its limits never gets past decoding.
I3  A secret is a ``Secret``: its ``repr`` and ``str`` are masked, only ``reveal()`` tells. A URL is
    text, and may hold a password where settings are made in code: ``repr`` and ``str`` of the
    settings mask it, and so does what ``rich`` shows of them.

Names carry their unit. Nothing here reads the environment, a file or a clock.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from msgspec import Meta, Struct

from .limits import Limit
from .masking import mask_url

__all__ = [
    "LEASE_MS_MAX",
    "CacheDefaults",
    "Compression",
    "Durable",
    "HostName",
    "Http",
    "Limiter",
    "Limits",
    "Log",
    "NodeSettings",
    "Secret",
    "Settings",
    "Valkey",
    "Workers",
]

LEASE_MS_MAX = 600_000
Port = Annotated[int, Meta(ge=0, le=65_535)]
Millis = Annotated[int, Meta(ge=1, le=86_400_000)]
Count = Annotated[int, Meta(ge=1, le=100_000_000)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Label = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,16}$")]
Compression = Literal["zlib", "zstd", "none"]
HostName = Annotated[
    str, Meta(pattern=r"^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?$")
]


class Secret:
    """A string that does not show itself."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret('***')" if self._value else "Secret('')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Valkey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server is and how long to wait for it."""

    url: str = ""  #: empty: an embedded server is started
    reader_url: str = ""  #: accepted, and not used: all reads go to the primary
    username: str = ""
    password: Secret = Secret("")
    fake: bool = False  #: fakeredis in this process, for trying out only
    embedded_dir: str = ""  #: data directory of the embedded server; empty: a temporary one
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_insecure: bool = False  #: skip the checks of certificate and host name
    connect_timeout_ms: Millis = 1_000
    command_timeout_ms: Millis = 1_000
    startup_timeout_ms: Millis = 10_000
    in_flight_max: Count = 50_000  #: commands sent and not answered, on one connection
    breaker_failures: Annotated[int, Meta(ge=1, le=1_000)] = 5
    breaker_recovery_ms: Millis = 2_000
    reconnect_jitter_ms: Millis = 250  #: spread before the first try of a reconnect
    reconnect_max_ms: Millis = 5_000
    replicas_min: Annotated[int, Meta(ge=1, le=16)] = 1  #: that "replicated" asks for

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"Valkey({fields})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        masked = {name: mask_url(values[name]) for name in ("url", "reader_url")}
        return list((values | masked).items())


class Http(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The endpoint for events, health, stats and metrics."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 8642  #: 0: any free one
    body_bytes_max: Annotated[int, Meta(ge=1_024, le=67_108_864)] = 1_048_576
    header_timeout_ms: Millis = 3_000
    body_timeout_ms: Millis = 10_000
    connections_max: Annotated[int, Meta(ge=1, le=65_536)] = 1_024
    batch_events_max: Annotated[int, Meta(ge=1, le=10_000)] = 100
    coordinator: bool | None = None  #: serve locks and limits; unset: where workers run
    token_file: str = ""  #: every request below /v1 then needs this bearer token
    open: bool = False  #: whether other machines may reach it without a token
    hosts: tuple[HostName, ...] = ()  #: names that clients may use; "*.x" is every name below x

    @property
    def reachable(self) -> bool:
        """Whether other machines may reach it. A name may be any address, except localhost."""
        if not self.enabled or self.host.lower() == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "pretty"] = "auto"  #: auto: pretty on a terminal
    keys: Literal["full", "hash", "none"] = "full"  #: how cache keys appear in logs


class CacheDefaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a cache gets that does not say otherwise."""

    version: Label = "0"  #: entries of another one are not read; only equality counts
    near_entries_max: Count = 100_000
    near_bytes_max: Count = 67_108_864
    near_value_bytes_max: Annotated[int, Meta(ge=1, le=67_108_864)] = 262_144
    near_negatives_max: Count = 10_000  #: known absences, beside the entries with a value
    near_policy: Literal["sieve", "lru"] = "sieve"  #: who has to go when there is no room
    max_staleness_ms: Millis = 500
    on_disconnected: Literal["bypass", "stale", "fail"] = "bypass"
    value_bytes_max: Annotated[int, Meta(ge=1, le=67_108_864)] = 1_048_576
    compression: Compression = "zlib"  #: of what is written; zstd needs the extra zstd
    compress_over_bytes: Annotated[int, Meta(ge=0, le=67_108_864)] = 1_024
    lease_ms: Annotated[int, Meta(ge=100, le=LEASE_MS_MAX)] = 10_000  #: one load takes no longer
    jitter: Annotated[float, Meta(ge=0, le=0.5)] = 0.05
    throttle_ms: Millis = 1_000  #: how long a source is left alone that failed for a key
    breaker_failures: Annotated[int, Meta(ge=1, le=1_000)] = 5  #: of loads in a row, per cache
    breaker_recovery_ms: Millis = 2_000
    external_writers: bool = False  #: follow what others do to entries in Valkey itself


class Durable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the streams."""

    event_bytes_max: Annotated[int, Meta(ge=256, le=1_048_576)] = 65_536
    events_max: Count = 1_000_000  #: ingress entries not yet applied
    writes_max: Count = 100_000  #: write-behind entries of one shard not yet sunk
    refreshes_max: Count = 1_000
    dead_letters_max: Count = 10_000
    log_retain: Annotated[int, Meta(ge=100, le=10_000_000)] = 10_000  #: notices kept per shard
    dedupe_ms: Millis = 60_000  #: how long an event id is remembered


class Workers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the cluster's work that this node takes."""

    enabled: bool | None = None  #: unset: if the node has sinks, or is run by `forebay run`
    ownership_ttl_ms: Annotated[int, Meta(ge=1_000, le=60_000)] = 4_000
    beat_ms: Annotated[int, Meta(ge=100, le=20_000)] = 1_000
    handover_ms: Annotated[int, Meta(ge=1_000, le=600_000)] = 30_000  #: then it goes by force
    rejoin_grace_ms: Annotated[int, Meta(ge=0, le=600_000)] = 10_000  #: with node.id only
    weight: Annotated[float, Meta(ge=0, le=1_000)] = 1.0  #: of the share of the work; 0: none
    flush_rows_max: Annotated[int, Meta(ge=1, le=100_000)] = 1_000
    flush_delay_ms: Annotated[int, Meta(ge=0, le=60_000)] = 20
    attempts_max: Annotated[int, Meta(ge=1, le=100)] = 5
    hold_ms: Annotated[int, Meta(ge=100, le=2_592_000_000)] = (
        3_600_000  #: for a worker with the sink
    )
    drain_ms: Millis = 20_000


class Limiter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rate limits: the default one is max_tokens in every window_s."""

    max_tokens: Count = 100
    window_s: Annotated[float, Meta(gt=0, le=86_400)] = 1.0
    budget_ms: Millis = 50  #: how long a decision may wait for Valkey
    named: tuple[Limit, ...] = ()  #: from tables [limits.NAME], or given in code


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds inside one process."""

    loads_max: Count = 1_000  #: loaders running at a time
    waiters_max: Count = 100_000  #: callers waiting for loads


class NodeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    namespace: Name = "default"
    id: str = ""  #: empty: host name, process id and a random part
    shards: Annotated[int, Meta(ge=1, le=1_024)] = 64  #: fixed when the namespace is born


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    node: NodeSettings = NodeSettings()
    valkey: Valkey = Valkey()
    http: Http = Http()
    log: Log = Log()
    cache: CacheDefaults = CacheDefaults()
    durable: Durable = Durable()
    workers: Workers = Workers()
    limiter: Limiter = Limiter()
    limits: Limits = Limits()

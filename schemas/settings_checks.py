"""What settings must hold together that each may hold alone.

Each rule has a complaint for every setting that has a part in it: what is wrong, and
what to do. The first of these that somebody set is named; a default is not to blame for
what was set against it. A rule is there because the pair that it refuses would start,
and fail or do something unwanted later: talk in plain text where certificates were
given, lose shards between two heartbeats, drop what a drain had no time to flush.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .errors import ConfigError
from .errors_limits import InvalidLimit
from .settings import Settings
from .settings_limits import default_limit
from .settings_names import shown
from .urls import Endpoint, endpoint_of

__all__ = ["check"]

Complaint = tuple[str, str, str]  #: setting, problem, fix
Rule = Callable[[Settings], Iterator[Complaint]]


def check(settings: Settings, origins: Mapping[str, str]) -> None:
    """Raise ConfigError for the first rule that the settings break."""
    for rule in _RULES:
        complaints = list(rule(settings))
        if not complaints:
            continue
        was_set = (each for each in complaints if origins.get(each[0], "default") != "default")
        name, problem, fix = next(was_set, complaints[0])
        raise ConfigError(
            setting=name,
            value=shown(name, _value(settings, name)),
            origin=origins.get(name, "default"),
            problem=problem,
            fix=fix,
        )


def _value(settings: Settings, name: str) -> object:
    section, _, leaf = name.partition(".")
    return getattr(getattr(settings, section), leaf)


def _fake(settings: Settings) -> Iterator[Complaint]:
    valkey = settings.valkey
    if not valkey.fake:
        return
    for leaf in ("url", "reader_url", "embedded_dir"):
        if getattr(valkey, leaf):
            fix = f"unset valkey.fake to use the server, or valkey.{leaf} to try out without one"
            yield "valkey.fake", f"a fake server cannot go with valkey.{leaf}", fix


def _credentials(settings: Settings) -> Iterator[Complaint]:
    """An embedded server has no users: whoever gives a user means another server."""
    valkey = settings.valkey
    if valkey.url or valkey.fake:
        return
    for leaf in ("username", "password"):
        if getattr(valkey, leaf):
            yield f"valkey.{leaf}", "nothing names its server", "set valkey.url, or unset this"


def _reader(settings: Settings) -> Iterator[Complaint]:
    reader, primary = endpoint_of(settings.valkey, reader=True), endpoint_of(settings.valkey)
    if reader is None:
        return
    name = "valkey.reader_url"
    if primary is None:
        yield name, "there is a reader but no primary", "set valkey.url too"
    elif reader.db != primary.db:
        fix = f"write database {primary.db}, or change valkey.url"
        yield name, f"valkey.url names database {primary.db}, this one {reader.db}", fix
    elif primary.tls and not reader.tls and not reader.path:
        fix = "write valkeys://, or valkey:// in valkey.url"
        yield name, "valkey.url asks for TLS, this one does not", fix


def _tls(settings: Settings) -> Iterator[Complaint]:
    valkey = settings.valkey
    for have, lack in (("tls_cert_file", "tls_key_file"), ("tls_key_file", "tls_cert_file")):
        if getattr(valkey, have) and not getattr(valkey, lack):
            yield f"valkey.{have}", f"it needs valkey.{lack}", "set both, or none"
    endpoint = endpoint_of(valkey)
    if _encrypted(endpoint):
        return
    for leaf in ("tls_ca_file", "tls_cert_file", "tls_insecure"):
        if getattr(valkey, leaf):
            where = "valkey.url does not ask for TLS" if endpoint else "valkey.url is not set"
            yield f"valkey.{leaf}", where, "write valkeys:// in valkey.url, or unset this"


def _encrypted(endpoint: Endpoint | None) -> bool:
    return endpoint is not None and endpoint.tls


def _at_most(smaller: str, greater: str, why: str) -> Rule:
    def rule(settings: Settings) -> Iterator[Complaint]:
        value, bound = _value(settings, smaller), _value(settings, greater)
        if isinstance(value, int) and isinstance(bound, int) and value > bound:
            yield (
                smaller,
                f"it is above {greater} = {bound}: {why}",
                f"lower it, or raise {greater}",
            )
            yield (
                greater,
                f"it is below {smaller} = {value}: {why}",
                f"raise it, or lower {smaller}",
            )

    return rule


def _beats(settings: Settings) -> Iterator[Complaint]:
    beat_ms, ttl_ms = settings.workers.beat_ms, settings.workers.ownership_ttl_ms
    if beat_ms * 3 > ttl_ms:
        why = "one lost beat, and a late one, would lose the shards"
        problem = f"three beats take longer than workers.ownership_ttl_ms = {ttl_ms}: {why}"
        yield "workers.beat_ms", problem, f"set it to at most {ttl_ms // 3}"
        problem = f"it is shorter than three beats of workers.beat_ms = {beat_ms}: {why}"
        yield "workers.ownership_ttl_ms", problem, f"set it to at least {beat_ms * 3}"


def _flush(settings: Settings) -> Iterator[Complaint]:
    delay_ms, drain_ms = settings.workers.flush_delay_ms, settings.workers.drain_ms
    if delay_ms >= drain_ms:
        problem = f"workers.drain_ms = {drain_ms} ends before a flush begins"
        yield "workers.flush_delay_ms", problem, "lower it, or raise workers.drain_ms"
        problem = f"it ends before a flush begins, after workers.flush_delay_ms = {delay_ms}"
        yield "workers.drain_ms", problem, "raise it, or lower workers.flush_delay_ms"


def _host(settings: Settings) -> Iterator[Complaint]:
    if not settings.http.host:
        fix = "write 127.0.0.1, or 0.0.0.0 for all interfaces"
        yield "http.host", "an empty host would listen on all interfaces", fix


def _exposed(settings: Settings) -> Iterator[Complaint]:
    http = settings.http
    if http.reachable and not http.token_file and not http.open:
        problem = "other machines may reach it, and it asks nobody for a token"
        fix = "set http.token_file; or http.open = true if only trusted clients reach it"
        yield "http.host", problem, fix


def _default_limit(settings: Settings) -> Iterator[Complaint]:
    try:
        default_limit(settings.limiter)
    except InvalidLimit as error:
        for name in ("limiter.max_tokens", "limiter.window_s"):
            yield name, f"the two make no limit: {error.field} {error.problem}", error.fix


_RULES: tuple[Rule, ...] = (
    _fake,
    _credentials,
    _reader,
    _tls,
    _beats,
    _flush,
    _host,
    _exposed,
    _default_limit,
    _at_most("valkey.connect_timeout_ms", "valkey.startup_timeout_ms", "no try could end in time"),
    _at_most("valkey.reconnect_jitter_ms", "valkey.reconnect_max_ms", "it is part of that wait"),
    _at_most("durable.event_bytes_max", "http.body_bytes_max", "such an event could not be posted"),
)

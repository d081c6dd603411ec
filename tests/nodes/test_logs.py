"""The log of a process: one stream, two forms, no secrets, no floods."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from forebay.nodes.logs import configure_embedded, configure_logs
from forebay.schemas.settings import Log, Secret, Valkey
from support.clock import ManualClock

CANARY = "canary-7f3a"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    quiet = {name: logging.getLogger(name).level for name in ("aiohttp.access", "aiosqlite")}
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()


def fail(text: str) -> None:
    raise ValueError(text)


def started(settings: Log | None = None, stream: io.StringIO | None = None, **more: Any) -> Any:
    """A logger, and a function that returns the written lines."""
    stream = stream or io.StringIO()
    configure_logs(settings or Log(format="json"), instance="node-1", stream=stream, **more)

    def lines() -> list[str]:
        return stream.getvalue().splitlines()

    return structlog.get_logger("forebay.test"), lines


def test_json_line_has_the_four_keys_first() -> None:
    """I1: timestamp in UTC, level, event and instance, then the fields."""
    log, lines = started()

    log.info("lease.lost", shard=7)

    event = json.loads(lines()[0])
    assert list(event) == ["timestamp", "level", "event", "instance", "shard"]
    assert event["timestamp"].endswith("Z")
    assert (event["level"], event["event"], event["instance"], event["shard"]) == (
        "info",
        "lease.lost",
        "node-1",
        7,
    )


@pytest.mark.parametrize(
    "settings, stream, is_json",
    [
        (Log(), io.StringIO(), True),
        (Log(), Terminal(), False),
        (Log(format="json"), Terminal(), True),
        (Log(format="pretty"), io.StringIO(), False),
    ],
)
def test_the_form_follows_the_stream_unless_set(
    settings: Log, stream: io.StringIO, is_json: bool
) -> None:
    """auto is pretty on a terminal and JSON elsewhere; log.format overrides it."""
    log, lines = started(settings, stream)

    log.warning("shard.suspect", shard=3)

    assert lines()[0].startswith("{") is is_json
    assert "shard.suspect" in lines()[0]
    assert "node-1" in lines()[0]


def test_below_the_level_nothing_is_written() -> None:
    """log.level applies to the loggers of Forebay and of the libraries."""
    log, lines = started(Log(level="warning", format="json"))

    log.info("a.b")
    logging.getLogger("library").info("talk")
    logging.getLogger("aiohttp.access").warning("GET /")
    log.warning("c.d")

    assert [json.loads(line)["event"] for line in lines()] == ["GET /", "c.d"]


def test_access_and_statement_logs_stay_quiet_even_at_debug() -> None:
    """Level debug does not log a line per request, or per statement with its values."""
    log, lines = started(Log(level="debug", format="json"))

    logging.getLogger("aiohttp.access").info("GET /")
    logging.getLogger("aiosqlite").debug("INSERT %s", CANARY)
    log.debug("a.b")

    assert [json.loads(line)["event"] for line in lines()] == ["a.b"]


def test_stdlib_records_take_the_same_way() -> None:
    """A record of a library becomes a line of the same form, with its logger and traceback."""
    _, lines = started()

    try:
        fail(f"no redis://u:{CANARY}@h")
    except ValueError:
        logging.getLogger("library").exception("failed for %s", "x")

    event = json.loads(lines()[0])
    assert (event["level"], event["event"], event["logger"]) == ("error", "failed for x", "library")
    assert "ValueError: no redis://u:***@h" in event["exception"]
    assert event["instance"] == "node-1"


def test_warnings_become_log_lines() -> None:
    """Output of the warnings module becomes a log line."""
    _, lines = started()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    assert json.loads(lines()[0])["logger"] == "py.warnings"


def test_configuring_again_replaces_and_does_not_double() -> None:
    """Existing loggers follow a second configuration, and a record is written once."""
    log, first = started()
    _, second = started()

    log.info("a.b")
    logging.getLogger("library").warning("talk")

    assert first() == []
    assert len(second()) == 2


class Unshowable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def secretive() -> list[tuple[str, object]]:
    url = f"valkey://app:{CANARY}@h:6379"
    return [
        ("url", url),
        ("text", f"connecting to {url} failed"),
        ("data", url.encode()),
        ("long", "x" * 16_376 + url),
        ("tail", "x" * 20_000 + url),
        ("secret_object", Secret(CANARY)),
        ("nested", {"a": [{"password": CANARY}, (url, {Secret(CANARY)})]}),
        ("deep", {"a": {"b": {"c": {"d": {"e": {"f": {"password": Secret(CANARY)}}}}}}}),
        ("password", CANARY),
        ("valkey_password", CANARY.encode()),
        ("api_key", [CANARY]),
        ("Authorization", f"Bearer {CANARY}"),
        ("error", ValueError(url)),
        ("settings", Valkey(url="valkey://h", password=Secret(CANARY))),
        (url, 1),
        ("names", {url: 1}),
    ]


@pytest.mark.parametrize("form", ["json", "pretty"])
@pytest.mark.parametrize("name, value", secretive(), ids=lambda v: str(v)[:12])
def test_no_field_shows_a_secret(form: Any, name: str, value: object) -> None:
    """I2: URLs, Secret objects and fields named like secrets, at any depth, in both forms."""
    log, lines = started(Log(format=form))

    log.warning("backend.refused", **{name: value})
    text = f"to redis://:{CANARY}@h"
    log.warning(text)

    assert len(lines()) == 2
    assert CANARY not in "\n".join(lines())
    assert "***" in lines()[0] or name in ("tail", "deep")


@pytest.mark.parametrize("form", ["json", "pretty"])
def test_secrets_that_were_told_never_show(form: Any) -> None:
    """I2: a secret passed to configure_logs is masked everywhere, tracebacks included."""
    log, lines = started(Log(format=form), secrets=[Secret(CANARY), Secret("")])

    try:
        fail(f"AUTH {CANARY} refused")
    except ValueError:
        log.exception("backend.refused", text=f"<{CANARY}>")
    logging.getLogger("library").warning("password is %s", CANARY)

    text = "\n".join(lines())
    assert CANARY not in text
    assert "AUTH *** refused" in text


def test_fencing_tokens_and_counts_are_no_secrets() -> None:
    """Numbers, and the tokens in log lines of locks, stay readable."""
    log, lines = started()

    log.info("lease.granted", token=17, fencing_token="18", tokens=3, token_count=1)

    event = json.loads(lines()[0])
    assert [event[k] for k in ("token", "fencing_token", "tokens", "token_count")] == [
        17,
        "18",
        3,
        1,
    ]


@pytest.mark.parametrize("form", ["json", "pretty"])
def test_values_that_cannot_be_written_do_not_raise(form: Any) -> None:
    """I4: unusual numbers, lone surrogates, endless structures and broken objects become text."""
    log, lines = started(Log(format=form))
    endless: list[object] = []
    endless.append(endless)

    log.info(
        "a.b", nan=float("nan"), big=2**80, text="\ud800", broken=Unshowable(), loop=endless,
        raw=b"\xff", many=list(range(1000)), none=None, mapping={1: 2, None: 3},
    )  # fmt: skip

    assert len(lines()) == 1
    assert len(lines()[0]) < 2_000
    assert "(Unshowable that cannot be shown)" in lines()[0]
    assert "and 950 more" in lines()[0]


def test_a_long_text_keeps_its_end() -> None:
    """Long text loses its middle: the last line of a traceback is kept."""
    log, lines = started()

    log.info("a.b", text="begin" + "x" * 100_000 + "end")

    text = json.loads(lines()[0])["text"]
    assert text.startswith("begin")
    assert text.endswith("end")
    assert len(text) < 17_000


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_broken_stream_does_not_raise() -> None:
    """I4: a closed log reader does not end the node."""
    log, lines = started(stream=Closed())

    log.error("a.b")
    logging.getLogger("library").error("talk")

    assert lines() == []


def test_a_value_cannot_forge_a_line_or_paint_the_terminal() -> None:
    """I1: the pretty form escapes CR, LF and escape sequences."""
    log, lines = started(Log(format="pretty"))

    log.info("a.b\nforged", value="x\r\n12:00:00 error forged \x1b[31m\x9b2J", **{"n\n": "y\u202e"})

    assert len(lines()) == 1
    assert "\\r\\n12:00:00" in lines()[0]
    assert "\\x1b[31m\\x9b2J" in lines()[0]
    assert not set(lines()[0]) & set("\x1b\x9b\r\u202e")


def test_the_lines_of_a_traceback_are_set_off() -> None:
    """A line break in an exception's text cannot forge a log line."""
    log, lines = started(Log(format="pretty"))

    try:
        fail("boom\n12:00:00.000Z error forged")
    except ValueError:
        log.exception("a.b")

    assert len(lines()) > 3
    assert all(line.startswith("  | ") for line in lines()[1:])
    assert lines()[-1] == "  | 12:00:00.000Z error forged"


def test_colors_only_when_asked_for() -> None:
    """The pretty form is plain text unless the caller enables colors."""
    log, lines = started(Log(format="pretty"), color=True)
    log.error("a.b", x="y z")
    coloured = lines()[0]
    log, lines = started(Log(format="pretty"))
    log.error("a.b", x="y z")

    assert "\x1b[31m" in coloured
    assert "\x1b" not in lines()[0]
    assert lines()[0].endswith('a.b  x="y z"')


def test_repeated_errors_are_suppressed_and_counted() -> None:
    """I3: ten errors of one name are written in ten seconds; the next one reports the count."""
    clock = ManualClock()
    log, lines = started(clock=clock)

    for _ in range(25):
        log.error("sink.failed")
    log.error("other.failed")
    for _ in range(25):
        log.warning("sink.slow")
    assert [json.loads(line)["event"] for line in lines()].count("sink.failed") == 10
    assert len(lines()) == 36

    clock.now_s += 9.9
    log.error("sink.failed")
    assert len(lines()) == 36

    clock.now_s += 0.1
    log.error("sink.failed")
    log.error("sink.failed")
    latest = [json.loads(line) for line in lines()[36:]]
    assert [event.get("suppressed") for event in latest] == [16, None]


def test_repeated_library_errors_count_by_their_template() -> None:
    """A library message with changing values is one repeated error."""
    _, lines = started(clock=ManualClock())

    for number in range(25):
        logging.getLogger("library").error("connection %d lost", number)

    assert len(lines()) == 10
    assert "repeat_of" not in lines()[0]


@pytest.mark.parametrize(
    "form, key, keys",
    [
        ("full", "user:1", ["user:1", "user:2"]),
        ("none", "(a key)", "(2 keys)"),
        ("hash", "#", "#"),
    ],
)
def test_cache_keys_appear_as_set(form: Any, key: str, keys: object) -> None:
    """I5: log.keys sets the form of the fields key and keys; equal keys have equal hashes."""
    log, lines = started(Log(format="json", keys=form))

    log.info("entry.filled", key="user:1", keys=["user:1", "user:2"])

    event = json.loads(lines()[0])
    if form != "hash":
        assert (event["key"], event["keys"]) == (key, keys)
        return
    assert event["key"] == event["keys"][0] != event["keys"][1]
    assert event["key"].startswith("#")
    assert "user" not in lines()[0]


def test_bound_context_is_part_of_the_line() -> None:
    """Values bound to the logger or the context, such as a trace id, are written too."""
    log, lines = started()

    with structlog.contextvars.bound_contextvars(trace_id="t1", instance="forged"):
        log.bind(shard=3).info("a.b")

    event = json.loads(lines()[0])
    assert (event["trace_id"], event["shard"], event["instance"]) == ("t1", 3, "node-1")


@pytest.mark.parametrize(("level", "events"), [("info", ["a", "b"]), ("warning", ["b"])])
def test_embedded_node_speaks_on_stderr_from_its_level(
    capsys: pytest.CaptureFixture[str], level: Any, events: list[str]
) -> None:
    """Each start of a node configures structlog, unless the application has done so."""
    structlog.reset_defaults()
    configure_embedded(Log(level="debug"), instance="-")
    configure_embedded(Log(level=level), instance="node-1", secrets=[Secret(CANARY)])
    log = structlog.get_logger("forebay.test")
    log.info("a", seen=CANARY)
    log.warning("b", seen=CANARY)
    logging.getLogger("elsewhere").warning("not ours")
    out, err = capsys.readouterr()
    assert out == ""
    assert [json.loads(line)["event"] for line in err.splitlines()] == events
    assert CANARY not in err


def test_application_that_has_configured_structlog_keeps_it() -> None:
    """A partial configuration by the application is kept."""
    structlog.reset_defaults()
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    before = structlog.get_config()
    configure_embedded(Log(level="error"), instance="node-1")
    assert structlog.get_config() == before


def test_stderr_that_is_gone_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """I4: a closed stream or a closed reader raises nothing."""
    structlog.reset_defaults()
    configure_embedded(Log(), instance="node-1")
    monkeypatch.setattr(sys, "stderr", None)
    structlog.get_logger("forebay.test").info("a")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    structlog.get_logger("forebay.test").info("a")
    assert sys.stderr.closed

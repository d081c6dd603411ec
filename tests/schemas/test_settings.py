"""The sources of settings: order, origins, and errors that tell what to do."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

import msgspec
import pytest

from forebay.schemas.errors import ConfigError
from forebay.schemas.settings import Secret, Settings
from forebay.schemas.settings_env import misspelt_names
from forebay.schemas.settings_names import FIELDS
from forebay.schemas.settings_sources import FileSource, Resolved, describe, resolve

CANARY = "canary-7f3a"
URL = "valkey://db.example:6379/0"


def settle(
    toml: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    files: Mapping[str, str] | None = None,
) -> Resolved:
    return resolve(
        file=None if toml is None else FileSource(path="forebay.toml", text=toml),
        environ=environ or {},
        flags=flags or {},
        read_secret=(files or {}).get,
    )


def refusal(
    toml: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    files: Mapping[str, str] | None = None,
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        settle(toml, environ, flags, files)
    return caught.value


def test_without_any_source_the_defaults_hold() -> None:
    """No file, no environment, no flags: exactly the struct's defaults."""
    resolved = settle()

    assert resolved.settings == Settings()
    assert set(resolved.origins.values()) == {"default"}
    assert set(resolved.origins) == set(FIELDS)


def test_file_then_environment_then_flags() -> None:
    """Defaults < file < environment < flags, and the origin names the winner."""
    toml = "[http]\nport = 1\n[log]\nlevel = 'debug'\n[cache]\njitter = 0"
    environ = {"FOREBAY_HTTP__PORT": "2", "FOREBAY_LOG__LEVEL": "error"}

    resolved = settle(toml, environ, {"port": 3, "host": None})

    assert resolved.settings.http.port == 3
    assert resolved.origins["http.port"] == "flag --port"
    assert resolved.settings.log.level == "error"
    assert resolved.origins["log.level"] == "environment FOREBAY_LOG__LEVEL"
    assert resolved.settings.cache.jitter == 0.0
    assert resolved.origins["cache.jitter"] == "file forebay.toml"
    assert resolved.origins["http.host"] == "default"


@pytest.mark.parametrize(
    "variable, text, name, value",
    [
        ("FOREBAY_URL", "redis://h", "valkey.url", "redis://h:6379/0"),
        ("FOREBAY_NAMESPACE", "shop", "node.namespace", "shop"),
        ("VALKEY_URL", "valkeys://h:1/2", "valkey.url", "valkeys://h:1/2"),
        ("VALKEY_HOST", "h", "valkey.url", "valkey://h:6379/0"),
        ("VALKEY_HOST", "::1", "valkey.url", "valkey://[::1]:6379/0"),
        ("VALKEY_HOST", "/run/v.sock", "valkey.url", "unix:///run/v.sock"),
        ("VALKEY_PORT", "7000", "valkey.url", "valkey://localhost:7000/0"),
        ("VALKEY_FAKE", "1", "valkey.fake", True),
        ("CACHE_VER", "7", "cache.version", "7"),
        ("CACHE_VER", "v9.1-b_2", "cache.version", "v9.1-b_2"),
        ("RATE_MAX_TOKENS", "50", "limiter.max_tokens", 50),
        ("RATE_WINDOW_SEC", "2.5", "limiter.window_s", 2.5),
        ("FOREBAY_WORKERS__ENABLED", "false", "workers.enabled", False),
    ],
)
def test_short_and_neutral_names_are_honoured(
    variable: str, text: str, name: str, value: object
) -> None:
    """Each alias sets its setting and is named as the origin."""
    resolved = settle(environ={variable: text})
    section, leaf = name.split(".")

    assert getattr(getattr(resolved.settings, section), leaf) == value
    assert resolved.origins[name] == f"environment {variable}"


def test_neutral_address_is_assembled() -> None:
    """Host, port, database and TLS become one URL; the reader follows the primary."""
    environ = {
        "VALKEY_HOST": "db",
        "VALKEY_PORT": "7000",
        "VALKEY_DB": "3",
        "VALKEY_SSL": "true",
        "VALKEY_READER_ENDPOINT": "replica:7001",
        "VALKEY_USERNAME": "app",
    }
    resolved = settle(environ=environ)

    assert resolved.settings.valkey.url == "valkeys://db:7000/3"
    assert resolved.settings.valkey.reader_url == "valkeys://replica:7001/3"
    assert resolved.settings.valkey.username == "app"
    origin = "environment VALKEY_HOST, VALKEY_PORT, VALKEY_DB, VALKEY_SSL"
    assert resolved.origins["valkey.url"] == origin


@pytest.mark.parametrize(
    "environ, reader",
    [
        ({"VALKEY_HOST": "a", "VALKEY_READER_HOST": "b"}, "valkey://b:6379/0"),
        (
            {"VALKEY_HOST": "a", "VALKEY_PORT": "7", "VALKEY_READER_HOST": "b"},
            "valkey://b:7/0",
        ),
        (
            {"VALKEY_HOST": "a", "VALKEY_READER_HOST": "b", "VALKEY_READER_PORT": "8"},
            "valkey://b:8/0",
        ),
        ({"FOREBAY_URL": "rediss://a/4", "VALKEY_READER_HOST": "b"}, "valkeys://b:6379/4"),
        ({"FOREBAY_URL_FILE": "/url", "VALKEY_READER_HOST": "b"}, "valkeys://b:6379/4"),
        (
            {"VALKEY_WRITER_ENDPOINT": "a", "VALKEY_WRITER_PORT": "7", "VALKEY_READER_HOST": "b"},
            "valkey://b:7/0",
        ),
        (
            {"VALKEY_URL": "redis://a", "VALKEY_READER_ENDPOINT": "redis://b:9"},
            "redis://b:9/0",
        ),
    ],
)
def test_a_bare_reader_host_is_completed_from_the_primary(
    environ: dict[str, str], reader: str
) -> None:
    """TLS and database of the reader are those of the primary; its port is its own first."""
    files = {"/url": "valkeys://a/4"}
    assert settle(environ=environ, files=files).settings.valkey.reader_url == reader


#: the environment of the service that Forebay grew out of
BEFORE = {
    "VALKEY_FAKE": "0",
    "VALKEY_USER": "app",
    "VALKEY_PASSWORD": CANARY,
    "VALKEY_WRITER_ENDPOINT": "primary.example",
    "VALKEY_WRITER_PORT": "7000",
    "VALKEY_READER_ENDPOINT": "replica.example",
    "VALKEY_READER_PORT": "7001",
    "VALKEY_TLS": "true",
    "VALKEY_DB": "3",
    "CACHE_VER": "7",
    "RATE_MAX_TOKENS": "50",
    "RATE_WINDOW_SEC": "2.5",
}


def test_the_environment_of_the_service_before_is_understood() -> None:
    """Each of its names sets what it says; the reader is accepted, and a warning says that it is
    not used."""
    resolved = settle(environ=BEFORE)
    valkey = resolved.settings.valkey

    assert (valkey.url, valkey.reader_url) == (
        "valkeys://primary.example:7000/3",
        "valkeys://replica.example:7001/3",
    )
    assert (valkey.username, valkey.password, valkey.fake) == ("app", Secret(CANARY), False)
    assert resolved.settings.cache.version == "7"
    limiter = resolved.settings.limiter
    assert (limiter.max_tokens, limiter.window_s) == (50, 2.5)
    (warning,) = resolved.warnings
    assert (warning.setting, warning.origin) == (
        "valkey.reader_url",
        "environment VALKEY_READER_ENDPOINT",
    )
    assert "all reads go to valkey.url" in warning.problem


def test_a_reader_that_is_the_primary_is_no_warning() -> None:
    """The service before had one server under both names where there was no replica."""
    environ = {**BEFORE, "VALKEY_READER_ENDPOINT": "primary.example", "VALKEY_READER_PORT": "7000"}
    assert settle(environ=environ).warnings == ()


@pytest.mark.parametrize("name", sorted({*BEFORE, "VALKEY_SSL"} - {"VALKEY_WRITER_ENDPOINT"}))
def test_whatever_describes_a_server_needs_an_address(name: str) -> None:
    """I5: alone, each VALKEY_* name but VALKEY_FAKE is refused; an embedded server would start."""
    environ = {name: BEFORE.get(name, "false")}
    if name.startswith("VALKEY_") and name != "VALKEY_FAKE":
        error = refusal(environ=environ)
        assert (error.setting, error.origin) == ("valkey.url", f"environment {name}")
        assert "VALKEY_WRITER_ENDPOINT" in error.fix
        assert settle(environ={**environ, "VALKEY_FAKE": "1"}).settings.valkey.fake
        assert settle("[valkey]\nurl = 'valkeys://h/3'", environ).settings.valkey.url
    else:
        assert settle(environ=environ).settings.valkey.url == ""


def test_without_its_writer_the_environment_before_is_refused() -> None:
    """I5: the whole of it, less the one name that gives an address."""
    environ = {k: v for k, v in BEFORE.items() if k != "VALKEY_WRITER_ENDPOINT"}
    assert "set VALKEY_URL, VALKEY_HOST or VALKEY_WRITER_ENDPOINT" in refusal(environ=environ).fix


@pytest.mark.parametrize(
    "environ, flags",
    [
        ({**BEFORE, "VALKEY_FAKE": "1"}, {}),
        ({"VALKEY_URL": f"valkey://app:{CANARY}@h", "VALKEY_FAKE": "true"}, {}),
        ({"VALKEY_HOST": "h", "FOREBAY_VALKEY__FAKE": "1"}, {}),
        ({"VALKEY_HOST": "h", "VALKEY_READER_HOST": "r"}, {"fake": True}),
    ],
)
def test_a_fake_server_goes_before_addresses_by_neutral_names(
    environ: dict[str, str], flags: dict[str, object]
) -> None:
    """I5: as in the service before; a warning names each address that is not used."""
    resolved = settle(environ=environ, flags=flags)
    valkey = resolved.settings.valkey

    assert (valkey.fake, valkey.url, valkey.reader_url) == (True, "", "")
    assert resolved.warnings[0].setting == "valkey.url"
    assert "valkey.fake is set" in resolved.warnings[0].problem
    assert CANARY not in repr(resolved.warnings)
    assert len(resolved.warnings) == 1 + any("READER_" in name for name in environ)


@pytest.mark.parametrize(
    "environ, url",
    [
        ({"VALKEY_WRITER_ENDPOINT": "a"}, "valkey://a:6379/0"),
        ({"VALKEY_WRITER_ENDPOINT": "a:7"}, "valkey://a:7/0"),
        ({"VALKEY_WRITER_ENDPOINT": "a:7", "VALKEY_WRITER_PORT": "7"}, "valkey://a:7/0"),
        ({"VALKEY_WRITER_ENDPOINT": "a", "VALKEY_PORT": "7"}, "valkey://a:7/0"),
        ({"VALKEY_HOST": "a", "VALKEY_WRITER_PORT": "7"}, "valkey://a:7/0"),
        ({"VALKEY_WRITER_ENDPOINT": "::1", "VALKEY_WRITER_PORT": "7"}, "valkey://[::1]:7/0"),
        ({"VALKEY_WRITER_ENDPOINT": "/v.sock", "VALKEY_WRITER_PORT": "7"}, "unix:///v.sock"),
        ({"VALKEY_WRITER_ENDPOINT": "rediss://a:7/3", "VALKEY_DB": "3"}, "rediss://a:7/3"),
        ({"VALKEY_WRITER_ENDPOINT": "a", "VALKEY_URL": "valkey://b"}, "valkey://b:6379/0"),
        (
            {"VALKEY_WRITER_ENDPOINT": "a", "VALKEY_WRITER_PORT": "tcp://10.0.0.1:6379"},
            "valkey://a:6379/0",
        ),
    ],
)
def test_a_writer_endpoint_is_an_address(environ: dict[str, str], url: str) -> None:
    """N2: a host, one with a port, a socket or a URL."""
    assert settle(environ=environ).settings.valkey.url == url


def test_names_that_resemble_known_ones_are_found() -> None:
    """Each is named with the closest one that is read, never with its value."""
    meant = {
        "VALKEY_USERNMAE": "VALKEY_USERNAME",
        "VALKEY_WRITER_ENPOINT": "VALKEY_WRITER_ENDPOINT",
        "VALKEY_READR_PORT": "VALKEY_READER_PORT",
        "VALKY_URL": "VALKEY_URL",
        "valkey_url": "VALKEY_URL",
        "CACHE_VR": "CACHE_VER",
        "RATE_MAX_TOKEN": "RATE_MAX_TOKENS",
        "RATE_WINDOW_SECS": "RATE_WINDOW_SEC",
        "FORBAY_NAMESPACE": "FOREBAY_NAMESPACE",
    }
    told = misspelt_names(dict.fromkeys(meant, CANARY))

    for name, known in meant.items():
        assert f"environment {name}: nothing reads it; did you mean {known}?" in told
    assert CANARY not in repr(told)


def test_names_of_other_software_are_left_alone() -> None:
    """No warning without resemblance, and none of what Kubernetes adds."""
    environ = {
        "VALKEY_SOMETHING_ELSE": "1",
        "VALKEY_PORT": "tcp://10.0.0.7:6379",
        "VALKEY_PRIMARY_PORT": "tcp://10.0.0.7:6379",
        "VALKEY_SERVICE_HOST": "10.0.0.7",
        "VALKEY_PORT_6379_TCP_ADDR": "10.0.0.7",
        "VALKEY_USERNMAE": "",
        "CACHE_DIR": "/c",
        "RATE_LIMIT": "5",
        "DATABASE_URL": "postgres://h",
        "REDIS_URL": "redis://h",
        "PATH": "/bin",
        **BEFORE,
    }
    assert misspelt_names(environ) == []


def test_own_names_win_over_neutral_ones_even_if_these_are_wrong() -> None:
    """What FOREBAY_* sets is not looked for elsewhere."""
    environ = {
        "FOREBAY_URL": URL,
        "VALKEY_URL": "nonsense",
        "VALKEY_PORT": "x",
        "FOREBAY_CACHE__VERSION": "2",
        "CACHE_VER": "v9",
        "FOREBAY_VALKEY__PASSWORD": CANARY,
        "VALKEY_PASSWORD_FILE": "/none",
    }
    resolved = settle(environ=environ, files={"/run/secrets/forebay_valkey_password": ""})

    assert resolved.settings.valkey.url == URL
    assert resolved.settings.valkey.password.reveal() == CANARY
    assert resolved.settings.cache.version == "2"


def test_foreign_names_and_empty_values_are_ignored() -> None:
    """Unknown VALKEY_*, service links of Kubernetes and empty variables set nothing."""
    environ = {
        "VALKEY_SOMETHING_ELSE": "1",
        "VALKEY_PORT": "tcp://10.0.0.7:6379",
        "VALKEY_SERVICE_HOST": "10.0.0.7",
        "FOREBAY_SERVICE_HOST": "10.0.0.8",
        "FOREBAY_SERVICE_PORT_HTTP": "8642",
        "FOREBAY_PORT": "tcp://10.0.0.8:8642",
        "FOREBAY_PORT_8642_TCP_ADDR": "10.0.0.8",
        "FOREBAY_HTTP__PORT": "",
        "FOREBAY_CONFIG": "x.toml",
        "FOREBAY_APP": "a:b",
    }
    assert settle(environ=environ).settings == Settings()


@pytest.mark.parametrize(
    "environ, files, origin",
    [
        ({"FOREBAY_VALKEY__PASSWORD": CANARY}, {}, "environment FOREBAY_VALKEY__PASSWORD"),
        ({"VALKEY_PASSWORD": CANARY}, {}, "environment VALKEY_PASSWORD"),
        (
            {"VALKEY_WRITER_ENDPOINT": f"redis://app:{CANARY}@h"},
            {},
            "environment VALKEY_WRITER_ENDPOINT, in the URL",
        ),
        (
            {"FOREBAY_VALKEY__PASSWORD_FILE": "/s"},
            {"/s": CANARY + "\n"},
            "environment FOREBAY_VALKEY__PASSWORD_FILE, file /s",
        ),
        (
            {"VALKEY_PASSWORD_FILE": "/s"},
            {"/s": CANARY + "\r\n"},
            "environment VALKEY_PASSWORD_FILE, file /s",
        ),
        (
            {"CREDENTIALS_DIRECTORY": "/cred"},
            {"/cred/valkey_password": CANARY},
            "file /cred/valkey_password",
        ),
        (
            {"VALKEY_PASSWORD": "other"},
            {"/run/secrets/forebay_valkey_password": CANARY},
            "file /run/secrets/forebay_valkey_password",
        ),
        (
            {"FOREBAY_URL_FILE": "/u"},
            {"/u": f"valkey://app:{CANARY}@h\n"},
            "environment FOREBAY_URL_FILE, file /u, in the URL",
        ),
        (
            {"FOREBAY_URL": f"valkey://:{CANARY}@h", "VALKEY_PASSWORD": "other"},
            {},
            "environment FOREBAY_URL, in the URL",
        ),
    ],
)
def test_the_password_has_many_sources_and_never_shows(
    environ: dict[str, str], files: dict[str, str], origin: str
) -> None:
    """Wherever the password comes from, it is found, and no text of the result holds it."""
    resolved = settle("[valkey]\nurl = 'valkey://h'", environ=environ, files=files)

    assert resolved.settings.valkey.password == Secret(CANARY)
    assert resolved.origins["valkey.password"] == origin
    rows = describe(resolved)
    shown = [repr(resolved), str(resolved), repr(rows), msgspec.json.encode(rows).decode()]
    assert not any(CANARY in text for text in shown)
    assert next(row for row in rows if row.name == "valkey.password").value_shown == "***"


def test_secret_file_named_in_the_configuration_file() -> None:
    """password_file stands for password in TOML too."""
    resolved = settle(f"[valkey]\nurl = '{URL}'\npassword_file = '/s'", files={"/s": CANARY})

    assert resolved.settings.valkey.password.reveal() == CANARY
    assert resolved.origins["valkey.password"] == "file forebay.toml, file /s"


def test_an_overridden_url_takes_its_credentials_with_it() -> None:
    """I3: the password of one server is never sent to another."""
    toml = f"[valkey]\nurl = 'valkey://app:{CANARY}@production'"

    resolved = settle(toml, {"FOREBAY_URL": "valkey://localhost"})

    assert resolved.settings.valkey.url == "valkey://localhost:6379/0"
    assert resolved.settings.valkey.username == ""
    assert not resolved.settings.valkey.password


def test_a_later_source_replaces_the_password_of_the_url() -> None:
    """A password given on its own by a stronger source wins over the one in the URL."""
    toml = "[valkey]\nurl = 'valkey://app:old@h'"

    resolved = settle(toml, {"FOREBAY_VALKEY__PASSWORD": CANARY})

    assert resolved.settings.valkey.password.reveal() == CANARY
    assert resolved.settings.valkey.username == "app"


def test_describe_shows_every_setting_once_in_order() -> None:
    """One row for each setting, with text that `config show` can print as it is."""
    rows = describe(settle(environ={"FOREBAY_VALKEY__FAKE": "true"}))
    by_name = {row.name: row for row in rows}

    assert [row.name for row in rows] == list(FIELDS)
    assert by_name["valkey.fake"].value_shown == "true"
    assert by_name["workers.enabled"].value_shown == "unset"
    assert by_name["http.port"].value_shown == "8642"


class Bad(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration that must be refused, and what the message has to name."""

    setting: str
    value: str
    origin: str
    says: str
    toml: str | None = None
    environ: Mapping[str, str] = {}
    flags: Mapping[str, object] = {}
    files: Mapping[str, str] = {}


def env(name: str, text: str, setting: str, says: str, value: str | None = None) -> Bad:
    shown = text if value is None else value
    origin = f"environment {name}"
    return Bad(setting=setting, value=shown, origin=origin, says=says, environ={name: text})


def toml(text: str, setting: str, value: str, says: str) -> Bad:
    return Bad(setting=setting, value=value, origin="file forebay.toml", says=says, toml=text)


BAD = [
    env("FOREBAY_HTTP__PORT", "70000", "http.port", "from 0 to 65535"),
    env("FOREBAY_HTTP__PORT", "http", "http.port", "the default, 8642"),
    env("FOREBAY_HTTP__PORT", "1_0", "http.port", "whole number"),
    env("FOREBAY_HTTP__ENABLED", "yes", "http.enabled", "must be true or false"),
    env("FOREBAY_WORKERS__ENABLED", "null", "workers.enabled", "must be true or false"),
    env("FOREBAY_LOG__LEVEL", "warn", "log.level", "did you mean warning?"),
    env("FOREBAY_LOG__LEVEL", "loud", "log.level", "one of debug, info, warning, error"),
    env("FOREBAY_CACHE__JITTER", "nan", "cache.jitter", "from 0 to 0.5"),
    env("RATE_WINDOW_SEC", "0", "limiter.window_s", "above 0 and at most 86400"),
    env("RATE_MAX_TOKENS", "-1", "limiter.max_tokens", "from 1 to 100000000"),
    env("CACHE_VER", "v 2", "cache.version", "1 to 16 letters"),
    env("CACHE_VER", "a" * 17, "cache.version", "1 to 16 letters"),
    env("CACHE_VER", "e:1", "cache.version", "1 to 16 letters"),
    env("FOREBAY_NAMESPACE", "my shop", "node.namespace", "letters, digits"),
    env("FOREBAY_NAMESPACE", "shop\n", "node.namespace", "control character", "shop\\n"),
    env("FOREBAY_VALKEY_URL", URL, "FOREBAY_VALKEY_URL", "FOREBAY_VALKEY__URL?", "***"),
    env("FOREBAY_PASSWORD", CANARY, "FOREBAY_PASSWORD", "VALKEY__PASSWORD?", "***"),
    env("FOREBAY_HTTP__PROT", "1", "FOREBAY_HTTP__PROT", "FOREBAY_HTTP__PORT?", "***"),
    env("FOREBAY_LOG__QQQQQQ", "1", "FOREBAY_LOG__QQQQQQ", "[log] knows level, format", "***"),
    env("FOREBAY_CONFG", "x", "FOREBAY_CONFG", "did you mean FOREBAY_CONFIG?", "***"),
    env("FOREBAY_HTTP__PORT_FILE", "/p", "FOREBAY_HTTP__PORT_FILE", "HTTP__PORT?", "***"),
    env("FOREBAY_URL", "http://h:1", "valkey.url", "use one of valkey, valkeys"),
    env("VALKEY_URL", f"valkey:/{CANARY}@h", "valkey.url", "no scheme", "valkey:/***@h"),
    env("FOREBAY_URL", f"valkey://u:{CANARY}@h:x", "valkey.url", "port", "valkey://u:***@h:x"),
    env("VALKEY_PORT", "0", "valkey.url", "VALKEY_PORT must be a whole number from 1"),
    env(
        "FOREBAY_VALKEY__READER_URL",
        "valkey://r",
        "valkey.reader_url",
        "no primary",
        "valkey://r:6379/0",
    ),
    env("FOREBAY_VALKEY__USERNAME", "app", "valkey.username", "nothing names its server"),
    env("FOREBAY_VALKEY__PASSWORD", CANARY, "valkey.password", "set valkey.url", "***"),
    toml("[valkey]\nusername = 'app'", "valkey.username", "app", "nothing names its server"),
    env("VALKEY_WRITER_ENDPONT", CANARY, "valkey.url", "did you mean VALKEY_WRITER_E", "(not set)"),
    env("VALKEY_ENDPOINT", CANARY, "valkey.url", "nothing reads VALKEY_ENDPOINT", "(not set)"),
    env("VALKEY_TLS_ENABLED", "1", "valkey.url", "nothing reads VALKEY_TLS_ENABLED", "(not set)"),
    env("VALKEY_USRE", CANARY, "valkey.url", "did you mean VALKEY_USER?", "(not set)"),
    env("FOREBAY_WORKERS__BEAT_MS", "2500", "workers.beat_ms", "at most 1333"),
    env("FOREBAY_WORKERS__FLUSH_DELAY_MS", "20000", "workers.flush_delay_ms", "drain_ms"),
    env("FOREBAY_VALKEY__TLS_CERT_FILE", "c", "valkey.tls_cert_file", "valkey.tls_key_file"),
    env("FOREBAY_VALKEY__TLS_CA_FILE", "c", "valkey.tls_ca_file", "write valkeys://"),
    env("FOREBAY_VALKEY__CONNECT_TIMEOUT_MS", "20000", "valkey.connect_timeout_ms", "startup"),
    env("FOREBAY_HTTP__BODY_BYTES_MAX", "2048", "http.body_bytes_max", "it is below durable"),
    env("FOREBAY_DURABLE__EVENT_BYTES_MAX", "1048577", "durable.event_bytes_max", "to 1048576"),
    env("FOREBAY_WORKERS__OWNERSHIP_TTL_MS", "1500", "workers.ownership_ttl_ms", "least 3000"),
    env("FOREBAY_WORKERS__DRAIN_MS", "20", "workers.drain_ms", "before a flush begins"),
    toml("[http]\nport = '1'", "http.port", '"1"', "whole number"),
    toml("[http]\nport = true", "http.port", "true", "whole number"),
    toml("[http]\nhost = ''", "http.host", "", "all interfaces"),
    toml("[http]\nhost = '0.0.0.0'", "http.host", "0.0.0.0", "set http.token_file"),
    toml("[http]\nhosts = 'a'", "http.hosts", '"a"', "in the file a list"),
    toml("[http]\nhosts = ['a:80']", "http.hosts", "(a list)", "without scheme and port"),
    env("FOREBAY_HTTP__HOST", "cache.internal", "http.host", "http.open = true"),
    env("FOREBAY_HTTP__HOSTS", "a, http://b", "http.hosts", "separated by commas"),
    toml("[valkey]\nurl = {}", "valkey.url", "(a table)", "must be text"),
    toml("[valkey]\npassword = 5", "valkey.password", "***", "must be text"),
    toml(f"[valkey]\npasword = '{CANARY}'", "valkey.pasword", "***", "valkey.password?"),
    toml("[valkye]\nurl = ''", "valkye", "***", "did you mean valkey?"),
    toml(f"url = '{CANARY}'", "url", "***", "did you mean valkey.url?"),
    toml("[zzzzzz]", "zzzzzz", "***", "the sections are node, valkey"),
    toml("http = 3", "http", "***", "write [http]"),
    toml("[http\n", "the configuration", "***", "is not TOML"),
    toml("a = " + "9" * 5000, "the configuration", "***", "is not TOML"),
    toml("a = " + "[" * 5000, "the configuration", "***", "is not TOML"),
    Bad(
        setting="log.lvl",
        value="***",
        origin="flag --set log.lvl",
        says="did you mean log.level?",
        flags={"log.lvl": "debug"},
    ),
    Bad(
        setting="valkey.fake",
        value="true",
        origin="environment VALKEY_FAKE",
        says="cannot go with valkey.url",
        environ={"VALKEY_FAKE": "true", "FOREBAY_URL": URL},
    ),
    Bad(
        setting="valkey.username",
        value="other",
        origin="environment VALKEY_USER",
        says="environment VALKEY_USERNAME says something else",
        environ={"VALKEY_USERNAME": "app", "VALKEY_USER": "other", "VALKEY_URL": URL},
    ),
    Bad(
        setting="valkey.url",
        value="b",
        origin="environment VALKEY_WRITER_ENDPOINT",
        says="VALKEY_HOST says something else",
        environ={"VALKEY_HOST": "a", "VALKEY_WRITER_ENDPOINT": "b"},
    ),
    Bad(
        setting="valkey.url",
        value="valkey://a:1/0",
        origin="environment VALKEY_WRITER_ENDPOINT, VALKEY_WRITER_PORT",
        says="VALKEY_WRITER_PORT says port 2",
        environ={"VALKEY_WRITER_ENDPOINT": "a:1", "VALKEY_WRITER_PORT": "2"},
    ),
    Bad(
        setting="valkey.url",
        value="redis://u:***@a",
        origin="environment VALKEY_WRITER_ENDPOINT, VALKEY_TLS",
        says="VALKEY_TLS asks for TLS",
        environ={"VALKEY_WRITER_ENDPOINT": f"redis://u:{CANARY}@a", "VALKEY_TLS": "1"},
    ),
    Bad(
        setting="valkey.password",
        value="***",
        origin="environment VALKEY_PASSWORD_FILE, file /none",
        says="the file is not there",
        environ={"VALKEY_PASSWORD_FILE": "/none"},
    ),
    Bad(
        setting="valkey.password",
        value="***",
        origin="environment VALKEY_PASSWORD",
        says="VALKEY_PASSWORD and VALKEY_PASSWORD_FILE are both set",
        environ={"VALKEY_PASSWORD": CANARY, "VALKEY_PASSWORD_FILE": "/s"},
        files={"/s": CANARY},
    ),
    Bad(
        setting="valkey.password",
        value="***",
        origin="environment FOREBAY_VALKEY__PASSWORD_FILE, file /s",
        says="the file is empty",
        environ={"FOREBAY_VALKEY__PASSWORD_FILE": "/s"},
        files={"/s": "\n"},
    ),
    Bad(
        setting="valkey.password",
        value="***",
        origin="file /run/secrets/forebay_valkey_password",
        says="more than one line",
        files={"/run/secrets/forebay_valkey_password": f"{CANARY}\n{CANARY}"},
    ),
    Bad(
        setting="valkey.url",
        value="valkey://***@h",
        origin="environment FOREBAY_VALKEY__URL",
        says="environment FOREBAY_URL says something else",
        environ={"FOREBAY_URL": URL, "FOREBAY_VALKEY__URL": f"valkey://{CANARY}@h"},
    ),
    Bad(
        setting="valkey.password",
        value="***",
        origin="environment FOREBAY_VALKEY__PASSWORD",
        says="take it out of the URL",
        environ={"FOREBAY_URL": f"valkey://:{CANARY}@h", "FOREBAY_VALKEY__PASSWORD": "other"},
    ),
    Bad(
        setting="valkey.url",
        value="valkey://h",
        origin="environment VALKEY_URL",
        says="VALKEY_TLS asks for TLS",
        environ={"VALKEY_URL": "valkey://h", "VALKEY_TLS": "1"},
    ),
    Bad(
        setting="valkey.url",
        value="valkey://h",
        origin="environment VALKEY_URL",
        says="VALKEY_DB names database 3",
        environ={"VALKEY_URL": "valkey://h", "VALKEY_DB": "3"},
    ),
    Bad(
        setting="valkey.reader_url",
        value="valkey://r:6379/1",
        origin="file forebay.toml",
        says="write database 0",
        toml=f"[valkey]\nurl = '{URL}'\nreader_url = 'valkey://r/1'",
    ),
    Bad(
        setting="valkey.reader_url",
        value="valkey://u:***@r",
        origin="environment FOREBAY_VALKEY__READER_URL",
        says="share one user",
        environ={"FOREBAY_URL": URL, "FOREBAY_VALKEY__READER_URL": f"valkey://u:{CANARY}@r"},
    ),
    Bad(
        setting="valkey.password",
        value="***",
        origin="file forebay.toml",
        says="both set",
        toml=f"[valkey]\npassword = '{CANARY}'\npassword_file = '/s'",
        files={"/s": CANARY},
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.setting}:{bad.says}"[:60])
def test_a_bad_configuration_is_told_with_setting_value_origin_and_fix(bad: Bad) -> None:
    """I2: one line names the setting, its masked value, where it came from and what to do."""
    error = refusal(bad.toml, bad.environ, bad.flags, bad.files)
    text = str(error)

    assert text.startswith(f"{bad.setting} = {bad.value} (from {bad.origin}): ")
    assert bad.says in text
    assert error.problem
    assert error.fix
    assert len(text.splitlines()) == 1
    assert error.exit_code == 2


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.setting}:{bad.says}"[:60])
def test_no_error_shows_a_password(bad: Bad) -> None:
    """I4: neither the message nor the traceback with its causes holds the secret."""
    error = refusal(bad.toml, bad.environ, bad.flags, bad.files)

    assert CANARY not in "".join(traceback.format_exception(error))
    assert CANARY not in repr(vars(error))


def test_a_secret_that_may_not_be_read_is_an_error() -> None:
    """A mounted secret without permission is told, not skipped."""

    def denied(path: str) -> str | None:
        raise PermissionError(13, "Permission denied", path)

    with pytest.raises(ConfigError, match=r"valkey\.password = \*\*\* .*Permission denied"):
        resolve(file=None, environ={}, flags={}, read_secret=denied)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_an_environment_name(name: str) -> None:
    """Each default, written out as text, is accepted from the environment as that value."""
    field = FIELDS[name]
    of_a_server = name in ("valkey.reader_url", "valkey.username", "valkey.password")
    alone = {"FOREBAY_URL": URL} if of_a_server else {}
    default = field.default
    lists = {"limiter.named": "{}", "http.hosts": ","}
    text = {"valkey.url": URL, "valkey.reader_url": URL, **lists}.get(name) or (
        str(default).lower() if isinstance(default, bool) else str(default)
    )
    if field.secret or default is None or default == "":
        text = text if field.url else "true"
    if name.startswith("valkey.tls_"):
        alone = {"FOREBAY_URL": "valkeys://h", "FOREBAY_VALKEY__TLS_CERT_FILE": "true"}
        alone["FOREBAY_VALKEY__TLS_KEY_FILE"] = "true"

    resolved = settle(environ={**alone, field.env_name: text})

    assert resolved.origins[name] == f"environment {field.env_name}"
    if default not in (None, "", Secret("")):
        assert getattr(getattr(resolved.settings, field.section), field.leaf) == default


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "cache.internal"])
def test_an_endpoint_that_others_reach_needs_a_token(host: str) -> None:
    """Without http.token_file it is refused, unless http.open says so, or nobody is served."""
    error = refusal("", {"FOREBAY_HTTP__HOST": host}, {}, {})
    assert (error.setting, error.exit_code) == ("http.host", 2)
    for name, value in (("TOKEN_FILE", "/token"), ("OPEN", "true"), ("ENABLED", "false")):
        settle(environ={"FOREBAY_HTTP__HOST": host, f"FOREBAY_HTTP__{name}": value})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost"])
def test_the_loopback_needs_no_token(host: str) -> None:
    """Other machines do not reach it."""
    assert not settle(environ={"FOREBAY_HTTP__HOST": host}).settings.http.reachable


def test_host_names_come_from_every_source() -> None:
    """A list in the file, text with commas in the environment and in flags."""
    names = ("a.b", "*.svc.x")
    assert settle(toml="[http]\nhosts = ['a.b', '*.svc.x']").settings.http.hosts == names
    assert settle(environ={"FOREBAY_HTTP__HOSTS": "a.b, *.svc.x"}).settings.http.hosts == names
    assert settle(flags={"http.hosts": "a.b,*.svc.x"}).settings.http.hosts == names

"""Addresses of servers: what is understood, what is refused, what is shown."""

from __future__ import annotations

import pytest

from forebay.schemas.errors import ConfigError
from forebay.schemas.masking import escape_controls, mask_url, mask_urls_in
from forebay.schemas.settings import Secret, Valkey
from forebay.schemas.urls import Endpoint, endpoint_of, parse_url

CANARY = "canary-7f3a"


def parsed(text: str) -> Endpoint:
    return parse_url(text, setting="valkey.url", origin="flag --url")


@pytest.mark.parametrize(
    "text, endpoint",
    [
        ("valkey://h", Endpoint(scheme="valkey", host="h")),
        ("redis://h:1/2", Endpoint(scheme="redis", host="h", port=1, db=2)),
        ("VALKEY://Host.Example./", Endpoint(scheme="valkey", host="host.example.")),
        ("rediss://h", Endpoint(scheme="rediss", host="h", tls=True)),
        ("valkeys://h?db=3", Endpoint(scheme="valkeys", host="h", db=3, tls=True)),
        ("valkey://[::1]", Endpoint(scheme="valkey", host="::1")),
        ("valkey://[2001:DB8::7]:7000", Endpoint(scheme="valkey", host="2001:db8::7", port=7000)),
        ("valkey://10.0.0.7:6380", Endpoint(scheme="valkey", host="10.0.0.7", port=6380)),
        (
            "valkey://app:p%40ss%2F%3A@h",
            Endpoint(scheme="valkey", host="h", username="app", password=Secret("p@ss/:")),
        ),
        ("valkey://:a:b@h", Endpoint(scheme="valkey", host="h", password=Secret("a:b"))),
        ("valkey://app@h", Endpoint(scheme="valkey", host="h", username="app")),
        ("unix:///run/v.sock", Endpoint(scheme="unix", path="/run/v.sock")),
        (
            "unix://:pw@/a%20b/v.sock?db=4",
            Endpoint(scheme="unix", path="/a b/v.sock", db=4, password=Secret("pw")),
        ),
    ],
)
def test_a_url_becomes_an_endpoint(text: str, endpoint: Endpoint) -> None:
    """Each part of the URL is found, decoded, and defaulted where absent."""
    assert parsed(text) == endpoint


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"),
        ("localhost:6379", "has no scheme"),
        ("://h", "has no scheme"),
        ("vlakey://h", "did you mean valkey://?"),
        ("http://h", "unknown scheme"),
        ("valkey://", "has no host"),
        ("valkey://:6379", "has no host"),
        ("valkey://h:", "has a port"),
        ("valkey://h:0", "has a port"),
        ("valkey://h:65536", "has a port"),
        ("valkey://h:6379a", "has a port"),
        ("valkey://h:٣", "has a port"),
        ("valkey://::1:6379", "too many colons"),
        ("valkey://[::g]", "brackets|cannot be read"),
        ("valkey://[::1", "brackets|cannot be read"),
        ("valkey://[::1]x", "has a port|brackets|cannot be read"),
        ("valkey://a,b", "more than one host"),
        ("valkey://-h", "host name"),
        ("valkey://h%41", "host name"),
        ("valkey://h/x", "has a database"),
        ("valkey://h/-1", "has a database"),
        ("valkey://h/1/2", "has a database"),
        ("valkey://h/65536", "has a database"),
        ("valkey://h/1?db=1", "twice"),
        ("valkey://h?ssl_cert_reqs=none", "option other than db"),
        ("valkey://h#x", "part after #"),
        ("valkey://h h", "blank"),
        ("valkey://h\n", "blank"),
        ("valkey://u:100%@h", "bare %"),
        ("valkey://u:%ff@h", "not UTF-8"),
        ("valkey://u:a/b@h", "behind its first /"),
        ("valkey://u:a?b@h", "behind its first /"),
        ("valkey://u:a#b@h", "behind its first /"),
        ("unix://tmp/v.sock", "three slashes"),
        ("unix://", "has no path"),
        ("unix:///", "has no path"),
        ("unix:///" + "a" * 107, "107 bytes"),
        ("valkey://" + "h" * 254, "host name"),
        ("valkey://" + "h" * 3000, "longer than"),
    ],
)
def test_a_malformed_url_is_refused_with_the_reason(text: str, says: str) -> None:
    """I1: the error has the caller's setting and origin, the reason and a fix."""
    with pytest.raises(ConfigError, match=says) as caught:
        parsed(text)

    assert caught.value.setting == "valkey.url"
    assert caught.value.origin == "flag --url"
    assert caught.value.fix
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"valkey://u:{CANARY}@h:x",
        f"valkey://{CANARY}@h:x",
        f"valkey://u:{CANARY}",
        f"valkey://u:{CANARY}/x",
        f"u:{CANARY}@h",
        f"{CANARY}@h",
        f"u:{CANARY}",
        f"valkey:/u:{CANARY}@h",
        f"valkey:u:{CANARY}@h",
        f"htp://u:{CANARY}@h",
        f"valkey://u:a@{CANARY}@h:x",
        f"valkey://u:a/{CANARY}@h",
        f"valkey://u:a#{CANARY}@h",
        f"valkey://u:a {CANARY}@h",
        f"valkey://u:a\n{CANARY}@h",
        f'valkey://u:a"{CANARY}@h',
        f"valkey://u:{CANARY}%@h",
        f"valkey://h?password={CANARY}",
        f"unix://u:{CANARY}@tmp/v.sock",
    ],
)
def test_no_malformed_url_shows_its_password(text: str) -> None:
    """I2: however the URL is broken, the error hides what may be a password."""
    with pytest.raises(ConfigError) as caught:
        parsed(text)

    assert CANARY not in str(caught.value)
    assert CANARY not in repr(vars(caught.value))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert CANARY not in mask_url(text)


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"valkey://u:{CANARY}@h:1/2", "valkey://u:***@h:1/2"),
        (f"valkeys://:{CANARY}@[::1]", "valkeys://:***@[::1]:6379/0"),
        (f"valkey://{CANARY}@h", "valkey://***@h:6379/0"),
        (f"unix://:{CANARY}@/v.sock?db=1", "unix://:***@/v.sock?db=1"),
        ("redis://h", "redis://h:6379/0"),
    ],
)
def test_an_endpoint_shows_itself_without_the_password(text: str, shown: str) -> None:
    """I2: str is a URL with stars; I3: its address_url leads to the same server."""
    endpoint = parsed(text)

    assert str(endpoint) == shown
    bare = parsed(endpoint.address_url)
    assert (bare.address, bare.db, bare.tls) == (endpoint.address, endpoint.db, endpoint.tls)
    assert not bare.username
    assert not bare.password
    if not endpoint.username:
        assert CANARY not in repr(endpoint)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("valkey://h:6379/0", "valkey://h:6379/0"),
        ("valkey://[::1]:6379", "valkey://[::1]:6379"),
        ("localhost:6379", "localhost:6379"),
        ("unix:///run/v.sock", "unix:///run/v.sock"),
        ("", ""),
    ],
)
def test_masking_leaves_harmless_urls_alone(text: str, shown: str) -> None:
    """What holds no password is shown as it is."""
    assert mask_url(text) == shown


def test_urls_inside_a_text_are_masked_one_by_one() -> None:
    """Text around and between the URLs stays."""
    text = f"from redis://a:{CANARY}@h/1 to <postgres://b:{CANARY}@i>, see http://j:80)."

    assert mask_urls_in(text) == "from redis://a:***@h/1 to <postgres://b:***@i>, see http://j:80)."


def test_control_characters_are_written_out() -> None:
    """Line ends, escapes, C1 controls and direction marks become visible ASCII."""
    assert escape_controls("a\r\n\x1b[1m\x9b\u202e\u2028é") == (
        "a\\r\\n\\x1b[1m\\x9b\\u202e\\u2028é"
    )


def test_settings_give_the_endpoint_with_its_credentials() -> None:
    """Credentials apart from the URL come first; both endpoints use the same."""
    valkey = Valkey(
        url="valkey://a:one@h/1", reader_url="valkey://r/1", username="b", password=Secret("two")
    )
    primary, reader = endpoint_of(valkey), endpoint_of(valkey, reader=True)

    assert primary == Endpoint(
        scheme="valkey", host="h", db=1, username="b", password=Secret("two")
    )
    assert reader is not None
    assert (reader.address, reader.username) == ("r:6379", "b")
    assert endpoint_of(Valkey()) is None

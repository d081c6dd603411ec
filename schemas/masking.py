"""How text that may hold a secret is shown.

I1  ``mask_url`` hides the password of any URL, also of one that no parser accepts:
    a missing scheme, an unescaped ``@``, ``/`` or ``#`` in the password, a password
    where the port belongs. Told to choose between hiding too much and too little, it
    hides too much.
I2  ``mask_urls_in`` does the same to every URL inside a longer text.
I3  ``escape_controls`` leaves nothing that moves a cursor, starts a new line or turns
    the direction of text.

A lone user name is hidden too: many put the password there. Secrets that stand in no
URL are not recognised here; they are ``Secret`` objects, which hide themselves.
"""

from __future__ import annotations

import re

__all__ = ["escape_controls", "mask_url", "mask_urls_in"]

_HEAD = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*:/*)?(.*)\Z", re.DOTALL)
_NOT_A_PORT = re.compile(
    r"\A(\[[^\]]*\]|(?!\[[^\]]*\])[^:/?#]*):(?!\d{0,5}(?:[/?#]|\Z)).*\Z", re.DOTALL
)
_IN_QUERY = re.compile(r"([?&](?:pass(?:word)?|pwd|secret|token|auth)=)[^&\s#]*", re.IGNORECASE)
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"<>]+")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")


def mask_url(text: str) -> str:
    """``text``, a URL or what was meant as one, without its password."""
    masked = _mask_credentials(text)
    if masked != text:
        return masked
    scheme, rest = _split_scheme(text)
    return scheme + _NOT_A_PORT.sub(r"\1:***", rest)


def mask_urls_in(text: str) -> str:
    """``text`` with the password of every URL in it hidden."""
    if "://" not in text:
        return text
    return _IN_TEXT.sub(lambda match: _mask_credentials(match[0]), text)


def escape_controls(text: str) -> str:
    r"""``text`` with control characters written out, a line feed as ``\n``."""
    return _CONTROLS.sub(_written_out, text)


def _mask_credentials(text: str) -> str:
    text = _IN_QUERY.sub(r"\1***", text)
    scheme, rest = _split_scheme(text)
    credentials, at, address = rest.rpartition("@")
    if not at:
        return text
    username, colon, _ = credentials.partition(":")
    return f"{scheme}{username}:***@{address}" if colon else f"{scheme}***@{address}"


def _split_scheme(text: str) -> tuple[str, str]:
    """The scheme with its slashes, if there are slashes, and what follows."""
    match = _HEAD.match(text)
    scheme = (match[1] or "") if match else ""
    return (scheme, text[len(scheme) :]) if scheme.endswith("/") else ("", text)


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")

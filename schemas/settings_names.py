"""The catalogue of settings: names, types, defaults, and words about them.

I1  It is made from the structs of ``settings``; nothing is listed a second time.
I2  ``shown`` is the only way from a value to text that a person sees: secrets and
    passwords in URLs are masked, control characters written out, long values cut.
I3  What a person mistyped is answered with the nearest known name, where one is near.

A setting has one dotted name, ``valkey.url``, and one environment name,
``FOREBAY_VALKEY__URL``; a few have short or neutral names besides (``settings_env``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from msgspec import Struct, inspect, structs

from .masking import escape_controls, mask_url, mask_urls_in
from .settings import Secret, Settings

__all__ = [
    "FIELDS",
    "SECTIONS",
    "Field",
    "expectation",
    "known_names",
    "nearest",
    "plainly",
    "shown",
]

_SHOWN_CHARS_MAX = 120
_WORDS = {
    "cache.version": "1 to 16 letters, digits, '.', '_' or '-'",
    "http.hosts": (
        "host names without scheme and port, such as cache.internal or *.shop.svc, "
        "separated by commas; in the file a list"
    ),
    "limiter.named": '[limits.NAME] tables in the file, or JSON: {"NAME": {"rate": 10}}',
    "node.namespace": (
        "1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or a digit"
    ),
}


class Field(Struct, frozen=True, kw_only=True):
    """One setting."""

    name: str
    section: str
    leaf: str
    type: Any
    default: Any
    secret: bool  #: its value is never shown
    url: bool  #: its value may hold a password
    text: bool  #: its value is text of any kind

    @property
    def env_name(self) -> str:
        return f"FOREBAY_{self.section.upper()}__{self.leaf.upper()}"

    @property
    def may_be_file(self) -> bool:
        """Whether NAME_FILE may name a file that holds the value."""
        return self.secret or self.url


def _catalogue() -> dict[str, Field]:
    found = [
        Field(
            name=f"{section.name}.{leaf.name}",
            section=section.name,
            leaf=leaf.name,
            type=leaf.type,
            default=leaf.default,
            secret=leaf.type is Secret,
            url=leaf.name == "url" or leaf.name.endswith("_url"),
            text=leaf.type is Secret or isinstance(inspect.type_info(leaf.type), inspect.StrType),
        )
        for section in structs.fields(Settings)
        for leaf in structs.fields(section.type)
    ]
    return {field.name: field for field in found}


FIELDS = _catalogue()
SECTIONS = tuple(section.name for section in structs.fields(Settings))


def shown(name: str, value: object) -> str:
    """The value of the setting as a person may see it."""
    field = FIELDS.get(name)
    if field is None or field.secret:
        return "***" if value else ""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "(a table)"
    if isinstance(value, list):
        return "(a list)"
    if isinstance(value, tuple):
        return plainly(", ".join(str(getattr(each, "name", each)) for each in value))
    return plainly(mask_url(str(value)) if field.url else str(value))


def plainly(text: str) -> str:
    """Any text from outside on one line of bounded length, passwords in URLs masked."""
    text = escape_controls(mask_urls_in(text[: 16 * _SHOWN_CHARS_MAX]))
    return text if len(text) <= _SHOWN_CHARS_MAX else text[: _SHOWN_CHARS_MAX - 3] + "..."


def expectation(field: Field) -> str:
    """What a value of the setting must be, in words."""
    if field.name in _WORDS:
        return _WORDS[field.name]
    info = inspect.type_info(field.type)
    if isinstance(info, inspect.UnionType):
        info = next(part for part in info.types if not isinstance(part, inspect.NoneType))
    if isinstance(info, inspect.LiteralType):
        return "one of " + ", ".join(str(value) for value in _choices(field, info))
    if isinstance(info, inspect.BoolType):
        return "true or false"
    if isinstance(info, inspect.IntType):
        return "a whole number" + _span(info)
    if isinstance(info, inspect.FloatType):
        return "a number" + _span(info)
    return "text"


def _choices(field: Field, info: inspect.LiteralType) -> Iterable[object]:
    """In the order of the definition, which is the order of meaning."""
    return getattr(field.type, "__args__", info.values)


def _span(info: inspect.IntType | inspect.FloatType) -> str:
    if info.ge is not None and info.le is not None:
        return f" from {_number(info.ge)} to {_number(info.le)}"
    bounds = (("above", info.gt), ("at least", info.ge), ("at most", info.le))
    words = [f"{word} {_number(bound)}" for word, bound in bounds if bound is not None]
    return " " + " and ".join(words) if words else ""


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, or nothing."""
    candidates = sorted(set(known))
    leaf = name.rpartition(".")[2]
    same_leaf = [each for each in candidates if each.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf[0]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if close:
        return close[0]
    leaves = {each.rpartition(".")[2]: each for each in candidates}
    close = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.7)
    return leaves[close[0]] if close else ""


def known_names(section: str) -> str:
    """The settings of a section, for people."""
    leaves = [field.leaf for field in FIELDS.values() if field.section == section]
    return f"[{section}] knows " + ", ".join(leaves)

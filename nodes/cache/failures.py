"""Exceptions that reach several callers: one object for each.

Raised again and again, one object would collect the frames and contexts of all who got it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import MemberDescriptorType

from ...schemas.errors import LoaderError

__all__ = ["CallFailed", "own_copy"]


class CallFailed(Exception):
    """The cause of what each key of one call gets, if the call failed: they have it in common."""


def own_copy(error: Exception, cache: str, key: str) -> Exception:
    """An equal exception; a LoaderError if one of its kind cannot be made.

    It is made without its class's own ``__init__``, whose parameters nobody here knows.
    """
    kind = type(error)
    try:
        twin = kind.__new__(kind, *error.__reduce__()[1])
        twin.args = error.args
        for name in _slots(kind):
            value = getattr(error, name, None)
            if value is not getattr(twin, name, None):  # None may stand for what was never set
                with suppress(AttributeError):
                    setattr(twin, name, value)
        vars(twin).update(vars(error))
    except Exception:
        return LoaderError(cache, key, f"{kind.__name__}: {error}")
    return twin


def _slots(kind: type) -> Iterator[str]:
    """What is kept beside ``__dict__``, such as ``errno``."""
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if isinstance(member, MemberDescriptorType) and not name.startswith("__"):
                yield name

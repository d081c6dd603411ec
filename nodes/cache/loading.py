"""What a loader may ask and say of the load under way.

    @node.cached("page:{path}", ttl=60)
    async def page(path: str) -> Page:
        load = forebay.loading()
        answer = await fetch(path, if_none_match=load.etag)
        if answer.status == 304:
            return load.not_modified()
        load.keep(ttl=answer.max_age, etag=answer.etag)
        load.tag(f"author:{answer.author}")
        return answer.page

A1  What it says holds for this load only. Lifetimes are checked like those of a declaration.
A2  Tags and dependencies named here are captured after the loader has run: what was loaded is
    not stored if one of them was invalidated since the load began.
A3  ``not_modified`` lets the entry live on as it is, with its tags and etag; where there is
    none, it is an error. Otherwise the etag of the old value is not that of the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from ...schemas.entry import Entry
from ...schemas.errors import ForebayError, InvalidEntry, LoaderError
from ...schemas.keys import check_key
from .declaration import lifetime_ms

__all__ = ["NOT_MODIFIED", "Loading", "loading", "under_way"]

_TAGS_MAX = 100


class _NotModified:
    def __repr__(self) -> str:
        return "NOT_MODIFIED"


NOT_MODIFIED: Final = _NotModified()


class Loading:
    """The load of one key."""

    def __init__(
        self,
        cache: str,
        key: str,
        previous: Entry | None,
        value_of: Callable[[Entry], Any],
    ) -> None:
        self.cache = cache
        self.key = key
        self.ttl_ms: int | None = None
        self.stale_ms: int | None = None
        self.stored = True
        self.overtaken = False  #: a tag named here was bumped since the load began
        self.new_etag: str | None = None  #: of what is loaded
        self.tags: list[str] = []
        self.dependencies: list[str] = []
        self.kept: list[str] = []  #: tags of what was not modified
        self._previous = previous
        self._value_of = value_of
        tagged = previous is not None and previous.meta.etag and self.previous is not None
        self.etag = previous.meta.etag if previous and tagged else ""  #: of what is stored now

    def __repr__(self) -> str:
        return f"<Loading {self.cache} {self.key}>"

    @property
    def previous(self) -> Any:
        """The value that is stored now, stale or invalid; None if there is none to be read."""
        if self._previous is None:
            return None
        try:
            return self._value_of(self._previous)
        except InvalidEntry:
            return None

    def keep(
        self,
        *,
        ttl: float | None = None,
        stale_for: float | None = None,
        etag: str | None = None,
        store: bool = True,
    ) -> None:
        """Say how long the value lives, in seconds, what it is known by, or not to store it.

        Raises:
            ConfigError: a lifetime is none. LoaderError: the etag is no string.
        """
        if not isinstance(etag, str | None):
            raise LoaderError(self.cache, self.key, f"its etag is no string, but {etag!r:.80}")
        if ttl is not None:
            self.ttl_ms = lifetime_ms("ttl", ttl)
        if stale_for is not None:
            self.stale_ms = lifetime_ms("stale_for", stale_for, zero=True)
        if etag is not None:
            self.new_etag = etag
        self.stored = self.stored and store

    def tag(self, *tags: str) -> None:
        """Have the value carry these tags too.

        Raises:
            InvalidKey: one cannot be a tag. LoaderError: they are too many.
        """
        self.tags += self._checked("tag", tags)

    def depends_on(self, *keys: str) -> None:
        """Have the value be invalidated with these keys, and with what they depend on: as declared,
        and as their own loaders have named it, where they are stored.

        Raises:
            InvalidKey: one cannot be a key. LoaderError: they are too many.
        """
        self.dependencies += self._checked("key", keys)

    def not_modified(self) -> Any:
        """To be returned by the loader: the stored value is still right.

        Raises:
            LoaderError: nothing is stored.
        """
        if self._previous is None or self._previous.negative or self.previous is None:
            problem = "it says that nothing was modified, but there is nothing"
            raise LoaderError(self.cache, self.key, problem)
        if self.new_etag is None:
            self.new_etag = self.etag
        self.kept = list(self._previous.meta.tags)
        return NOT_MODIFIED

    def _checked(self, name: str, given: tuple[str, ...]) -> list[str]:
        if len(self.tags) + len(self.dependencies) + len(given) > _TAGS_MAX:
            raise LoaderError(self.cache, self.key, f"it names over {_TAGS_MAX} tags and keys")
        return [check_key(each, name=name) for each in given]


_under_way: ContextVar[Loading | None] = ContextVar("forebay_loading", default=None)


def loading() -> Loading:
    """The load that the code here runs for.

    Raises:
        ForebayError: it is no loader that runs, or one for many keys at once.
    """
    found = _under_way.get()
    if found is None:
        raise ForebayError("forebay.loading() is for loaders of one key, while they run")
    return found


@contextmanager
def under_way(load: Loading | None) -> Iterator[None]:
    token = _under_way.set(load)
    try:
        yield
    finally:
        _under_way.reset(token)

"""The Lua scripts by name, and the functions that run them.

I1  A script is one file, ``scripts/<noun_verb>.lua``. Code that several scripts share is in a file
    whose name begins with ``_``. A script whose header names such a file gets its text when it is
    loaded: at the beginning, or at the line ``-- Here _name.lua.``
I2  A script that the server does not know is sent in full, and the server then knows it. Repeating
    is safe: a server that answers NOSCRIPT has run nothing.
I3  A refusal of the server is raised with the name of the script, which names the operation, and
    with the keys of another type that caused it (``WrongKeys``).
I4  If several scripts are sent at once, those that had to be repeated run after the others, in
    order among themselves. A caller that needs an order across all sends them one by one.

After the server has lost its scripts (restart, SCRIPT FLUSH), each script costs one more round
trip, once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

from msgspec import Struct

from ...schemas.errors import ForebayError, ServerRefused
from ..wrong_keys import WrongKeys
from .link import Arg, Commands, Reply

__all__ = [
    "Call",
    "Script",
    "Scripts",
    "ask_many",
    "granted",
    "load_scripts",
    "run",
    "run_many",
]


_PACKAGE = f"{__package__.rpartition('.')[0]}.scripts"
_SHARED = re.compile(r"^-- With (_\w+\.lua)\.$", re.MULTILINE)


class Script(Struct, frozen=True, kw_only=True):
    name: str
    source: str
    sha: str
    wrong_keys: WrongKeys

    @classmethod
    def of(cls, name: str, source: str, wrong_keys: WrongKeys | None = None) -> Script:
        # SHA-1 is how the server names scripts; nothing rests on its strength.
        sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        return cls(
            name=name,
            source=source,
            sha=sha,
            wrong_keys=WrongKeys() if wrong_keys is None else wrong_keys,
        )

    def __repr__(self) -> str:
        return f"<Script {self.name} {self.sha[:8]}>"


class Call(Struct, frozen=True, kw_only=True):
    """A script with the keys and arguments of one run."""

    script: Script
    keys: Sequence[str | bytes]
    args: Sequence[Arg] = ()

    def by_sha(self) -> list[Arg]:
        return ["EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args]

    def in_full(self) -> list[Arg]:
        return ["EVAL", self.script.source, len(self.keys), *self.keys, *self.args]


class Scripts(Mapping[str, Script]):
    """The scripts of a folder, by name; ``wrong_keys`` are the keys that their refusals named."""

    def __init__(self, scripts: Sequence[Script], wrong_keys: WrongKeys | None = None) -> None:
        self._by_name = {script.name: script for script in scripts}
        self.wrong_keys = WrongKeys() if wrong_keys is None else wrong_keys

    def __getitem__(self, name: str) -> Script:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


def load_scripts(folder: Traversable | None = None) -> Scripts:
    """The scripts of a folder, by default those of this package."""
    folder = folder or files(_PACKAGE)
    texts = {each.name: each.read_text(encoding="utf-8") for each in folder.iterdir()}
    wrong_keys = WrongKeys()
    return Scripts(
        [
            Script.of(name.removesuffix(".lua"), _with_shared(text, texts), wrong_keys)
            for name, text in sorted(texts.items())
            if name.endswith(".lua") and not name.startswith("_")
        ],
        wrong_keys,
    )


def _with_shared(text: str, texts: Mapping[str, str]) -> str:
    header, _, _ = text.partition("\n\n")
    for name in _SHARED.findall(header):
        here, shared = f"-- Here {name}.\n", _with_shared(texts[name], texts)
        text = text.replace(here, shared) if here in text else f"{shared}\n{text}"
    return text


async def run(
    commands: Commands,
    script: Script,
    keys: Sequence[str | bytes],
    args: Sequence[Arg] = (),
    *,
    timeout_ms: int | None = None,
) -> Reply:
    count = len(keys)
    try:
        return await commands.call(
            "EVALSHA", script.sha, count, *keys, *args, timeout_ms=timeout_ms
        )
    except ServerRefused as refused:
        if refused.code != "NOSCRIPT":
            raise await _named(commands, refused, script, keys) from None
    try:
        return await commands.call(
            "EVAL", script.source, count, *keys, *args, timeout_ms=timeout_ms
        )
    except ServerRefused as refused:
        raise await _named(commands, refused, script, keys) from None


async def run_many(
    commands: Commands, calls: Sequence[Call], *, timeout_ms: int | None = None
) -> list[Reply]:
    """Replies in order; a refused call is a ServerRefused in its place."""
    replies = await commands.call_many([c.by_sha() for c in calls], timeout_ms=timeout_ms)
    unknown = [at for at, reply in enumerate(replies) if _is_unknown(reply)]
    if unknown:
        again = _made_known([calls[at] for at in unknown])
        late = await commands.call_many(again, timeout_ms=timeout_ms)
        for at, reply in zip(unknown, late, strict=True):
            replies[at] = reply
    for at, reply in enumerate(replies):
        if isinstance(reply, ServerRefused):
            replies[at] = await _named(commands, reply, calls[at].script, calls[at].keys)
    return replies


async def _named(
    commands: Commands, refused: ServerRefused, script: Script, keys: Sequence[str | bytes]
) -> ServerRefused:
    named = ServerRefused(refused.code, refused.message, script.name)
    return await script.wrong_keys.name(commands, named, keys)


async def ask_many(commands: Commands, calls: Sequence[Sequence[Arg]]) -> list[Reply]:
    """Like ``call_many``, for commands whose first argument is a key: a refusal names the key."""
    replies = await commands.call_many(calls)
    for at, reply in enumerate(replies):
        if isinstance(reply, ServerRefused):
            replies[at] = reply.at(str(calls[at][1]))
    return replies


def granted(replies: Sequence[Reply]) -> Sequence[Reply]:
    """Return the replies. Raises the first one that is an error."""
    for reply in replies:
        if isinstance(reply, ForebayError):
            raise reply
    return replies


def _is_unknown(reply: Reply) -> bool:
    return isinstance(reply, ServerRefused) and reply.code == "NOSCRIPT"


def _made_known(calls: Sequence[Call]) -> list[list[Arg]]:
    """Each script in full the first time only: that is when the server learns it."""
    sent: set[str] = set()
    commands = []
    for call in calls:
        commands.append(call.by_sha() if call.script.sha in sent else call.in_full())
        sent.add(call.script.sha)
    return commands

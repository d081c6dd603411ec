"""The rights that the user of a node needs in Valkey, and the check that it has them.

R1  ``needed`` are the commands of the scripts, and those that only Python sends (``SENT``). A test
    compares ``SENT`` with the source, and ``deploy/valkey/users.acl`` with ``users_file``.
R2  One script checks the rights. It runs none of the commands and writes nothing. The user needs no
    right to read ACLs.
R3  If a right in ``PARTLY`` is missing, the node lacks the feature named there and logs a warning.
    If any other right is missing, the node is not ready and does not start.
R4  A server that does not answer does not change the result: the link reports it.

The check runs every ``EVERY_S``, and every second while a right is missing. A command that the
server does not know, such as one of a later version, does not count as a missing right.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import anyio
import structlog
from anyio.abc import TaskStatus
from msgspec import Struct

from ..schemas.errors import RIGHTS, ForebayError, ServerRefused
from ..schemas.keys import Names
from ..schemas.replies import array, integer
from .valkey.link import Arg, Commands
from .valkey.scripting import Script, Scripts

__all__ = [
    "EVERY_S",
    "PARTLY",
    "SENT",
    "TRACKING",
    "Missing",
    "RightsCheck",
    "commands_of",
    "needed",
    "users_file",
]

log = structlog.get_logger(__name__)

EVERY_S = 5.0
_EVERY_S_MISSING = 1.0

_CALL = re.compile(r'redis\.p?call\(\s*"([A-Z]+)"(?:,\s*"([A-Z]+)")?')
_CONTAINERS = frozenset(("client", "command", "config", "pubsub", "script", "xgroup", "xinfo"))

#: What Python sends and no script; SELECT and two of CLIENT are sent by valkey-py.
SENT = frozenset(
    (
        "client|id client|setinfo client|setname client|tracking command|info config|get"
        " dbsize echo eval evalsha mget ping pubsub|numsub script|load select strlen subscribe"
        " type unsubscribe wait xack xautoclaim xgroup|create xread xreadgroup scan zmscore"
    ).split()
)
TRACKING = "&__redis__:invalidate"
_EXTERNAL = "changes by external writers (cache.external_writers)"
_EXPLAIN = "forebay explain of an entry"
_LOCKS = "locks, semaphores and limits of what runs at a time"
_REFRESHES = "refresh jobs: others do them, if they may"
#: Rights without which a node still works, and what is lost.
PARTLY: Mapping[str, str] = {
    "client|id": _EXTERNAL,
    "client|setinfo": "the library's name in CLIENT LIST",
    "client|tracking": _EXTERNAL,
    "command|info": "knowledge of the server's newer commands",
    "config|get": "the warning that a power failure loses accepted writes",
    "dbsize": "what /stats reads from the server",
    "echo": _EXPLAIN,
    "pubsub|numsub": "the number of processes that share a limit, other than workers",
    "rename": "the recovery of a stream whose largest possible id was used",
    "scan": "the number of the namespace's keys in /stats, and forebay import",
    "script|load": "one round trip, the first time that a script is used",
    "strlen": _EXPLAIN,
    "type": "the name of a key of another type, in errors, health and the log",
    "wait": 'until="replicated" of writes and locks',
    "xack": _REFRESHES,
    "xautoclaim": _REFRESHES,
    "xgroup|create": _REFRESHES,
    "xreadgroup": _REFRESHES,
    "zcard": _LOCKS,
    "zmscore": "values that another service has stored (legacy_key)",
    "zrevrange": "locks and semaphores",
    TRACKING: _EXTERNAL,
}

_NO_KEY = frozenset(
    (
        "client|id client|setinfo client|setname client|tracking command|info config|get dbsize"
        " echo eval evalsha info ping pubsub|numsub scan script|load select time unsubscribe wait"
    ).split()
)
_ON_CHANNELS = frozenset(("publish", "subscribe"))
_SAMPLES: Mapping[
    str, str
] = {  #: of commands whose key does not follow the name, or that have none
    "eval": "EVAL x 0",
    "evalsha": "EVALSHA x 0",
    "publish": "PUBLISH {name} x",
    "subscribe": "SUBSCRIBE {name}",
    "xread": "XREAD STREAMS {name} 0",
    "xreadgroup": "XREADGROUP GROUP x x STREAMS {name} 0",
}
_OTHERWISE = "{command} {name} {name} {name} {name}"


class _Sample(Struct, frozen=True):
    """A command as it would be run, with a key or channel of a pattern if it has one."""

    command: str
    pattern: str
    words: tuple[str, ...]


def commands_of(script: Script) -> frozenset[str]:
    """The commands that it calls, as an ACL names them: ``xadd``, ``xinfo|stream``."""
    return frozenset(_named(*words) for words in _CALL.findall(script.source))


def _named(command: str, first: str) -> str:
    name = command.lower()
    return f"{name}|{first.lower()}" if name in _CONTAINERS else name


def needed(scripts: Scripts) -> frozenset[str]:
    """All commands that a node sends, in a script or by itself."""
    return SENT.union(*map(commands_of, scripts.values()))


def users_file(names: Names, scripts: Scripts) -> str:
    """An ACL file for a namespace; its users cannot log in before they get a password."""
    keys, channels = " ".join(names.key_patterns), " ".join([*names.channel_patterns, TRACKING])
    rights = " ".join(f"+{each}" for each in sorted(needed(scripts)))
    login = "+ping +select +client|setinfo +client|setname"
    reading = " ".join(f"%R{each}" for each in names.key_patterns)
    bare = "off resetchannels"
    return (
        f"user {names.namespace}-node {bare} {keys} {channels} {rights}\n"
        f"user {names.namespace}-publisher {bare} %W~{names.events} +xadd {login}\n"
        f"user {names.namespace}-observer {bare} {reading} +@read -@dangerous +info {login}\n"
    )


class Missing(Struct, frozen=True, kw_only=True):
    """Rights that a user lacks, as ACL SETUSER would give them without the ``+``."""

    user: str
    commands: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()  #: of keys and channels: ``~forebay:shop:*``

    def __bool__(self) -> bool:
        return bool(self.commands or self.patterns)

    @property
    def is_partial(self) -> bool:
        """Whether the node can work, but for some features."""
        return all(right in PARTLY for right in (*self.commands, *self.patterns))

    @property
    def problem(self) -> str:
        names = [each.replace("|", " ").upper() for each in self.commands]
        parts = [f"run {', '.join(names)}"] if names else []
        parts += [f"use {', '.join(self.patterns)}"] if self.patterns else []
        text = f"the user {self.user} may not {' or '.join(parts)}"
        lost = {PARTLY[each]: None for each in (*self.commands, *self.patterns) if each in PARTLY}
        return f"{text} (lost: {'; '.join(lost)})" if self.is_partial else text

    @property
    def fix(self) -> str:
        rights = " ".join([f"+{each}" for each in self.commands] + list(self.patterns))
        return f"run ACL SETUSER {self.user} {rights}; {RIGHTS} lists all rights"


class RightsCheck:
    """Asks the server whether its ACL lets the user of these connections do all that is needed."""

    def __init__(
        self,
        commands: Commands,
        names: Names,
        scripts: Scripts,
        *,
        user: str,
        unused: Collection[str] = (),
    ) -> None:
        """``unused``: commands that this node does not send, as its settings are."""
        self.missing = Missing(user=user)
        self._commands = commands
        self._script = scripts["rights_check"]
        self._samples = _samples(needed(scripts) - set(unused), names)

    def __repr__(self) -> str:
        return f"<RightsCheck {self.missing.problem if self.missing else 'ok'}>"

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Look until cancelled."""
        task_status.started()
        while True:
            await anyio.sleep(_EVERY_S_MISSING if self.missing else EVERY_S)
            with suppress(ForebayError):
                await self.look()

    async def look(self) -> None:
        """Find out what is missing now.

        Raises:
            Unavailable, ServerRefused, UnreadableRecord: the server did not say.
        """
        before, self.missing = self.missing, await self._asked()
        if self.missing == before:
            return
        if not self.missing:
            log.info("valkey.rights_complete", user=self.missing.user)
            return
        log.warning(
            "valkey.rights_missing",
            user=self.missing.user,
            commands=self.missing.commands,
            patterns=self.missing.patterns,
            problem=self.missing.problem,
            fix=self.missing.fix,
        )

    async def _asked(self) -> Missing:
        user, script = self.missing.user, self._script
        words: list[Arg] = []
        for each in self._samples:
            words += [len(each.words), *each.words]
        asking = "evalsha"
        try:
            try:
                reply = await self._commands.call("EVALSHA", script.sha, 0, *words)
            except ServerRefused as refused:
                if refused.code != "NOSCRIPT":
                    raise
                asking = "eval"
                reply = await self._commands.call("EVAL", script.source, 0, *words)
        except ServerRefused as refused:
            if refused.code != "NOPERM":
                raise
            return Missing(user=user, commands=(asking,))
        return _judged(self._samples, _positions(reply, len(self._samples)), user)


def _samples(commands: Collection[str], names: Names) -> list[_Sample]:
    found = []
    for command in sorted(commands):
        patterns: Mapping[str, str] = {"": "0"}
        if command not in _NO_KEY:
            patterns = names.channel_patterns if command in _ON_CHANNELS else names.key_patterns
        form = _SAMPLES.get(command, _OTHERWISE)
        for pattern, name in patterns.items():
            words = form.format(command=command.replace("|", " "), name=name).split()
            found.append(_Sample(command, pattern, tuple(words)))
    if "client|tracking" in commands:
        found.append(_Sample("subscribe", TRACKING, ("SUBSCRIBE", TRACKING[1:])))
    return found


def _positions(reply: object, count: int) -> frozenset[int]:
    found = array(reply, "the reply of rights_check")
    return frozenset(integer(each, "a position", low=1, high=count) for each in found)


def _judged(samples: Sequence[_Sample], refused: Collection[int], user: str) -> Missing:
    """Tell a command that is not allowed from a pattern that is not."""
    allowed = [each for at, each in enumerate(samples, 1) if at not in refused]
    denied = [each for at, each in enumerate(samples, 1) if at in refused]
    usable, reached = {each.command for each in allowed}, {each.pattern for each in allowed} | {""}
    commands = [
        each.command for each in denied if each.pattern in reached and each.command not in usable
    ]
    patterns = [
        each.pattern
        for each in denied
        if each.pattern and (each.pattern not in reached or each.command in usable)
    ]
    return Missing(
        user=user,
        commands=tuple(dict.fromkeys(commands)),
        patterns=tuple(dict.fromkeys(patterns)),
    )

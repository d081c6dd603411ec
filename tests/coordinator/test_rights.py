"""The rights that a node needs in Valkey: what the code sends, and what the server allows."""

from __future__ import annotations

import ast
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import valkey
from structlog.testing import capture_logs

import forebay
from conftest import MakeServer
from forebay.coordinator import rights
from forebay.coordinator.rights import Missing, RightsCheck, commands_of, needed, users_file
from forebay.coordinator.valkey.backend import Backend
from forebay.coordinator.valkey.scripting import Script, load_scripts
from forebay.schemas.errors import ServerRefused, Unavailable
from forebay.schemas.keys import Names
from support.acl_users import SHIPPED, as_node, restore, shipped_users
from support.valkey_server import Flavour, ValkeyServer

pytestmark = pytest.mark.anyio

ROOT = Path(forebay.__file__).parent
NAMES = Names("shop", 64)
#: Sent by valkey-py in the handshake; AUTH needs no right.
BY_THE_LIBRARY = {"client|setname", "client|setinfo", "select"}


def constants(node: ast.Call | ast.Tuple | ast.List) -> list[str]:
    """The strings at the beginning, up to the first element that is none."""
    found = []
    for each in node.args if isinstance(node, ast.Call) else node.elts:
        value = each.value if isinstance(each, ast.Constant) else None
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            break
        found.append(text)
    return found


def sent_by(text: str, known: frozenset[str]) -> Iterator[str]:
    """The commands with which a call or a sequence in this source begins."""
    tree = ast.parse(text)
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    exported = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call | ast.Tuple | ast.List) or node in exported:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func)[0].isupper():
            continue  # an error, say
        words = constants(node)
        if not words or not re.fullmatch("[A-Z]+", words[0]) or words[0].lower() not in known:
            continue
        name = words[0].lower()
        container = name in rights._CONTAINERS
        yield f"{name}|{words[1].lower()}" if container else name


@pytest.fixture(scope="module")
def known(valkey_server: ValkeyServer) -> frozenset[str]:
    """All commands of Valkey."""
    return frozenset(
        each.decode().partition("|")[0] for each in valkey_server.execute("COMMAND", "LIST")
    )


def test_list_is_what_python_sends(known: frozenset[str]) -> None:
    """``SENT`` has each command that the source sends and no script, and no other."""
    files = [*(ROOT / "coordinator").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    files = [path for path in files if "demo" not in path.parts and path.name != "shareable.py"]
    sent = {command for path in files for command in sent_by(path.read_text(), known)}

    in_scripts = frozenset[str]().union(*map(commands_of, load_scripts().values()))
    assert (sent | BY_THE_LIBRARY) - in_scripts == rights.SENT


@pytest.mark.parametrize(
    "line",
    ['link.call("GETDEL", key)', 'commands = [("GETDEL", key)]', 'pack((b"GETDEL", *names))'],
)
def test_new_command_is_found_when_planted(line: str, known: frozenset[str]) -> None:
    """The search of the source finds a command in each form in which commands are written."""
    assert list(sent_by(line, known)) == ["getdel"]


def test_commands_of_scripts_are_found() -> None:
    """Also in ``pcall``, over several lines, and with their subcommand."""
    script = Script.of("x", 'redis.pcall("XADD", k)\nredis.call(\n  "XINFO", "STREAM", k)')

    assert commands_of(script) == {"xadd", "xinfo|stream"}
    texts = [script.source for script in load_scripts().values()]
    calls = sum(len(re.findall(r"redis\.p?call\(", text)) for text in texts)
    assert calls == sum(len(rights._CALL.findall(text)) for text in texts)


def test_shipped_file_is_what_the_code_needs() -> None:
    """``deploy/valkey/users.acl`` is what ``forebay config acl --namespace shop`` prints."""
    assert SHIPPED.read_text() == users_file(NAMES, load_scripts())


def test_partial_rights_are_needed_rights() -> None:
    """Each right in the table of partial losses is one that a node is given."""
    assert set(rights.PARTLY) - {rights.TRACKING} <= needed(load_scripts())


@asynccontextmanager
async def checked(server: ValkeyServer) -> AsyncIterator[RightsCheck]:
    async with Backend(as_node(server), client_name="test") as backend:
        yield RightsCheck(backend.link, NAMES, load_scripts(), user=backend.user)


@pytest.fixture(scope="module", params=["valkey", "redis7"])
def with_users(request: pytest.FixtureRequest) -> Iterator[ValkeyServer]:
    flavour: Flavour = request.param
    request.getfixturevalue(f"{flavour}_server")  # skips the test where there is no program
    with ValkeyServer(flavour, acl=shipped_users(flavour)) as server:
        yield server


async def test_shipped_file_lacks_nothing(with_users: ValkeyServer) -> None:
    """Valkey and Redis load the file, and the check finds every right in it."""
    restore(with_users)
    async with checked(with_users) as check:
        await check.look()

        assert not check.missing


CHANNELS = "&forebay:shop:* &__redis__:invalidate"
LOST = [
    ("-xadd", "may not run XADD", "+xadd", False),
    ("-xinfo|stream -zadd", "may not run XINFO STREAM, ZADD", "+xinfo|stream +zadd", False),
    ("-wait", "may not run WAIT (lost: until=", "+wait", True),
    ("-eval", "may not run EVAL", "+eval", False),
    ("-evalsha", "may not run EVALSHA", "+evalsha", False),
    ("-publish", "may not run PUBLISH", "+publish", False),
    (
        "resetkeys ~forebay:shop:* ~{forebay:shop:*",
        "may not use ~{shop:*",
        "~{shop:*",
        False,
    ),
    ("resetkeys", "may not use ~forebay:shop:*, ~{forebay:shop:*, ~{shop:*", "~forebay", False),
    (
        "resetkeys ~forebay:shop:* ~{forebay:shop:* %R~{shop:*",
        "may not use ~{shop:*",
        "~{shop:*",
        False,
    ),
    ("resetchannels &__redis__:invalidate", "may not use &forebay:shop:*", "&forebay", False),
    ("resetchannels &forebay:shop:*", "may not use &__redis__:invalidate (lost", "&__redis", True),
    ("resetchannels", "may not use &forebay:shop:*, &__redis__:invalidate", "&forebay", False),
    ("resetkeys -ping", "may not run PING or use ~forebay:shop:*", "+ping ~forebay", False),
]


@pytest.mark.parametrize("rules,problem,fix,partial", LOST, ids=[each[0] for each in LOST])
async def test_missing_right_is_named(
    rules: str, problem: str, fix: str, partial: bool, with_users: ValkeyServer
) -> None:
    """The user, commands, patterns and the remedy are named; what follows from it is decided."""
    restore(with_users)
    async with checked(with_users) as check:
        with capture_logs() as lines:
            restore(with_users, *rules.split())
            await check.look()
            await check.look()
            missing = check.missing
            restore(with_users)
            await check.look()

    assert f"the user shop-node {problem}" in missing.problem
    assert f"ACL SETUSER shop-node {fix}" in missing.fix
    assert "docs/operating.md#users-in-valkey" in missing.fix
    assert missing.is_partial is partial
    assert not check.missing
    said = [line["event"] for line in lines]
    assert said == ["valkey.rights_missing", "valkey.rights_complete"]


async def test_remedy_helps(with_users: ValkeyServer) -> None:
    """The command in ``fix`` gives back all that was missing."""
    restore(with_users)
    async with checked(with_users) as check:
        restore(with_users, "-xadd", "-wait", "resetkeys", "~{shop:*", "resetchannels")
        await check.look()
        command = check.missing.fix.removeprefix("run ").partition(";")[0]
        with_users.execute(*command.split())
        await check.look()

    assert not check.missing


async def test_no_answer_changes_nothing() -> None:
    """While the server does not answer, what was missing stays missing."""

    class Away:
        async def call(self, *_: object, **__: object) -> object:
            raise Unavailable("away")

    check = RightsCheck(Away(), NAMES, load_scripts(), user="app")  # type: ignore[arg-type]
    check.missing = before = Missing(user="app", commands=("xadd",))
    with pytest.raises(Unavailable):
        await check.look()

    assert check.missing == before


async def test_refusal_inside_a_script_is_noperm(with_users: ValkeyServer) -> None:
    """A command that the ACL does not allow to a script is told like one outside of it."""
    restore(with_users)
    async with Backend(as_node(with_users), client_name="test") as backend:
        for text in ("return redis.call('LPUSH', KEYS[1], 1)", "return redis.call('GET', 'x')"):
            with pytest.raises(ServerRefused) as caught:
                await backend.link.call("EVAL", text, 1, NAMES.meta)
            assert caught.value.code == "NOPERM"
            assert not caught.value.of_keys
            assert "docs/operating.md#users-in-valkey" in str(caught.value)


def test_other_users_of_the_file(make_server: MakeServer) -> None:
    """A publisher adds events and reads nothing; an observer reads and changes nothing."""
    server = make_server(acl=shipped_users())

    def as_user(name: str, *words: str) -> str:
        with valkey.Valkey(
            unix_socket_path=server.socket_path, username=f"shop-{name}", password="pw"
        ) as client:
            try:
                client.execute_command(*words)
            except valkey.exceptions.NoPermissionError:
                return "refused"
        return "done"

    events, meta = NAMES.events, NAMES.meta
    done = {
        words: (as_user("publisher", *words), as_user("observer", *words))
        for words in [
            ("XADD", events, "*", "event", "{}"),
            ("XADD", meta, "*", "event", "{}"),
            ("XRANGE", events, "-", "+"),
            ("XLEN", NAMES.part(7, "dead")),
            ("GET", "elsewhere"),
            ("DEL", events),
            ("INFO",),
            ("FLUSHALL",),
        ]
    }
    assert list(done.values()) == [
        ("done", "refused"),
        ("refused", "refused"),
        ("refused", "done"),
        ("refused", "done"),
        ("refused", "refused"),
        ("refused", "refused"),
        ("refused", "done"),
        ("refused", "refused"),
    ]


def test_users_are_off_until_they_get_a_password(make_server: MakeServer) -> None:
    """A file that is loaded as it was shipped lets nobody in."""
    lines = ["user default on nopass ~* &* +@all", *SHIPPED.read_text().splitlines()]
    server = make_server(acl=lines)

    for name in ("node", "publisher", "observer"):
        user = server.execute("ACL", "GETUSER", f"shop-{name}")
        assert user[user.index(b"flags") + 1][0] == b"off"
        assert user[user.index(b"passwords") + 1] == []

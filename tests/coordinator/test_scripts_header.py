"""The header of each script is its contract; these rules keep it true.

A header is everything up to the first blank line: the purpose; perhaps ``With _shared.lua.``;
then one line for each slot that the body reads, ``-- KEYS[1] name ...`` or, for all from
there on, ``-- KEYS[3..] names``; what it returns; numbered invariants.
"""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from forebay.coordinator.valkey.scripting import load_scripts

FOLDER = files("forebay.coordinator") / "scripts"
TEXTS = {each.name: each.read_text() for each in FOLDER.iterdir() if each.name.endswith(".lua")}
NAMES = sorted(name for name in TEXTS if not name.startswith("_"))

DOCUMENTED = re.compile(r"^-- (KEYS|ARGV)\[(\d+)(\.\.)?\] \S", re.MULTILINE)
READ = re.compile(r"\b(KEYS|ARGV)\[([^\]]+)\]")
READ_AS_A_WHOLE = re.compile(r"#(KEYS|ARGV)\b|[(,]\s*(KEYS|ARGV)\s*[,)]")
CALL = re.compile(r"redis\.p?call\(")
FUNCTION = re.compile(r"local function (\w+)\(([^)]*)\)")
SIBLING = re.compile(r"^sibling\((\w+(?:\[\w+\])?), label\)$")
MARKS = re.compile(r"^marks_of\((\w+(?:\[\w+\])?)\)$")
LOCAL = re.compile(r"local ([\w, ]+?) = ([^\n]+)")

NO_KEY = {"TIME", "PUBLISH", "SPUBLISH", "PING", "ECHO", "INFO"}
ALL_KEYS = {"DEL", "UNLINK", "EXISTS", "MGET"}
KEY_AT = {"XGROUP": 2, "XINFO": 2, "OBJECT": 2}


def split(text: str) -> tuple[str, str]:
    header, _, body = text.partition("\n\n")
    return header, body


def slot_faults(text: str) -> list[str]:
    """Where the slots of the header and those of the body differ.

    Slots read by a number must be documented one by one, up to where a range begins; a slot
    read by anything else (``KEYS[i]``), or the whole of them (``#KEYS``), needs a range.
    """
    header, body = split(text)
    faults = []
    for kind in ("KEYS", "ARGV"):
        slots = [(int(n), bool(dots)) for k, n, dots in DOCUMENTED.findall(header) if k == kind]
        indexes = [index for k, index in READ.findall(body) if k == kind]
        numbers = {int(index) for index in indexes if index.isdigit()}
        whole = {a or b for a, b in READ_AS_A_WHOLE.findall(body)}
        ranged = any(not index.isdigit() for index in indexes) or kind in whole
        documented = [n for n, _ in slots]
        if documented != list(range(1, len(documented) + 1)):
            faults.append(f"{kind} are not documented from 1 on, one after the other")
        singles = {n for n, dots in slots if not dots}
        first_of_range = min((n for n, dots in slots if dots), default=None)
        if (first_of_range is not None) != ranged:
            faults.append(f"{kind}: a range is documented if and only if one is read")
        if first_of_range is not None and first_of_range != documented[-1]:
            faults.append(f"{kind}: nothing comes after a range")
        needed = {n for n in numbers if first_of_range is None or n < first_of_range}
        if singles != needed:
            faults.append(f"{kind}: documented {sorted(singles)}, read {sorted(needed)}")
    return faults


def call_arguments(text: str, start: int) -> list[str]:
    """The arguments of the call whose opening bracket is just before ``start``."""
    parts, depth, quote = [""], 0, ""
    for char in text[start:]:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            if not depth:
                break
            depth -= 1
        elif char == "," and not depth:
            parts.append("")
            continue
        parts[-1] += char
    return [part.strip() for part in parts]


def key_expressions(text: str) -> list[str]:
    """What stands where commands expect a key."""
    found = []
    for match in CALL.finditer(text):
        command, *rest = call_arguments(text, match.end())
        if not re.fullmatch(r"\"[A-Z]+\"", command):
            found.append(f"the command {command}")
            continue
        name = command.strip('"')
        if name in ALL_KEYS:
            found += rest
        elif name not in NO_KEY:
            found.append(rest[KEY_AT.get(name, 1) - 1])
    return found


def sources_of(expression: str, text: str) -> tuple[list[str], bool]:
    """The values of locals and parameters of this name; whether one is of a function that
    is shared, and not called in this script."""
    sources, unused = [], False
    for names, values in LOCAL.findall(text):
        for name, value in zip(names.split(","), call_arguments(values, 0), strict=False):
            if name.strip() == expression:
                sources.append(value)
    for function, parameters in FUNCTION.findall(text):
        names = [each.strip() for each in parameters.split(",")]
        if expression in names:
            calls = re.finditer(rf"(?<!function )\b{function}\(", text)
            given = [call_arguments(text, call.end()) for call in calls]
            unused |= not given
            sources += [arguments[names.index(expression)] for arguments in given]
    return sources, unused


def is_declared(expression: str, text: str) -> bool:
    """Whether the expression is one of KEYS, itself or by way of locals and parameters."""
    waiting, seen, found = [expression], set(), False
    while waiting:
        each = MARKS.sub(r"\1", SIBLING.sub(r"\1", waiting.pop()))
        if re.fullmatch(r"KEYS\[[^\].]+\]", each):
            found = True
        elif each not in seen:
            seen.add(each)
            sources, unused = sources_of(each, text) if each.isidentifier() else ([], False)
            if not sources and not unused:
                return False
            found |= unused
            waiting += sources
    return found


def built_keys(text: str) -> list[str]:
    return [each for each in key_expressions(text) if not is_declared(each, text)]


def with_shared(name: str) -> str:
    """The script as it is sent, without comments."""
    source = load_scripts()[name.removesuffix(".lua")].source
    return re.sub(r"--[^\n]*", "", source)


@pytest.mark.parametrize("name", NAMES)
def test_header_documents_exactly_the_slots_that_the_body_reads(name: str) -> None:
    """A slot is documented if and only if it is read."""
    assert slot_faults(TEXTS[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_no_key_is_built_in_lua(name: str) -> None:
    """Every key comes from KEYS: otherwise a cluster could not know where the script runs.

    The two exceptions lie in the slot of a key that is declared: ``sibling`` names the entry of
    the same key in another cache version, ``marks_of`` the set of marks beside a shard's head.
    """
    text = with_shared(name)
    assert bool(key_expressions(text)) == bool(CALL.search(text))
    assert built_keys(text) == []


@pytest.mark.parametrize("name", NAMES)
def test_header_has_all_its_parts(name: str) -> None:
    """Purpose first, what it returns, and invariants numbered from 1."""
    header, body = split(TEXTS[name])
    lines = header.splitlines()
    assert all(line == "--" or line.startswith("-- ") for line in lines)
    assert not re.match(r"-- (KEYS|ARGV|I\d|Returns|With)\b", lines[0])
    assert re.search(r"^-- Returns ", header, re.MULTILINE)
    numbers = [int(n) for n in re.findall(r"^-- I(\d+) ", header, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers
    assert body.strip()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_noun_and_verb(name: str) -> None:
    """One script, one command: noun_verb.lua."""
    assert re.fullmatch(r"[a-z]+_[a-z]+\.lua", name)


def test_shared_text_reads_no_slots_of_its_own() -> None:
    """What scripts share takes parameters: which slot is which is each script's own matter."""
    for name, text in TEXTS.items():
        if name.startswith("_"):
            assert not READ.search(re.sub(r"--[^\n]*", "", text))


GOOD = """\
-- Set a value.
--
-- KEYS[1] value  string
-- KEYS[2..] others
-- ARGV[1] text
-- Returns 1
--
-- I1 It is set.

local target = KEYS[1]
redis.call("SET", target, ARGV[1])
for i = 2, #KEYS do
  redis.call("DEL", KEYS[i])
end
return 1
"""


def test_the_rules_accept_what_is_right() -> None:
    """The script that the controls below are made of is without fault."""
    assert slot_faults(GOOD) == []
    assert built_keys(GOOD) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("-- ARGV[1] text\n", ""),
        ("-- ARGV[1] text", "-- ARGV[1] text\n-- ARGV[2] unused"),
        ("-- KEYS[2..] others", "-- KEYS[2] other"),
        ("-- KEYS[2..] others\n", ""),
        ("-- KEYS[1] value  string\n", ""),
        ("-- KEYS[2..] others", "-- KEYS[2..] others\n-- KEYS[3] another"),
        ("-- ARGV[1] text", "-- ARGV[1..] texts"),
        ('for i = 2, #KEYS do\n  redis.call("DEL", KEYS[i])\nend\n', ""),
    ],
)
def test_the_rules_see_a_wrong_header(old: str, new: str) -> None:
    """Negative control: one slot too many, too few, or of the wrong kind is found."""
    assert old in GOOD
    assert slot_faults(GOOD.replace(old, new)) != []


def test_a_range_may_cover_a_slot_that_is_read_by_number() -> None:
    """``KEYS[1..]`` documents KEYS[1] too."""
    changed = GOOD.replace("-- KEYS[1] value  string\n-- KEYS[2..]", "-- KEYS[1..]")
    assert changed != GOOD
    assert slot_faults(changed) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ('redis.call("SET", target', 'redis.call("SET", target .. ":x"'),
        ('redis.call("SET", target', 'redis.call("SET", "literal"'),
        ('redis.call("SET", target', 'redis.call("SET", ARGV[1]'),
        ('redis.call("SET", target', 'redis.call("SET", sibling(ARGV[1], label)'),
        ('redis.call("SET", target', 'redis.call("SET", marks_of(ARGV[1])'),
        ('redis.call("SET", target', "redis.call(ARGV[1], target"),
        ("local target = KEYS[1]", 'local target = KEYS[1] .. "x"'),
        ("local target = KEYS[1]", 'local target = "literal"'),
        ("local target = KEYS[1]", "local other = KEYS[1]"),
        ("local target = KEYS[1]", "local target = again\nlocal again = target"),
        ('redis.call("DEL", KEYS[i])', 'redis.call("DEL", KEYS[i], KEYS[i] .. "x")'),
        (
            "local target = KEYS[1]",
            """local target = KEYS[1]
local function put(key) redis.call("SET", key, 1) end
put(KEYS[1])
put(ARGV[1])""",
        ),
    ],
)
def test_the_rules_see_a_key_that_is_built(old: str, new: str) -> None:
    """Negative control: concatenated, literal or passed in as an argument, it is found."""
    assert old in GOOD
    assert built_keys(GOOD.replace(old, new)) != []

"""Which environment variables are settings, and what they say.

I1  A ``FOREBAY_*`` name that nothing reads is refused, with the nearest one that exists;
    except what Kubernetes adds for a service of that name.
I2  Neutral names (``settings_neutral``) are honoured unless a ``FOREBAY_*`` name sets the same;
    unknown ones among them belong to other software.
I3  A variable that is set but empty counts as not set.
I4  NAME and NAME_FILE together are refused; a file that NAME_FILE names must be there,
    while the places where systemd and container engines put secrets may be empty.

Values are still text here, ``settings_sources`` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from msgspec import Struct

from .errors import ConfigError
from .settings_names import FIELDS, SECTIONS, known_names, nearest, plainly, shown
from .settings_neutral import (
    NEUTRAL,
    Address,
    is_of_kubernetes,
    misspelt,
    primary_address,
    reader_address,
    url_must_agree,
)

__all__ = [
    "READ_BY_THE_COMMAND_LINE",
    "Found",
    "from_environment",
    "from_secret_file",
    "misspelt_names",
]

ReadSecret = Callable[[str], str | None]

READ_BY_THE_COMMAND_LINE = frozenset({"FOREBAY_CONFIG", "FOREBAY_APP", "FOREBAY_DEMO_DB"})
_READ_BY_TESTS = "FOREBAY_TEST_"
_SHORT = {"FOREBAY_URL": "valkey.url", "FOREBAY_NAMESPACE": "node.namespace"}

FILE_RANK, NEUTRAL_RANK, MOUNTED_RANK, OWN_RANK, FLAG_RANK = range(1, 6)


class Found(Struct, frozen=True, kw_only=True):
    """One value of one setting, as some source gives it."""

    name: str
    value: object
    origin: str
    rank: int  #: the greater one wins
    textual: bool = True  #: it may have to be read as a number or a truth value
    file: str = ""  #: the path of the file that it is from

    def __repr__(self) -> str:
        return f"Found({self.name} = {shown(self.name, self.value)} from {self.origin})"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [(self.name, shown(self.name, self.value)), ("origin", self.origin)]


def from_environment(
    environ: Mapping[str, str], read_secret: ReadSecret, others: Collection[Found] = ()
) -> list[Found]:
    """The values by the environment; ``others`` are those of file and flags."""
    present = {name: value for name, value in environ.items() if value}
    own = list(_own(present, read_secret))
    mounted = list(_mounted(present, read_secret, skip={found.name for found in own}))
    decided = {found.name for found in own + mounted}
    found = [*own, *mounted, *_neutral(present, read_secret, skip=decided)]
    if "valkey.reader_url" in decided:
        return found
    return [*found, *_neutral_reader(present, [*others, *found])]


def misspelt_names(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that nothing reads and that resembles one that is read."""
    own = [*_SHORT, *READ_BY_THE_COMMAND_LINE, *(field.env_name for field in FIELDS.values())]
    return list(misspelt(environ, own))


def from_secret_file(
    name: str, path: str, read_secret: ReadSecret, *, origin: str, rank: int
) -> Found | None:
    """The value that the file holds, without its last line end; None: there is no file."""

    def refused(problem: str) -> ConfigError:
        fix = "write the value alone into that file"
        return ConfigError(setting=name, value="***", origin=origin, problem=problem, fix=fix)

    try:
        text = read_secret(path)
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:  # not UTF-8, or too large
        raise refused("cannot be read: it is too large or not UTF-8") from None
    if text is None:
        return None
    value = text.removesuffix("\n").removesuffix("\r")
    if not value:
        raise refused("the file is empty")
    if "\n" in value:
        raise refused("the file has more than one line")
    return Found(name=name, value=value, origin=origin, rank=rank, file=path)


def _own(environ: Mapping[str, str], read_secret: ReadSecret) -> Iterator[Found]:
    known = {field.env_name: name for name, field in FIELDS.items()} | _SHORT
    taken: dict[str, Found] = {}
    for variable in sorted(environ):
        if not variable.startswith("FOREBAY_") or _read_elsewhere(variable, environ[variable]):
            continue
        setting = known.get(variable.removesuffix("_FILE"))
        if variable in known:
            setting = known[variable]
        elif setting is None or not FIELDS[setting].may_be_file:
            raise _unknown(variable, known)
        found = _read(variable, setting, environ, read_secret, rank=OWN_RANK)
        other = taken.setdefault(setting, found)
        if other.value != found.value:
            raise _set_twice(found, other)
    yield from taken.values()


def _neutral(
    environ: Mapping[str, str], read_secret: ReadSecret, skip: Collection[str]
) -> Iterator[Found]:
    taken: dict[str, Found] = {}
    for variable, setting in NEUTRAL.items():
        if setting in skip:
            continue
        by_file = f"{variable}_FILE" if FIELDS[setting].may_be_file else variable
        for each in sorted({variable, by_file} & environ.keys()):
            found = _read(each, setting, environ, read_secret, rank=NEUTRAL_RANK)
            other = taken.setdefault(setting, found)
            if other.value != found.value:
                raise _set_twice(found, other)
    if url := taken.get("valkey.url"):
        url_must_agree(str(url.value), url.origin, environ)
    elif "valkey.url" not in skip:
        taken |= _assembled("valkey.url", primary_address(environ))
    yield from taken.values()


def _neutral_reader(environ: Mapping[str, str], known: Collection[Found]) -> Iterable[Found]:
    """The reader is completed by the URL of the primary that is in force."""
    primaries = [found for found in known if found.name == "valkey.url" and found.value]
    primary = max(primaries, key=lambda found: found.rank, default=None)
    found = reader_address(environ, str(primary.value) if primary else "")
    return _assembled("valkey.reader_url", found).values()


def _assembled(setting: str, found: Address | None) -> dict[str, Found]:
    if found is None:
        return {}
    return {setting: Found(name=setting, value=found.url, origin=found.origin, rank=NEUTRAL_RANK)}


def _read(
    variable: str,
    setting: str,
    environ: Mapping[str, str],
    read_secret: ReadSecret,
    *,
    rank: int,
) -> Found:
    """The value of a variable, or of the file that it names."""
    origin = f"environment {variable}"
    by_file = variable.endswith("_FILE") and FIELDS[setting].may_be_file
    plain = variable.removesuffix("_FILE") if by_file else variable
    if plain in environ and f"{plain}_FILE" in environ:
        problem = f"{plain} and {plain}_FILE are both set"
        raise _refused(setting, environ[plain], origin, problem, "unset one of them")
    if not by_file:
        return Found(name=setting, value=environ[variable], origin=origin, rank=rank)
    path = environ[variable]
    origin = f"{origin}, file {plainly(path)}"
    found = from_secret_file(setting, path, read_secret, origin=origin, rank=rank)
    if found is None:
        raise _refused(setting, "***", origin, "the file is not there", "correct the path")
    return found


def _mounted(
    environ: Mapping[str, str], read_secret: ReadSecret, skip: Collection[str]
) -> Iterator[Found]:
    """Secrets where systemd (LoadCredential) and container engines put them."""
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    for name, field in FIELDS.items():
        if not field.secret or name in skip:
            continue
        flat = f"{field.section}_{field.leaf}"
        paths = [f"/run/secrets/forebay_{flat}"]
        if credentials:
            paths.insert(0, f"{credentials}/{flat}")
        for path in paths:
            origin = f"file {plainly(path)}"
            found = from_secret_file(name, path, read_secret, origin=origin, rank=MOUNTED_RANK)
            if found is not None:
                yield found
                break


def _read_elsewhere(variable: str, value: str) -> bool:
    if variable in READ_BY_THE_COMMAND_LINE or variable.startswith(_READ_BY_TESTS):
        return True
    return is_of_kubernetes(variable, value)


def _unknown(variable: str, known: Mapping[str, str]) -> ConfigError:
    files = [name + "_FILE" for name, setting in known.items() if FIELDS[setting].may_be_file]
    by_dotted = {_dotted(name): name for name in (*known, *files, *READ_BY_THE_COMMAND_LINE)}
    close = by_dotted.get(nearest(_dotted(variable), by_dotted))
    section = _dotted(variable).partition(".")[0]
    listed = known_names(section) if section in SECTIONS else ""
    fix = f"did you mean {close}?" if close else listed or "see `forebay config show`"
    origin = f"environment {variable}"
    return _refused(variable, "***", origin, "is no setting", fix)


def _dotted(variable: str) -> str:
    """Without the prefix that all share, which would make any two look alike."""
    return variable.removeprefix("FOREBAY_").lower().replace("__", ".")


def _set_twice(found: Found, other: Found) -> ConfigError:
    problem = f"{other.origin} says something else"
    return _refused(found.name, found.value, found.origin, problem, "unset one of them")


def _refused(setting: str, value: object, origin: str, problem: str, fix: str) -> ConfigError:
    text = shown(setting, value) if setting in FIELDS else "***"
    return ConfigError(setting=setting, value=text, origin=origin, problem=problem, fix=fix)

"""The command `forebay`: finds the command that was asked for, and ends with its exit code.

I1  A command's module is imported when the command is run; `--version` and `--help` import
    none, so that they answer at once.
I2  Every way to end is decided in ``main``: an error raised on purpose is one line on stderr
    and its exit code; a traceback is shown only with ``--debug``.
I3  A reader that goes away, as in `forebay ... | head`, ends the command without a word; output
    that cannot be written for another reason is one line on stderr. A standard stream that is
    closed is /dev/null, so that no connection takes its place.
I4  What a command returns is its exit code, None is 0.
I5  No error shows the password of a URL that was typed, nor moves a cursor.

Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import click

from ... import __version__

__all__ = ["COMMANDS", "main", "root"]


class Listed(NamedTuple):
    target: str  #: module:attribute, from this package
    summary: str


COMMANDS = {
    "dev": Listed(".dev:command", "Try it out: a server, three nodes and a day of real flights."),
    "run": Listed(".run:command", "Run a node as a worker."),
    "publish": Listed(".publish:command", "Publish an event: invalidate, write or refresh."),
    "explain": Listed(".explain:command", "Say why a read of a key hits or misses."),
    "locks": Listed(".locks:command", "Show locks, or release one by force."),
    "limits": Listed(".limits:command", "Show rate limits, or take of one."),
    "warm": Listed(".warm:command", "Load keys into the shared tier ahead of their readers."),
    "import": Listed(".import_:command", "Bring over what another service has stored."),
    "health": Listed(".health:command", "Ask a running node whether it is well."),
    "config": Listed(
        ".config:command", "Show or check the settings in force; print the users Valkey needs."
    ),
}

_EXIT_CODES = """
\b
Exit codes:
  0  done; also after a drain that SIGTERM or SIGINT asked for
  1  a check failed, or a fault while running
  2  wrong usage, or settings that cannot be used
  3  Valkey was not reached, or cannot serve us
  4  accepted events or writes are left undone: to other nodes, or lost with the server
  130  interrupted before there was anything to drain
"""
_FAULT, _INTERRUPTED = 1, 130
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_FLAGS = f"{__package__}.options"  # where setting_options gathers flags; not imported


class LazyGroup(click.Group):
    """A group that knows the names and summaries of its commands, and imports one to run it."""

    def __init__(self, **attributes: object) -> None:
        commands = {
            name: click.Command(name, short_help=listed.summary)
            for name, listed in COMMANDS.items()
        }
        super().__init__(commands=commands, **attributes)  # type: ignore[arg-type]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of their use, not of the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, found, rest = super().resolve_command(ctx, args)
        return name, _imported(name) if name in COMMANDS else found, rest


def _imported(name: str) -> click.Command:
    module, _, attribute = COMMANDS[name].target.partition(":")
    command = getattr(importlib.import_module(module, __package__), attribute)
    assert isinstance(command, click.Command)
    return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, "--version", prog_name="forebay")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@click.option("-q", "--quiet", is_flag=True, help="Log errors only.")
@click.option("--debug", is_flag=True, help="Show the traceback of what fails.")
@click.pass_context
def root(context: click.Context, verbose: bool, quiet: bool, debug: bool) -> None:
    """A cache that a whole cluster of services shares on Valkey, kept right by events."""
    context.obj.debug = debug
    if verbose or quiet:
        level = "debug" if verbose else "error"
        context.meta.setdefault(_FLAGS, {})["log_level"] = level


class Invocation:
    """What ``main`` must know of the options when the command has failed."""

    debug = False


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    invocation = Invocation()
    _open_closed_streams()
    try:
        code = _outcome(args, invocation)
        sys.stdout.flush()
    except BrokenPipeError:
        code = _without_reader()
    except Exception as error:
        if invocation.debug:
            raise
        code = _not_written(error) if _is_of_output(error) else _told(error)
    sys.exit(code)


def _open_closed_streams() -> None:
    """The first descriptor that is free is opened: these three, in their order."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            assert opened == number
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _outcome(args: Sequence[str] | None, invocation: Invocation) -> int:
    """The exit code of a command that ended by itself: returned, or by ``context.exit``."""
    try:
        result = root.main(args, prog_name="forebay", standalone_mode=False, obj=invocation)
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    return result if isinstance(result, int) else 0


def _show(error: click.ClickException) -> None:
    """As click does, which repeats what was typed as it is."""
    from ...schemas.masking import escape_controls, mask_urls_in

    error.message = escape_controls(error.message)  # type: ignore[misc]  # click shows it
    with io.StringIO() as shown:
        error.show(file=shown)
        for line in shown.getvalue().splitlines():
            click.echo(escape_controls(mask_urls_in(line)), err=True)


def _without_reader() -> int:
    """Whatever is still buffered goes nowhere; the exit code is the one that click has for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _FAULT


def _is_of_output(error: Exception) -> bool:
    """Whether stdout could not be written; an error about a file has its name."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _FULL


def _not_written(error: Exception) -> int:
    click.echo(f"Error: the output cannot be written: {error}", err=True)
    return _without_reader()


def _told(error: Exception) -> int:
    """One line for a person; the exit code for the machine."""
    from ...schemas.errors import ForebayError
    from ...schemas.masking import escape_controls, mask_urls_in

    error = _blamed(error)
    text = escape_controls(mask_urls_in(str(error)))
    if not isinstance(error, ForebayError):
        text = f"{type(error).__name__}: {text} (this is a defect; --debug shows the traceback)"
    click.echo(f"Error: {text}", err=True)
    return getattr(error, "exit_code", _FAULT)


def _blamed(error: Exception) -> Exception:
    """The first error that a task group has gathered, an exit code of its own preferred."""
    if not isinstance(error, ExceptionGroup):
        return error
    leaves = [_blamed(each) for each in error.exceptions]
    return next((each for each in leaves if hasattr(each, "exit_code")), leaves[0])

"""The command line. It does not import torch before a subcommand runs."""

import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import typer

from apt.cli.commands import HELP_OPTIONS, Commands
from apt.cli.commands import run as run_command
from apt.cli.heap import keep_freed_memory
from apt.cli.interruptions import interrupted, signals_as_exceptions
from apt.cli.streams import guarded, program
from apt.errors import SLOW_PRODUCTS, AptError, resource_error
from apt.locations.paths import user_error

# Subcommands of the package manager `apt` of Debian.
_PACKAGE_MANAGER = [
    "install", "remove", "purge", "autoremove", "update", "upgrade", "full-upgrade",
    "dist-upgrade", "search", "show", "list", "policy", "edit-sources", "source", "build-dep",
    "download", "changelog", "clean", "autoclean", "satisfy",
]  # fmt: skip

_EPILOG = "The options above can be given with every command, before or after its name."

app = typer.Typer(
    name="apt-prune",
    cls=Commands,
    help="Prune transformers after training, in one shot.",
    epilog=_EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)

_GLOBAL_FLAGS = ("--debug", "--quiet", "-q", "--verbose", "-v")
_LOG_FILE = "--log-file"


def _version(show: bool) -> None:
    if show:
        from apt import __version__

        typer.echo(f"apt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
    quiet: bool = typer.Option(
        False, "--quiet", "-q", help="Print results and errors only: no notices, no progress."
    ),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Also print a line for each step and each pruned weight."
    ),
    log_file: Path | None = typer.Option(
        None, "--log-file", metavar="FILE", help="Append all messages to FILE, with the time."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of every error."),
) -> None:
    """Prune transformers after training, in one shot."""
    from apt.cli.output import Level, set_up

    if quiet and verbose:
        raise AptError("--quiet and --verbose are both given", "choose one")
    set_up(Level.QUIET if quiet else Level.VERBOSE if verbose else Level.NORMAL, log_file)


def main() -> None:
    """Run the command line; exit status 2 for errors of the user, 130 for Ctrl-C."""
    with guarded():
        try:
            with signals_as_exceptions():
                _run(sys.argv[1:] or ["--help"])
        except KeyboardInterrupt as error:  # before or after the command itself
            raise SystemExit(interrupted(error).exit_code) from None


def _run(arguments: list[str]) -> None:
    pairs = pairwise(["", *arguments])
    commands = (word for last, word in pairs if word[:1] != "-" and last != _LOG_FILE)
    if (command := next(commands, "")) in _PACKAGE_MANAGER:
        _fail(f"this is APT, which prunes transformers; for packages, run /usr/bin/apt {command}")
    arguments = _global_options_first(arguments)
    _quieten_libraries()
    keep_freed_memory()
    options = [word for word in arguments if word != "--debug"]
    try:
        _check_working_directory()
        _check_text(options)
        with _json_output(arguments):
            run_command(app, options, program())
    except Exception as error:
        message = None if "--debug" in arguments else _user_error(error)
        if message is None:
            raise
        from apt.options import flags_of

        *lines, last = message.faults
        _fail(*lines, last + flags_of(message.options))


def _user_error(error: Exception) -> AptError | None:
    """The error for the user, if the user can correct it; None for a bug."""
    if isinstance(error, AptError):
        return error
    return (user_error(error) if isinstance(error, OSError) else None) or resource_error(error)


def _json_output(words: list[str]) -> AbstractContextManager[None]:
    """With ``--json``, both streams contain JSON only, beginning with the first error."""
    from apt.cli.output import json_streams, print_events

    command_words = words[: words.index("--")] if "--" in words else words
    print_events("--json" in command_words)
    return json_streams() if "--json" in command_words else nullcontext()


def _check_working_directory() -> None:
    """Raise if the working directory was deleted: torch would end without a traceback."""
    try:
        os.getcwd()
    except OSError as error:
        raise AptError("the working directory no longer exists", "change to another") from error


def _check_text(words: list[str]) -> None:
    """Raise if an argument is not text in the encoding of the environment."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            escaped, encoding = ascii(word), sys.getfilesystemencoding()
            raise AptError(
                f"{escaped} is not text in the encoding of this environment ({encoding})",
                "set LC_ALL=C.UTF-8, or rename it",
            ) from error


def _global_options_first(arguments: list[str]) -> list[str]:
    """The arguments, with the options of every command moved before the command."""
    global_options: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            return [*global_options, *others, word, *words]
        if word in _GLOBAL_FLAGS or word.startswith(f"{_LOG_FILE}="):
            global_options.append(word)
        elif word == _LOG_FILE:
            global_options += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            others.append(word)
    return global_options + others


def _fail(*lines: str) -> None:
    from apt.cli.output import error_line

    rank = os.environ.get("RANK", "0")  # of the processes that torchrun starts
    for line in (" ".join(line.split()) for line in lines):
        typer.echo(error_line(f"rank {rank}: {line}" if rank != "0" else line), err=True)
    raise SystemExit(2)


def _quieten_libraries() -> None:
    """Suppress messages of other libraries, and show each failure of a plugin in one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    for pattern in (
        "plugin failed to load", "observer failed", ".* is now .*; the old name",
        SLOW_PRODUCTS,
    ):  # fmt: skip
        warnings.filterwarnings("default", message=pattern)  # once for each text
    warnings.showwarning = _warn


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    from apt.cli.output import notice

    notice(f"{program()}: warning: {message}")

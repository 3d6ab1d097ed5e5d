"""What the subcommands share: consoles, notices, tables, JSON."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apt.cli.streams import program
from apt.errors import AptError
from apt.output.json_values import plain


class Level(IntEnum):
    """How much is said beside results and errors."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


def _speaks() -> bool:
    """Whether this process is the one that speaks, of those that torchrun starts."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return not several or os.environ.get("RANK", "0") == "0"


def _console(*, stderr: bool = False, width: int | None = None) -> Console:
    return Console(
        stderr=stderr, width=width, highlight=False, soft_wrap=True, emoji=False,
        quiet=not _speaks(),
    )  # fmt: skip


out, err = _console(), _console(stderr=True)
_wide = _console(width=10_000)  # for tables that go to a file or another program
log = logging.getLogger("apt.cli")
log.propagate = False
log.addHandler(logging.NullHandler())
_chosen = Level.NORMAL


def set_up(level: Level, log_file: Path | None) -> None:
    """Choose how much is said, and the file that keeps all of it.

    Raises:
        AptError: the file cannot be written.
    """
    global _chosen
    _chosen = level
    log.handlers.clear()
    log.addHandler(logging.NullHandler())
    if log_file is None or not _speaks():
        return
    try:
        kept = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise AptError(f"cannot write {log_file}: {error.strerror}", "choose another") from error
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(kept)
    log.setLevel(logging.INFO)


def notice(line: str) -> None:
    """A line for the person at the shell, beside the results."""
    log.info(line)
    if _chosen > Level.QUIET:
        err.print(line, markup=False)


def complaint(line: str) -> None:
    """A line about what went wrong, which is said however little was asked for."""
    log.error(line)
    err.print(f"{program()}: {line}", markup=False)


def detail(line: str) -> None:
    """A line for who has asked for more (``--verbose``)."""
    log.info(line)
    if _chosen is Level.VERBOSE:
        err.print(line, markup=False)


def animated() -> bool:
    """Whether there is somebody to see a display that changes."""
    return err.is_terminal and _chosen > Level.QUIET


class Working:
    """Says what is being done: a line that changes on a terminal, with ``--verbose`` a line each.

    Attributes:
        update: says what is being done next.
    """

    def __init__(self, spinner: Any = None) -> None:
        self._spinner = spinner

    def update(self, text: str) -> None:
        """Say what is being done now."""
        if self._spinner is not None:
            self._spinner.update(text)
        detail(text)


@contextmanager
def working(text: str) -> Iterator[Working]:
    """While entered, say what is being done."""
    if not animated():
        quiet = Working()
        quiet.update(text)
        yield quiet
        return
    with err.status(text) as spinner:
        yield Working(spinner)


class _Table(Table):
    """A table whose cells are what they say: ``apt-prune[gguf]`` is no markup."""

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        super().add_row(*map(Text, cells))


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; columns whose name starts with ``>`` are right-aligned."""
    made = _Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left")
    return made


def show(made: Table) -> None:
    """Print a table; for a file or another program, as wide as it is."""
    if out.is_terminal:
        out.print(made, soft_wrap=False)
    else:
        _wide.print(made)


def show_json(record: Any) -> None:
    """Print a record as one line of JSON, in which numbers that are none are strings."""
    out.print(json.dumps(plain(record), allow_nan=False), markup=False)


def size(count: float) -> str:
    """A number of bytes, readable."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """A number of seconds, readable."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"

"""Output of the subcommands: consoles, notices, tables, JSON, the log file."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import IntEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apt.cli.streams import printable, program
from apt.errors import AptError
from apt.files.writing import check_file
from apt.locations.paths import expanded
from apt.output.json_values import json_value

_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")


class Level(IntEnum):
    """The amount of output beside results and errors."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


def is_first_rank() -> bool:
    """True in the first process of ``torchrun``, the only process that prints."""
    is_distributed = os.environ.get("WORLD_SIZE", "1") != "1"
    return not is_distributed or os.environ.get("RANK", "0") == "0"


def _console(*, stderr: bool = False, width: int | None = None) -> Console:
    return Console(
        stderr=stderr, width=width, highlight=False, soft_wrap=True, emoji=False,
        quiet=not is_first_rank(),
    )  # fmt: skip


out, err = _console(), _console(stderr=True)
_wide_console = _console(width=10_000)  # for tables in a file or for another program
log = logging.getLogger("apt.cli")
log.propagate = False
log.addHandler(logging.NullHandler())
_level = Level.NORMAL
_events = False


def set_up(level: Level, log_file: Path | None) -> None:
    """Choose the amount of output, and the log file for all of it.

    Raises:
        AptError: the file cannot be written, or is not a log.
    """
    global _level
    _level = level
    out.quiet = err.quiet = not is_first_rank()
    log.handlers.clear()
    log.addHandler(logging.NullHandler())
    if log_file is None or not is_first_rank():
        return
    log.addHandler(open_log(expanded(log_file)))
    log.setLevel(logging.INFO)


def print_events(enabled: bool) -> None:
    """Choose whether standard error gets events as lines of JSON (``--json``), or text."""
    global _events
    _events = enabled


@contextmanager
def json_streams() -> Iterator[None]:
    """While entered, standard output has results alone; plugins print to standard error."""
    out.file = _wide_console.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        out._file = _wide_console._file = None  # rich uses the current standard output again


def _line(line: str, event: str, fields: Mapping[str, Any]) -> str:
    """A line of text, or the event with its fields as a line of JSON."""
    if not _events:
        return printable(line)
    return json.dumps(json_value({"event": event, **(fields or {"text": line})}), allow_nan=False)


def say(line: str) -> None:
    """Print a line of results."""
    out.print(printable(line), markup=False)


def notice(line: str, event: str = "notice", **fields: Any) -> None:
    """Print a line beside the results, unless ``--quiet`` is given.

    Args:
        line: the text.
        event: the name of the event that takes the place of the text with ``--json``.
        fields: the fields of the event; by default the text.
    """
    log.info(line)
    if _level > Level.QUIET:
        err.print(_line(line, event, fields), markup=False)


def error_line(line: str) -> str:
    """Log a line about an error, and return the line to print."""
    log.error(line)
    return _line(f"{program()}: {line}", "error", {"text": line})


def show_error(line: str) -> None:
    """Print a line about an error, also with ``--quiet``."""
    err.print(error_line(line), markup=False)


def show_detail(line: str, event: str = "step", **fields: Any) -> None:
    """Print a line if ``--verbose`` is given, and an event with ``--json``; see `notice`."""
    log.info(line)
    if _level is Level.VERBOSE or (_events and _level > Level.QUIET):
        err.print(_line(line, event, fields), markup=False)


def show_event(event: str, **fields: Any) -> None:
    """Print an event that has no text, with ``--json``."""
    if _events and _level > Level.QUIET:
        err.print(_line("", event, fields), markup=False)


def has_live_display() -> bool:
    """True if standard error is a terminal that may show a changing display."""
    return err.is_terminal and _level > Level.QUIET and not _events


class _Table(Table):
    """A table whose cells are literal text: ``apt-prune[gguf]`` is not markup."""

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        super().add_row(*map(_literal, cells))


def _literal(text: str) -> Text:
    return Text(printable(text))


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table. Columns whose name starts with ``>`` are right-aligned."""
    heading = None if title is None else _literal(title)
    result = _Table(
        title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        right = column.startswith(">")
        result.add_column(_literal(column.lstrip(">")), justify="right" if right else "left")
    return result


def show(content: Table) -> None:
    """Print a table. Its lines are not wrapped if a file or another program reads them."""
    if out.is_terminal:
        out.print(content, soft_wrap=False)
    else:
        _wide_console.print(content)


def show_json(record: Any) -> None:
    """Print a record as one line of JSON. Numbers that are not finite become strings."""
    out.print(json.dumps(json_value(record), allow_nan=False), markup=False)


def show_rows(rows: Sequence[dict[str, str]], *, as_json: bool) -> None:
    """Print rows with the same keys as a table, whose columns are the keys; or as JSON."""
    if as_json:
        show_json(rows)
        return
    row_table = table(*(rows[0] if rows else ()))
    for row in rows:
        row_table.add_row(*row.values())
    show(row_table)


def size(count: float) -> str:
    """A number of bytes in a readable unit."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    """A number of seconds in readable units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


class _LineFormatter(logging.Formatter):
    """One printable line for each message: a log is shown on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a message."""
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file. If writing fails, an error is printed once, and the run continues without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print that the file cannot be written, and stop logging."""
        error = sys.exc_info()[1]
        logging.getLogger("apt.cli").removeHandler(self)
        self.stream = None  # its buffer cannot be written when it is closed either
        reason = getattr(error, "strerror", None) or error
        message = f"{program()}: cannot write {self.baseFilename}: {reason}"
        print(printable(message), file=sys.stderr)


def open_log(path: Path) -> logging.Handler:
    """A handler that appends to a new file, or to an earlier log.

    Raises:
        AptError: the file cannot be written, or is not a log of APT.
    """
    check_file(path, overwrite=True, options=("log_file",))
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb") as file:
            beginning = file.read(64)
    except OSError as error:
        raise AptError(
            f"cannot write {path}: {error.strerror}", "choose another file", ("log_file",)
        ) from error
    if beginning and not _LOG_LINE.match(beginning):
        raise AptError(f"{path} is not a log of APT", "choose another file", ("log_file",))
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_LineFormatter(_LOG_FORMAT))
    return handler

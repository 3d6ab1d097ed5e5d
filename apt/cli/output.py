"""What the subcommands share: consoles, notices, tables."""

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Of the processes that torchrun starts, the first speaks for all.
_QUIET = os.environ.get("RANK", "0") != "0"
out = Console(highlight=False, soft_wrap=True, emoji=False, quiet=_QUIET)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=_QUIET)


def notice(line: str) -> None:
    """A line for the person at the shell, beside the results."""
    err.print(line, markup=False)


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

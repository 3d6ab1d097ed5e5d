"""The file of ``--log-file``, to which messages are appended."""

import logging
import os
import re
import sys
from pathlib import Path

from apt.cli.streams import printable, program
from apt.errors import AptError
from apt.files.writing import check_file

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_FIRST = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")


class _Lines(logging.Formatter):
    """One line for each message, since a log is shown on a terminal too."""

    def format(self, record: logging.LogRecord) -> str:
        """The time and the message."""
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file. If it cannot be written, one line says so, and the run goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that the file cannot be written, and write no more."""
        error = sys.exc_info()[1]
        logging.getLogger("apt.cli").removeHandler(self)
        self.stream = None  # its buffer cannot be written when it is closed either
        reason = getattr(error, "strerror", None) or error
        fault = f"{program()}: cannot write {self.baseFilename}: {reason}"
        print(printable(fault), file=sys.stderr)


def open_log(path: Path) -> logging.Handler:
    """A handler that appends to a new file, or to an earlier log.

    Raises:
        AptError: the file cannot be written, or is something else than a log.
    """
    check_file(path, overwrite=True, options=("log_file",))
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb") as file:
            first = file.read(64)
    except OSError as error:
        raise AptError(
            f"cannot write {path}: {error.strerror}", "choose another file", ("log_file",)
        ) from error
    if first and not _FIRST.match(first):
        raise AptError(f"{path} is not a log of APT", "choose another file", ("log_file",))
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Lines(_FORMAT))
    return handler

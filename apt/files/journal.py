"""The journal of a run that can be resumed: a file of lines, each with a checksum.

A line is written after the data that it describes are on disk. Its checksum covers all lines before
it, so that a changed, added or removed line is detected. An incomplete last line is ignored.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from apt.errors import AptError

Line = dict[str, Any]
_CHECKSUM = "checksum"


class Journal:
    """The lines of a file, which need not exist yet.

    Args:
        path: the file.
        remedy: the advice for a file that was changed.

    Attributes:
        lines: the lines, without their checksums.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path, self.lines, self._remedy = path, list[Line](), remedy
        self._last = ""  # the checksum of the last line

    def read(self) -> None:
        """Read the complete lines, and remove an incomplete last line from the file.

        Raises:
            AptError: a line before the last one was changed.
        """
        self.lines, self._last = [], ""
        with open(_open(self.path), "r+b") as file:
            raw_lines, complete = file.read().splitlines(keepends=True), 0
            for number, raw in enumerate(raw_lines, 1):
                line = self._checked(raw)
                if line is None:
                    if number < len(raw_lines):
                        raise AptError(f"line {number} of {self.path} was changed", self._remedy)
                    file.truncate(complete)
                    return
                self.lines.append(line)
                complete += len(raw)

    def _checked(self, raw: bytes) -> Line | None:
        """A line; None if it is incomplete or its checksum is wrong."""
        try:
            line = json.loads(raw)
            checksum = line.pop(_CHECKSUM)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not raw.endswith(b"\n") or checksum != self._checksum(line):
            return None
        self._last = checksum
        return dict(line)

    def _checksum(self, line: Line) -> str:
        """The checksum of the next line."""
        return hashlib.blake2b((self._last + json.dumps(line)).encode(), digest_size=16).hexdigest()

    def add(self, line: Line) -> None:
        """Write a line and flush it to disk."""
        checksum = self._checksum(line)
        with open(_open(self.path), "ab") as file:
            file.write(f"{json.dumps({**line, _CHECKSUM: checksum})}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self._last = checksum

    def clear(self) -> None:
        """Delete the file and forget its lines."""
        self.path.unlink(missing_ok=True)
        self.lines, self._last = [], ""

    def has(self, key: str) -> bool:
        """True if a line has the key ``key``."""
        return any(key in line for line in self.lines)


def _open(path: Path) -> int:
    """Open a file for reading and appending. A link is refused: it may lead to another's file."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AptError(f"{path} cannot be opened: {error.strerror}") from error
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(file)
        raise AptError(f"{path} is a link or not a regular file", "delete it")
    return file

"""The journal of a run that can be gone on with: lines on disk, each sealed by a checksum.

A line is written when what it says is on disk. Its checksum covers all lines before it, so that a
line that was changed, added or taken out is seen. A last line that was cut short counts for
nothing.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from apt.errors import AptError

Line = dict[str, Any]
_SEAL = "checksum"


class Journal:
    """The lines of a file, which need not be there yet.

    Attributes:
        lines: the lines, without their checksums.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[Line]()
        self._seal = ""

    def read(self) -> None:
        """Read the whole lines; what the last one lacks to be whole is cut off.

        Raises:
            AptError: a line before the last is none that a run has written.
        """
        self.lines, self._seal = [], ""
        with open(_open(self.path), "r+b") as file:
            raw_lines, whole = file.read().splitlines(keepends=True), 0
            for number, raw in enumerate(raw_lines, 1):
                line = self._checked(raw)
                if line is None:
                    if number < len(raw_lines):
                        raise AptError(
                            f"line {number} of {self.path} was changed",
                            f"delete {self.path.parent} and begin again",
                        )
                    file.truncate(whole)
                    return
                self.lines.append(line)
                whole += len(raw)

    def _checked(self, raw: bytes) -> Line | None:
        """A line, if it is whole and its checksum is right."""
        try:
            line = json.loads(raw)
            seal = line.pop(_SEAL)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not raw.endswith(b"\n") or seal != self._sealed(line):
            return None
        self._seal = seal
        return dict(line)

    def _sealed(self, line: Line) -> str:
        """The checksum of a line that comes next."""
        return hashlib.blake2b((self._seal + json.dumps(line)).encode(), digest_size=16).hexdigest()

    def add(self, line: Line) -> None:
        """Write a line, and wait until the disk has it."""
        seal = self._sealed(line)
        with open(_open(self.path), "ab") as file:
            file.write(f"{json.dumps({**line, _SEAL: seal})}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self._seal = seal

    def has(self, key: str) -> bool:
        """Whether a line says ``key``."""
        return any(key in line for line in self.lines)


def _open(path: Path) -> int:
    """A file to read and to add to, which must not be a link: what that leads to is not ours."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AptError(f"{path} cannot be opened: {error.strerror}") from error
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(file)
        raise AptError(f"{path} is a link or no file")
    return file

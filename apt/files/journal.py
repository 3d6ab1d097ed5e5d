"""The journal of a run that can be resumed: a file of lines, each with a checksum.

The first line has all inputs of the run. A line of `Journal.keep` describes work from which a
resumed run continues. The journal flushes the data that a line describes before it writes the line.
The checksum of a line covers all lines before it, so that a changed, added or removed line is
detected. An incomplete last line is ignored.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from apt.errors import AptError
from apt.files.flushing import flush

Line = dict[str, Any]
_CHECKSUM, _INPUTS, _KEPT = "checksum", "run_inputs", "kept"
_HEAD = f'{{"{_INPUTS}": '.encode()


class Journal:
    """The lines of a file, which need not exist yet.

    Args:
        path: the file; None keeps the lines in memory.
        run: the run in words, for messages.
        remedy: the advice for a file that cannot be used.

    Attributes:
        lines: the lines, without their checksums.
    """

    def __init__(self, path: Path | None = None, run: str = "", remedy: str = "") -> None:
        self.path, self.lines, self._run, self._remedy = path, list[Line](), run, remedy
        self._last = ""  # the checksum of the last line

    def read(self) -> None:
        """Read the complete lines, and remove an incomplete last line from the file.

        Raises:
            AptError: the file is no journal, or a line before the last one was changed.
        """
        if self.path is None or not os.path.lexists(self.path):
            return
        self.lines, self._last = [], ""
        with open(_open(self.path, self._remedy), "r+b") as file:
            raw, complete = file.read(), 0
            if raw[: len(_HEAD)] != _HEAD[: len(raw)]:
                raise AptError(
                    f"{self.path} is not the journal of {self._run}, or was changed", self._remedy
                )
            raw_lines = raw.splitlines(keepends=True)
            for number, raw in enumerate(raw_lines, 1):
                line = self._checked(raw)
                if line is None:
                    if number < len(raw_lines):
                        raise self.damaged(f"line {number} of {self.path} was changed")
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

    def add(self, line: Line, data: Path | None = None) -> None:
        """Write a line and flush it to disk.

        Args:
            line: the line.
            data: the file or folder that the line describes, which is flushed first; None if it is
                on disk already, or if there is none.
        """
        if self.path is not None:
            if data is not None:
                flush(data)
            checksum, is_new = self._checksum(line), not self.path.exists()
            with open(_open(self.path, self._remedy), "ab") as file:
                file.write(f"{json.dumps({**line, _CHECKSUM: checksum})}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                flush(self.path)
            self._last = checksum
        self.lines.append(line)

    def keep(self, line: Line, data: Path | None = None) -> None:
        """Write a line about work from which a resumed run continues, see `add`."""
        self.add({**line, _KEPT: True}, data)

    @property
    def has_work(self) -> bool:
        """True if there is work from which a resumed run continues."""
        return any(_KEPT in line for line in self.lines)

    def clear(self) -> None:
        """Delete the file and forget its lines."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.lines, self._last = [], ""

    def begin(self, inputs: Line) -> None:
        """Begin anew, with all inputs of the run, as values for JSON."""
        self.clear()
        self.add({_INPUTS: json.loads(json.dumps(inputs))})

    def serves(self, inputs: Line) -> bool:
        """True if the journal belongs to a run with these inputs."""
        return self.lines[:1] == [{_INPUTS: json.loads(json.dumps(inputs))}]

    def check(self, inputs: Line) -> None:
        """Raise if the journal belongs to a run with other inputs."""
        recorded = self.lines[0].get(_INPUTS)
        if not isinstance(recorded, dict):
            raise self.damaged(f"{self.path} has no {_INPUTS}")
        hint = f"resume with the same options and inputs, or {self._remedy}"
        check_same(f"{self._run} is another run", recorded, inputs, hint)

    def damaged(self, change: str) -> AptError:
        """The error for a change since the interruption."""
        return AptError(f"{self._run} is damaged: {change}", self._remedy)

    def values(self, key: str) -> list[Any]:
        """The values of a key in the lines, the oldest first."""
        return [line[key] for line in self.lines if key in line]

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """The last value of a key; if no line has the key, compute the value and add a line."""
        if not (results := self.values(key)):
            results = [compute()]
            self.add({key: results[0]})
        return results[-1]


def journal_beside(output: Path, kind: str, run: str) -> Journal:
    """The journal of an earlier run in a hidden file beside an output.

    Args:
        kind: the word for its content in the name of the file.
        run: the run in words, for messages.

    Raises:
        AptError: the file is a link, was changed, or is not a journal.
    """
    real = output.resolve()
    place = real.with_name(f".{real.name}.{kind}.jsonl")
    journal = Journal(place, run, "move it to another place, or delete it")
    journal.read()
    return journal


def check_same(
    message: str,
    recorded: Line,
    current: Line,
    hint: str,
    options: tuple[str, ...] = (),
    ignored: Collection[str] = (),
) -> None:
    """Raise if the inputs of a run differ from the recorded inputs of another run.

    Args:
        message: the error, to which the names of the entries that differ are added.
        recorded, current: the inputs of the two runs; ``recorded`` was read from JSON.
        hint, options: the advice, see `AptError`.
        ignored: the entries that may differ.
    """
    names = sorted(_differences(recorded, json.loads(json.dumps(current))))
    if names := [name for name in names if name.partition(".")[0] not in ignored]:
        raise AptError(f"{message}: {', '.join(names)} differ", hint, options)


def _differences(recorded: Line, current: Line, prefix: str = "") -> Iterator[str]:
    """The dotted names of the entries that differ."""
    for key in {**recorded, **current}:
        left, right = recorded.get(key), current.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def _open(path: Path, remedy: str) -> int:
    """Open a file for reading and appending. A link is refused: its target may be any file."""
    link = AptError(f"{path} is a link or not a regular file", remedy)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise link from error
        raise AptError(f"{path} cannot be opened: {error.strerror}", remedy) from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(file)
        raise link
    return file

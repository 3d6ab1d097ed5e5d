"""The workplace of a run that can be gone on with: a lock, a journal, and the output so far.

It lies beside the output directory and is gone once the output is whole. A line of the journal is
written when what it says is on disk; a line cut short by a power cut counts for nothing.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apt.checkpoint import replace_directory
from apt.errors import AptError

Line = dict[str, Any]


def workplace(output: Path) -> Path:
    """The folder ``.NAME.apt`` beside an output directory ``NAME``."""
    output = output.absolute()
    return output.parent / f".{output.name}.apt"


class Workplace:
    """What lies in the `workplace` of an output directory.

    Attributes:
        lines: the journal's lines so far.
        out: what will be the output directory.
        activations: a folder for what no other run goes on with; empty at the start.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.folder = workplace(output)
        self.out = self.folder / "out"
        self.activations = self.folder / "activations"
        self.lines: list[Line] = []
        self._path = self.folder / "journal.jsonl"

    @contextmanager
    def entered(self, fingerprint: Line, resume: bool) -> Iterator[None]:
        """Hold the lock; begin a journal, or go on with one that has the same ``fingerprint``.

        Raises:
            AptError: another run is at work here, there is something to go on with and ``resume``
                is not given, or what is there is another run's or no run's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AptError(f"another run is writing {self.output}", "wait for it") from error
            shutil.rmtree(self.activations, ignore_errors=True)
            self.activations.mkdir()
            self._begin(json.loads(json.dumps(fingerprint)), resume)
            yield

    def _begin(self, fingerprint: Line, resume: bool) -> None:
        self.lines = self._read()
        if not self.lines:
            shutil.rmtree(self.out, ignore_errors=True)
            self._path.unlink(missing_ok=True)
            self.out.mkdir()
            self.add({"fingerprint": fingerprint})
            return
        if not resume:
            raise AptError(
                f"an interrupted run of {self.output} is there to go on with",
                f"pass --resume, or delete {self.folder}",
            )
        known = self.lines[0]["fingerprint"]
        if not isinstance(known, dict):
            raise self.damaged()
        if other := [key for key in fingerprint if known.get(key) != fingerprint[key]]:
            raise AptError(
                f"the interrupted run of {self.output} was another one: its {', '.join(other)} "
                "differ",
                f"give the same command, or delete {self.folder}",
            )

    def damaged(self) -> AptError:
        """What to say of a journal that no run has written."""
        return AptError(f"{self._path} is damaged", f"delete {self.folder} and begin again")

    def _read(self) -> list[Line]:
        """The journal's whole lines; what comes after them is cut off."""
        if not self._path.is_file():
            return []
        lines, whole = [], 0
        for raw in self._path.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                break
            lines.append(line)
            whole += len(raw)
        os.truncate(self._path, whole)
        return lines if lines and "fingerprint" in lines[0] else []

    def add(self, line: Line) -> None:
        """Write a line, and wait until the disk has it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def has(self, key: str) -> bool:
        """Whether a line says ``key``."""
        return any(key in line for line in self.lines)

    def finish(self) -> None:
        """Let the output appear, and leave nothing else."""
        if not self.has("finished"):
            self.add({"finished": True})
        if self.out.is_dir():
            replace_directory(self.out, self.output)
        shutil.rmtree(self.folder)

"""The results of a comparison: a file that grows row by row."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.errors import AptError, describe
from apt.files.journal import check_same
from apt.files.locking import locked
from apt.files.writing import write_file
from apt.locations.paths import user_error
from apt.output.json_values import json_value
from apt_lab.tasks.answers import Answers
from apt_lab.windows import Windows

RESULTS = "comparison.json"
LOCKS = ".claims"
"""The folder of the lock files of rows. The row of a killed process is free again."""

DENSE = "dense"
"""The key of the dense model's row, with which all other rows are compared."""
Row = dict[str, Any]


@dataclass
class Comparison:
    """The results of a comparison, in a file that grows row by row.

    Attributes:
        path: the file.
        setting: the common setting of the rows.
        rows: the rows.
    """

    path: Path
    setting: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def stored(cls, folder: Path) -> "Comparison":
        """The comparison in a folder.

        Raises:
            AptError: the file cannot be read, or it is damaged.
        """
        path = folder / RESULTS
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            setting = _read_setting(content["setting"])
            rows = [_read(row, setting) for row in content["rows"]]
        except OSError as error:
            raise user_error(error) or error from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AptError(
                f"{path} is damaged: {describe(error)}", "delete it, or use another directory"
            ) from error
        return cls(path, setting, rows)

    def read(self) -> None:
        """Read the rows of earlier runs and of other processes.

        Raises:
            AptError: the file is damaged, or its rows come from another setting.
        """
        if not self.path.is_file():
            return
        earlier = Comparison.stored(self.folder)
        message, hint = f"{self.path} is another comparison", "choose another output, or delete it"
        check_same(message, earlier.setting, self.setting, hint, ("output",))
        self.rows = earlier.rows

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return self.path.parent

    def known(self, key: str) -> Row | None:
        """The row of a key; None if it is not measured yet."""
        return next((row for row in self.rows if row["key"] == key), None)

    def ordered(self) -> list[Row]:
        """The rows, with the row of the dense model first.

        Raises:
            AptError: the dense model is not measured yet.
        """
        if (dense := self.known(DENSE)) is None:
            raise AptError(
                f"{self.path} has no row of the dense model yet", "continue the comparison first"
            )
        return [dense, *(row for row in self.rows if row is not dense)]

    def remember(self, key: str, compute: Callable[[], Row], *, wait: bool = False) -> Row | None:
        """The row of a key; if no process has measured it, compute it and add it to the file.

        Returns:
            The row; None if another process measures it, unless ``wait`` is given.
        """
        with claimed(self.folder, f"row {key}", wait=wait) as is_claimed:
            self.read()
            row = self.known(key)
            if row is None and is_claimed:
                row = {"key": key, **compute()}
                self._add(row)
            return row

    def _add(self, row: Row) -> None:
        with claimed(self.folder, "the file", wait=True):
            self.read()
            self.rows.append(row)
            self._write()

    def _write(self) -> None:
        record = json_value({"setting": self.setting, "rows": self.rows})
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_file(self.path, text, overwrite=True)


def _read_setting(record: Any) -> dict[str, Any]:
    """What the rows have in common.

    Raises:
        TypeError, KeyError, ValueError: the record is damaged.
    """
    setting: dict[str, Any] = dict(record)
    if not all(isinstance(setting[name], list) for name in ("shape", "metrics")):
        raise TypeError("shape and metrics must be lists")
    if not all(isinstance(size, list) for size in dict(setting["windows"]).values()):
        raise TypeError("the shapes of the windows must be lists")
    _texts(setting, "model", "calibration", *({"reads"} & setting.keys()))
    return setting


def _read(row: Row, setting: Mapping[str, Any]) -> Row:
    """A row of the file with its numbers; JSON has numbers that are not finite as strings.

    Raises:
        TypeError, KeyError, ValueError, AttributeError: it is damaged.
    """
    _texts(row, "key", "method", "pattern")
    scores = {
        text: {metric: float(row["scores"][text][metric]) for metric in setting["metrics"]}
        for text in setting["windows"]
    }
    for text, metrics in scores.items():
        for metric in metrics:
            Windows.of(row, text, metric)
    for record in row.get("tasks", {}).values():
        Answers.read(record)
    numbers = {
        name: float(row[name])
        for name in ("sparsity", "error", "seconds")
        if row.get(name) is not None
    }
    return {**row, **numbers, "scores": scores}


def _texts(record: Mapping[str, Any], *names: str) -> None:
    """Raise if one of these entries is not a text."""
    for name in names:
        if not isinstance(record[name], str):
            raise TypeError(f"{name} must be a text")


@contextmanager
def claimed(folder: Path, key: str, *, wait: bool) -> Iterator[bool]:
    """Claim a row. While True is yielded, no other process measures it.

    Args:
        folder: the folder of the comparison.
        key: the key of the row.
        wait: True to wait for another process that measures the row.

    Yields:
        False if another process measures it.
    """
    locks = folder / LOCKS
    hint = f"delete {locks}, or choose another output"
    try:
        locks.mkdir(exist_ok=True)
    except OSError as error:
        message = f"the folder {locks} of the locks cannot be opened: {error.strerror}"
        raise AptError(message, hint, ("output",)) from error
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    with locked(locks / name, hint, ("output",), wait=wait) as lock:
        yield lock is not None

"""The results of a comparison: a file that grows row by row."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.comparing.claims import claimed
from apt.errors import AptError, first_line
from apt.files.writing import write_file
from apt.locations.paths import user_error
from apt.output.json_values import json_value
from apt.output.report import differences

RESULTS = "comparison.json"
DENSE = "dense"
"""The key of the row of the dense model, with which all others are compared."""
Row = dict[str, Any]


@dataclass
class Comparison:
    """The results of a comparison, in a file that grows row by row.

    Attributes:
        path: the file.
        setting: everything that the rows have in common.
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
            known = json.loads(path.read_text(encoding="utf-8"))
            setting = dict(known["setting"])
            rows = [_read(row) for row in known["rows"]]
        except OSError as error:
            raise user_error(error) or error from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AptError(
                f"{path} is damaged: {first_line(error)}", "delete it", ("output",)
            ) from error
        return cls(path, setting, rows)

    def read(self) -> None:
        """Read the rows of earlier runs, and of others that run now.

        Raises:
            AptError: the file is damaged, or its rows come from another setting.
        """
        if not self.path.is_file():
            return
        known = Comparison.stored(self.folder)
        if other := sorted(differences(known.setting, json.loads(json.dumps(self.setting)))):
            raise AptError(
                f"{self.path} is another comparison: {', '.join(other)} differ",
                "choose another output, or delete it",
                ("output",),
            )
        self.rows = known.rows

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return self.path.parent

    def known(self, key: str) -> Row | None:
        """The row of a key; None if it is not measured yet."""
        return next((row for row in self.rows if row["key"] == key), None)

    def ordered(self) -> list[Row]:
        """The rows with that of the dense model first.

        Raises:
            AptError: the dense model is not measured yet.
        """
        if (dense := self.known(DENSE)) is None:
            raise AptError(
                f"{self.path} has no row of the dense model yet", "continue the comparison first"
            )
        return [dense, *(row for row in self.rows if row is not dense)]

    def add(self, row: Row) -> None:
        """Add a row to the file."""
        with claimed(self.folder, "the file", wait=True):
            self.read()
            self.rows.append(row)
            self._write()

    def _write(self) -> None:
        record = json_value({"setting": self.setting, "rows": self.rows})
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_file(self.path, text, overwrite=True)


def _read(row: Row) -> Row:
    """A row of the file, in which numbers that are not finite are strings."""
    scores = {
        text: {metric: float(value) for metric, value in found.items()}
        for text, found in row["scores"].items()
    }
    return {**row, "key": str(row["key"]), "scores": scores}

"""The results of a comparison: a file that grows row by row."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.comparing.claims import claimed
from apt.errors import AptError, first_line
from apt.output.json_values import json_value
from apt.output.report import differences

RESULTS = "comparison.json"
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
            AptError: the file is missing or damaged.
        """
        path = folder / RESULTS
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            setting = dict(known["setting"])
            rows = [{**row, "key": str(row["key"])} for row in known["rows"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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

    def add(self, row: Row) -> None:
        """Add a row to the file."""
        with claimed(self.folder, "the file", wait=True):
            self.read()
            self.rows.append(row)
            self._write()

    def _write(self) -> None:
        record = json_value({"setting": self.setting, "rows": self.rows})
        partial = self.path.with_name(f".{self.path.name}")
        partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

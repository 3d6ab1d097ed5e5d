"""Comparisons of methods and patterns on a page: a table, and a chart of each metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apt_lab.reporting.charts import Bar, bar_chart
from apt_lab.windows import size_of, spread


@dataclass(frozen=True)
class ComparisonSection:
    """The section about a comparison that ``apt-prune compare`` wrote.

    Attributes:
        name: its name on the page.
        anchor: the identifier of its section.
        header: the names of the columns.
        lines: the texts of each row; the first two are the method and the pattern.
        rows: the rows, with the row of the dense model first.
        setting: the common setting of the rows.
    """

    name: str
    anchor: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    rows: Sequence[Mapping[str, Any]]
    setting: Mapping[str, Any]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The facts of the summary, each with its name."""
        setting = self.setting
        windows = (
            f"{text}, {size_of(setting, shape)}" for text, shape in setting["windows"].items()
        )
        return [
            ("original", str(setting["model"])),
            ("calibration", f"{setting['calibration']}, {size_of(setting, setting['shape'])}"),
            ("measured on", "; ".join(windows)),
        ]

    @property
    def charts(self) -> list[tuple[str, str]]:
        """A chart of each metric on each text, with its title."""
        dense, result = self.rows[0], []
        scores = dense["scores"]
        for text, metric in [(source, name) for source in scores for name in scores[source]]:
            bars = [
                Bar(
                    " ".join(line[:2]).strip(),
                    row["scores"][text][metric],
                    spread(row, dense, text, metric),
                )
                for line, row in zip(self.lines, self.rows, strict=True)
                if row["scores"].get(text, {}).get(metric) is not None
            ]
            title = f"{metric} on {text}"
            result.append((title, bar_chart(title, bars, "")))
        return result

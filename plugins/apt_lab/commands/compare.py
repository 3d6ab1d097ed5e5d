"""``apt-prune compare``."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.console import (
    Progress,
    find_model,
    has_live_display,
    interrupted,
    notice,
    say,
    show,
    show_json,
    table,
)
from apt.errors import AptError
from apt.files.writing import check_file
from apt.locations.paths import kind_at
from apt.options import PrintingOptions
from apt_lab.options import CompareRun

if TYPE_CHECKING:
    from apt_lab.comparing.results import Comparison

_FILES = ("comparison.md", "comparison.csv", "comparison.png")


def compare(run: CompareRun, printing: PrintingOptions) -> None:
    """Compare methods and patterns on one model.

    For example: apt-prune compare zoo:llama --methods wanda,admm --patterns 0.5,2:4 --output cmp
    """
    _check_place(run.output)
    tasks = run.known_tasks(trust_remote_code=run.trust_remote_code)
    source = find_model(run.model, run)

    from apt.engine.prepare import input_paths
    from apt.output.location import check_not_input
    from apt_lab.comparing.grid import Grid
    from apt_lab.comparing.results import RESULTS, Comparison

    texts = (*run.data, run.calibration, *map(str, run.others))
    check_not_input(run.output, input_paths(source, texts))
    try:
        with Progress("starting") as progress:
            live = has_live_display()
            grid = Grid(run, source, tasks, progress.status, notice, progress=live)
            comparison = Comparison(run.output / RESULTS, grid.setting())
            comparison.read()
            run.output.mkdir(parents=True, exist_ok=True)
            progress.total = grid.rows
            # The row of the dense model takes less time, so the estimate begins after it.
            progress.begin((time.perf_counter(), max(1, len(comparison.rows))))
            rows = grid.run(comparison, partial(_tell, progress))
    except KeyboardInterrupt as error:
        raise interrupted(error, "the same command continues") from None
    _show(run.output, comparison, rows, as_json=printing.as_json)
    _write(run.output, comparison, rows)


def _tell(progress: Progress, row: dict[str, Any]) -> None:
    """Print a line about a row, with the time that is left."""
    progress.done += 1
    figures = (
        f"{metric} {value:.4g} on {text}"
        for text, scores in row["scores"].items()
        for metric, value in scores.items()
    )
    left = progress.left and f"  {progress.left}"
    notice(
        f"{progress.done}/{progress.total}  {row['key']}: {', '.join(figures)}{left}",
        "row", done=progress.done, rows=progress.total, seconds_left=progress.seconds_left, row=row,
    )  # fmt: skip


def _check_place(output: Path) -> None:
    """Raise if the directory has files that do not belong to a comparison."""
    kind = kind_at(output)
    if output.is_symlink() and kind is None:
        raise AptError(
            f"output {output} is a link to a missing file", "choose another", ("output",)
        )
    if kind is None:
        return
    if kind != "directory":
        raise AptError(f"output {output} is not a directory", options=("output",))
    from apt_lab.comparing.results import LOCKS, RESULTS

    names = {path.name for path in output.iterdir()}
    if names - {LOCKS} and RESULTS not in names:
        message = f"output {output} has other files"
        raise AptError(message, "choose another directory", ("output",))
    for name in (RESULTS, *_FILES):
        check_file(output / name, overwrite=True, options=("output",))


def _write(output: Path, comparison: "Comparison", rows: list[dict[str, Any]]) -> None:
    """Write the tables, and the plot if matplotlib is installed."""
    from importlib.util import find_spec

    from apt.files.writing import write_file
    from apt_lab.comparing.tables import as_csv, markdown
    from apt_lab.windows import size_of

    setting = comparison.setting
    about = f"{setting['model']}, calibrated on {setting['calibration']}, "
    about += f"{size_of(setting, setting['shape'])}\n\n"
    write_file(output / "comparison.md", about + markdown(rows), overwrite=True)
    write_file(output / "comparison.csv", as_csv(rows), overwrite=True)
    if find_spec("matplotlib") is not None:
        from apt_lab.plots import draw_comparison

        draw_comparison(rows, output / "comparison.png")


def _show(
    output: Path, comparison: "Comparison", rows: list[dict[str, Any]], *, as_json: bool
) -> None:
    from apt_lab.comparing.results import RESULTS
    from apt_lab.comparing.tables import header, intervals, summaries, texts_of

    if as_json:
        records = [
            {**row, "intervals": intervals(row, rows[0]), "tasks": summaries(row, rows[0])}
            for row in rows
        ]
        show_json({"output": str(output), **comparison.setting, "rows": records})
        return
    view = table(*(name if i < 2 else f">{name}" for i, name in enumerate(header(rows))))
    for row in rows:
        view.add_row(*texts_of(row, rows[0]))
    show(view)
    say(f"{output}: {RESULTS}, comparison.md, comparison.csv")

"""``apt-prune report``."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from apt.console import Progress, check_new_file, find_model, say, show_json
from apt.errors import AptError, first_line
from apt.locations.paths import kind_at
from apt.options import PrintingOptions, RemoteOptions
from apt_lab.options import ReportRun

if TYPE_CHECKING:
    from apt_lab.reporting.beside import Beside
    from apt_lab.reporting.comparisons import ComparisonSection
    from apt_lab.reporting.heat import Heat
    from apt_lab.reporting.page import Subject


def report(run: ReportRun, printing: PrintingOptions) -> None:
    """Write one HTML page about pruned models and comparisons, which needs no network.

    Several models are compared. For example: apt-prune report ./pruned --output report.html
    """
    check_new_file(run.output, *run.directories, run.text, run.dense, overwrite=run.overwrite)
    _check_png(run.png)
    from apt.files.writing import write_file
    from apt_lab.comparing.results import RESULTS
    from apt_lab.reporting.page import read_subjects, render
    from apt_lab.reproduction import command_of

    compared = [directory for directory in run.directories if (directory / RESULTS).is_file()]
    models = [directory for directory in run.directories if directory not in compared]
    if not models and (run.text or run.png):
        name = "text" if run.text else "png"
        raise AptError(f"{name} is for pruned models, and none is named", "name one", (name,))
    comparisons = [_section(directory, number) for number, directory in enumerate(compared)]
    subjects = read_subjects(models, command_of)
    images = {} if run.png is None else _images(subjects, run.png, run)
    if run.text is not None:
        subjects = [
            replace(subject, beside=_beside(directory, subject, run.text, run))
            for directory, subject in zip(models, subjects, strict=True)
        ]
    page = render(subjects, comparisons)
    write_file(run.output, page, overwrite=run.overwrite)
    _draw(images, overwrite=run.overwrite)
    size = len(page.encode())
    counts = {"models": len(subjects), "comparisons": len(comparisons)}
    if printing.as_json:
        show_json({"output": str(run.output), **counts, "bytes": size})
    else:
        parts = [f"{n} {name if n > 1 else name[:-1]}" for name, n in counts.items() if n]
        say(f"{run.output}: {', '.join(parts)}, {size:,} bytes")


def _check_png(png: Path | None) -> None:
    if png is not None and find_spec("matplotlib") is None:
        raise AptError("png needs matplotlib", "pip install 'apt-prune[plot]'", ("png",))
    if png is not None and kind_at(png) not in (None, "directory"):
        raise AptError(f"png {png} is not a directory", "choose another", ("png",))


def _section(directory: Path, number: int) -> "ComparisonSection":
    """The section of a comparison."""
    from apt_lab.comparing.results import Comparison
    from apt_lab.comparing.tables import header, texts_of
    from apt_lab.reporting.comparisons import ComparisonSection
    from apt_lab.reporting.page import render

    comparison = Comparison.stored(directory)
    rows, name = comparison.ordered(), directory.resolve().name
    try:
        lines = [texts_of(row, rows[0]) for row in rows]
        anchor = f"comparison-{number}"
        section = ComparisonSection(name, anchor, header(rows), lines, rows, comparison.setting)
        render([], [section])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AptError(
            f"{comparison.path} is damaged: {first_line(error)}",
            "compare again into another directory",
        ) from error
    return section


def _beside(directory: Path, subject: "Subject", text: str, run: ReportRun) -> "Beside":
    """The measurements of a model and of the dense one on a text."""
    from apt.extending import registry
    from apt_lab.reporting.beside import compare_texts, weights_before

    report = subject.report
    name = run.dense or report.model.get("reference")
    if not name:
        message = f"the report in {directory} names no dense model"
        raise AptError(message, "name it", ("dense",))
    source = find_model(str(name), RemoteOptions())
    with Progress("loading the models") as status:
        expected = None if run.dense else weights_before(report)
        return compare_texts(
            directory, source, text, run.prompts, registry(), status.status, expected
        )


def _images(subjects: "list[Subject]", folder: Path, run: ReportRun) -> "dict[Path, Heat]":
    """The tables of each model by the file of their image.

    Raises:
        AptError: an image cannot be written.
    """
    from apt.output.location import check_not_input

    check_not_input(folder, run.directories)
    images = {
        folder
        / f"{subject.name}-{table.title.lower().replace(' ', '-')}.png".replace("/", "-"): table
        for subject in subjects
        for table in subject.heats
    }
    for path in images if folder.exists() else ():
        check_new_file(path, overwrite=run.overwrite, option="png")
    return images


def _draw(images: "dict[Path, Heat]", *, overwrite: bool) -> None:
    """Draw tables into their files."""
    from apt.output.staging import write_errors
    from apt_lab.plots import draw_heat

    for path, table in images.items():
        with write_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        draw_heat(table, path, overwrite=overwrite)

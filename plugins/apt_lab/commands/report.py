"""``apt-prune report``."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt.errors import AptError, first_line
from apt.locations.hub import Hub
from apt.locations.paths import kind_at

if TYPE_CHECKING:
    from apt_lab.reporting.beside import Beside
    from apt_lab.reporting.comparisons import ComparisonSection
    from apt_lab.reporting.heat import Heat
    from apt_lab.reporting.page import Subject


def report(
    directories: list[Path] = typer.Argument(
        metavar="DIR",
        help="Models that prune, shrink or recover wrote, or comparisons that compare wrote.",
    ),
    output: Path = typer.Option(
        Path("report.html"), "--output", "-o", callback=args.in_home, help="The HTML file to write."
    ),
    text: str | None = typer.Option(
        None,
        "--text",
        metavar="SRC",
        help="Also compare with the dense model on this text: the losses of frequent and rare "
        "tokens, and the text that both models generate.",
    ),
    prompts: int = typer.Option(
        4,
        "--prompts",
        metavar="N",
        help="With --text, the number of paragraph beginnings that both models continue.",
    ),
    dense: str | None = typer.Option(
        None,
        "--dense",
        metavar="MODEL",
        help="The dense model for --text; by default the one that the report names.",
    ),
    png: Path | None = typer.Option(
        None,
        "--png",
        metavar="DIR",
        help="Also draw errors and sparsities by block and kind as images in this directory.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    as_json: bool = args.JSON,
) -> None:
    """Write one HTML page about pruned models and comparisons, which needs no network.

    Several models are compared. For example: apt-prune report ./pruned --output report.html
    """
    if output.suffix not in (".html", ".htm"):
        raise AptError(f"--output {output} is not an .html file")
    args.check_new_file(output, *directories, text, dense, overwrite=overwrite)
    _check_measures(text, dense, prompts, png)
    from apt.cli.output import out, show_json
    from apt.cli.reproduction import command_of
    from apt.files.writing import write_file
    from apt_lab.comparing.results import RESULTS
    from apt_lab.reporting.page import read_subjects, render

    compared = [directory for directory in directories if (directory / RESULTS).is_file()]
    models = [directory for directory in directories if directory not in compared]
    if not models and (text or png):
        option = "--text" if text else "--png"
        raise AptError(f"{option} is for pruned models, and none is named", "name one")
    comparisons = [_section(directory, number) for number, directory in enumerate(compared)]
    subjects = read_subjects(models, command_of)
    images = {} if png is None else _images(subjects, png, directories, overwrite=overwrite)
    if text is not None:
        subjects = [
            replace(subject, beside=_beside(directory, subject, text, prompts, dense))
            for directory, subject in zip(models, subjects, strict=True)
        ]
    page = render(subjects, comparisons)
    write_file(output, page, overwrite=overwrite)
    _draw(images, overwrite=overwrite)
    size = len(page.encode())
    counts = {"models": len(subjects), "comparisons": len(comparisons)}
    if as_json:
        show_json({"output": str(output), **counts, "bytes": size})
    else:
        parts = [f"{n} {name if n > 1 else name[:-1]}" for name, n in counts.items() if n]
        out.print(f"{output}: {', '.join(parts)}, {size:,} bytes", markup=False)


def _check_measures(text: str | None, dense: str | None, prompts: int, png: Path | None) -> None:
    if text is None and dense is not None:
        raise AptError("only --text uses --dense", "add --text builtin, or leave it out")
    if prompts < 0:
        raise AptError(f"--prompts {prompts} is negative", "write 0 or more")
    if png is not None and find_spec("matplotlib") is None:
        raise AptError("--png needs matplotlib", "pip install 'apt-prune[plot]'")
    if png is not None and kind_at(png) not in (None, "directory"):
        raise AptError(f"--png {png} is not a directory", "choose another")


def _section(directory: Path, number: int) -> "ComparisonSection":
    """The section of a comparison."""
    from apt_lab.comparing.results import Comparison
    from apt_lab.comparing.tables import header, texts_of
    from apt_lab.reporting.comparisons import ComparisonSection
    from apt_lab.reporting.page import render

    found = Comparison.stored(directory)
    rows, name = found.ordered(), directory.resolve().name
    try:
        lines = [texts_of(row, rows[0]) for row in rows]
        anchor = f"comparison-{number}"
        section = ComparisonSection(name, anchor, header(rows), lines, rows, found.setting)
        render([], [section])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AptError(
            f"{found.path} is damaged: {first_line(error)}", "compare again into another directory"
        ) from error
    return section


def _beside(
    directory: Path, subject: "Subject", text: str, prompts: int, dense: str | None
) -> "Beside":
    """What a model does beside the dense one."""
    from apt.cli.progress import Progress
    from apt.plugin.registry import registry
    from apt_lab.reporting.beside import compare_texts, weights_before

    report = subject.report
    name = dense or report.model.get("reference")
    if not name:
        raise AptError(f"the report in {directory} names no dense model", "add --dense MODEL")
    source = args.find_model(str(name), registry(), Hub())
    with Progress("loading the models") as progress:
        expected = None if dense else weights_before(report)
        return compare_texts(
            directory, source, text, prompts, registry(), progress.status, expected
        )


def _images(
    subjects: "list[Subject]", folder: Path, inputs: list[Path], *, overwrite: bool
) -> "dict[Path, Heat]":
    """The tables of each model by the file of their image.

    Raises:
        AptError: an image cannot be written.
    """
    from apt.output.location import check_not_input

    check_not_input(folder, inputs)
    images = {
        folder
        / f"{subject.name}-{table.title.lower().replace(' ', '-')}.png".replace("/", "-"): table
        for subject in subjects
        for table in subject.heats
    }
    for path in images if folder.exists() else ():
        args.check_new_file(path, overwrite=overwrite, option="png")
    return images


def _draw(images: "dict[Path, Heat]", *, overwrite: bool) -> None:
    """Draw tables into their files."""
    from apt.output.workplace import write_errors
    from apt_lab.plots import draw_heat

    for path, table in images.items():
        with write_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        draw_heat(table, path, overwrite=overwrite)

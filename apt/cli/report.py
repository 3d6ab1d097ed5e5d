"""``apt-prune report``."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt.errors import AptError, first_line
from apt.locations.hub import Hub

if TYPE_CHECKING:
    from apt.reporting.beside import Beside
    from apt.reporting.comparisons import ComparisonSection
    from apt.reporting.page import Subject


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
    _check_output(output, overwrite=overwrite)
    _check_measures(text, dense, prompts, png)
    from apt.cli.output import out, show_json
    from apt.cli.reproduction import command_of
    from apt.comparing.results import RESULTS
    from apt.output.workplace import write_errors
    from apt.reporting.page import read_subjects, render

    compared = [directory for directory in directories if (directory / RESULTS).is_file()]
    models = [directory for directory in directories if directory not in compared]
    if not models and (text or png):
        option = "--text" if text else "--png"
        raise AptError(f"{option} is for pruned models, and none is named", "name one")
    comparisons = [_section(directory, number) for number, directory in enumerate(compared)]
    subjects = read_subjects(models, command_of)
    if text is not None:
        subjects = [
            replace(subject, beside=_beside(directory, subject, text, prompts, dense))
            for directory, subject in zip(models, subjects, strict=True)
        ]
    page = render(subjects, comparisons)
    with write_errors(output):
        output.write_text(page, encoding="utf-8")
    if png is not None:
        _draw(subjects, png)
    size = len(page.encode())
    counts = {"models": len(subjects), "comparisons": len(comparisons)}
    if as_json:
        show_json({"output": str(output), **counts, "bytes": size})
    else:
        parts = [f"{n} {name if n > 1 else name[:-1]}" for name, n in counts.items() if n]
        out.print(f"{output}: {', '.join(parts)}, {size:,} bytes", markup=False)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise AptError(f"{output} exists", "add --overwrite, or choose another")
    if output.is_dir() or output.suffix not in (".html", ".htm"):
        raise AptError(f"--output {output} is not an .html file")
    if not output.absolute().parent.is_dir():
        raise AptError(f"--output {output}: its folder does not exist", "create it first")


def _check_measures(text: str | None, dense: str | None, prompts: int, png: Path | None) -> None:
    if text is None and dense is not None:
        raise AptError("only --text uses --dense", "add --text builtin, or leave it out")
    if prompts < 0:
        raise AptError(f"--prompts {prompts} is negative", "write 0 or more")
    if png is not None and find_spec("matplotlib") is None:
        raise AptError("--png needs matplotlib", "pip install 'apt-prune[plot]'")
    if png is not None and png.exists() and not png.is_dir():
        raise AptError(f"--png {png} is not a directory", "choose another")


def _section(directory: Path, number: int) -> "ComparisonSection":
    """The section of a comparison."""
    from apt.comparing.results import Comparison
    from apt.comparing.tables import header, texts_of
    from apt.reporting.comparisons import ComparisonSection
    from apt.reporting.page import render

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
    from apt.cli.output import status_line
    from apt.plugin.registry import registry
    from apt.reporting.beside import compare_texts, weights_before

    report = subject.report
    name = dense or report.model.get("reference")
    if not name:
        raise AptError(f"the report in {directory} names no dense model", "add --dense MODEL")
    source = args.find_model(str(name), registry(), Hub())
    with status_line("loading the models") as status:
        expected = None if dense else weights_before(report)
        return compare_texts(directory, source, text, prompts, registry(), status.update, expected)


def _draw(subjects: "list[Subject]", directory: Path) -> None:
    """Draw the tables of each model as images."""
    from apt.cli.plots import draw_heat
    from apt.output.workplace import write_errors

    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        for table in subject.heats:
            name = f"{subject.name}-{table.title.lower().replace(' ', '-')}.png"
            draw_heat(table, directory / name.replace("/", "-"))

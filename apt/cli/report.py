"""``apt-prune report``."""

from pathlib import Path

import typer

from apt.cli import arguments as args
from apt.errors import AptError


def report(
    directories: list[Path] = typer.Argument(
        metavar="DIR", help="Models that prune, shrink or recover wrote."
    ),
    output: Path = typer.Option(
        Path("report.html"), "--output", "-o", help="The HTML file to write."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    as_json: bool = args.JSON,
) -> None:
    """Write one HTML page about pruned models, which needs no network.

    Several directories are compared. For example: apt-prune report ./pruned --output report.html
    """
    if output.exists() and not overwrite:
        raise AptError(f"{output} exists", "add --overwrite, or choose another")
    if output.is_dir() or output.suffix not in (".html", ".htm"):
        raise AptError(f"--output {output} is not an .html file")
    if not output.expanduser().absolute().parent.is_dir():
        raise AptError(f"--output {output}: its folder does not exist", "create it first")

    from apt.cli.output import out, show_json
    from apt.cli.reproduction import command_of
    from apt.output.workplace import write_errors
    from apt.reporting.page import read_subjects, render

    page = render(read_subjects(directories, command_of))
    with write_errors(output):
        output.write_text(page, encoding="utf-8")
    size, count = len(page.encode()), len(directories)
    if as_json:
        show_json({"output": str(output), "models": count, "bytes": size})
    else:
        models = f"{count} model{'s' * (count > 1)}"
        out.print(f"{output}: {models}, {size:,} bytes", markup=False)

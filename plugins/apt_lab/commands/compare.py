"""``apt-prune compare``."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.cli.interruptions import interrupted
from apt.engine.limits import check_amount, check_seed, check_windows
from apt.errors import AptError
from apt.files.writing import check_file
from apt.locations.paths import kind_at
from apt_lab.commands.arguments import LIMIT, TASKS, check_limit, read_tasks

if TYPE_CHECKING:
    from apt.cli.progress import Progress
    from apt_lab.comparing.results import Comparison

_GRID = "Comparison"
_FILES = ("comparison.md", "comparison.csv", "comparison.png")


def compare(
    model: str = typer.Argument(help="The dense model: a directory, hub name, .gguf or zoo:NAME."),
    methods: str = typer.Option(
        "magnitude,wanda,ss,admm", "--methods", metavar="LIST", rich_help_panel=_GRID,
        help="Methods, separated by commas; each NAME[:EFFORT][/ALLOCATION], for example "
        "admm:fast or wanda/owl. n:m patterns use no allocation.",
    ),
    patterns: str = typer.Option(
        "0.5,2:4", "--patterns", metavar="LIST", rich_help_panel=_GRID,
        help="Patterns, separated by commas, for example 0.5,0.7,2:4.",
    ),
    others: list[Path] = typer.Option(
        [], "--with", metavar="DIR", rich_help_panel=_GRID,
        help="A directory that another tool pruned, measured in the same way; repeatable.",
    ),
    data: list[str] = typer.Option(
        ["builtin"], "--data", metavar="SRC", rich_help_panel=_GRID,
        help="Text to measure on; repeatable.",
    ),
    windows: int | None = typer.Option(
        None, "--windows", metavar="N", rich_help_panel=_GRID,
        help="Windows of each text; by default all.",
    ),
    metric: list[str] = typer.Option(
        ["perplexity"], "--metric", metavar="NAME", rich_help_panel=_GRID,
        help="perplexity, accuracy, divergence or agreement; repeatable.",
    ),
    tasks: list[str] = TASKS,
    limit: int | None = LIMIT,
    calibration: str = typer.Option(
        "builtin", "--calibration", metavar="SRC", rich_help_panel=run.CALIBRATION_GROUP,
        help="Text to calibrate on.",
    ),
    samples: int = run.SAMPLES,
    seqlen: int = run.SEQLEN,
    seed: int = run.SEED,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    device: str = args.DEVICE,
    output: Path = typer.Option(
        ..., "--output", "-o", rich_help_panel=run.OUTPUT_GROUP,
        help="Directory for the results. The same command continues an interrupted comparison; "
        "several processes with this command divide the rows.",
    ),
    as_json: bool = args.JSON,
) -> None:  # fmt: skip
    """Compare methods and patterns on one model.

    For example: apt-prune compare zoo:llama --methods wanda,admm --patterns 0.5,2:4 --output cmp
    """
    check_amount(samples, seqlen)
    check_windows(windows, seqlen, "windows")
    check_seed(seed)
    check_limit(limit, tasks)
    _check_place(output)
    _check_data(data)
    from apt.plugin.registry import registry

    installed = registry()
    metrics = tuple(dict.fromkeys(installed.evaluators.get(name).name for name in metric))
    questions = read_tasks(tasks, trust_remote_code=trust_remote_code)
    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, installed, hub, trust_remote_code=trust_remote_code)

    from apt.cli.output import has_live_display, notice
    from apt.cli.progress import Progress
    from apt.engine.machine import choose_device
    from apt.engine.prepare import input_paths
    from apt.output.location import check_not_input
    from apt_lab.comparing.cells import read_cells
    from apt_lab.comparing.grid import CompareOptions, Grid
    from apt_lab.comparing.results import RESULTS, Comparison

    options = CompareOptions(
        source,
        read_cells(args.parts(methods, "--methods"), args.parts(patterns, "--patterns"), installed),
        tuple(others),
        tuple(dict.fromkeys(data)),
        metrics,
        questions,
        limit,
        calibration,
        samples,
        seqlen,
        seed,
        windows,
        choose_device(device),
    )
    _check_others(others)
    check_not_input(output, input_paths(source, (*data, calibration, *map(str, others))))
    try:
        with Progress("starting") as progress:
            grid = Grid(options, installed, progress.status, notice, progress=has_live_display())
            comparison = Comparison(output / RESULTS, grid.setting())
            comparison.read()
            output.mkdir(parents=True, exist_ok=True)
            progress.total = grid.rows
            # The dense model takes less time: the time left counts from its row on.
            progress.begin((time.perf_counter(), max(1, len(comparison.rows))))
            rows = grid.run(comparison, partial(_tell, progress))
    except KeyboardInterrupt as error:
        raise interrupted(error, "the same command continues") from None
    _show(output, comparison, rows, as_json=as_json)
    _write(output, comparison, rows)


def _tell(progress: "Progress", row: dict[str, Any]) -> None:
    """Print a line about a row, with the time that is left."""
    from apt.cli.output import notice

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
    """Raise if the directory has files other than those of a comparison."""
    kind = kind_at(output)
    if output.is_symlink() and kind is None:
        raise AptError(f"--output {output} is a link to a missing file", "choose another")
    if kind is None:
        return
    if kind != "directory":
        raise AptError(f"--output {output} is not a directory")
    from apt_lab.comparing.claims import FOLDER
    from apt_lab.comparing.results import RESULTS

    names = {path.name for path in output.iterdir()}
    if names - {FOLDER} and RESULTS not in names:
        raise AptError(f"--output {output} has other files", "choose another directory")
    for name in (RESULTS, *_FILES):
        check_file(output / name, overwrite=True, options=("output",))


def _check_data(data: list[str]) -> None:
    """Raise if two texts have the same file name, by which results name them."""
    from apt.output.report import portable

    names: dict[str, str] = {}
    for source in dict.fromkeys(data):
        if (other := names.setdefault(portable(source), source)) != source:
            raise AptError(f"--data {other} and {source} have the same name", "rename one")


def _check_others(directories: list[Path]) -> None:
    for directory in directories:
        if not directory.is_dir():
            raise AptError(f"--with {directory} is not a directory")


def _write(output: Path, comparison: "Comparison", rows: list[dict[str, Any]]) -> None:
    """Write the tables, and the plot if matplotlib is installed."""
    from importlib.util import find_spec

    from apt.files.writing import write_file
    from apt_lab.comparing.tables import as_csv, markdown

    setting = comparison.setting
    about = f"{setting['model']}, calibrated on {setting['calibration']}, "
    about += f"{' × '.join(map(str, setting['shape']))} tokens\n\n"
    write_file(output / "comparison.md", about + markdown(rows), overwrite=True)
    write_file(output / "comparison.csv", as_csv(rows), overwrite=True)
    if find_spec("matplotlib") is not None:
        from apt_lab.plots import draw_comparison

        draw_comparison(rows, output / "comparison.png", overwrite=True)


def _show(
    output: Path, comparison: "Comparison", rows: list[dict[str, Any]], *, as_json: bool
) -> None:
    from apt.cli.output import out, show, show_json, table
    from apt_lab.comparing.results import RESULTS
    from apt_lab.comparing.tables import header, intervals, summaries, texts_of

    if as_json:
        told = [
            {**row, "intervals": intervals(row, rows[0]), "tasks": summaries(row, rows[0])}
            for row in rows
        ]
        show_json({"output": str(output), **comparison.setting, "rows": told})
        return
    made = table(*(name if i < 2 else f">{name}" for i, name in enumerate(header(rows))))
    for row in rows:
        made.add_row(*texts_of(row, rows[0]))
    show(made)
    out.print(f"{output}: {RESULTS}, comparison.md, comparison.csv", markup=False)

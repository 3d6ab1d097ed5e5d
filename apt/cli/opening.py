"""The checks of a command before it imports torch: names, places, and the model."""

from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from apt.engine.opening import AnyRun, RunRequest, find_source, resolve_names
from apt.errors import AptError
from apt.files.writing import check_file
from apt.locations.model_source import Source
from apt.locations.paths import expanded, kind_at
from apt.locations.text_sources import text_sources
from apt.options import RemoteOptions
from apt.plugin.registry import registry

R = TypeVar("R", bound=AnyRun)


def run_request(options: R) -> tuple[RunRequest[R], list[str]]:
    """The options with all names filled in, and notices about the defaults."""
    from apt.cli.progress import Progress

    notices: list[str] = []
    with Progress(f"looking for {options.model or 'the model'}"):
        return resolve_names(options, registry(), notices.append), notices


def find_model(reference: str, options: RemoteOptions) -> Source:
    """The location of a model. For a model on the hub, the hub is contacted."""
    from apt.cli.progress import Progress

    with Progress(f"looking for {reference}"):
        return find_source(reference, options, registry())


def check_new_file(
    path: Path, *inputs: str | Path | None, overwrite: bool | None, option: str = "output"
) -> None:
    """Raise if a file cannot be written. This is checked before the work.

    Args:
        path: the file.
        inputs: the files and directories that the command reads. The file must not be inside.
        overwrite: True if a file there may be replaced; None for a command without this option.
        option: the option that names the file.
    """
    names = [one.name for text in inputs if text for one in text_sources(str(text))]
    places = [expanded(name) for name in names]
    read = [place for place in places if kind_at(place)]
    check_file(expanded(path), overwrite=overwrite, inputs=read, options=(option,))


def check_plot(
    plot: Path | None, *inputs: str | Path | None, overwrite: bool | None = None
) -> None:
    """Raise if a plot cannot be drawn. This is checked before the work; see `check_new_file`."""
    if plot is None:
        return
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise AptError(f"plot {plot} is not a .png, .svg or .pdf file", options=("plot",))
    check_new_file(plot, *inputs, overwrite=overwrite, option="plot")
    if find_spec("matplotlib") is None:
        raise AptError("a plot needs matplotlib", "pip install 'apt-prune[plot]'", ("plot",))

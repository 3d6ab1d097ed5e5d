"""Checks that all tasks have in common, before the work: of the model and of the output."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.copies import links_outside
from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.compute import dtype_name
from apt.engine.machine import read_dtype
from apt.engine.opening import Named
from apt.engine.task import WITHOUT_EFFECT, Task
from apt.errors import AptError
from apt.files.journal import check_same
from apt.files.writing import check_file
from apt.locations.model_source import Source
from apt.locations.paths import expanded
from apt.locations.text_sources import text_sources
from apt.output.json_values import json_value
from apt.output.location import check_not_input, check_output
from apt.output.report import Report, read_report
from apt.output.staging import resumable
from apt.plugin.registry import Registry

Notice = Callable[[str], None]


def open_model(
    named: Named[Any], texts: Sequence[str | None], registry: Registry, notice: Notice
) -> Opened:
    """The model of a run, without weights, after a check of the place of the output.

    ``texts`` are what the run reads beside the model, see `input_paths`.
    """
    options, source = named.options, named.source
    check_place(options, source, texts, notice)
    opened = open_skeleton(source, registry, options.adapter)
    if options.adapter is None and opened.spec.default:
        kind = opened.config.model_type
        notice(f"adapter: {opened.spec.name} (default, since none is for type '{kind}' alone)")
    return opened


def with_compute(opened: Opened, options: Any, device: str, notice: Notice) -> Opened:
    """The model with the dtype that it is planned to compute in, which is said if it is another."""
    dtype = read_dtype(getattr(options, "dtype", "auto")) or opened.dtype
    planned = opened.computing(options.compute, device, dtype)
    plain = opened.source.gguf or quantised_with(opened.config) is None
    if plain and options.compute == "auto" and planned.compute != dtype:
        computed, stored = dtype_name(planned.runs_in), dtype_name(dtype)
        notice(f"compute: {computed} (default, since {device} multiplies {stored} more slowly)")
    return planned


def check_place(options: Any, source: Source, texts: Sequence[str | None], notice: Notice) -> None:
    """Check the place of the output, and notify the user of an earlier result to be replaced."""
    inputs, output = input_paths(source, texts), options.output
    if (file := getattr(options, "export", None)) is not None:
        if file.resolve().is_relative_to(output.resolve()):
            fault = f"export {file} is inside the output"
            raise AptError(fault, "choose another file", ("export",))
        check_file(file, overwrite=options.overwrite, inputs=inputs, options=("export",))
    if getattr(options, "resume", False) and (resumable(output) or read_report(output)):
        check_not_input(output, inputs)
        return
    for link in [] if source.gguf else links_outside(Path(source.location)):
        notice(f"left out: {link} is a link to a file outside the checkpoint")
    if lost := check_output(output, options.overwrite, inputs):
        notice(f"replaces {lost}")


def input_paths(source: Source, texts: Sequence[str | None]) -> list[Path]:
    """The local files and directories of a model and of texts, tokenizers and other models."""
    names = [one.name for text in texts if text for one in text_sources(text)]
    given = [path for name in names if (path := expanded(name)).exists()]
    return [*source.files(), *given]


def finished_report(task: Task) -> Report | None:
    """The report of the run that is to be resumed, if it was finished before.

    Raises:
        AptError: the output is that of a run with other options.
    """
    output = task.options.output
    if not task.resume or resumable(output) or read_report(output) is None:
        return None
    report, options = Report.read(output), ("output", "overwrite", "resume")
    fault = f"{output} is the result of another run"
    hint = "choose another output, or overwrite it without resuming"
    now = json_value(task.record())
    check_same(fault, task.recorded(report), now, hint, options, WITHOUT_EFFECT)
    return report


def capped(seqlen: int, model: Opened, notice: Notice) -> int:
    """``seqlen``, or the number of the model's positions if that is smaller.

    Raises:
        AptError: the model has fewer than two positions.
    """
    positions = model.adapter.positions(model.config)
    if positions is not None and positions < 2:
        raise AptError(
            f"{model.source.reference} has {positions} positions, and a sample needs at least 2",
            "is its config.json damaged?",
        )
    if positions is None or seqlen <= positions:
        return seqlen
    notice(f"seqlen: {positions}, the number of the model's positions (not {seqlen})")
    return positions

"""The checks of the model and of the output before the work, for all tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.copies import links_outside
from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.checkpoints.towers import towers_of
from apt.compute import dtype_name
from apt.engine.machine import read_dtype
from apt.engine.opening import RunRequest, cuts_file
from apt.engine.task import WITHOUT_EFFECT, Task
from apt.errors import AptError, unknown_name
from apt.files.journal import check_same
from apt.files.writing import check_file
from apt.locations.model_source import Source
from apt.locations.paths import expanded
from apt.locations.text_sources import text_sources
from apt.options import ShrinkRun
from apt.output.json_values import json_value
from apt.output.location import check_not_input, check_output
from apt.output.report import Report, read_report, report_beside
from apt.output.staging import resumable
from apt.plugin.registry import Registry

Notice = Callable[[str], None]


def ignore_notice(line: str) -> None:
    """Tell nobody: the notice is told elsewhere."""


def open_model(
    request: RunRequest[Any], texts: Sequence[str | None], registry: Registry, notice: Notice
) -> Opened:
    """The model of a run, without weights, after a check of the place of the output.

    ``texts`` are the other inputs of the run, see `input_paths`.
    """
    options, source = request.options, request.source
    check_place(options, source, texts, notice)
    cuts = cuts_file(options, source)
    expanded = (source.gguf is None or cuts) and isinstance(options, ShrinkRun)
    opened = open_skeleton(source, registry, options.adapter, expanded=expanded)
    tower = _tower_among(getattr(options, "stacks", ()), opened)
    opened = tower_in(opened, tower, registry, options.adapter)
    if cuts and opened.quantised is None:
        fault = f"no plugin that is installed cuts experts or blocks out of {source.gguf}"
        raise AptError(fault, "name a directory as the output", ("output",))
    if options.adapter is None:
        tell_adapter(opened, notice)
    return opened


def tower_in(
    opened: Opened,
    name: str | None,
    registry: Registry,
    adapter: str | None,
    *,
    packed: bool = False,
) -> Opened:
    """A tower of a multimodal model, by its name; the model itself without a name.

    For ``adapter`` and ``packed`` see `open_skeleton`.

    Raises:
        AptError: the model has no such tower.
    """
    if name is None:
        return opened
    if name not in (towers := towers_of(opened.module)):
        raise unknown_name("tower", name, towers, f" in {opened.source.reference}")
    return open_skeleton(replace(opened.source, tower=name), registry, adapter, packed=packed)


def pruned_towers(report: Mapping[str, Any]) -> list[str]:
    """The towers that the run of a report and the earlier runs pruned; the latest comes first."""
    found, record = list[str](), dict(report)
    while record:
        found += (record.get("options") or {}).get("stacks") or ()
        record = record.get("earlier") or {}
    return list(dict.fromkeys(found))


def _tower_among(stacks: Sequence[str], opened: Opened) -> str | None:
    """The chosen stack that is a tower of a multimodal model; None if none is.

    Raises:
        AptError: another stack is chosen too.
    """
    towers = [name for name in stacks if name in towers_of(opened.module)]
    if towers and len(stacks) > 1:
        raise AptError(
            f"{' and '.join(stacks)} are pruned on different samples, and a run has one kind",
            f"run twice: first with stack {stacks[0]}, then on its output",
            ("stacks",),
        )
    return towers[0] if towers else None


def tell_adapter(opened: Opened, notice: Notice) -> None:
    """Say that a model has the default adapter, if no adapter is for its type alone."""
    if opened.spec.default:
        kind = opened.config.model_type
        notice(f"adapter: {opened.spec.name} (default, since none is for type '{kind}' alone)")


def with_compute(opened: Opened, options: Any, device: str, notice: Notice) -> Opened:
    """The model with its compute dtype, with a notice if the default is not the stored dtype."""
    dtype = read_dtype(getattr(options, "dtype", "auto")) or opened.dtype
    planned = opened.computing(options.compute, device, dtype)
    is_dense = opened.source.gguf or quantised_with(opened.config) is None
    if is_dense and options.compute == "auto" and planned.compute != dtype:
        compute, stored = dtype_name(planned.runs_in), dtype_name(dtype)
        notice(f"compute: {compute} (default, since {device} multiplies {stored} more slowly)")
    return planned


def check_place(options: Any, source: Source, texts: Sequence[str | None], notice: Notice) -> None:
    """Check the place of the output, with a notice about an earlier result to be replaced."""
    inputs, output = input_paths(source, texts), options.output
    alone, resumed = getattr(options, "exports_alone", False), getattr(options, "resume", False)
    if (file := getattr(options, "export", None)) is not None and not alone:
        if file.resolve().is_relative_to(output.resolve()):
            message = f"export {file} is inside the output"
            raise AptError(message, "choose another file", ("export",))
        check_file(file, overwrite=options.overwrite, inputs=inputs, options=("export",))
    if alone or cuts_file(options, source):
        continued = resumed and (resumable(output) or (output.is_file() and read_report(output)))
        for path in (output, report_beside(output)):
            overwrite = options.overwrite or bool(continued)
            check_file(path, overwrite=overwrite, inputs=inputs, options=("output",))
        return
    if resumed and (resumable(output) or read_report(output)):
        check_not_input(output, inputs)
        return
    for link in [] if source.gguf else links_outside(Path(source.location)):
        notice(f"left out: {link} is a link to a file outside the checkpoint")
    if replaced := check_output(output, options.overwrite, inputs):
        notice(f"replaces {replaced}")


def input_paths(source: Source, texts: Sequence[str | None]) -> list[Path]:
    """The local files and directories of a model and of texts, tokenizers and other models."""
    names = [source.name for text in texts if text for source in text_sources(text)]
    paths = [path for name in names if (path := expanded(name)).exists()]
    return [*source.files(), *paths]


def finished_report(task: Task) -> Report | None:
    """The report of the run to resume, if that run is finished; else None.

    Raises:
        AptError: the output is the result of a run with other options.
    """
    output = task.options.output
    if not task.resume or resumable(output) or read_report(output) is None:
        return None
    report, options = Report.read(output), ("output", "overwrite", "resume")
    message = f"{output} is the result of another run"
    hint = "choose another output, or overwrite it without resuming"
    record = json_value(task.record())
    check_same(message, task.recorded(report), record, hint, options, WITHOUT_EFFECT)
    if task.exports_alone and getattr(task.options, "pack", None) is not None:
        message = f"{output} is complete, and the directory to pack is deleted"
        raise AptError(
            message, "leave out pack, or begin anew: overwrite it", ("pack", "overwrite")
        )
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

"""The summary of a run, as a table and lines, or as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from apt.cli.output import duration, say, show, show_json, size, table
from apt.engine.opening import selection_of
from apt.engine.prune_task import CalibratedTask, PruneTask
from apt.options import FitRun, MeasuringOptions, PruneRun
from apt.output.report import Report, by_kind, peak_memory

_MAX_CANDIDATES = 10  # candidates in the table, beside the Pareto front


def show_report(report: Report, task: PruneTask, *, as_json: bool) -> None:
    """Print the summary of a run and the place of the result."""
    options = task.options
    if as_json:
        show_json(_record(report, task))
        return
    _show_kinds(report)
    _show_warnings(report)
    show_scores(report, task)
    if report.structure:
        _show_candidates(report.structure["candidates"])
    show_training(report, task)
    result = structure_line(report.structure) if report.structure else _sparsity_line(report, task)
    error = f"mean relative layer error {report.relative_layer_error:.4f}; " if report.sites else ""
    say(
        f"{options.output}: {result}, verified on disk; {error}{duration(report.seconds)}, "
        f"peak memory {size(sum(peak_memory().values()))}"
    )


def show_scores(report: Report, task: CalibratedTask) -> None:
    """Print each metric before and after."""
    options = task.options
    for metric in options.metrics if report.scores else ():
        before, after = report.scores["before"][metric], report.scores["after"][metric]
        change = _change(before, after, task.registry.evaluators.get(metric).better)
        say(f"{metric} on {measured_on(report, options)}: {before:.4g} → {after:.4g}{change}")


def show_training(report: Report, task: CalibratedTask) -> None:
    """Print the losses of a training in the rest of a given time, or why there was none."""
    if isinstance(task.options, PruneRun | FitRun) and task.options.minutes is not None:
        training = report.recovery.get("training")
        say(training_line(training) if training else report.problems[-1])


def measured_on(report: Report, options: MeasuringOptions) -> str:
    """The text of the metrics, and whether they were measured before an export."""
    return f"{options.evaluation}{', before the export' if report.export else ''}"


def _sparsity_line(report: Report, task: PruneTask) -> str:
    """The share of zeros, and the number of sites that the allocation left dense."""
    line = f"{report.sparsity:.2%} zeros in the pruned sites{lost_zeros(report)}"
    if task.pattern is None or not isinstance(task.options, PruneRun):
        return line
    pattern = partial(selection_of(task.options).pattern, default=task.pattern)
    dense = sum(pattern(name) is not None for name in report.skipped)
    return f"{line} ({dense} more left dense by {task.options.allocation})" if dense else line


def lost_zeros(report: Report) -> str:
    """The share of the zeros that an exported file keeps, if it is the output and lost some."""
    zeros, kept = report.export.get("zeros", 0), report.export.get("kept", 0)
    return f", of which the file keeps {kept / zeros:.2%}" if kept < zeros else ""


def training_line(training: Mapping[str, Any]) -> str:
    """A sentence with the losses of a training, see `apt.recovery.record.Training`."""
    losses = dict(training["held_back"])
    stopped = f" ({training['stopped']})" if training["stopped"] else ""
    best, steps = training["best"], training["steps"]
    return (
        f"loss on the samples held back: {losses[0]:.4f} → {losses[best]:.4f} after {best} of "
        f"{steps} steps of {training['tokens']:,} tokens{stopped}"
    )


def structure_line(structure: Mapping[str, Any]) -> str:
    """A sentence with the size of a smaller model."""
    blocks, groups = structure["blocks"], structure["groups"]
    parts = [f"{blocks['kept']} of {blocks['of']} blocks"] + [
        f"{group['kept']} of {group['of']} {kind}"
        for kind, group in groups.items()
        if group["kept"] < group["of"]
    ]
    return f"{structure['share']:.2%} of the blocks' parameters ({', '.join(parts)})"


def _show_candidates(candidates: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of the candidates; a star marks the Pareto front of budget and loss."""
    if not candidates:
        return
    rows = [
        candidate
        for place, candidate in enumerate(candidates)
        if place < _MAX_CANDIDATES or candidate["front"]
    ]
    candidate_table = table(
        ">loss", ">parameters", ">budget", ">blocks", "groups", "dropped blocks", "front"
    )
    for candidate in rows:
        groups = ", ".join(f"{count} {kind}" for kind, count in candidate["groups"].items())
        candidate_table.add_row(
            f"{candidate['loss']:.4f}",
            f"{candidate['share']:.2%}",
            f"{candidate['cost']:.2%}",
            str(candidate["blocks"]),
            groups or "all",
            ", ".join(map(str, candidate["dropped"])) or "none",
            "*" if candidate["front"] else "",
        )
    show(candidate_table)


def _change(before: float, after: float, better: str) -> str:
    """The relative change of a metric, in brackets; empty if it has not changed."""
    if not (math.isfinite(before) and math.isfinite(after)) or before in (0, after):
        return ""
    improved = (after < before) is (better == "lower")
    return f" ({abs(after / before - 1):.1%} {'better' if improved else 'worse'})"


def _record(report: Report, task: PruneTask) -> dict[str, Any]:
    options = task.options
    return {
        "output": str(options.output),
        "model": options.model,
        "pattern": str(task.pattern) if task.pattern else None,
        "structure": report.structure,
        "method": options.method,
        "sparsity": report.sparsity,
        "relative_layer_error": report.relative_layer_error,
        "scores": report.scores,
        "seconds": round(report.seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "kinds": [asdict(kind) for kind in by_kind(report.sites)],
    }


def _show_kinds(report: Report) -> None:
    if not report.sites:
        return
    kind_table = table(
        "site", ">sites", ">weights", ">sparsity", ">mean error", ">worst", ">solve s"
    )
    for kind in by_kind(report.sites):
        kind_table.add_row(
            kind.kind,
            str(kind.sites),
            f"{kind.weights:,}",
            f"{kind.sparsity:.4f}",
            f"{kind.mean_error:.4f}",
            f"{kind.max_error:.4f}",
            f"{kind.seconds:.2f}",
        )
    show(kind_table)


def _show_warnings(report: Report) -> None:
    """Print lines about raised damping and about too few tokens."""
    if rounded := report.structure.get("rounded"):
        name, kind = next(iter(rounded.items()))
        say(
            f"{len(rounded)} tensors have new values, rounded again in their own kinds of numbers "
            f"({name}: {kind}); all others have their stored bytes"
        )
    damping = report.options["damping"]
    for site in report.sites:
        if site.damping is not None and site.damping > damping:
            say(f"{site.name} needed damping {site.damping:g}")
    if starved := [site for site in report.sites if site.starved]:
        example = starved[0]
        say(
            f"{len(starved)} of {len(report.sites)} sites saw fewer tokens than they have inputs "
            f"({example.name}: {example.tokens:,} of {example.shape[1]:,}); "
            "more --samples would help"
        )


def first_not_finite(scores: Mapping[str, Any], metrics: tuple[str, ...]) -> str | None:
    """The first metric that is not a finite number, with its time; None if all are finite."""
    for when in ("before", "after"):
        for metric in metrics if scores else ():
            if not math.isfinite(float(scores[when][metric])):
                return f"{metric} {when} pruning"
    return None

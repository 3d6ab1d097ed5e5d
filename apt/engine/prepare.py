"""Checks of the options of a run against the model, the machine and the disk, before the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.checkpoints.copies import links_outside
from apt.checkpoints.load import skeleton
from apt.checkpoints.model import Model
from apt.distributed.launch import whole_number
from apt.engine.limits import (
    check_activations,
    check_amount,
    check_dtype,
    check_seed,
    check_shard_size,
)
from apt.engine.machine import check_tokens, choose_device
from apt.engine.options import RunOptions
from apt.engine.prune_options import record
from apt.engine.shrink_plan import find_method, resolved, shrinking
from apt.errors import AptError
from apt.files.journal import check_same
from apt.locations.model_source import Source, find
from apt.locations.paths import expanded
from apt.output.json_values import json_value
from apt.output.location import check_not_input, check_output
from apt.output.report import read_report
from apt.output.workplace import resumable
from apt.planning.allocation import check_allocation
from apt.planning.plan import Plan, check_rounding, make_plan
from apt.plugin.registry import Registry
from apt.plugin.specs import MethodSpec
from apt.pruning.layer import Recipe
from apt.shrinking.structure_choice import StructureChoice
from apt.solver import Unstructured
from apt.text.augmentation import Augmentation
from apt.text.self_generated import writes

WITHOUT_EFFECT = ("overwrite", "resume", "stream", "activations")
"""The options that do not change the result, but for rounding."""


@dataclass(frozen=True)
class Prepared:
    """A run that has passed all checks that need neither weights nor text."""

    options: RunOptions
    registry: Registry
    shell: Model
    plan: Plan
    method: MethodSpec
    recipe: Recipe
    augmentation: Augmentation
    device: str
    structure: StructureChoice | None = None

    @property
    def samples(self) -> int:
        """The number of all calibration samples."""
        return self.augmentation.samples(self.options.samples, self.options.seqlen)

    def record(self) -> dict[str, Any]:
        """All options with defaults filled in, as values for JSON, for the report."""
        per = {"per": self.plan.per}
        return self.options.record() | per | record(self.recipe, self.augmentation)


def prepare(
    options: RunOptions, registry: Registry, notice: Callable[[str], None] = lambda line: None
) -> Prepared:
    """Check everything that can be checked before the work begins.

    Args:
        options: the run's options.
        registry: the plugins.
        notice: called with a line about each option that was changed to fit the model.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    _check_numbers(options)
    method = find_method(options, registry)
    _check_used(options, method, registry)
    source = find(
        options.model, registry, trust_remote_code=options.trust_remote_code, hub=options.hub
    )
    texts = (options.calibration, options.evaluation, options.tokenizer)
    check_place(
        options.output, source, texts, notice, overwrite=options.overwrite, resume=options.resume
    )
    shell = skeleton(source, registry, options.adapter)
    if options.shrink is not None:
        wish, method = resolved(
            options.shrink, options.method, shell.module, shell.adapter, shell.config, registry,
            notice, streams=options.stream,
        )  # fmt: skip
        options = replace(options, shrink=wish)
    recipe = options.prune.recipe(method)
    if options.shrink is None:
        structure, plan = None, _plan(options, shell, method, notice)
    else:
        structure, plan = shrinking(options, shell, method, recipe, registry, notice)
    seqlen = capped(options.seqlen, shell, notice)
    pattern = options.pattern
    if isinstance(pattern, Unstructured):
        pattern = pattern.counted(method.per)
    options = replace(
        options, pattern=pattern, method=method.name, adapter=shell.spec.name, seqlen=seqlen
    )
    augmentation = options.prune.augmentation(method, options.samples)
    augmentation = _supported(augmentation, options, shell.module, notice)
    device = choose_device(options.device)
    prepared = Prepared(
        options, registry, shell, plan, method, recipe, augmentation, device, structure
    )
    _check_memory(prepared)
    return prepared


def _plan(
    options: RunOptions, shell: Model, method: MethodSpec, notice: Callable[[str], None]
) -> Plan:
    """The plan of a sparse model."""
    assert options.pattern is not None
    plan = make_plan(
        shell.module, shell.adapter, options.pattern, options.selection, method.per, options.also
    )
    if shell.config.model_type not in shell.spec.model_types:
        notice(f"adapter {shell.spec.name}: {plan.outline()}")
    check_rounding(plan, notice)
    check_allocation(options.allocation, plan)
    return plan


def _check_memory(prepared: Prepared) -> None:
    """Raise if the samples with one stream of their activations do not fit into memory."""
    options, shell = prepared.options, prepared.shell
    held = 0 if options.activations == "disk" else shell.config.hidden_size * shell.dtype.itemsize
    ranks = whole_number("WORLD_SIZE", 1, least=1)
    samples = prepared.augmentation.written(options.samples)
    each = torch.long.itemsize + held
    check_tokens(samples, options.seqlen, each, prepared.device, ranks)


def check_place(
    output: Path,
    source: Source,
    texts: Sequence[str | None],
    notice: Callable[[str], None],
    *,
    overwrite: bool,
    resume: bool,
) -> None:
    """Check the place of the output, and notify the user of an earlier result to be replaced.

    Args:
        output: the directory to write.
        source: the model.
        texts: the data sources and the tokenizer; files and directories among them are protected.
        notice: called with a line about what is replaced or left out.
        overwrite, resume: the options of the run.
    """
    inputs = input_paths(source, texts)
    if resume and (resumable(output) or read_report(output)):
        check_not_input(output, inputs)
        return
    for link in [] if source.gguf else links_outside(Path(source.location)):
        notice(f"left out: {link} is a link to a file outside the checkpoint")
    if lost := check_output(output, overwrite, inputs):
        notice(f"replaces {lost}")


def input_paths(source: Source, texts: Sequence[str | None]) -> list[Path]:
    """The local files and directories that a run reads.

    Args:
        source: the model.
        texts: the data sources and the tokenizer; None for one that is not used.
    """
    given = [path for name in texts if name and (path := expanded(name)).exists()]
    return [*source.files(), *given]


def already_complete(prepared: Prepared) -> bool:
    """True if the run to be resumed was finished before.

    Raises:
        AptError: the output is that of a run with other options.
    """
    options = prepared.options
    report = finished_report(options.output, resume=options.resume)
    if report is not None:
        check_same_run(options.output, report["options"], prepared.record())
    return report is not None


def finished_report(output: Path, *, resume: bool) -> dict[str, Any] | None:
    """The report of a finished run; None if the run is not to be resumed, or was interrupted."""
    return None if not resume or resumable(output) else read_report(output)


def check_same_run(output: Path, known: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise if the options of a finished run differ from those of the run to be resumed.

    Args:
        output: the directory of the finished run.
        known: its options, as in its report.
        now: the options of the run to be resumed.
    """
    fault = f"{output} is the result of another run"
    hint = "choose another output, or overwrite it without resuming"
    options = ("output", "overwrite", "resume")
    check_same(fault, known, json_value(now), hint, options, WITHOUT_EFFECT)


def _supported(
    augmentation: Augmentation,
    options: RunOptions,
    module: nn.Module,
    notice: Callable[[str], None],
) -> Augmentation:
    """The augmentation, without default own samples if the model cannot generate text."""
    count = augmentation.own_samples
    if options.prune.own_samples is not None or not count or writes(module):
        return augmentation
    notice(f"own samples: 0 (not {count}: {type(module).__name__} cannot generate text)")
    return replace(augmentation, own_samples=0)


def _check_numbers(options: RunOptions) -> None:
    check_amount(options.samples, options.seqlen, options.prune.own_samples)
    check_seed(options.seed)
    options.prune.check()
    check_dtype(options.dtype)
    check_shard_size(options.max_shard_size)
    check_activations(options.activations, streamed=options.stream)


def _check_used(options: RunOptions, method: MethodSpec, registry: Registry) -> None:
    """Raise for an option that the method does not use."""
    known = registry.methods.specs.values()
    if options.prune.effort != "default" and not method.efforts:
        others = ", ".join(spec.name for spec in known if spec.efforts)
        raise AptError(
            f"method {method.name} does not use the effort",
            f"methods with it: {others}",
            ("effort",),
        )
    if options.prune.block_size is not None and not method.blocks:
        others = ", ".join(spec.name for spec in known if spec.blocks)
        raise AptError(
            f"method {method.name} does not use a block size",
            f"methods with it: {others}",
            ("block_size",),
        )


def capped(seqlen: int, model: Model, notice: Callable[[str], None]) -> int:
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

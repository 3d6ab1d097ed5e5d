"""Making a smaller model of a model in memory, from a program."""

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.checkpoints.smaller import smaller
from apt.distributed.ranks import Ranks
from apt.engine.api import described, find_adapter
from apt.engine.inputs import check_inputs
from apt.engine.limits import check_activations
from apt.engine.machine import activation_store
from apt.engine.new_report import calibration_of
from apt.engine.prune_model import Job, prune_model
from apt.engine.prune_options import PruneOptions, record
from apt.engine.shrink_plan import Choice, choice_of, removal, resolved
from apt.events import Observer, telling
from apt.output.report import Report
from apt.planning.structure import make_structured_plan
from apt.plugin.registry import registry
from apt.shrinking.options import ShrinkOptions
from apt.shrinking.record import structure_record
from apt.text.special_tokens import bos_of, named_ids, special_ids


@torch.inference_mode(mode=False)  # in which a copy would be of inference tensors
def shrink(
    model: nn.Module,
    tokens: Tensor,
    *,
    size: ShrinkOptions | None = None,
    adapter: str | Adapter | None = None,
    method: str | Choice | None = None,
    options: PruneOptions | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    activations: str = "memory",
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> tuple[Any, Report]:
    """Make a smaller dense model of a causal language model of transformers.

    The given model does not change. A copy of it is needed during the run.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen), without padding.
        size: the options of the smaller model; by default 75 % of the parameters of the blocks.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.
        method: the name of a choice of groups, or of blocks in mode ``"depth"``; or a function: an
            `apt.solver.GroupChoice`, an `apt.extending.GroupScores`, or, where only blocks are
            dropped, an `apt.extending.BlockChoice`.
        options: the options that the weights depend on. ``row_importance`` and ``block_size`` have
            no effect.
        tokenizer, seed, activations, ranks, observe: as in `apt.prune`.

    Returns:
        The smaller model, of the same class, and the record of the run. Its ``structure`` says what
        the model keeps.

    Raises:
        AptError: no smaller model meets the options, an option is out of range, or the model cannot
            be pruned.
    """
    started, ranks = time.perf_counter(), ranks or Ranks()
    check_activations(activations, streamed=False)
    installed, options, size = registry(), options or PruneOptions(), size or ShrinkOptions()
    size.check()
    adapter_name, instance = find_adapter(adapter, model, installed)
    check_inputs(model, instance, tokens)
    config: Any = getattr(model, "config", None)
    size, spec = resolved(size, method, model, instance, config, installed)
    recipe, augmentation = options.recipe(spec), options.augmentation(spec, len(tokens))
    device = str(next(model.parameters()).device)
    choice = choice_of(
        size, model, instance, config, spec, recipe, installed, seed=seed, device=device
    )
    plan = make_structured_plan(
        model, instance, config, choice.provisional(model, instance),
        adjusted=recipe.targets is not None,
    )  # fmt: skip
    job = Job(
        instance,
        plan,
        removal(choice, size.compensate),
        recipe,
        augmentation,
        structure=choice,
        seed=seed,
        bos=bos_of(tokenizer) if tokenizer else None,
        special=special_ids(tokenizer) if tokenizer else named_ids(model),
    )
    report = Report(
        options={
            "shrink": size.record(),
            "method": spec.name,
            "seed": seed,
            "activations": activations,
            **record(recipe, augmentation),
        },
        model=described(model, adapter_name),
        calibration={"source": "", "own_samples": augmentation.own_samples, "bos": job.bos},
    )
    masked: Any = copy.deepcopy(model)
    tokens = job.with_own_text(masked, tokens, ranks)
    plan, sites = prune_model(
        masked,
        tokens,
        job,
        store=activation_store(activations),
        ranks=ranks,
        observe=telling(observe, installed.site_pruned) if ranks.first else observe,
    )
    report = replace(
        report,
        calibration=report.calibration | calibration_of(tokens),
        sites=sites,
        skipped=plan.dense,
        structure=structure_record(choice, plan, model, instance, config),
        ranks=ranks.gather(ranks.work),
    )
    return smaller(masked, instance, plan), report.timed(time.perf_counter() - started)

"""Pruning an in-memory model from a program."""

import copy
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from apt.distributed.ranks import Ranks
from apt.errors import AptError
from apt.events import Observer, telling
from apt.output.report import Report
from apt.planning.allocation import UNIFORM, allocated, check_allocation
from apt.planning.plan import Selection, make_plan
from apt.plugin.registry import registry
from apt.pruning.config import choose_mode
from apt.pruning.pipeline import prune_blocks
from apt.runs.limits import check_solver
from apt.solver import Pattern, SolverOptions, parse_pattern
from apt.text.datasets import digest
from apt.text.special_tokens import named_ids

M = TypeVar("M")


def prune_copy(model: M, tokens: Tensor, **options: Any) -> tuple[M, Report]:
    """Prune a copy, and leave the model as it is; what `prune` takes otherwise.

    Returns:
        The pruned copy, and the record of the run.
    """
    pruned = copy.deepcopy(model)
    return pruned, prune(pruned, tokens, **options)


def prune(
    model: Any,
    tokens: Tensor,
    *,
    pattern: Pattern | str,
    adapter: str | None = None,
    method: str | None = None,
    selection: Selection | None = None,
    options: SolverOptions | None = None,
    error_aware: bool | None = None,
    ordered: bool | None = None,
    allocation: str = UNIFORM,
    also: Sequence[str] = (),
    special: Sequence[int] | None = None,
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> Report:
    """Prune a causal language model of transformers in place.

    However a run ends early, by an error, an observer or Ctrl-C, no hook, thread, mode or precision
    setting is left behind. Blocks before the one at hand are pruned and tuned, those after it are
    dense; of its own sites each is either dense or meets its pattern. Work on a copy where that
    matters.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen), without padding. Where the model's
            tokenizer begins a text with a token of its own, so should every sample.
        pattern: ``"2:4"``, ``"0.5"``, or a pattern of `apt.solver`.
        adapter: the adapter's name; by default the only one that serves the model's type.
        method: the method's name; by default the most accurate.
        selection: which sites are pruned, and overrides; all by default.
        options: effort, damping and block sizes.
        error_aware: whether each site makes up for a part of the error of those before it
            (`apt.calibration.targets`); by default as the method declares.
        ordered: solve the sites of a block in their order of execution, each on inputs that the
            pruned ones before it give; by default where the run is error-aware.
        allocation: how an unstructured sparsity is shared out among sites, by name.
        also: kinds of parameters beyond the Linears that are pruned too, as the adapter has them.
        special: tokens that are no text, which never stand among random ones; by default those
            that the model's configurations name. `special_ids` of its tokenizer are what
            ``apt-prune prune`` leaves out.
        ranks: the processes of torch.distributed that prune together, `apt.Ranks` of their group:
            each calls this with an equal model and the same arguments, and is left with the same
            weights. None prunes alone, whatever process group there is.
        observe: called with every event of `apt.events`, from the thread that prunes. What it
            raises ends the run, and comes through: so a run is cancelled. It is called after each
            solve, each step of tuning and each batch that is run through a block.

    Returns:
        The record of the run; ``report.sites`` has one entry for each pruned site.

    Raises:
        AptError: a name is unknown, an option is out of range, the pattern does not fit, or the
            model cannot be pruned.
    """
    started, ranks = time.perf_counter(), ranks or Ranks()
    options = options or SolverOptions()
    check_solver(options.damping, options.block_size, options.effort)
    try:
        wanted = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    except ValueError as error:
        raise AptError(str(error)) from error
    shelf = registry()
    kind = getattr(model.config, "model_type", type(model).__name__)
    spec = shelf.adapters.get(adapter) if adapter else shelf.adapter_for(kind)
    chosen = shelf.methods.get(method) if method else shelf.default_method()
    instance = spec.load()()
    instance.check(model.config)
    plan = make_plan(model, instance, wanted, selection, chosen.per, also)
    check_allocation(allocation, plan)
    if allocation != UNIFORM:
        share_out = shelf.allocations.get(allocation)
        plan = ranks.share(allocated(plan, share_out, model, instance, tokens))
    mode = choose_mode(chosen, options, error_aware, ordered)
    mode = mode.sparing(named_ids(model) if special is None else special)
    tell = telling(observe, shelf.site_pruned)
    sites = prune_blocks(
        model, instance, plan, tokens, chosen.load(), **vars(mode), ranks=ranks, observe=tell
    )
    return Report(
        options={
            "pattern": str(wanted),
            "method": chosen.name,
            "allocation": allocation,
            "also": list(also),
            **mode.record(),
        },
        model={"type": kind, "adapter": spec.name},
        tokens={"shape": list(tokens.shape), "sha256": digest(tokens.cpu())},
        sites=sites,
        skipped=[site.name for site in plan.sites if site.pattern is None],
        seconds=time.perf_counter() - started,
        ranks=ranks.gather(ranks.work),
    )

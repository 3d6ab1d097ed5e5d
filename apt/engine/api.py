"""Pruning an in-memory model from a program."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.wrapped import refuse_wrapped
from apt.checkpoints.load import fingerprint
from apt.distributed.ranks import Ranks
from apt.engine.inputs import check_inputs
from apt.engine.limits import check_activations, check_windows
from apt.engine.machine import activation_store
from apt.engine.new_report import calibration_of
from apt.engine.prune_model import Job, named_allocation, prune_model
from apt.engine.prune_options import PruneOptions, record
from apt.errors import AptError, name_of
from apt.events import Observer, telling
from apt.output.report import Report, portable
from apt.planning.allocation import Allocation, check_allocation, default_allocation
from apt.planning.plan import Plan, Selection, check_rounding, make_plan, read_pattern
from apt.plugin.registry import Registry, registry
from apt.plugin.specs import MethodSpec
from apt.pruning.layer import Method
from apt.solver import Pattern
from apt.text import datasets
from apt.text.special_tokens import bos_of, named_ids, special_ids

M = TypeVar("M", bound=nn.Module)


class PruneArguments(TypedDict, total=False):
    """The keyword arguments of `prune`."""

    pattern: Pattern | str | float
    adapter: str | Adapter | None
    method: str | Method | None
    selection: Selection | None
    options: PruneOptions | None
    allocation: str | Allocation | None
    also: Sequence[str]
    tokenizer: Any
    seed: int
    activations: str
    ranks: Ranks | None
    observe: Observer


@torch.inference_mode(mode=False)  # in which a copy would be of inference tensors
def prune_copy(model: M, tokens: Tensor, **arguments: Unpack[PruneArguments]) -> tuple[M, Report]:
    """Prune a copy of a model; the model itself does not change.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen).
        arguments: the keyword arguments of `prune`.

    Returns:
        The pruned copy, and the record of the run.
    """
    pruned = copy.deepcopy(model)
    return pruned, prune(pruned, tokens, **arguments)


def prune(
    model: nn.Module,
    tokens: Tensor,
    *,
    pattern: Pattern | str | float,
    adapter: str | Adapter | None = None,
    method: str | Method | None = None,
    selection: Selection | None = None,
    options: PruneOptions | None = None,
    allocation: str | Allocation | None = None,
    also: Sequence[str] = (),
    tokenizer: Any = None,
    seed: int = 0,
    activations: str = "memory",
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> Report:
    """Prune a causal language model of transformers in place.

    If a run ends early, by an error, an observer or Ctrl-C, no hook, thread, mode or precision
    setting is left behind. The model is then partly pruned: blocks before the current one are
    pruned and tuned, blocks after it are dense, and each site of the current block is dense or
    meets its pattern. Use `prune_copy` to keep the original model.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen), without padding; see
            `apt.calibration_tokens`. If the model's tokenizer begins each text with a special
            token, each sample should begin with it.
        pattern: ``"2:4"``, ``"0.5"`` or 0.5, ``"auto:8@0.5"`` for n:8 with an n of its own for each
            site, or a pattern of `apt.solver`.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.
        method: the name of a method, or a function `apt.extending.Method`; by default the most
            accurate method.
        selection: the sites to prune, and the sites with other patterns; by default all sites.
        options: the options that the weights depend on; see `apt.PruneOptions`.
        allocation: the distribution of an unstructured sparsity over the sites: a name, or a
            function `apt.extending.Allocation`. By default ``"auto"`` for mixed n:m, and
            the same for every site otherwise.
        also: kinds of parameters to prune beside the Linears, by their names in the adapter.
        tokenizer: the model's tokenizer. It gives the special tokens, which never occur among
            random tokens, and the first token of the text that the model generates. Without it the
            special tokens are those of the model's configurations.
        seed: the seed for the text that the model generates.
        activations: ``"memory"`` keeps the calibration activations on the device of the model,
            ``"cpu"`` in CPU memory beside a model on a GPU.
        ranks: the processes of torch.distributed that prune together, `apt.Ranks` of their group.
            Each process makes this call with an equal model and the same arguments, and gets the
            same weights. None prunes in this process alone, even if there is a process group.
        observe: called with every event of `apt.events`, from the thread that prunes: after each
            solve, each step of tuning and each batch that is run through a block. To cancel the
            run, raise an exception from it; the exception reaches the caller. With several ranks,
            raise it on all of them at the same `BlockStarted` or `SitePruned`, the events that all
            get alike: a rank that is left alone waits for the others.

    Returns:
        The record of the run; ``report.sites`` has one entry for each pruned site.

    Raises:
        AptError: a name is unknown, an option is out of range, the pattern does not fit or prunes
            nothing, or the model cannot be pruned.
    """
    started, ranks = time.perf_counter(), ranks or Ranks()
    check_activations(activations, streamed=False)
    installed, options = registry(), options or PruneOptions()
    spec, function = find_method(method, installed)
    adapter_name, instance = find_adapter(adapter, model, installed)
    check_inputs(model, instance, tokens)
    wanted = read_pattern(pattern)
    plan = make_plan(model, instance, wanted, selection, spec.per, also)
    check_rounding(plan)
    job = Job(
        instance,
        plan,
        function,
        options.recipe(spec),
        options.augmentation(spec, len(tokens)),
        allocation=_allocation(allocation, wanted, plan, installed),
        seed=seed,
        bos=bos_of(tokenizer) if tokenizer else None,
        special=special_ids(tokenizer) if tokenizer else named_ids(model),
    )
    check_allocation(job.allocation_name, plan)
    report = Report(
        options={
            "pattern": str(wanted),
            "per": plan.per,
            "method": spec.name,
            "allocation": job.allocation_name,
            "also": list(also),
            "seed": seed,
            "activations": activations,
            **(selection or Selection()).record(),
            **record(job.recipe, job.augmentation),
        },
        model=described(model, adapter_name),
        calibration={"source": "", "own_samples": job.augmentation.own_samples, "bos": job.bos},
    )
    tokens = job.with_own_text(model, tokens, ranks)
    plan, sites = prune_model(
        model,
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
        ranks=ranks.gather(ranks.work),
    )
    return report.timed(time.perf_counter() - started)


def calibration_tokens(
    tokenizer: Any,
    source: str = "builtin",
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> Tensor:
    """Calibration samples from a data source, the same as those of ``apt-prune prune``.

    Args:
        tokenizer: the model's tokenizer. If it begins each text with a special token, each sample
            begins with it.
        source: ``builtin``, the name of a data set, or a .txt, .jsonl or .parquet file.
        samples: the number of samples. They do not overlap.
        seqlen: the number of tokens of a sample.
        seed: the seed for the choice of samples.

    Returns:
        Token ids (samples, seqlen).

    Raises:
        AptError: an amount is out of range, or the source cannot be read or has too little text.
    """
    check_windows(samples, seqlen)
    found = datasets.documents(source, "calibration", registry())
    bos = bos_of(tokenizer)
    return datasets.calibration_tokens(tokenizer, found, samples, seqlen, seed, source, bos)


def evaluation_tokens(
    tokenizer: Any, source: str = "builtin", *, samples: int | None = None, seqlen: int = 2048
) -> Tensor:
    """Windows of a data source to measure on, the same as those of ``apt-prune eval``.

    Args:
        tokenizer: the model's tokenizer, as in `calibration_tokens`.
        source: ``builtin``, the name of a data set, or a .txt, .jsonl or .parquet file.
        samples: the number of windows; None for all of the text.
        seqlen: the number of tokens of a window.

    Returns:
        Token ids (windows, seqlen).

    Raises:
        AptError: an amount is out of range, or the source cannot be read or has too little text.
    """
    check_windows(samples, seqlen)
    found = datasets.documents(source, "evaluation", registry())
    return datasets.evaluation_tokens(tokenizer, found, samples, seqlen, source, bos_of(tokenizer))


def find_adapter(
    adapter: str | Adapter | None, model: nn.Module, installed: Registry
) -> tuple[str, Adapter]:
    """The name of the adapter for a model, and the adapter.

    Raises:
        AptError: no adapter serves the model's type, the model has no configuration, what was
            given is no adapter, or a module of the model is a wrapper.
    """
    refuse_wrapped(model)
    if adapter is not None and not isinstance(adapter, str):
        if isinstance(adapter, type) or not hasattr(adapter, "blocks"):
            raise AptError(f"adapter is {adapter!r}", "give its name, or an instance of its class")
        name, instance = type(adapter).__name__, adapter
    elif adapter is None and getattr(model, "config", None) is None:
        raise AptError(
            f"{type(model).__name__} has no config, so its family is not known",
            "choose an adapter",
            ("adapter",),
        )
    else:
        spec = (
            installed.adapters.get(adapter) if adapter else installed.adapter_for(model_type(model))
        )
        name, instance = spec.name, spec.make()
    if (config := getattr(model, "config", None)) is not None:
        instance.check(config)
    return name, instance


def model_type(model: nn.Module) -> str:
    """The ``model_type`` of a model's configuration; without one, the name of its class."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def find_method(method: str | Method | None, installed: Registry) -> tuple[MethodSpec, Method]:
    """A method and its spec; a function has the spec of a method without options."""
    if method is None or isinstance(method, str):
        spec = installed.methods.get(method) if method else installed.default_method()
        return spec, spec.load()
    name = name_of("method", method)
    return MethodSpec(name, "a function of the caller", ""), method


def _allocation(
    allocation: str | Allocation | None, pattern: Pattern, plan: Plan, installed: Registry
) -> tuple[str, Allocation] | None:
    if allocation is None or isinstance(allocation, str):
        return named_allocation(allocation or default_allocation(pattern), plan, installed)
    return name_of("allocation", allocation), allocation


def described(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The entry of the report for a model in memory.

    The reference is that of the model's configuration; without one, the name of its class.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return {
        "reference": portable(str(name)),
        "type": model_type(model),
        "adapter": adapter,
        "sha256": fingerprint(model),
    }

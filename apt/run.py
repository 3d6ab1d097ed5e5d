"""A whole run, from references to a directory on disk; what ``apt prune`` does."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.allocate import UNIFORM, allocated, check_allocation
from apt.checkpoint import check_output, check_space, save_model, whole_directory
from apt.errors import AptError
from apt.events import Observer, SitePruned, telling
from apt.journal import workplace
from apt.mode import Mode, choose_mode, choose_own_samples
from apt.models import Model, find, fingerprint, load, load_tokenizer, skeleton
from apt.pipeline import prune_blocks
from apt.plan import Plan, Selection, make_plan
from apt.plugins import Registry
from apt.ranks import Ranks
from apt.report import Report
from apt.samples import mixed
from apt.self_calibration import own_text, writes
from apt.solver import EFFORTS, Pattern, SolverOptions, Unstructured
from apt.specials import bos_of, special_ids
from apt.specs import MethodSpec
from apt.text import calibration_tokens, digest, documents, evaluation_tokens
from apt.verify import failures, verify

ACTIVATIONS = ("memory", "disk")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """What a run is told; every default that depends on the model is already filled in."""

    model: str
    pattern: Pattern
    output: Path
    adapter: str | None = None
    method: str | None = None
    calibration: str = "builtin"
    evaluation: str | None = None
    metrics: tuple[str, ...] = ("perplexity",)
    allocation: str = "uniform"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    own_samples: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    error_aware: bool | None = None
    ordered: bool | None = None
    overwrite: bool = False
    also: tuple[str, ...] = ()
    stream: bool = False
    resume: bool = False
    activations: str = "memory"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    bos: bool = True
    selection: Selection = field(default_factory=Selection)
    solver: SolverOptions = field(default_factory=SolverOptions)

    def record(self) -> dict[str, Any]:
        """The options as plain values, for the report."""
        selection = {
            "only": self.selection.only,
            "skip": self.selection.skip,
            "overrides": {glob: str(pattern) for glob, pattern in self.selection.overrides},
        }
        plain = {k: v for k, v in vars(self).items() if k not in ("selection", "solver")}
        return {
            **plain,
            "pattern": str(self.pattern),
            "per": getattr(self.pattern, "per", None),
            "output": str(self.output),
            **selection,
        }


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked as far as that goes without reading weights or text."""

    options: RunOptions
    registry: Registry
    shell: Model
    plan: Plan
    method: MethodSpec
    mode: Mode
    device: str


def choose_device(name: str) -> str:
    """The device for ``auto``, or the one named if this machine has it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise AptError(f"device '{name}' is not available here", "use --device cpu") from error
    return name


def prepare(
    options: RunOptions, registry: Registry, notice: Callable[[str], None] = lambda line: None
) -> Prepared:
    """Check everything that can be checked before the work begins.

    Args:
        options: the run's options.
        registry: the plugins.
        notice: told, in a line, what was changed to fit the model.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    _check_numbers(options)
    method = registry.methods.get(options.method) if options.method else registry.default_method()
    _check_heeded(options, method, registry)
    going_on = options.resume and workplace(options.output).is_dir()
    check_output(options.output, options.overwrite or going_on)
    source = find(options.model, registry, trust_remote_code=options.trust_remote_code)
    shell = skeleton(source, registry, options.adapter)
    plan = make_plan(
        shell.module, shell.adapter, options.pattern, options.selection, method.per, options.also
    )
    if shell.config.model_type not in shell.spec.model_types:
        notice(f"adapter {shell.spec.name}: {plan.outline()}")
    check_allocation(options.allocation, plan)
    seqlen = capped(options.seqlen, shell, notice)
    pattern = options.pattern
    if isinstance(pattern, Unstructured):
        pattern = pattern.counted(method.per)
    options = replace(
        options, pattern=pattern, method=method.name, adapter=shell.spec.name, seqlen=seqlen
    )
    mode = choose_mode(method, options.solver, options.error_aware, options.ordered)
    own = _own_samples(options, method, mode, shell.module, notice)
    options = replace(options, solver=mode.options, own_samples=own)
    return Prepared(options, registry, shell, plan, method, mode, choose_device(options.device))


def _own_samples(
    options: RunOptions,
    method: MethodSpec,
    mode: Mode,
    module: nn.Module,
    notice: Callable[[str], None],
) -> int:
    """How many samples the model writes itself: of those that nobody has asked for, if it can."""
    if options.own_samples is not None:
        return options.own_samples
    count = choose_own_samples(method, mode, options.samples)
    if not count or (writes(module) and not options.stream):
        return count
    what = "a model that is streamed" if options.stream else type(module).__name__
    notice(f"own samples: 0 (not {count}: {what} writes no text)")
    return 0


def _check_numbers(options: RunOptions) -> None:
    solver = options.solver
    if min(options.samples, options.own_samples or 0) < 0 or options.seqlen < 2:
        raise AptError("--samples and --own-samples must not be negative, --seqlen at least 2")
    if not options.samples and not options.own_samples:
        raise AptError("--samples must be at least 1", "or let the model write --own-samples")
    if solver.damping is not None and not 0 <= solver.damping < math.inf:
        raise AptError(f"--damping {solver.damping:g} is not a number from 0 up")
    if solver.block_size is not None and solver.block_size < 1:
        raise AptError(f"--block-size {solver.block_size} is not positive")
    if solver.effort not in EFFORTS:
        raise AptError(f"--effort {solver.effort} is none of {', '.join(EFFORTS)}")
    read_dtype(options.dtype)
    check_activations(options.activations, streamed=options.stream)


def check_activations(where: str, *, streamed: bool) -> None:
    """Raise where activations cannot be kept in a place of that name."""
    if where not in ACTIVATIONS:
        raise AptError(f"--activations {where} is none of {', '.join(ACTIVATIONS)}")
    if where != "memory" and not streamed:
        raise AptError(f"--activations {where} is for streamed runs", "pass --stream as well")


def _check_heeded(options: RunOptions, method: MethodSpec, registry: Registry) -> None:
    """Refuse options that the method would not look at."""
    known = registry.methods.specs.values()
    if options.solver.effort != "default" and not method.efforts:
        others = ", ".join(spec.name for spec in known if spec.efforts)
        raise AptError(f"{method.name} knows no --effort", f"these do: {others}")
    if options.solver.block_size is not None and not method.blocks:
        others = ", ".join(spec.name for spec in known if spec.blocks)
        raise AptError(f"{method.name} knows no --block-size", f"these do: {others}")


def read_dtype(name: str) -> torch.dtype | None:
    """The precision of that name; None for ``auto``, which keeps the checkpoint's."""
    if name not in ("auto", *DTYPES):
        raise AptError(f"no dtype '{name}'", f"use auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def capped(seqlen: int, model: Model, notice: Callable[[str], None]) -> int:
    """``seqlen``, cut to the positions that the model has."""
    positions = model.adapter.positions(model.config)
    if positions is None or seqlen <= positions:
        return seqlen
    notice(f"seqlen: {positions}, all the positions that the model has (not {seqlen})")
    return positions


def execute(
    prepared: Prepared,
    observe: Observer,
    status: Callable[[str], None],
    *,
    ranks: Ranks | None = None,
) -> Report:
    """Load, prune, save and verify.

    Args:
        prepared: the checked run.
        observe: called with the pipeline's events.
        status: told what is being done outside the pipeline.
        ranks: the processes that do this together, the first of which measures and writes.

    Raises:
        AptError: the checkpoint, the text or the disk is at fault; nothing is written then.
    """
    started, options, ranks = time.perf_counter(), prepared.options, ranks or Ranks()
    check_space(options.output, _bytes(prepared))
    status("reading text")
    tokenizer = load_tokenizer(prepared.shell.source, options.tokenizer)
    prepared, bos = sparing(prepared, tokenizer), chosen_bos(prepared.options, tokenizer)
    tokens, held_out = texts(prepared, tokenizer)
    held_out = held_out if ranks.first else None
    status("loading the model")
    model = load(prepared.shell, read_dtype(options.dtype), prepared.device)
    check_vocabulary(tokens, model.module, model.source.reference)
    if options.own_samples:
        status("writing text to calibrate on")
        if ranks.first:
            own = own_text(
                model.module,
                options.own_samples,
                options.seqlen,
                options.seed,
                bos=bos,
                special=special_ids(tokenizer),
            )
            tokens = mixed(tokens, own, options.seed)
        tokens = ranks.share(tokens)
    if options.allocation != UNIFORM:
        status(f"sharing out the sparsity ({options.allocation})")
        plan = _allocated(prepared, model, tokens)
        prepared = replace(prepared, plan=ranks.share(plan))
    report = unfinished(prepared, tokens, fingerprint(model.module), bos)
    scores: dict[str, Any] = {}
    if held_out is not None:
        with model.adapter.running(model.module):
            scores["before"] = measure(prepared, model.module, held_out, "before", status)
    sites = _prune(prepared, model, tokens, observe, ranks)
    if held_out is not None:
        with model.adapter.running(model.module):
            scores["after"] = measure(prepared, model.module, held_out, "after", status)
    report = replace(
        report,
        sites=sites,
        scores=scored(prepared, held_out, scores),
        seconds=time.perf_counter() - started,
        ranks=ranks.gather(ranks.work),
    )
    if not ranks.first:
        return report
    status("saving and verifying")
    with whole_directory(options.output) as directory:
        save_model(model.module, tokenizer, directory, model.checkpoint)
        report.write(directory)
        del model
        gc.collect()
        _verify_saved(prepared, directory)
    return report


def sparing(prepared: Prepared, tokenizer: Any) -> Prepared:
    """The run, in which no token drawn at random is a special one of the tokenizer."""
    return replace(prepared, mode=prepared.mode.sparing(special_ids(tokenizer)))


def chosen_bos(options: RunOptions, tokenizer: Any) -> int | None:
    """What every sample and window begins with; None where there is no such token, or by option."""
    return bos_of(tokenizer) if options.bos else None


def unfinished(prepared: Prepared, tokens: Tensor, sha256: str, bos: int | None) -> Report:
    """The report of a run that has not begun."""
    options, shell = prepared.options, prepared.shell
    return Report(
        options.record() | prepared.mode.record(),
        {
            "reference": options.model,
            "type": shell.config.model_type,
            "adapter": shell.spec.name,
            "sha256": sha256,
        },
        {
            "source": options.calibration,
            "own_samples": options.own_samples,
            "bos": bos,
            "shape": list(tokens.shape),
            "sha256": digest(tokens),
        },
        [],
        [site.name for site in prepared.plan.sites if site.pattern is None],
        0.0,
    )


def _bytes(prepared: Prepared) -> int:
    """How large the weights will be on disk."""
    shell = prepared.shell
    dtype = read_dtype(prepared.options.dtype) or shell.dtype
    return sum(parameter.numel() for parameter in shell.module.parameters()) * dtype.itemsize


def texts(prepared: Prepared, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """The tokens to calibrate on that are given, and those to measure on if any are asked for."""
    options, registry = prepared.options, prepared.registry
    seqlen, bos = options.seqlen, chosen_bos(options, tokenizer)
    found = documents(options.calibration, "calibration", registry) if options.samples else ()
    tokens = calibration_tokens(
        tokenizer, found, options.samples, seqlen, options.seed, options.calibration, bos
    )
    if options.evaluation is None:
        return tokens, None
    found = documents(options.evaluation, "evaluation", registry)
    most = options.samples or options.own_samples
    held_out = evaluation_tokens(
        tokenizer, found, most, seqlen, options.evaluation, bos, fewer=True
    )
    return tokens, held_out


def check_vocabulary(tokens: Tensor, module: nn.Module, reference: str) -> None:
    """Raise where a token has no embedding."""
    vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise AptError(
            f"the tokenizer of {reference} gives ids up to {int(tokens.max())}, "
            f"but the model has {vocabulary} embeddings",
            "the tokenizer belongs to another model",
        )


def _allocated(prepared: Prepared, model: Model, tokens: Tensor) -> Plan:
    share_out = prepared.registry.allocations.get(prepared.options.allocation)
    return allocated(prepared.plan, share_out, model.module, model.adapter, tokens)


def measure(
    prepared: Prepared,
    module: nn.Module,
    held_out: Tensor,
    when: str,
    status: Callable[[str], None],
) -> dict[str, float]:
    """Each of the run's metrics, of a model that is `Adapter.running`."""
    measured = {}
    for name in prepared.options.metrics:
        status(f"measuring {name} {when} pruning")
        measured[name] = float(prepared.registry.evaluators.get(name).load()(module, held_out))
    return measured


def scored(prepared: Prepared, held_out: Tensor | None, found: dict[str, Any]) -> dict[str, Any]:
    """What was measured before and after, if anything was, with the text, for the report."""
    if held_out is None or not found:
        return {}
    return {"source": prepared.options.evaluation, "shape": list(held_out.shape), **found}


def _prune(
    prepared: Prepared, model: Model, tokens: Tensor, observe: Observer, ranks: Ranks
) -> list[SitePruned]:
    return prune_blocks(
        model.module,
        model.adapter,
        prepared.plan,
        tokens,
        prepared.method.load(),
        **vars(prepared.mode),
        ranks=ranks,
        observe=telling(observe, prepared.registry.site_pruned),
    )


def _verify_saved(prepared: Prepared, directory: Path) -> None:
    """Open what was written as anybody would, and hold it against the plan."""
    shell = prepared.shell
    source = replace(shell.source, location=str(directory), gguf=None)
    saved = load(skeleton(source, prepared.registry, shell.spec.name))
    if failed := failures(verify(saved.module, shell.adapter, prepared.plan)):
        raise RuntimeError(f"{failed[0].name} as written: {failed[0].detail}")

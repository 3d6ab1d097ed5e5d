"""A whole run, from references to a directory on disk; what ``apt-prune prune`` does."""

import gc
import json
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.allocate import UNIFORM, allocated, check_allocation
from apt.card import write_card
from apt.checkpoint import keep_side_files, save_model
from apt.copies import copied_size, links_outside
from apt.errors import AptError, first_line
from apt.events import Observer, SitePruned, telling
from apt.hub import Hub
from apt.limits import (
    check_activations,
    check_amount,
    check_dtype,
    check_seed,
    check_shard_size,
    check_solver,
    whole_number,
)
from apt.machine import check_tokens, choose_device, read_dtype
from apt.mode import Mode, choose_mode, choose_own_samples
from apt.models import Model, fingerprint, load, load_tokenizer, skeleton
from apt.outputs import check_output, check_space
from apt.pipeline import prune_blocks
from apt.plain import plain
from apt.plan import Plan, Selection, make_plan
from apt.plugins import Registry
from apt.ranks import Ranks
from apt.report import Report, differences, portable, read_report
from apt.rounding import check_rounding
from apt.samples import mixed
from apt.self_calibration import own_text, writes
from apt.solver import Pattern, SolverOptions, Unstructured
from apt.source import Source, find
from apt.specials import bos_of, special_ids
from apt.specs import MethodSpec
from apt.stored import Stored, find_stored, local_directory
from apt.text import calibration_tokens, digest, documents, evaluation_tokens
from apt.verify import failures, verify
from apt.workplace import resumable, whole_directory, writing

# Options that change no byte of a result, or follow from others and the tokenizer.
_HOW = ("overwrite", "resume", "stream", "activations", "replaced")


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
    max_shard_size: str | None = None
    also: tuple[str, ...] = ()
    stream: bool = False
    resume: bool = False
    activations: str = "memory"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    bos: bool = True
    hub: Hub = field(default_factory=Hub)
    selection: Selection = field(default_factory=Selection)
    solver: SolverOptions = field(default_factory=SolverOptions)

    def record(self) -> dict[str, Any]:
        """The options as plain values, for the report."""
        selection = {
            "only": self.selection.only,
            "skip": self.selection.skip,
            "overrides": {glob: str(pattern) for glob, pattern in self.selection.overrides},
        }
        apart = ("selection", "solver", "hub")  # the hub's token is nobody's business
        plain = {k: v for k, v in vars(self).items() if k not in apart}
        paths = ("model", "calibration", "evaluation", "tokenizer")
        return {
            **plain,
            **{name: portable(plain[name]) if plain[name] else None for name in paths},
            "revision": self.hub.revision,
            "pattern": str(self.pattern),
            "per": getattr(self.pattern, "per", None),
            "output": self.output.name,
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
    source = find(
        options.model, registry, trust_remote_code=options.trust_remote_code, hub=options.hub
    )
    _check_output(options, source, notice)
    shell = skeleton(source, registry, options.adapter)
    plan = make_plan(
        shell.module, shell.adapter, options.pattern, options.selection, method.per, options.also
    )
    if shell.config.model_type not in shell.spec.model_types:
        notice(f"adapter {shell.spec.name}: {plan.outline()}")
    check_rounding(plan, notice)
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
    device = choose_device(options.device)
    _check_memory(options, shell, device)
    return Prepared(options, registry, shell, plan, method, mode, device)


def _check_memory(options: RunOptions, shell: Model, device: str) -> None:
    """Raise where the samples alone, with one stream of their activations, fit into no memory."""
    held = 0 if options.activations == "disk" else shell.config.hidden_size * shell.dtype.itemsize
    samples = options.samples + (options.own_samples or 0)
    ranks = whole_number("WORLD_SIZE", 1, least=1)
    check_tokens(samples, options.seqlen, torch.long.itemsize + held, device, ranks)


def _check_output(options: RunOptions, source: Source, notice: Callable[[str], None]) -> None:
    """Check where the output lies, and say what it replaces."""
    if options.resume and (resumable(options.output) or read_report(options.output)):
        return
    given = (options.calibration, options.evaluation, options.tokenizer)
    texts = [path for name in given if name and (path := Path(name).expanduser()).exists()]
    inputs = [*source.files(), *texts]
    for link in [] if source.gguf else links_outside(Path(source.location)):
        notice(f"left out: {link} is a link to a file outside the checkpoint")
    if lost := check_output(options.output, options.overwrite, inputs):
        notice(f"replaces {lost}")


def already_complete(prepared: Prepared) -> bool:
    """Whether ``--resume`` is asked for where an earlier run of the same options was finished.

    Raises:
        AptError: the output is that of another run.
    """
    options = prepared.options
    if not options.resume or resumable(options.output):
        return False
    if (report := read_report(options.output)) is None:
        return False
    now = json.loads(json.dumps(plain(options.record() | prepared.mode.record())))
    other = sorted(differences(report["options"], now))
    if other := [key for key in other if key.partition(".")[0] not in _HOW]:
        raise AptError(
            f"{options.output} is the result of another run: {', '.join(other)} differ",
            "choose another --output, or leave out --resume and pass --overwrite",
        )
    return True


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
    check_amount(options.samples, options.seqlen, options.own_samples)
    check_seed(options.seed)
    check_solver(solver.damping, solver.block_size, solver.effort)
    check_dtype(options.dtype)
    check_shard_size(options.max_shard_size)
    check_activations(options.activations, streamed=options.stream)


def _check_heeded(options: RunOptions, method: MethodSpec, registry: Registry) -> None:
    """Refuse options that the method would not look at."""
    known = registry.methods.specs.values()
    if options.solver.effort != "default" and not method.efforts:
        others = ", ".join(spec.name for spec in known if spec.efforts)
        raise AptError(f"{method.name} knows no --effort", f"these do: {others}")
    if options.solver.block_size is not None and not method.blocks:
        others = ", ".join(spec.name for spec in known if spec.blocks)
        raise AptError(f"{method.name} knows no --block-size", f"these do: {others}")


def capped(seqlen: int, model: Model, notice: Callable[[str], None]) -> int:
    """``seqlen``, cut to the positions that the model has.

    Raises:
        AptError: it has fewer than two.
    """
    positions = model.adapter.positions(model.config)
    if positions is not None and positions < 2:
        raise AptError(
            f"{model.source.reference} has {positions} positions, and a sample needs 2 at least",
            "is its config.json damaged?",
        )
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
    stored = find_stored(prepared.shell) if options.dtype == "auto" else None
    check_space(options.output, _bytes(prepared, stored))
    place = whole_directory(options.output, options.overwrite) if ranks.first else nullcontext()
    with place as work:
        status("reading text")
        tokenizer = load_tokenizer(prepared.shell.source, options.tokenizer)
        prepared = sparing(prepared, tokenizer)
        tokens, held_out = texts(prepared, tokenizer)
        held_out = held_out if ranks.first else None
        status("loading the model")
        dtype = stored.dtype(prepared.shell, prepared.plan) if stored else None
        model = load(prepared.shell, read_dtype(options.dtype) or dtype, prepared.device)
        stored = stored if stored and _copied(stored, model) else None
        report = _pruned(prepared, model, tokenizer, tokens, held_out, observe, status, ranks)
        if work is None:
            return report
        status("saving and verifying")
        with writing(options.output):
            _save(prepared, model, stored, tokenizer, work.out)
        del model
        gc.collect()
        saved = _verified(prepared, work.out, read_dtype(options.dtype) or dtype)
        report = replace(report, seconds=time.perf_counter() - started)
        _record(report, work.out, prepared)
    if held_out is not None:
        report = _measured_after(prepared, saved, held_out, report, started, status)
    return report


def _pruned(
    prepared: Prepared,
    model: Model,
    tokenizer: Any,
    tokens: Tensor,
    held_out: Tensor | None,
    observe: Observer,
    status: Callable[[str], None],
    ranks: Ranks,
) -> Report:
    """Prune a model that is loaded, and measure it before where there is text for that."""
    options, bos = prepared.options, chosen_bos(prepared.options, tokenizer)
    for given in (tokens, held_out):
        if given is not None:
            check_vocabulary(given, model.module, model.source.reference)
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
    scores = scored(prepared, held_out, scores)
    return replace(report, sites=sites, scores=scores, ranks=ranks.gather(ranks.work))


def _copied(stored: Stored, model: Model) -> bool:
    """Whether the model's blocks are what is stored, so that a copy of that can be written over."""
    names = [
        f"{name}.{path}"
        for name, block in model.adapter.blocks(model.module)
        for path, _ in block.named_parameters()
    ]
    return stored.holds(model.module, names)


def _save(
    prepared: Prepared, model: Model, stored: Stored | None, tokenizer: Any, directory: Path
) -> None:
    """Write a pruned model: as a copy of its checkpoint where that is possible."""
    largest = prepared.options.max_shard_size
    if stored is not None:
        stored.copy(directory, tokenizer if prepared.options.tokenizer else None, largest)
        stored.write(model.module, prepared.plan, directory)
        return
    save_model(model.module, tokenizer, directory, model.checkpoint, largest)
    if not model.source.gguf:
        keep_side_files(local_directory(model), directory)


def _measured_after(
    prepared: Prepared,
    saved: Model,
    held_out: Tensor,
    report: Report,
    started: float,
    status: Callable[[str], None],
) -> Report:
    """Measure the model as it was written, which is in its place, and complete the report.

    Raises:
        Unmeasured: a measure failed.
    """
    problem = None
    try:
        with saved.adapter.running(saved.module):
            after = measure(prepared, saved.module, held_out, "after", status)
        report = replace(report, scores=report.scores | {"after": after})
    except Exception as error:  # a measure that fails must not lose what it measures
        problem = Unmeasured(prepared.options.output, error)
        report = replace(report, problems=[str(problem)])
    report = replace(report, seconds=time.perf_counter() - started)
    _record(report, prepared.options.output, prepared)
    if problem is not None:
        raise problem
    return report


def _record(report: Report, directory: Path, prepared: Prepared) -> None:
    """Write the model card and the report."""
    source = prepared.shell.source
    with writing(prepared.options.output):
        write_card(directory, report, None if source.gguf else local_directory(prepared.shell))
        report.write(directory)


class Unmeasured(AptError):
    """A pruned model is written and verified, but a measure of it failed."""

    def __init__(self, output: Path, error: Exception) -> None:
        what = f"{type(error).__name__}: {first_line(error)}"
        super().__init__(
            f"{output} is written and verified, but measuring it failed: {what}",
            f"measure it with: apt-prune eval {output}",
        )
        self.__cause__ = error


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
            "reference": portable(options.model),
            "type": shell.config.model_type,
            "adapter": shell.spec.name,
            "sha256": sha256,
        },
        {
            "source": portable(options.calibration),
            "own_samples": options.own_samples,
            "bos": bos,
            "shape": list(tokens.shape),
            "sha256": digest(tokens),
        },
        [],
        [site.name for site in prepared.plan.sites if site.pattern is None],
        0.0,
    )


def _bytes(prepared: Prepared, stored: Stored | None) -> int:
    """How large the output will be on disk."""
    shell = prepared.shell
    if stored is not None:
        return copied_size(stored.directory, stored.shards)
    dtype = read_dtype(prepared.options.dtype) or shell.dtype
    return sum(parameter.numel() for parameter in shell.module.parameters()) * dtype.itemsize


def texts(prepared: Prepared, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """The tokens to calibrate on that are given, and those to measure on if any are asked for."""
    options, registry = prepared.options, prepared.registry
    seqlen, bos = options.seqlen, chosen_bos(options, tokenizer)
    token = options.hub.token
    found: Iterable[str] = ()
    if options.samples:
        found = documents(options.calibration, "calibration", registry, token)
    tokens = calibration_tokens(
        tokenizer, found, options.samples, seqlen, options.seed, options.calibration, bos
    )
    if options.evaluation is None:
        return tokens, None
    found = documents(options.evaluation, "evaluation", registry, token)
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
    source = portable(str(prepared.options.evaluation))
    return {"source": source, "shape": list(held_out.shape), **found}


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


def _verified(prepared: Prepared, directory: Path, dtype: torch.dtype | None) -> Model:
    """Open what was written as anybody would, and hold it against the plan."""
    shell = prepared.shell
    source = replace(shell.source, location=str(directory), gguf=None)
    saved = load(skeleton(source, prepared.registry, shell.spec.name), dtype, prepared.device)
    if failed := failures(verify(saved.module, shell.adapter, prepared.plan)):
        raise RuntimeError(f"{failed[0].name} as written: {failed[0].detail}")
    return saved

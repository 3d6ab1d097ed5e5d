"""The functions for programs: pruning and training of a model in memory, without an output."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from torch import Tensor, nn

from apt.adapter import Adapter, Samples
from apt.adapter.wrapped import check_in_memory
from apt.arguments import checked
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.checkpoints.smaller import smaller
from apt.distributed.ranks import Ranks
from apt.engine.caller_model import CallerModel
from apt.engine.pruning_plan import sparse_pruning
from apt.engine.recover_task import check_dense, check_recovery
from apt.engine.shrink_plan import Choice, smaller_pruning
from apt.errors import AptError, name_of
from apt.events import Observer, TrainingObserver
from apt.files.journal import Journal, Line
from apt.modes import default_modes
from apt.options import (
    Activations,
    PruneOptions,
    PruneRun,
    RecoverOptions,
    ShrinkOptions,
    ShrinkRun,
    check_seed,
    check_windows,
)
from apt.output.report import Report
from apt.planning.allocation import Allocation
from apt.planning.plan import Selection, read_pattern
from apt.plugin.documents import Document
from apt.plugin.registry import registry
from apt.plugin.specs import RecoverySpec
from apt.pruning.layer import Method
from apt.recovery.job import RecoveryJob
from apt.recovery.norm_tuning import NormTuning
from apt.recovery.record import Training
from apt.recovery.recover import forget, recover_model
from apt.recovery.trainable import Recovery
from apt.shrinking.same_function import check_same_function
from apt.solver import Pattern
from apt.text import datasets
from apt.text.datasets import digest
from apt.text.mixes import mixed_samples
from apt.text.special_tokens import bos_of, check_tokenizer

M = TypeVar("M", bound=nn.Module)


def _ignore(line: str) -> None:
    """Ignore a notice."""


class PruneArguments(TypedDict, total=False):
    """The keyword arguments of `prune`."""

    pattern: Pattern | str | float
    adapter: str | Adapter | None
    method: str | Method | None
    selection: Selection | None
    options: PruneOptions | None
    allocation: str | Allocation | None
    also: Sequence[str]
    other_tokens: Tensor | None
    tokenizer: Any
    seed: int
    activations: Activations
    ranks: Ranks | None
    observe: Observer


@default_modes()  # in inference mode a copy would be of inference tensors
@checked
def prune_copy(
    model: M, tokens: Tensor | Samples, **arguments: Unpack[PruneArguments]
) -> tuple[M, Report]:
    """Prune a copy of a model; the model itself does not change.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen), or other samples.
        arguments: the keyword arguments of `prune`.

    Returns:
        The pruned copy, and the record of the run.
    """
    pruned = copy.deepcopy(model)
    return pruned, prune(pruned, tokens, **arguments)


@default_modes()
@checked
def prune(
    model: nn.Module,
    tokens: Tensor | Samples,
    *,
    pattern: Pattern | str | float,
    adapter: str | Adapter | None = None,
    method: str | Method | None = None,
    selection: Selection | None = None,
    options: PruneOptions | None = None,
    allocation: str | Allocation | None = None,
    also: Sequence[str] = (),
    other_tokens: Tensor | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    activations: Activations = "memory",
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> Report:
    """Prune a model of transformers in place.

    A run that ends early leaves a model that is partly pruned (embedding.md, "Progress and
    cancellation"). Use `prune_copy` to keep the original model.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen), see `apt.calibration_tokens`; or
            `apt.Samples` for a model that does not read windows of text.
        pattern: ``"2:4"``, ``"0.5"`` or 0.5, ``"auto:8@0.5"`` for n:8 with an n of its own for each
            site, or a pattern of `apt.solver`.
        adapter: an adapter or its name; by default the one that serves the model's type.
        method: an `apt.extending.Method` or its name; by default the most accurate one.
        selection: the sites to prune, and those with other patterns; by default all sites.
        options: the options that the weights depend on.
        allocation: the distribution of an unstructured sparsity over the sites: an
            `apt.extending.Allocation` or its name. By default ``"auto"`` for mixed n:m and in
            an error-aware run of the default method, unless the pattern has a ``per``; otherwise
            every site has the same sparsity.
        also: kinds of parameters to prune beside the Linears, by their names in the adapter.
        other_tokens: windows (windows, seqlen) of the calibration text that are not in ``tokens``,
            see `apt.other_tokens`. With them, the default effort trains the norms and biases at
            the end, as ``apt-prune prune`` does, which lowers the error. At most as many windows as
            samples are used; where there are fewer, samples are added. None trains norms and biases
            only if ``options.norm_epochs`` says so, on ``tokens``.
        tokenizer: the model's tokenizer, for the special tokens; by default its config has them.
        seed: the seed for the text that the model generates.
        activations: the place of the calibration activations: ``"memory"`` (with the model) or
            ``"cpu"`` (beside a GPU).
        ranks: the processes that prune together (distributed.md, "From a program"). None prunes in
            this process alone, even if there is a process group.
        observe: called with every event of `apt.events`. An exception that it raises ends the run.

    Returns:
        The record of the run; ``report.sites`` has one entry for each pruned site.

    Raises:
        AptError: an option is unknown, out of range or not used by the method, the pattern does not
            fit or prunes nothing, or the model cannot be pruned.
    """
    store = CallerModel(model, tokens, adapter, activations, ranks, observe)
    pattern, selection = read_pattern(pattern), selection or Selection()
    options = options or PruneOptions()
    options.check()
    check_seed(seed)
    of_tokens = {"samples": len(tokens), "seqlen": tokens.shape[1]}
    norm_epochs = (options.norm_epochs or 0) if other_tokens is None else options.norm_epochs
    run = PruneRun(
        **vars(options) | of_tokens
        | {"norm_epochs": norm_epochs, "seed": seed, "also": tuple(also)}
    )  # fmt: skip
    spec, job = sparse_pruning(store.opened, run, pattern, selection, method, allocation, _ignore)
    record = {
        "pattern": str(pattern), "per": job.plan.per, "method": spec.name,
        "allocation": job.allocation_name, "also": list(also), "seed": seed,
        "activations": activations, "norm_epochs": job.norms.epochs if job.norms else 0,
        **selection.record(),
    }  # fmt: skip
    return store.prune(tokens, job, tokenizer, record, options.compute, other_tokens)[1]


@default_modes()  # in inference mode a copy would be of inference tensors
@checked
def shrink(
    model: nn.Module,
    tokens: Tensor | Samples,
    *,
    size: ShrinkOptions | None = None,
    adapter: str | Adapter | None = None,
    method: str | Choice | None = None,
    options: PruneOptions | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    activations: Activations = "memory",
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> tuple[Any, Report]:
    """Make a smaller dense model of a model of transformers.

    The given model does not change. A copy of it is needed during the run.

    Args:
        model: the model.
        tokens: calibration token ids (samples, seqlen), or other samples, without padding.
        size: the options of the smaller model; by default 75 % of the parameters of the blocks.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.
        method: the name of a choice of groups, or of blocks; or a function: an
            `apt.solver.GroupChoice`, an `apt.extending.ExpertChoice`, an
            `apt.extending.GroupScores`, or, where only blocks are dropped, an
            `apt.extending.BlockChoice`.
        options: the options that the weights depend on, without the options of sparse models such
            as ``row_importance``.
        tokenizer, seed, activations, ranks, observe: as in `apt.prune`.

    Returns:
        The smaller model, of the same class, and the record of the run. Its ``structure`` says what
        the model keeps.

    Raises:
        AptError: no smaller model meets the options, an option is out of range or not used by the
            method, or the model cannot be pruned.
    """
    store = CallerModel(model, tokens, adapter, activations, ranks, observe)
    size, options = size or ShrinkOptions(), options or PruneOptions()
    size.check()
    options.check()
    check_seed(seed)
    run = ShrinkRun(**vars(size) | {"samples": len(tokens), "seed": seed, "device": store.device})
    run, spec, job = smaller_pruning(store.opened, run, options, method, _ignore)
    record = {"shrink": run.size_record(), "method": spec.name, "seed": seed}
    record |= {"activations": activations}
    store.model = copy.deepcopy(model)
    plan, report = store.prune(tokens, job, tokenizer, record, options.compute)
    small = smaller(store.model, store.adapter, plan)
    check_same_function(store.model, small, store.adapter, plan, tokens, store.precision.compute)
    return small, report


@default_modes()
@checked
def recover(
    model: nn.Module,
    tokens: Tensor | Samples,
    *,
    kind: str | Recovery = "distill",
    options: RecoverOptions | None = None,
    dense: nn.Module | None = None,
    adapter: str | Adapter | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    resume: bool = False,
    observe: TrainingObserver = lambda event: None,
) -> Training:
    """Train the kept weights of a pruned model, in place; every zero stays zero.

    Args:
        model: the pruned model, a model of transformers.
        tokens: samples of text (samples, seqlen), or `apt.Samples` for a model that does not read
            windows of text, without padding. The last ones are held back to measure the loss.
        kind: the name of a kind of recovery, or a function, which is trained with a rate of 1e-4.
        options: the options of the training.
        dense: the dense model, for the kinds ``distill`` and ``norms``, and for all kinds with
            `apt.Samples`; it is not changed.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.
        seed: the seed for the order of the samples and for new adapters.
        folder: a folder for checkpoints; by default a temporary one. Without ``resume``, the
            checkpoints of an earlier training there are deleted.
        resume: True to continue from the last checkpoint in ``folder``, with the same arguments.
        observe: called with the events of the training.

    Returns:
        The record of the training.

    Raises:
        AptError: the model has no zeros and the kind needs zeros, an option is out of range or not
            used by the kind, ``folder`` has another training, or the training did not lower the
            loss on the samples held back. The model then has the weights before the training.
    """
    if resume and folder is None:
        raise AptError(
            "there is no training to resume without its folder",
            "give the folder of the interrupted training",
            ("resume",),
        )
    options, spec, function = options or RecoverOptions(), *_recovery(kind)
    options.check()
    check_seed(seed)
    store, windows = CallerModel(model, tokens, adapter), isinstance(tokens, Tensor)
    spec = spec if windows else spec.for_samples()
    check_recovery(options, spec, registry(), type(model), windows=windows)
    if spec.zeros and not sparsity_of(masks_of(model, store.adapter)):
        raise AptError("the model has no zeros", "prune it first, or use the kind layers")
    if spec.teacher and dense is None:
        raise AptError(f"recovery {spec.name} needs the dense model", "give it", ("dense",))
    if spec.teacher and dense is not None:
        check_in_memory(dense)
        check_dense({"the dense model": dense, "the pruned one": model}, options, store.registry)
    inputs = {"kind": spec.name, "seed": seed, "options": options.record()}
    inputs |= {"model": store.weights, "tokens": digest(tokens)}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) if folder is None else Path(folder)
        job = RecoveryJob(
            store.adapter, spec, function, options, path,
            None if dense is None else lambda: dense, seed, store.device,
            journal=_journal(path, inputs, resume=resume), observe=observe,
        )  # fmt: skip
        return recover_model(model, tokens, job)[0]


def _journal(folder: Path, inputs: Line, *, resume: bool) -> Journal:
    """The journal of the training in a folder, which is made if it is missing.

    Without ``resume``, an earlier training in it is deleted.

    Raises:
        AptError: the training to be resumed has other inputs, or is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "choose another folder, or begin anew with resume=False"
    journal = Journal(folder / "journal.jsonl", f"the training in {folder}", remedy)
    if resume:
        journal.read()
    if journal.lines:
        journal.check(inputs)
        return journal
    if resume and (folder / "training.json").exists():
        raise AptError(f"{folder} has a training of an earlier version of APT", remedy)
    forget(folder)
    journal.begin(inputs)
    return journal


def _recovery(kind: str | Recovery) -> tuple[RecoverySpec, Recovery]:
    """A kind of recovery and its spec."""
    if isinstance(kind, str):
        spec = registry().recoveries.get(kind)
        return spec, spec.load()
    name = name_of("kind", kind)
    return RecoverySpec(name, "a function of the caller", ""), kind


@default_modes()
@checked
def calibration_tokens(
    tokenizer: Any,
    source: str = "builtin",
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    bos: bool = True,
) -> Tensor:
    """Calibration samples from a data source, the same samples as in ``apt-prune prune``.

    Args:
        tokenizer: the model's tokenizer. If it begins each text with a special token, each sample
            begins with it.
        source: ``builtin``, the name of a data set, a .txt, .jsonl or .parquet file, or a mix such
            as ``chat=0.5,code``.
        samples: the number of samples. They do not overlap.
        seqlen: the number of tokens of a sample.
        seed: the seed for the choice of samples.
        bos: False to begin no sample with the special token.

    Returns:
        Token ids (samples, seqlen).

    Raises:
        AptError: an amount is out of range, or the source cannot be read or has too little text.
    """
    draw = partial(datasets.calibration_tokens, seqlen=seqlen, seed=seed)
    return _drawn(tokenizer, source, samples, seqlen, draw, bos=bos)


@default_modes()
@checked
def other_tokens(
    tokenizer: Any,
    source: str = "builtin",
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    bos: bool = True,
) -> Tensor:
    """Windows that `calibration_tokens` of the same arguments does not draw.

    They are the ``other_tokens`` of `prune`, the same as in ``apt-prune prune``.

    Args:
        tokenizer, source, samples, seqlen, seed, bos: as in `calibration_tokens`.

    Returns:
        Token ids (windows, seqlen): as many windows as samples, but at most 32,768 tokens; fewer
        or none if the text is short.

    Raises:
        AptError: as in `calibration_tokens`.
    """
    share = NormTuning(1).share(samples, seqlen)
    draw = partial(datasets.held_back_tokens, seqlen=seqlen, seed=seed, share=share)
    return _drawn(tokenizer, source, samples, seqlen, draw, bos=bos)


def _drawn(
    tokenizer: Any,
    source: str,
    samples: int,
    seqlen: int,
    draw: Callable[..., Tensor],
    *,
    bos: bool,
) -> Tensor:
    """Windows (windows, seqlen) of a data source or a mix."""
    check_windows(samples, seqlen)
    check_tokenizer(tokenizer)
    first = bos_of(tokenizer) if bos else None

    def drawn(
        tokenizer: Any, texts: Iterable[Document], count: int, name: str, bos: int | None
    ) -> Tensor:
        return draw(tokenizer, texts, count, source=name, bos=bos)

    return mixed_samples(source, tokenizer, registry(), samples, first, drawn).tokens


@default_modes()
@checked
def evaluation_tokens(
    tokenizer: Any,
    source: str = "builtin",
    *,
    samples: int | None = None,
    seqlen: int = 2048,
    bos: bool = True,
) -> Tensor:
    """Windows of a data source to measure on, the same windows as in ``apt-prune eval``.

    Args:
        tokenizer: the model's tokenizer, as in `calibration_tokens`.
        source: ``builtin``, the name of a data set, or a .txt, .jsonl or .parquet file.
        samples: the number of windows; None for all of the text.
        seqlen: the number of tokens of a window.
        bos: False to begin no window with the special token.

    Returns:
        Token ids (windows, seqlen).

    Raises:
        AptError: an amount is out of range, or the source cannot be read or has too little text.
    """
    check_windows(samples, seqlen)
    check_tokenizer(tokenizer)
    texts = datasets.documents(source, "evaluation", registry())
    first = bos_of(tokenizer) if bos else None
    return datasets.evaluation_tokens(tokenizer, texts, samples, seqlen, source, first)

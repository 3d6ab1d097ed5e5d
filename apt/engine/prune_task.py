"""The task of ``apt-prune prune`` and ``shrink``."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from apt.adapter.text_config import hidden_size
from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import check_writable
from apt.checkpoints.stored import open_stored
from apt.checkpoints.towers import towers_of
from apt.distributed.launch import whole_number
from apt.distributed.ranks import Ranks
from apt.engine.estimate import activations_on_disk
from apt.engine.export import check_exportable
from apt.engine.in_place import check_slices, without_rounding
from apt.engine.kept_scores import KeptScores
from apt.engine.machine import check_tokens, choose_device, read_dtype
from apt.engine.opening import RunRequest, pattern_of, selection_of
from apt.engine.packing import check_packed_place
from apt.engine.prepare import Notice, capped, input_paths, open_model, with_compute
from apt.engine.prune_model import Pruning, decide, prune_model
from apt.engine.pruning_plan import sparse_pruning
from apt.engine.recipes import record
from apt.engine.recover_task import RecoverTask
from apt.engine.reports import calibration_of, in_order, model_entry, report_beside
from apt.engine.samples import metrics_for, read_samples
from apt.engine.shrink_plan import smaller_pruning
from apt.engine.store import ModelStore
from apt.engine.task import WITHOUT_EFFECT, Task, TaskResult
from apt.engine.text import Text, other_windows, read_text
from apt.engine.timed_run import fit_to_time, training_of
from apt.errors import AptError, NotStoredError, unknown_name
from apt.files.journal import Line, journal_beside
from apt.locations.paths import portable
from apt.locations.text_sources import portable_sources
from apt.options import FitRun, PruneRun, ShrinkRun
from apt.output.report import Report
from apt.patterns import Pattern
from apt.planning.plan import Plan
from apt.planning.structure import Structure, make_structured_plan
from apt.plugin.documents import Document
from apt.plugin.registry import Registry
from apt.plugin.specs import UNIFORM, MethodSpec
from apt.recovery.recover import NotRecoveredError
from apt.text.datasets import calibration_tokens, digest
from apt.text.self_generated import beside_given

_ORDER = (
    "model", "pattern", "output", "adapter", "method", "calibration", "evaluation", "metrics",
    "allocation", "samples", "seqlen", "seed", "device", "dtype", "compute", "overwrite",
    "max_shard_size", "export_type", "also", "save_masks", "stream", "resume", "activations",
    "tokenizer", "trust_remote_code", "bos", "revision", "only", "skip", "overrides", "shrink",
    "per",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CalibratedTask(Task):
    """A task whose loop over blocks solves weights on calibration text.

    Attributes:
        job: the loop over blocks.
        notice: called with a line about a result of the run.
    """

    options: PruneRun | ShrinkRun | FitRun
    job: Pruning
    notice: Notice = field(default=lambda line: None, repr=False, compare=False)

    @property
    def samples(self) -> int:
        """The number of all calibration samples."""
        return self.job.augmentation.samples(self.options.samples, self.options.seqlen)

    def read_text(self, ranks: Ranks) -> Text:
        """The calibration samples, and at most the same number of windows to measure on."""
        options = self.options
        if not self.skeleton.reads.windows:
            return read_samples(
                options, self.skeleton, self.registry, samples=options.samples, windows=None,
                measures=ranks.first,
            )  # fmt: skip

        def draw(
            tokenizer: Any, texts: Iterable[Document], samples: int, source: str, bos: int | None
        ) -> Tensor:
            return calibration_tokens(
                tokenizer, texts, samples, options.seqlen, options.seed, source, bos
            )

        windows = options.samples or self.job.augmentation.own_samples or None
        text = read_text(
            options, self.skeleton, self.registry, draw, samples=options.samples, windows=windows,
            measures=ranks.first,
        )  # fmt: skip
        if ranks.first and text.lacks_chat:
            self.notice(
                f"calibration: {portable_sources(options.calibration)} has no conversations, and "
                f"{portable(options.model)} is a chat model: its tokenizer has a chat template. It "
                "may lose what only conversations use; add some, such as builtin:chat"
            )
        if self.job.norms is not None and options.samples:
            share = self.job.norms.share(options.samples, options.seqlen)
            others = other_windows(options, text, self.skeleton, self.registry, share)
            text = replace(text, others=others)
        return text

    def begin(self, store: ModelStore, text: Text) -> Report:
        """A report with the options, the model and the text."""
        return Report(
            options=self.record(),
            model=self._model_entry(store),
            calibration={
                "source": portable_sources(self.options.calibration),
                **text.source_record,
                "own_samples": self.job.augmentation.own_samples,
                "bos": text.bos,
                **calibration_of(text.tokens),
            },
            earlier=report_beside(self.skeleton.source),
        )

    def _model_entry(self, store: ModelStore) -> dict[str, Any]:
        skeleton = self.skeleton
        entry = model_entry(self.options.model, skeleton.config.model_type, skeleton.spec.name)
        products = store.precision.products(self.device, self.job.recipe.compute)
        return entry | {"sha256": store.weights} | store.precision.record() | products

    def inputs(self, store: ModelStore, text: Text, report: Report) -> Line:
        """All inputs of the result."""
        return {
            "model": report.model,
            "calibration": report.calibration,
            "evaluation": None if text.held_out is None else digest(text.held_out),
            "options": {k: v for k, v in report.options.items() if k not in WITHOUT_EFFECT},
        }

    def finished(
        self, report: Report, scores: dict[str, Any], timeline: dict[str, Any], seconds: float
    ) -> Report:
        """The report with the metrics, the timeline and the time of the run."""
        return replace(report, scores=scores, timeline=timeline).timed(seconds)


@dataclass(frozen=True, kw_only=True)
class PruneTask(CalibratedTask):
    """The pruning of a model on disk, to a sparse or to a smaller one.

    Attributes:
        training: the distillation in the rest of a given time; None if no time is given.
    """

    options: PruneRun | ShrinkRun
    method: MethodSpec
    training: RecoverTask | None = None
    event = " pruning"

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of a sparse model, with the unit in which it is counted."""
        pattern = pattern_of(self.options) if isinstance(self.options, PruneRun) else None
        return pattern and pattern.counted(self.method.per)

    @property
    def changes_kept_weights(self) -> bool:
        """See `Task`."""
        return self.job.recipe.changes_kept_weights

    def record(self) -> dict[str, Any]:
        """All options with defaults filled in, as values for JSON, for the report."""
        pattern_record: dict[str, Any] = {"per": self.job.plan.per}
        if isinstance(self.options, PruneRun):
            pattern_record |= {"pattern": str(self.pattern)} | selection_of(self.options).record()
            pattern_record |= {"stacks": self.options.stacks} if self.options.stacks else {}
            pattern_record["norm_epochs"] = self.job.norms.epochs if self.job.norms else 0
        settings = record(self.job.recipe, self.job.augmentation, self.job.plan.grid)
        return in_order(self.options.record() | pattern_record | settings, (*_ORDER, *settings))

    def space(self, written: int) -> int:
        """The bytes of the output, and of the temporary files of a streamed run."""
        options, skeleton = self.options, self.skeleton
        if self.training is not None:
            return self.training.space(written)
        if not options.stream:
            return written
        if options.activations == "disk":
            tokens = self.samples * options.seqlen
            aware = self.job.recipe.error_aware
            written += activations_on_disk(skeleton, self.job.plan, tokens, error_aware=aware)
        return written * 2 if self.job.structure else written  # the smaller model and the copy

    def begin(self, store: ModelStore, text: Text) -> Report:
        """A report with the options, the model and the text."""
        options = self.options
        if not (isinstance(options, ShrinkRun) and options.scores_from is not None):
            return super().begin(store, text)
        model, scored = self._model_entry(store), KeptScores.read(options.scores_from)
        scored.check_model(model, stream=options.stream)
        earlier, report = report_beside(self.skeleton.source), scored.report
        return Report(
            self.record(), model, report.calibration, earlier=earlier, routing=report.routing
        )

    def decide(self, store: ModelStore, text: Text) -> tuple[Text, Plan]:
        """The text with generated samples, and the plan with the allocation or the structure."""
        return decide(store, text, self.job)

    def change(
        self, store: ModelStore, text: Text, plan: Plan | None, report: Report
    ) -> TaskResult:
        """Prune the model, and train it if there is time."""
        assert plan is not None
        report = prune_model(store, text, replace(self.job, plan=plan), report)
        if store.ranks.first:
            self._tell_experts(report)
        if self.training is not None:
            report = train_in_time(self.training, store, report, text.own_samples)
        if self.in_place:
            report = replace(report, structure=report.structure | {"rounded": store.rounded})
        save_masks = isinstance(self.options, PruneRun) and self.options.save_masks
        return TaskResult(report, plan, save_masks=save_masks)

    def _tell_experts(self, report: Report) -> None:
        """Say which experts few tokens reached, and which could not be protected."""
        removal, blocks = self.job.recipe.experts, report.structure.get("experts", {})
        few = sum(len(entry.get("underserved", ())) for entry in blocks.values())
        if few:
            by_source = (entry["tokens"] for entry in report.routing.values())
            count = sum(len(next(iter(tokens.values()))) for tokens in by_source if tokens)
            self.notice(
                f"expert tokens: {few} of {count} experts got fewer than {removal.tokens} tokens; "
                "they were judged also on tokens that the router came near to sending to them"
            )
        if short := sum(bool(entry.get("unprotected")) for entry in blocks.values()):
            sources = " and ".join(removal.protect)
            self.notice(f"protect: {short} blocks keep fewer experts than {sources} needs")

    def forget(self) -> None:
        """Delete the journal of a search."""
        if self.job.structure is not None:
            self.job.structure.journal.clear()


def train_in_time(
    training: RecoverTask, store: ModelStore, report: Report, own: Tensor | None = None
) -> Report:
    """Train a changed model in the rest of the time, and return the report with the record.

    The time for writing and measuring is estimated as the time of reading and measuring.

    Args:
        training: the training, with the minutes from the opening of the model to the end of the
            run.
        own: text that the dense model generated (samples, seqlen), to train on beside the given.
    """
    assert training.options.minutes is not None
    store.status("reading text")
    text = training.read_text(store.ranks)
    if own is not None:
        text = replace(text, tokens=beside_given(text.windows, own))
    minutes = training.options.minutes - (store.seconds + store.opening) / 60
    minutes = store.ranks.share(minutes)  # by the clock of the first rank, all train or none does
    if minutes <= 0:
        return replace(report, problems=[*report.problems, "no time was left for the training"])
    training = replace(training, options=replace(training.options, minutes=minutes))
    store.status("training", f"training ({training.spec.name})")
    try:
        return training.change(store, text, None, report).report
    except NotRecoveredError as error:
        return replace(report, problems=[*report.problems, error.message])


def prepare_pruning(
    request: RunRequest[PruneRun | ShrinkRun], registry: Registry, notice: Notice, ranks: Ranks
) -> PruneTask:
    """Check a pruning.

    Args:
        ranks: the processes that prune together; the first one chooses the samples for a given
            time.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    started = time.perf_counter()
    options: PruneRun | ShrinkRun = request.options
    texts = [options.calibration, options.evaluation, options.tokenizer]
    if isinstance(options, ShrinkRun) and options.scores_from is not None:
        texts.append(str(options.scores_from))
    skeleton = open_model(request, texts, registry, notice)
    if skeleton.source.tower:
        _check_tower(options, skeleton)
    check_exportable(options, skeleton, registry)
    device, training = choose_device(options.device), None
    skeleton = with_compute(skeleton, options, device, notice)
    if isinstance(options, PruneRun):
        check_packed_place(options, input_paths(skeleton.source, texts))
    make_job: Any = _sparse_job if isinstance(options, PruneRun) else _smaller_job
    seqlen = capped(options.seqlen, skeleton, notice)
    options = replace(options, metrics=metrics_for(skeleton, options, registry))
    if isinstance(options, PruneRun) and options.stacks and not skeleton.source.tower:
        skip = (*options.skip, *_other_stacks(skeleton, options.stacks))
        options = replace(options, skip=skip, stacks=())
    stream, adapter = options.stream or options.resume, skeleton.spec.name
    options = replace(options, stream=stream, adapter=adapter, seqlen=seqlen)
    in_place = skeleton.quantised is not None
    if in_place and isinstance(options, ShrinkRun):
        options = without_rounding(options, notice)
    if isinstance(options, PruneRun) and (minutes := options.minutes) is not None:
        if ranks.first:
            _, method, job = make_job(options, skeleton, lambda line: None)
            options = fit_to_time(options, skeleton, job, method, device, notice)
        options = ranks.share(options)
        taken = (time.perf_counter() - started) / 60
        remaining = replace(options, minutes=max(minutes - taken, 0.0))
        training = training_of(remaining, skeleton, registry, device)
    options, method, job = make_job(options, skeleton, notice)
    if in_place and isinstance(options, ShrinkRun):
        job = check_slices(skeleton, job, options, notice)
    if request.options.method is None:
        from_scores = isinstance(options, ShrinkRun) and options.scores_from
        origin = f"of {from_scores}" if from_scores else "default"
        notice(f"method: {method.name} ({origin})")
    task = PruneTask(
        options=options, registry=registry, skeleton=skeleton, device=device,
        dtype=read_dtype(options.dtype), plan=None if training else _writable_plan(skeleton, job),
        job=job, method=method, training=training, notice=notice,
    )  # fmt: skip
    check_memory(task)
    if options.stream:
        _check_streamable(task)
    return task


def _check_tower(options: PruneRun | ShrinkRun, skeleton: Opened) -> None:
    """Raise for a tower that is not stored as it is, or an option that needs the whole model."""
    tower = skeleton.source.tower
    for name in ("minutes", "export"):
        if getattr(options, name, None):
            message = f"{name} needs the language model, and the run prunes the {tower} tower alone"
            raise AptError(message, "leave it out", (name, "stacks"))
    if options.dtype != "auto":
        message = f"the {tower} tower keeps the dtype of its checkpoint"
        raise AptError(message, "leave out the dtype", ("dtype", "stacks"))
    try:
        open_stored(skeleton)
    except NotStoredError as error:
        message = f"the {tower} tower of {skeleton.source.reference} cannot be pruned"
        raise AptError(f"{message}: {error.message}", "prune another stack", ("stacks",)) from error


def _other_stacks(skeleton: Opened, chosen: Sequence[str]) -> list[str]:
    """A glob for the sites of each stack of a model that is not chosen.

    Raises:
        AptError: the model has no stack of a name.
    """
    stacks = dict(skeleton.adapter.stacks(skeleton.module))
    for name in chosen:
        if name not in stacks:
            known = {**stacks, **towers_of(skeleton.module)}
            raise unknown_name("stack", name, known, f" in {skeleton.source.reference}")
    lists = {
        block.rpartition(".")[0]
        for name, blocks in stacks.items()
        if name not in chosen
        for block, _ in blocks
    }
    return sorted(f"{path}.*" for path in lists)


def _sparse_job(
    options: PruneRun, skeleton: Opened, notice: Notice
) -> tuple[PruneRun, MethodSpec, Pruning]:
    """The pruning to a sparse model."""
    pattern = pattern_of(options)
    assert pattern is not None
    spec, job = sparse_pruning(
        skeleton, options, pattern, selection_of(options), options.method, options.allocation,
        notice,
    )  # fmt: skip
    if skeleton.config.model_type not in skeleton.spec.model_types:
        notice(f"adapter {skeleton.spec.name}: {job.plan.outline()}")
    return replace(options, method=spec.name, allocation=job.allocation_name), spec, job


def _smaller_job(
    options: ShrinkRun, skeleton: Opened, notice: Notice
) -> tuple[ShrinkRun, MethodSpec, Pruning]:
    """The pruning to a smaller model."""
    if skeleton.checkpoint is not None:
        raise AptError(
            f"{skeleton.source.reference} is not in the format of transformers",
            "convert it first with apt-prune convert",
        )
    options, spec, job = smaller_pruning(skeleton, options, options, options.method, notice)
    if options.mode == "search" and job.structure is not None:
        journal = journal_beside(options.directory, "search", "a search")
        job = replace(job, structure=replace(job.structure, journal=journal))
    return replace(options, method=spec.name), spec, job


def _writable_plan(skeleton: Opened, job: Pruning) -> Plan:
    """The plan with all blocks that may be written: blocks to drop may not be chosen yet."""
    if job.structure is None:
        return job.plan
    structure = Structure(job.structure.sizes[0].kept)
    return make_structured_plan(
        skeleton.module,
        skeleton.adapter,
        skeleton.config,
        structure,
        adjusted=job.recipe.error_aware,
    )


def check_memory(task: CalibratedTask) -> None:
    """Raise if the samples and one stream of activations do not fit into memory."""
    options, skeleton = task.options, task.skeleton
    stream_bytes = (
        0
        if getattr(options, "activations", None) == "disk"
        else hidden_size(skeleton.config) * skeleton.runs_in.itemsize
    )
    ranks = whole_number("WORLD_SIZE", 1, least=1)
    samples = task.job.augmentation.written(options.samples)
    token_bytes = torch.long.itemsize + stream_bytes
    check_tokens(samples, options.seqlen, token_bytes, task.device, ranks)


def _check_streamable(task: PruneTask) -> None:
    """Raise if a run cannot be streamed."""
    options, structure = task.options, task.job.structure
    stored = open_stored(task.skeleton)
    if structure is not None:
        assert task.plan is not None
        check_writable(task.skeleton, task.plan, stored.layout)
        structure.check_streamable()
    allocation = getattr(options, "allocation", UNIFORM)
    if not task.registry.allocations.get(allocation).streams:
        raise AptError(
            f"allocation {allocation} needs the whole model in memory",
            "choose another one, or do not stream",
            ("allocation", "stream"),
        )
    if options.dtype != "auto":
        raise AptError(
            "another dtype than the default needs the whole model in memory",
            "leave out the dtype, or do not stream",
            ("dtype", "stream"),
        )

"""The task of ``apt-prune recover``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.adapter.text_config import hidden_size
from apt.checkpoints.architecture import reads_of
from apt.checkpoints.load import load, open_skeleton
from apt.checkpoints.masks import Masks, masks_of, sparsity_of
from apt.checkpoints.opened import Opened
from apt.distributed.ranks import Ranks
from apt.engine.export import check_exportable
from apt.engine.machine import choose_device
from apt.engine.opening import RunRequest, find_source
from apt.engine.prepare import Notice, capped, open_model, with_compute
from apt.engine.reports import continued_report, in_order, report_beside
from apt.engine.samples import metrics_for, read_samples
from apt.engine.store import ModelStore
from apt.engine.task import Task, TaskResult
from apt.engine.text import Text, read_text
from apt.errors import AptError, first_line
from apt.files.journal import Line
from apt.locations.model_source import Source
from apt.options import BATCH, STEPS, RecoverOptions, RecoverRun
from apt.output.report import Report, peak_memory, versions
from apt.planning.plan import Plan, read_pattern
from apt.plugin.documents import Document
from apt.plugin.registry import Registry
from apt.plugin.specs import RecoverySpec
from apt.recovery.job import CHECKPOINT, RecoveryJob
from apt.recovery.recover import DENSE_LOSS, NotRecoveredError, forget, recover_model
from apt.text.datasets import digest, training_tokens
from apt.text.ids import vocabulary_size

_MAX_SAMPLES = 10_000
_MAX_LARGE = 1_000  # images or sounds, which are kept in memory
_MEASURED = 128  # samples to measure on, if they are not windows of text
_ADAPTER = "adapter"
_ORDER = (
    "model", "kind", "dense", "calibration", "evaluation", "metrics", "samples", "seqlen", "seed",
    "save_masks", "save_adapter", "adapter", "tokenizer", "device", "compute", "max_shard_size",
    "export_type", "trust_remote_code", "bos", "revision",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RecoverTask(Task):
    """The training of a pruned model on disk.

    Attributes:
        earlier: the report beside the pruned model; empty if there is none.
        source: the location of the dense model; None if the options or the report name it.
    """

    options: RecoverRun
    spec: RecoverySpec
    earlier: dict[str, Any]
    source: Source | None = None
    resumable = True

    def record(self) -> dict[str, Any]:
        """The options for the report, as values for JSON."""
        batch = self.options.batch or (None if self.options.minutes is not None else BATCH)
        return in_order(self.options.record() | {"batch": batch}, _ORDER)

    def recorded(self, report: Report) -> dict[str, Any]:
        """The options of the training in the report of a finished run."""
        options: dict[str, Any] = report.recovery.get("options", {})
        chosen = self.options.minutes is not None and self.options.batch is None
        return options | {"batch": None} if chosen else options

    def space(self, written: int) -> int:
        """The bytes of the weights in fp32, and of the outputs of the dense model.

        The initial weights and the output are on disk at the same time. If all weights are trained,
        there are also three checkpoints, each with two moments, and with latent values if masks
        move.
        """
        copies = 2 + 3 * (3 + self.options.move_masks) if self.spec.teacher else 4
        weights = sum(p.numel() * 4 for p in self.skeleton.module.parameters())
        return copies * weights + self._teacher_bytes()

    def _teacher_bytes(self) -> int:
        """The bytes of the outputs of the dense model: the top logits and the hidden states.

        It is 0 before the number of samples is known.
        """
        options, hidden = self.options, hidden_size(self.skeleton.config)
        open_ended = options.minutes is not None or options.tokens == "auto"
        if open_ended or not self.spec.teacher:
            return 0
        if not self.skeleton.reads.windows:
            return 0  # the dense model runs beside the trained one
        samples = self._useful_samples()
        return samples * options.seqlen * (6 * options.top + 2 * hidden)

    def read_text(self, ranks: Ranks) -> Text:
        """The samples to train on, and all windows, or a number of samples, to measure on."""
        options = self.options
        count = options.samples or self._useful_samples()
        if not self.skeleton.reads.windows:
            return read_samples(
                options, self.skeleton, self.registry, samples=count,
                windows=min(count, _MEASURED), measures=ranks.first, fewer=True,
            )  # fmt: skip

        def draw(
            tokenizer: Any, texts: Iterable[Document], samples: int, source: str, bos: int | None
        ) -> Tensor:
            return training_tokens(
                tokenizer, texts, samples, options.seqlen, options.seed, source, bos
            )

        return read_text(
            options, self.skeleton, self.registry, draw, samples=count, windows=None,
            measures=ranks.first,
        )  # fmt: skip

    def _useful_samples(self) -> int:
        """The number of samples for the steps, and of the samples that are held back."""
        options, reads = self.options, self.skeleton.reads
        most = _MAX_LARGE if reads.image or reads.sound else _MAX_SAMPLES
        # The lengths of samples that are not windows are not known.
        open_ended = options.tokens == "auto" if reads.windows else options.tokens is not None
        if options.minutes is not None or open_ended:
            return most
        tokens = options.tokens if isinstance(options.tokens, int) else 0
        trained = math.ceil(tokens / options.seqlen) or (
            (options.steps or STEPS) * (options.batch or BATCH)
        )
        return min(most, math.ceil(trained / (1 - options.validation_share)) + 1)

    def dense_model(self) -> nn.Module | None:
        """See `Task`."""
        return None if self.skeleton.reads.windows else _dense_model(self)

    def begin(self, store: ModelStore, text: Text) -> Report:
        """The report of the pruned model.

        Raises:
            AptError: the model is dense, and the kind needs zeros or a smaller model; or the
                adapter is saved, and other software would fill the zeros with it.
        """
        sparse = sparsity_of(masks_of(store.model, self.skeleton.adapter)) > 0.01
        smaller = self.earlier.get("structure")
        if self.options.save_adapter and sparse and not self.spec.zeros:
            raise AptError(
                f"{self.options.model} has zeros, and peft would fill them with an adapter of "
                f"{self.spec.name}",
                "use the kind spp, or do not save the adapter",
                ("save_adapter",),
            )
        if sparse or smaller or self.spec.dense:
            location = Path(self.skeleton.source.location)
            return continued_report(self.earlier, self.skeleton, location)
        raise AptError(
            f"{self.options.model} has no zeros, and no report that says how it became smaller",
            "recover a model that was pruned; for dropped blocks use the kind layers",
            ("kind",),
        )

    def inputs(self, store: ModelStore, text: Text, report: Report) -> Line:
        """All inputs of the result."""
        return {
            "options": self.record(),
            "model": store.weights,
            "text": digest(text.tokens),
            **store.precision.record(),
        }

    def change(
        self, store: ModelStore, text: Text, plan: Plan | None, report: Report
    ) -> TaskResult:
        """Train the model."""
        options, skeleton = self.options, self.skeleton
        dense = partial(_dense_model, self) if self.spec.teacher else None
        adapter = store.folder / _ADAPTER if options.save_adapter else None
        job = RecoveryJob(
            skeleton.adapter, self.spec, self.spec.load(), options, store.folder, dense,
            options.seed, self.device, store.ranks, store.journal, store.observe, store.status,
            adapter,
        )  # fmt: skip
        if store.ranks.first and not store.journal.values(CHECKPOINT):
            forget(store.folder)
        store.restore()  # a training begins with the weights as they are stored
        try:
            training, masks = recover_model(store.model, text.tokens, job)
        except NotRecoveredError:
            store.journal.clear()  # nothing to resume from
            raise
        record = {
            "options": self.record() | {"batch": training.batch},
            "text": {"shape": list(text.tokens.shape), "sha256": digest(text.tokens)},
            "training": training.record(),
            "sparsity": sparsity_of(masks),
            "zeros": sum(int(mask.sum()) for mask in masks.values()),
            **_size_record(skeleton, self.earlier, masks),
            DENSE_LOSS: next(iter(store.journal.values(DENSE_LOSS)), None),
            "scores": {},
            "seconds": 0.0,
            "peak_memory_bytes": {},
            "ranks": store.ranks.size,
            **store.precision.record(),
            "versions": versions(),
            "earlier": self.earlier.get("recovery", {}),
        }
        save_masks = options.save_masks and bool(masks)
        report = replace(report, recovery=record)
        return TaskResult(report, masks=masks, save_masks=save_masks, adapter=adapter)

    def finished(
        self, report: Report, scores: dict[str, Any], timeline: dict[str, Any], seconds: float
    ) -> Report:
        """The report with the metrics and the times of the run."""
        measured = {
            "scores": scores,
            "timeline": timeline,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(),
        }
        return replace(report, recovery=report.recovery | measured)


def _size_record(skeleton: Opened, earlier: dict[str, Any], masks: Masks) -> dict[str, Any]:
    """The number of parameters before the pruning, and the share of pruned parameters."""
    parameters = sum(p.numel() for p in skeleton.module.parameters())
    share = (earlier.get("structure") or {}).get("share") or 1.0
    blocks = sum(
        p.numel() for _, b in skeleton.adapter.blocks(skeleton.module) for p in b.parameters()
    )
    before = round(parameters + blocks * (1 / share - 1))
    zeros = sum(int(mask.sum()) for mask in masks.values())
    return {"parameters_before": before, "rate": (before - parameters + zeros) / before}


def prepare_recovery(
    request: RunRequest[RecoverRun], registry: Registry, notice: Notice
) -> RecoverTask:
    """Check the options of a recovery.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    options = request.options
    options.check()
    spec = registry.recoveries.get(options.kind or "distill")
    texts = (options.calibration, options.evaluation, options.tokenizer, options.dense)
    skeleton = open_model(request, texts, registry, notice)
    if not skeleton.reads.windows:
        spec = spec.for_samples()
    check_recovery(options, spec, registry, type(skeleton.module), windows=skeleton.reads.windows)
    options = replace(options, metrics=metrics_for(skeleton, options, registry))
    check_exportable(options, skeleton, registry)
    device = choose_device(options.device)
    skeleton = with_compute(skeleton, options, device, notice)
    earlier = _pruning_report(skeleton.source)
    if spec.zeros and earlier.get("structure"):
        raise AptError(
            f"recovery {spec.name} serves models with zeros, and {options.model} is a smaller one",
            "use the kind layers, distill or lora",
            ("kind",),
        )
    if options.move_masks and not earlier.get("structure"):
        _check_movable(earlier)
    seqlen = capped(options.seqlen, skeleton, notice)
    line = f"kind: {spec.name}" + ("" if options.kind else " (default)")
    options = replace(options, kind=spec.name, adapter=skeleton.spec.name, seqlen=seqlen)
    task = RecoverTask(
        options=options, registry=registry, skeleton=skeleton, device=device,
        spec=spec, earlier=earlier,
    )  # fmt: skip
    if spec.teacher:
        _dense_skeleton(task)
    notice(line)
    return task


def _check_movable(earlier: Mapping[str, Any]) -> None:
    """Raise if a pattern of a pruned model does not let its zeros move."""
    for text in dict.fromkeys(str(site.get("pattern")) for site in earlier.get("sites") or ()):
        if not read_pattern(text).movable:
            message = f"masks of the pattern {text} cannot move"
            raise AptError(message, "leave it out", ("move_masks",))


def check_recovery(
    options: RecoverOptions,
    spec: RecoverySpec,
    registry: Registry,
    model_class: type[nn.Module],
    *,
    windows: bool,
) -> None:
    """Raise `AptError` if the kind of recovery does not use an option for a class of models.

    Args:
        windows: True if the models read windows of text.
    """
    specs = registry.recoveries.specs.values()
    options.check_used(spec, specs if windows else (), "recovery")
    if windows:
        return
    unused = {
        "tokens": "tokens auto" * (options.tokens == "auto"),
        "checkpointing": "gradient checkpointing" * options.checkpointing,
    }
    for name, words in unused.items():
        if words:
            needs = "needs a model that predicts the next token"
            raise AptError(
                f"{words} {needs}, unlike {model_class.__name__}", "leave it out", (name,)
            )


def _pruning_report(source: Source) -> dict[str, Any]:
    """The report of the pruning; empty if there is none.

    Raises:
        AptError: the report is damaged.
    """
    report = report_beside(source)
    if not report:
        return report
    place = f"the report in {source.location}"
    Report.from_dict(report, place)
    try:
        share = float((report.get("structure") or {}).get("share", 1))
        if not 0 < share <= 1:
            raise ValueError(f"a smaller model has a share of {share} of the parameters")
    except (AttributeError, TypeError, ValueError) as error:
        raise AptError(
            f"{place} is damaged: {first_line(error)}", "delete it to recover without it"
        ) from error
    return report


def _dense_model(task: RecoverTask) -> nn.Module:
    if task.source is None:
        skeleton = _dense_skeleton(task)
    else:
        skeleton = open_skeleton(task.source, task.registry, task.skeleton.spec.name)
    return load(skeleton, None, task.device).module


def _dense_skeleton(task: RecoverTask) -> Opened:
    """The dense model on the meta device.

    Raises:
        AptError: the dense model is not known or cannot be opened, or does not fit.
    """
    options, registry = task.options, task.registry
    reference = options.dense or task.earlier.get("model", {}).get("reference")
    if reference is None:
        raise AptError(
            f"recovery {task.spec.name} needs the dense model, and no report names it",
            "name it",
            ("dense",),
        )
    if Path(reference).exists() and Path(reference).resolve() == Path(options.model).resolve():
        raise _wrong_dense(f"{reference} is the pruned model itself")
    try:
        source = find_source(reference, replace(options, revision=None), registry)
        skeleton = open_skeleton(source, registry)
    except AptError as error:
        if options.dense is None:
            error.add_hint("the report names this dense model: give its place", "dense")
        raise
    models = {f"the dense model {reference}": skeleton.module, options.model: task.skeleton.module}
    check_dense(models, options, registry)
    return skeleton


def check_dense(
    models: Mapping[str, nn.Module], options: RecoverOptions, registry: Registry
) -> None:
    """Raise if a training cannot use the outputs of a dense model.

    Args:
        models: the dense and the pruned model, by their names in messages.

    Raises:
        AptError: the dense model is of another family, or has another vocabulary or width.
    """
    (dense_name, dense), (name, model) = models.items()
    families = [_family(checked, registry) for checked in (dense, model)]
    if families[0] != families[1]:
        raise _wrong_dense(
            f"{dense_name} is of the family {families[0]}, and {name} of {families[1]}"
        )
    sizes = [vocabulary_size(checked) for checked in (dense, model)]
    if sizes[0] != sizes[1]:
        raise _wrong_dense(f"{dense_name} has {sizes[0]} tokens, and {name} has {sizes[1]}")
    if not reads_of(type(model), model.config).windows:
        heads = [type(checked).__name__ for checked in (dense, model)]
        if heads[0] != heads[1]:
            raise _wrong_dense(f"{dense_name} is a {heads[0]}, and {name} a {heads[1]}")
        labels = [getattr(checked.config, "num_labels", None) for checked in (dense, model)]
        if labels[0] != labels[1]:
            raise _wrong_dense(f"{dense_name} has {labels[0]} classes, and {name} has {labels[1]}")
    widths = [hidden_size(checked.config) for checked in (dense, model)]
    if options.hidden and widths[0] != widths[1]:
        raise AptError(
            f"the hidden states of {dense_name} have {widths[0]} features, and those of "
            f"{name} have {widths[1]}",
            "name the model from which it was pruned, or use the logits alone: hidden 0",
            ("dense", "hidden"),
        )


def _family(model: nn.Module, registry: Registry) -> str:
    """The name of the adapter for the type of a model; without an adapter, the type."""
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    return next((s.name for s in registry.adapters.specs.values() if kind in s.model_types), kind)


def _wrong_dense(message: str) -> AptError:
    return AptError(message, "name the model from which it was pruned", ("dense",))

"""A whole run of ``apt-prune recover``, from a pruned directory to a recovered one."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.recording import eval_mode
from apt.checkpoints.copies import keep_side_files, save_model
from apt.checkpoints.load import fingerprint, load, load_tokenizer, skeleton
from apt.checkpoints.masks import MASKS, Masks, filled, masks_of, sparsity_of, write_masks
from apt.checkpoints.model import Model
from apt.checkpoints.stored import local_directory
from apt.distributed.ranks import Ranks
from apt.engine.limits import check_seed, check_shard_size, check_windows
from apt.engine.machine import choose_device
from apt.engine.prepare import capped, check_place, check_same_run, finished_report
from apt.engine.recover_options import RecoverRunOptions
from apt.engine.text import check_vocabulary
from apt.errors import AptError, first_line
from apt.events import TrainingObserver
from apt.locations.model_source import find
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, peak_memory, portable, read_report, versions
from apt.output.workplace import Workplace, write_errors
from apt.plugin.registry import Registry
from apt.plugin.specs import RecoverySpec
from apt.recovery.law import EnoughTokens
from apt.recovery.record import Training
from apt.recovery.recover import (
    DENSE_LOSS,
    STEPS,
    NotRecoveredError,
    RecoveryJob,
    forget,
    recover_model,
)
from apt.text.datasets import digest, documents, evaluation_tokens, training_tokens
from apt.text.special_tokens import bos_of

_MOST_SAMPLES = 10_000


@dataclass(frozen=True)
class PreparedRecovery:
    """A recovery that has passed all checks that need neither weights nor text."""

    options: RecoverRunOptions
    registry: Registry
    shell: Model
    spec: RecoverySpec
    device: str
    earlier: dict[str, Any]

    @property
    def dense(self) -> str | None:
        """The reference of the dense model; None if it is not known."""
        return self.options.dense or self.earlier.get("model", {}).get("reference")


def prepare_recovery(
    options: RecoverRunOptions,
    registry: Registry,
    notice: Callable[[str], None] = lambda line: None,
) -> PreparedRecovery:
    """Check everything that can be checked before the work begins.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    options.recover.check()
    check_windows(options.samples, options.seqlen)
    check_seed(options.seed)
    check_shard_size(options.max_shard_size)
    source = find(
        options.model, registry, trust_remote_code=options.trust_remote_code, hub=options.hub
    )
    texts = (options.calibration, options.evaluation, options.tokenizer, options.dense)
    check_place(
        options.output, source, texts, notice, overwrite=options.overwrite, resume=options.resume
    )
    shell = skeleton(source, registry, options.adapter)
    report = {} if source.on_hub or source.gguf else _report_beside(Path(source.location))
    spec = registry.recoveries.get(options.kind or "distill")
    options.recover.check_used(spec, registry.recoveries.specs.values())
    if spec.zeros and report.get("structure"):
        raise AptError(
            f"recovery {spec.name} serves models with zeros, and {options.model} is a smaller one",
            "use the kind layers, distill or lora",
            ("kind",),
        )
    seqlen = capped(options.seqlen, shell, notice)
    options = replace(options, kind=spec.name, adapter=shell.spec.name, seqlen=seqlen)
    prepared = PreparedRecovery(
        options, registry, shell, spec, choose_device(options.device), report
    )
    if spec.teacher:
        _dense_shell(prepared)
    return prepared


def already_recovered(prepared: PreparedRecovery) -> bool:
    """True if the run to be resumed was finished before.

    Raises:
        AptError: the output is that of a run with other options.
    """
    options = prepared.options
    report = finished_report(options.output, resume=options.resume)
    if report is not None:
        known = (report.get("recovery") or {}).get("options", {})
        check_same_run(options.output, known, options.record())
    return report is not None


def _report_beside(directory: Path) -> dict[str, Any]:
    """The report of the pruning; empty if there is none.

    Raises:
        AptError: it is damaged.
    """
    report = read_report(directory) or {}
    if not report:
        return report
    where = f"the report in {directory}"
    Report.from_dict(report, where)
    try:
        share = float((report.get("structure") or {}).get("share", 1))
        if not 0 < share <= 1:
            raise ValueError(f"a smaller model has a share of {share} of the parameters")
    except (AttributeError, TypeError, ValueError) as error:
        raise AptError(
            f"{where} is damaged: {first_line(error)}", "delete it to recover without it"
        ) from error
    return report


def _dense_shell(prepared: PreparedRecovery) -> Model:
    """The dense model on the meta device.

    Raises:
        AptError: it is not known or cannot be opened, or has another vocabulary.
    """
    options, given = prepared.options, prepared.dense
    if given is None:
        raise AptError(
            f"recovery {prepared.spec.name} needs the dense model, and no report names it",
            "name it",
            ("dense",),
        )
    if Path(given).exists() and Path(given).resolve() == Path(options.model).resolve():
        raise AptError(
            f"{given} is the pruned model itself",
            "name the model from which it was pruned",
            ("dense",),
        )
    try:
        source = find(
            given, prepared.registry, trust_remote_code=options.trust_remote_code,
            hub=options.hub.without_revision(),
        )  # fmt: skip
        shell = skeleton(source, prepared.registry)
    except AptError as error:
        if options.dense is None:
            error.add_hint("the report names this dense model: give its place", "dense")
        raise
    sizes = [m.module.get_input_embeddings().weight.shape[0] for m in (shell, prepared.shell)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise AptError(
            f"the dense model {given} has {sizes[0]} tokens, and {options.model} has {sizes[1]}",
            "name the model from which it was pruned",
            ("dense",),
        )
    widths = [model.config.hidden_size for model in (shell, prepared.shell)]
    if options.recover.hidden and widths[0] != widths[1]:
        raise AptError(
            f"the hidden states of {given} have {widths[0]} features, and those of "
            f"{options.model} have {widths[1]}",
            "name the model from which it was pruned, or use the logits alone: hidden 0",
            ("dense", "hidden"),
        )
    return shell


class RecoveryRun:
    """One run of a recovery.

    Args:
        prepared: the checked run.
        observe: called with the events of the training.
        status: called with a text for each step outside the training.
        ranks: the processes that train together. Only the first one measures and writes.
    """

    def __init__(
        self,
        prepared: PreparedRecovery,
        observe: TrainingObserver = lambda event: None,
        status: Callable[[str], None] = lambda text: None,
        ranks: Ranks | None = None,
    ) -> None:
        self._prepared, self._options = prepared, prepared.options
        self._observe, self._status, self._ranks = observe, status, ranks or Ranks()
        self._work = Workplace(self._options.output, self._options.overwrite)
        self._started = time.perf_counter()
        self._model: Any = None

    def execute(self) -> Report:
        """Train, write and verify.

        Raises:
            AptError: an error of the checkpoint, the text, the training or the disk. Nothing is
                written then; a training with a checkpoint can be resumed.
        """
        options = self._options
        self._check_space()
        with self._opened():
            self._status("reading text")
            tokenizer, tokens, held_out = self._read_text()
            self._status("loading the model")
            shell = self._prepared.shell
            loaded = load(shell, None, self._prepared.device)
            self._model = loaded.module
            self._check_masks()
            if self._ranks.first:
                self._begin(tokens)
            before = self._measure(held_out, "before")
            training, masks = recover_model(self._model, tokens, self._job())
            if not self._ranks.first:
                return self._report(training, masks, tokens, {})
            self._write(tokenizer, masks)
            after = self._measure(held_out, "after")
            scores: dict[str, Any] = {}
            if held_out is not None:
                source = portable(str(options.evaluation))
                scores = {"source": source, "shape": list(held_out.shape)}
                scores |= {"before": before, "after": after}
            report = self._report(training, masks, tokens, scores)
            with write_errors(options.output):
                origin = None if shell.source.gguf else local_directory(shell)
                write_card(self._work.out, report, origin)
                report = report.write(self._work.out)
            self._work.publish()
            return report

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """While entered, the workplace is locked."""
        try:
            with self._work.locked() if self._ranks.first else nullcontext():
                try:
                    yield
                except NotRecoveredError:
                    self._work.journal.clear()  # nothing to resume from
                    raise
        except AptError as error:
            if self._work.worth_keeping and "resume" not in f"{error.hint} {error.options}":
                error.add_hint("the training can be resumed", "resume")
            raise

    def _check_space(self) -> None:
        weights = sum(p.numel() * 4 for p in self._prepared.shell.module.parameters())
        if self._ranks.first and not self._options.resume:
            check_space(self._options.output, self._copies() * weights + self._teacher_bytes())

    def _copies(self) -> int:
        """The most copies of the weights in fp32 that are on disk at one time.

        These are the weights before the training and the output. If all weights are trained, there
        are also three checkpoints, each with two moments.
        """
        return 2 + 3 * 3 if self._prepared.spec.teacher else 4

    def _teacher_bytes(self) -> int:
        """The bytes of the outputs of the dense model: the top logits and the hidden states.

        0 if the number of samples is not known yet.
        """
        options, hidden = self._options, int(self._prepared.shell.config.hidden_size)
        open_ended = options.recover.minutes is not None or options.recover.tokens == "auto"
        if open_ended or not self._prepared.spec.teacher:
            return 0
        samples = self._useful_samples()
        return samples * options.seqlen * (6 * options.recover.top + 2 * hidden)

    def _read_text(self) -> tuple[Any, Tensor, Tensor | None]:
        """The tokenizer, the training tokens, and the tokens to measure on."""
        options, registry = self._options, self._prepared.registry
        tokenizer = load_tokenizer(self._prepared.shell.source, options.tokenizer)
        bos = bos_of(tokenizer) if options.bos else None
        texts = documents(options.calibration, "calibration", registry, options.hub.token)
        most = options.samples or self._useful_samples()
        tokens = training_tokens(
            tokenizer, texts, most, options.seqlen, options.seed, options.calibration, bos
        )
        held_out = None
        if options.evaluation is not None and self._ranks.first:
            texts = documents(options.evaluation, "evaluation", registry, options.hub.token)
            held_out = evaluation_tokens(
                tokenizer, texts, None, options.seqlen, options.evaluation, bos
            )
        for found in (tokens, held_out):
            if found is not None:
                check_vocabulary(found, self._prepared.shell.module, options.model)
        return tokenizer, tokens, held_out

    def _useful_samples(self) -> int:
        """The number of samples that the steps use, with those that are held back."""
        recover, seqlen = self._options.recover, self._options.seqlen
        if recover.minutes is not None or recover.tokens == "auto":
            return _MOST_SAMPLES
        used = math.ceil(recover.tokens / seqlen) if isinstance(recover.tokens, int) else (
            (recover.steps or STEPS) * recover.batch
        )  # fmt: skip
        return min(_MOST_SAMPLES, math.ceil(used / (1 - recover.held_back)) + 1)

    def _check_masks(self) -> None:
        """Raise for a dense model, for a kind of recovery that needs zeros or a smaller model."""
        masks = masks_of(self._model, self._prepared.shell.adapter)
        smaller = self._prepared.earlier.get("structure")
        if sparsity_of(masks) > 0.01 or smaller or self._prepared.spec.dense:
            return
        raise AptError(
            f"{self._options.model} has no zeros, and no report that says how it became smaller",
            "recover a model that was pruned; for dropped blocks use the kind layers",
            ("kind",),
        )

    def _begin(self, tokens: Tensor) -> None:
        """Continue from the journal, or start a new output."""
        inputs = {
            "options": self._options.record(),
            "model": fingerprint(self._model),
            "text": digest(tokens),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "ranks": self._ranks.size,
        }
        if not (self._options.resume and self._work.resume(inputs)):
            self._work.begin(inputs)
            forget(self._work.folder)

    def _job(self) -> RecoveryJob:
        prepared, options = self._prepared, self._options
        rules = (EnoughTokens(),) if options.recover.tokens == "auto" else ()
        return RecoveryJob(
            prepared.shell.adapter, prepared.spec, prepared.spec.load(), options.recover,
            self._work.folder,
            self._dense if prepared.spec.teacher else None, options.seed, prepared.device,
            self._ranks, rules, self._work.journal, self._observe, self._status,
        )  # fmt: skip

    def _dense(self) -> nn.Module:
        return load(_dense_shell(self._prepared), None, self._prepared.device).module

    def _measure(self, held_out: Tensor | None, when: str) -> dict[str, float]:
        found = {}
        if held_out is not None:
            with eval_mode(self._model), self._prepared.shell.adapter.running(self._model):
                for name in self._options.metrics:
                    self._status(f"measuring {name} {when}")
                    metric = self._prepared.registry.evaluators.get(name)
                    found[name] = metric.measure(self._model, held_out)
        return found

    def _write(self, tokenizer: Any, masks: Masks) -> None:
        """Save the model, load the saved one, and check its zeros."""
        options, shell, out = self._options, self._prepared.shell, self._work.out
        self._status("saving and verifying")
        with write_errors(options.output):
            save_model(self._model, tokenizer, out, shell.checkpoint, options.max_shard_size)
            if not shell.source.gguf:
                keep_side_files(local_directory(shell), out)
            if options.save_masks and masks:
                write_masks(masks, out / MASKS)
        self._model = None
        gc.collect()
        source = replace(shell.source, location=str(out), gguf=None)
        saved = skeleton(source, self._prepared.registry, shell.spec.name)
        self._model = load(saved, None, self._prepared.device).module
        if (wrong := filled(masks, self._model)) is not None:
            raise RuntimeError(f"{wrong} on disk lost zeros")

    def _report(
        self, training: Training, masks: Masks, tokens: Tensor, scores: dict[str, Any]
    ) -> Report:
        """The report of the pruned model, with the record of the recovery."""
        options, shell = self._options, self._prepared.shell
        earlier = self._prepared.earlier
        record = {
            "options": options.record(),
            "text": {"shape": list(tokens.shape), "sha256": digest(tokens)},
            "training": training.record(),
            "sparsity": sparsity_of(masks),
            "zeros": sum(int(mask.sum()) for mask in masks.values()),
            **_size(shell, earlier, masks),
            DENSE_LOSS: next(iter(self._work.journal.values(DENSE_LOSS)), None),
            "scores": scores,
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_memory_bytes": peak_memory(),
            "ranks": self._ranks.size,
            "versions": versions(),
            "earlier": earlier.get("recovery", {}),
        }
        if earlier:
            return replace(Report.from_dict(earlier), recovery=record)
        model = {
            "reference": portable(options.model),
            "type": shell.config.model_type,
            "adapter": shell.spec.name,
        }
        return Report({}, model, {}, recovery=record)


def _size(shell: Model, earlier: dict[str, Any], masks: Masks) -> dict[str, Any]:
    """The number of parameters before the pruning, and the share of them that was pruned."""
    now = sum(p.numel() for p in shell.module.parameters())
    share = (earlier.get("structure") or {}).get("share") or 1.0
    blocks = sum(p.numel() for _, b in shell.adapter.blocks(shell.module) for p in b.parameters())
    before = round(now + blocks * (1 / share - 1))
    zeros = sum(int(mask.sum()) for mask in masks.values())
    return {"parameters_before": before, "rate": (before - now + zeros) / before}

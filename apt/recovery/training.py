"""The training of a recovery, by transformers' Trainer.

The Trainer owns optimizer, schedule, checkpoints, resumption and the processes of ``torchrun``.
This module adds the loss, the masks, and the rules by which training ends early.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from apt.adapter.eval_mode import eval_mode
from apt.errors import AptError, first_line
from apt.events import CheckpointSaved, HeldBack, TrainingObserver, TrainingStep
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.options import RecoverOptions
from apt.recovery.trainable import Trainable, next_token_loss
from apt.solver.precision import multiplies_bf16

_WARM_UP = 0.03  # of the steps, as in SPP
_CHECKPOINTING = next(  # transformers 5.24 has renamed it
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
_COMPLETE = "complete"  # a file in a checkpoint that was completely written
_DIVERGED = 2.0  # nats per token above the loss before the training


@dataclass
class Training:
    """The record of a training.

    Attributes:
        steps: the planned number of steps.
        tokens: the tokens of a step, over all processes.
        losses: the loss of each step.
        held_back: the loss of the next token on the samples held back, by step.
        seconds: the time of the training.
        best: the step whose weights were taken; 0 if no step lowered the loss on the samples held
            back, and the weights are those before the training.
        diverged: the step after which the loss diverged; None if it did not.
        stopped: why the training ended before its planned end; empty if it did not.
        exchanges: the number of weights that were pruned in exchange for others, if masks move.
    """

    steps: int
    tokens: int
    losses: list[float] = field(default_factory=list)
    held_back: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: int = 0
    diverged: int | None = None
    stopped: str = ""
    exchanges: int = 0

    def record(self) -> dict[str, Any]:
        """The record as values for JSON."""
        return {**vars(self), "held_back": [list(pair) for pair in self.held_back.items()]}


class Samples(Dataset[dict[str, Any]]):
    """Samples of tokens (samples, seqlen) with their indices."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self._tokens[row], "row": row}


class StopRule(Protocol):
    """A rule that ends a training early."""

    def reason(self, training: Training) -> str | None:
        """Why the training ends now, or None; asked after each measurement of the loss."""


def train(
    trainable: Trainable,
    masks: Mapping[str, Tensor],
    tokens: Tensor,
    held_back: Tensor,
    options: RecoverOptions,
    steps: int,
    rate: float,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    moving: MovingMasks | None = None,
    rules: tuple[StopRule, ...] = (),
    observe: TrainingObserver = lambda event: None,
) -> Training:
    """Train, and leave the best weights in the module of ``trainable``.

    Args:
        trainable: what is trained.
        masks: the zeros to keep, by parameter.
        tokens: the training samples (samples, seqlen).
        held_back: the samples on which the loss is measured (samples, seqlen).
        options: the options.
        steps: the number of steps.
        rate: the highest learning rate.
        folder: the folder of the checkpoints.
        seed: the seed for the order of the samples.
        device: ``"cpu"``, or a CUDA device.
        resume: True to continue from the last checkpoint in ``folder``.
        moving: the masks, if they move; None if they stay.
        rules: further rules that end the training early.
        observe: called with the events of the training.

    Raises:
        AptError: the optimizer is unknown or not installed.
    """
    arguments = _arguments(trainable.module, options, steps, rate, folder, seed, device)
    training = Training(steps, options.batch * tokens.shape[1])
    recorder = _Recorder(training, rules, observe, moving)
    handles = _mask_gradients(trainable, masks, recorder)
    trainer = _Trainer(
        model=trainable.module,
        args=arguments,
        train_dataset=Samples(tokens),
        eval_dataset=Samples(held_back),
        callbacks=[recorder, EarlyStoppingCallback(options.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.use(trainable)
    last = _last_checkpoint(folder) if resume else None
    recorder.begin(trainer, last)
    if last is not None and moving is not None:
        moving.restore(Path(last))
    with _optimizer_errors(options):
        trainer.train(resume_from_checkpoint=last)
    for handle in handles:
        handle.remove()
    recorder.end(trainer)
    if moving is not None and training.best:
        moving.restore(folder / f"{PREFIX_CHECKPOINT_DIR}-{training.best}")
    trainable.module.eval()
    return training


@contextmanager
def _optimizer_errors(options: RecoverOptions) -> Iterator[None]:
    """While entered, an optimizer that is not installed is an `AptError`."""
    try:
        yield
    except ImportError as error:
        raise AptError(
            f"optimizer {options.optimizer} cannot be used: {first_line(error)}",
            "install its package, or use adamw_torch or adafactor",
            ("optimizer",),
        ) from error


def _arguments(
    module: nn.Module,
    options: RecoverOptions,
    steps: int,
    rate: float,
    folder: Path,
    seed: int,
    device: str,
) -> TrainingArguments:
    every = max(1, math.ceil(steps / options.checks))
    whole = all(p.dtype == torch.float32 for p in module.parameters())
    processes = int(torch.distributed.get_world_size()) if _distributed() else 1
    each = max(1, min(options.batch // processes, options.samples_at_once))
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(_WARM_UP * steps),
            per_device_train_batch_size=each,
            per_device_eval_batch_size=each,
            gradient_accumulation_steps=max(1, options.batch // (each * processes)),
            **({_CHECKPOINTING: True} if options.checkpointing else {}),
            optim=options.optimizer,
            max_grad_norm=1.0,
            bf16=whole and multiplies_bf16(torch.device(device)),
            use_cpu=device == "cpu",
            seed=seed % 2**32,  # the range of numpy
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
    except ValueError as error:
        if options.optimizer not in str(error):
            raise
        raise AptError(
            f"optimizer '{options.optimizer}' is unknown to transformers",
            "use adamw_torch or adafactor",
            ("optimizer",),
        ) from error


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was completely written; None if there is none."""
    found = {int(path.parent.name.rpartition("-")[2]): path.parent for path in folder.glob(
        f"{PREFIX_CHECKPOINT_DIR}-*/{_COMPLETE}")}  # fmt: skip
    return str(found[max(found)]) if found else None


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _mask_gradients(
    trainable: Trainable, masks: Mapping[str, Tensor], recorder: "_Recorder"
) -> list[Any]:
    """Set the gradients of masked weights to zero, so that no optimizer moves these weights.

    A zero weight with zero gradients has zero moments, and no decay.
    """
    if not trainable.masked:
        return []
    parameters = dict(trainable.module.named_parameters(remove_duplicate=False))
    return [
        parameters[name].register_hook(_Masked(name, mask, recorder))  # type: ignore[no-untyped-call]
        for name, mask in masks.items()
        if parameters[name].requires_grad
    ]


class _Masked:
    def __init__(self, name: str, mask: Tensor, recorder: "_Recorder") -> None:
        self._name, self._mask, self._recorder = name, mask, recorder

    def __call__(self, gradient: Tensor) -> Tensor:
        self._recorder.see(self._name, gradient)
        return gradient.masked_fill(self._mask.to(gradient.device), 0)


class _Trainer(Trainer):  # type: ignore[misc]
    loss_is_scaled_for_ga = False  # the loss is a mean over the batch

    def use(self, trainable: Trainable) -> None:
        self._trainable = trainable

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        loss = self._trainable.loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return next_token_loss(model, inputs).detach(), None, None


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Records the losses, and ends a training that diverges or that a rule ends."""

    def __init__(
        self,
        training: Training,
        rules: tuple[StopRule, ...],
        observe: TrainingObserver,
        moving: MovingMasks | None,
    ) -> None:
        self._training, self._rules, self._observe = training, rules, observe
        self._moving, self._next = moving, 1  # the number of the current step
        self._started = 0.0

    def begin(self, trainer: Trainer, checkpoint: str | None) -> None:
        """Measure the loss before the training, and read the record of a checkpoint."""
        self._started = time.perf_counter()
        with eval_mode(trainer.model):
            self._keep(0, trainer.evaluate()["eval_loss"])
        if checkpoint is None:
            return
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        for entry in state.log_history:
            if "loss" in entry:
                self._training.losses.append(float(entry["loss"]))
            if "eval_loss" in entry:
                self._training.held_back[int(entry["step"])] = float(entry["eval_loss"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note the number of the step."""
        self._next = state.global_step + 1

    def see(self, name: str, gradient: Tensor) -> None:
        """Note the gradient of a parameter, if its mask moves after this step."""
        if self._moving is not None and self._moving.wants(self._next):
            self._moving.see(name, gradient)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Move the masks."""
        if self._moving is not None and self._moving.wants(state.global_step):
            self._training.exchanges += self._moving.move(state.global_step, given["optimizer"])

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any, **_: Any
    ) -> None:
        """Record the loss of a step, and its event."""
        if "loss" not in logs:
            return
        training, loss = self._training, float(logs["loss"])
        training.losses.append(loss)
        seconds = time.perf_counter() - self._started
        self._observe(
            TrainingStep(state.global_step, training.steps, loss, logs["learning_rate"], seconds)
        )
        if not math.isfinite(loss):
            self._diverge(state, control)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **_: Any
    ) -> None:
        """Record the loss on the samples held back, and ask the rules."""
        training, loss = self._training, float(metrics["eval_loss"])
        if not state.global_step or training.diverged is not None:
            return
        self._keep(state.global_step, loss)
        if not loss < training.held_back.get(0, math.inf) + _DIVERGED:
            self._diverge(state, control)
        for rule in self._rules:
            if reason := rule.reason(training):
                training.stopped, control.should_training_stop = reason, True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint as complete."""
        if state.is_world_process_zero:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            folder = Path(str(args.output_dir)) / name
            if self._moving is not None:
                self._moving.save(folder)
            (folder / _COMPLETE).touch()
        self._observe(CheckpointSaved(state.global_step))

    def _keep(self, step: int, loss: float) -> None:
        self._training.held_back[step] = loss
        self._observe(HeldBack(step, loss))

    def _diverge(self, state: TrainerState, control: TrainerControl) -> None:
        self._training.diverged, control.should_training_stop = state.global_step, True

    def end(self, trainer: Trainer) -> None:
        """Record the end."""
        training, state = self._training, trainer.state
        training.seconds = time.perf_counter() - self._started
        known = {step: loss for step, loss in training.held_back.items() if math.isfinite(loss)}
        training.best = min(known, key=lambda step: known[step], default=0)
        if training.stopped or training.diverged is not None:
            return
        if state.global_step < training.steps:
            training.stopped = "the loss on the samples held back no longer fell"

"""The training of a recovery, by transformers' Trainer.

The Trainer owns optimizer, schedule, checkpoints, resumption and the processes of ``torchrun``.
This module adds the loss, the masks, and the rules by which training ends early.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from apt.errors import AptError, first_line
from apt.events import TrainingObserver
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.options import RecoverOptions
from apt.recovery.record import StopRule, Training
from apt.recovery.recorder import COMPLETE, Recorder
from apt.recovery.trainable import Trainable, next_token_loss
from apt.recovery.windows import BlockWindows
from apt.solver.precision import multiplies_bf16

_WARM_UP = 0.03  # of the steps, as in SPP
_CHECKPOINTING = next(  # transformers 5.24 has renamed it
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


class Samples(Dataset[dict[str, Any]]):
    """Samples of tokens (samples, seqlen) with their indices."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self._tokens[row], "row": row}


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast a model is trained, and where.

    Attributes:
        options: the options.
        steps: the number of steps.
        rate: the highest learning rate.
        folder: the folder of the checkpoints.
        seed: the seed for the order of the samples.
        device: ``"cpu"``, or a CUDA device.
        resume: True to continue from the last checkpoint in ``folder``.
    """

    options: RecoverOptions
    steps: int
    rate: float
    folder: Path
    seed: int = 0
    device: str = "cpu"
    resume: bool = False


def train(
    trainable: Trainable,
    masks: dict[str, Tensor],
    tokens: Tensor,
    held_back: Tensor,
    plan: TrainingPlan,
    *,
    moving: MovingMasks | None = None,
    windows: BlockWindows | None = None,
    rules: tuple[StopRule, ...] = (),
    observe: TrainingObserver = lambda event: None,
) -> Training:
    """Train, and leave the best weights in the module of ``trainable``.

    Args:
        trainable: what is trained.
        masks: the zeros to keep, by parameter; they are moved to the device of the training.
        tokens: the training samples (samples, seqlen).
        held_back: the samples on which the loss is measured (samples, seqlen).
        plan: how long and how fast it is trained.
        moving: the masks, if they move; None if they stay.
        windows: the windows of blocks, if blocks are trained in turn; None to train all together.
        rules: further rules that end the training early.
        observe: called with the events of the training.

    Raises:
        AptError: the optimizer is unknown or not installed.
    """
    options, folder = plan.options, plan.folder
    arguments = _arguments(trainable.module, plan, len(windows) if windows else 0)
    training = Training(plan.steps, options.batch * tokens.shape[1])
    recorder = Recorder(training, rules, observe, moving)
    trainer = _Trainer(
        model=trainable.module,
        args=arguments,
        train_dataset=Samples(tokens),
        eval_dataset=Samples(held_back),
        callbacks=[recorder, EarlyStoppingCallback(options.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    if windows is not None:
        trainer.add_callback(windows)
    trainer.use(trainable)
    handles = _mask_gradients(trainable, masks, recorder)
    last = _last_checkpoint(folder) if plan.resume else None
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


def is_mixed(module: nn.Module, device: torch.device) -> bool:
    """True if the training of a module computes in bf16: its weights are fp32, and it is faster."""
    whole = all(p.dtype == torch.float32 for p in module.parameters())
    return whole and multiplies_bf16(device)


def _arguments(module: nn.Module, plan: TrainingPlan, windows: int) -> TrainingArguments:
    """The arguments of the Trainer; with windows of blocks, their number."""
    options, steps = plan.options, plan.steps
    every = max(1, math.ceil(steps / options.checks))
    processes = int(torch.distributed.get_world_size()) if _distributed() else 1
    each = max(1, min(options.batch // processes, options.samples_at_once))
    try:
        return TrainingArguments(
            output_dir=str(plan.folder),
            max_steps=steps,
            learning_rate=plan.rate,
            lr_scheduler_type="cosine_with_restarts" if windows else "cosine",
            lr_scheduler_kwargs={"num_cycles": windows} if windows else {},
            ddp_find_unused_parameters=True if windows else None,
            warmup_steps=math.ceil(_WARM_UP * steps),
            per_device_train_batch_size=each,
            per_device_eval_batch_size=each,
            gradient_accumulation_steps=max(1, options.batch // (each * processes)),
            **({_CHECKPOINTING: True} if options.checkpointing else {}),
            optim=options.optimizer,
            max_grad_norm=1.0,
            bf16=is_mixed(module, torch.device(plan.device)),
            use_cpu=plan.device == "cpu",
            seed=plan.seed % 2**32,  # the range of numpy
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
            dataloader_pin_memory=plan.device != "cpu",
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
        f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")}  # fmt: skip
    return str(found[max(found)]) if found else None


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _mask_gradients(
    trainable: Trainable, masks: dict[str, Tensor], recorder: Recorder
) -> list[Any]:
    """Set the gradients of masked weights to zero, so that no optimizer moves these weights.

    A zero weight with zero gradients has zero moments, and no decay.
    """
    if not trainable.masked:
        return []
    parameters = dict(trainable.module.named_parameters(remove_duplicate=False))
    masks |= {name: mask.to(parameters[name].device) for name, mask in masks.items()}
    return [
        parameters[name].register_hook(_Masked(name, mask, recorder))  # type: ignore[no-untyped-call]
        for name, mask in masks.items()
        if parameters[name].requires_grad
    ]


class _Masked:
    def __init__(self, name: str, mask: Tensor, recorder: Recorder) -> None:
        self._name, self._mask, self._recorder = name, mask, recorder

    def __call__(self, gradient: Tensor) -> Tensor:
        self._recorder.see(self._name, gradient)
        return gradient.masked_fill(self._mask, 0)


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

"""The training of a recovery, by transformers' Trainer.

The Trainer owns optimizer, schedule, checkpoints, resumption and the processes of ``torchrun``.
This module adds the loss, the masks, and the rules for an early end.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from apt.adapter import Sample, Samples
from apt.compute import dtype_name, mixed_precision
from apt.devices import keep_random_states
from apt.errors import AptError, first_line
from apt.recovery.job import RecoveryJob, TrainingPlan, checkpoint_of
from apt.recovery.law import enough_tokens
from apt.recovery.objective import Loss
from apt.recovery.record import Training
from apt.recovery.recorder import Recorder
from apt.recovery.trainable import Trainable

_WARM_UP = 0.03  # of the steps, as in SPP
# transformers 5.24 calls gradient checkpointing activation checkpointing.
_NEW = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
_KIND = "activation" if _NEW else "gradient"


class _Rows(Dataset[tuple[int, Tensor | Sample]]):
    """The samples of a text with their indices."""

    def __init__(self, text: Tensor | Samples) -> None:
        self._text = text

    def __len__(self) -> int:
        return len(self._text)

    def __getitem__(self, row: int) -> tuple[int, Tensor | Sample]:
        return row, self._text[row]


def train(
    trainable: Trainable, masks: dict[str, Tensor], job: RecoveryJob, plan: TrainingPlan
) -> Training:
    """Train, and leave the best weights in the module of ``trainable``.

    The training continues from the last checkpoint in the journal of the job.

    Args:
        masks: the zeros to keep, by parameter; they are moved to the device of the training.

    Raises:
        AptError: the optimizer is unknown or not installed.
    """
    moving, windows = plan.moving, [] if plan.windows is None else [plan.windows]
    tokens = round(plan.batch * plan.text.numel() / len(plan.text))
    # The gradients of a copy in the cache would be summed in bf16 over the groups of a batch.
    weights, compute = trainable.module.parameters(), job.options.compute
    autocast = mixed_precision(weights, compute, cache=False)
    products = dtype_name(autocast.fast_dtype if autocast._enabled else torch.float32)
    training = Training(plan.steps, tokens, plan.batch, products)
    rules = (enough_tokens,) if job.options.tokens == "auto" else ()
    recorder = Recorder(training, rules, job.report, moving, plan.ends)
    last_move = 0 if moving is None else moving.last_move
    patience = _Patience(job.options.patience, last_move)
    last = next((str(path) for path in reversed(job.written_checkpoints()) if path.is_dir()), None)
    with _restored_state(trainable.module), _masked_gradients(trainable, masks, recorder):
        trainer = _Trainer(
            model=trainable.module,
            args=_arguments(trainable.module, job, plan),
            train_dataset=_Rows(plan.text),
            eval_dataset=_Rows(plan.held_back),
            data_collator=plan.objective.collate,
            callbacks=[recorder, patience, *windows],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.use(trainable, plan.objective.loss, autocast, None if windows else plan.ends)
        recorder.begin(trainer, last)
        patience.early_stopping_patience_counter = training.checks_since_best(last_move)
        if last is not None and moving is not None:
            moving.restore(Path(last))
        trainer.train(resume_from_checkpoint=last)
        recorder.end(trainer)
        if moving is not None and training.best:
            moving.restore(checkpoint_of(job.checkpoints, training.best))
    return training


@contextmanager
def _restored_state(module: nn.Module) -> Iterator[None]:
    """Restore the state of a model and the random states after a training.

    The Trainer sets ``use_cache`` of the configuration, the training mode and the seeds, and
    enables the checkpointing of activations.
    """
    # A model of peft contains the caller's model.
    model: Any = getattr(module, "get_base_model", lambda: module)()
    config, checkpointing = vars(model.config), getattr(model, f"is_{_KIND}_checkpointing")
    use_cache = config.get("use_cache")
    module_attributes, model_attributes = set(vars(module)), set(vars(model))
    modes = {part: part.training for part in module.modules()}
    random_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with keep_random_states():
            yield
    finally:
        random.setstate(random_state)
        numpy.random.set_state(numpy_state)
        if use_cache is None:
            config.pop("use_cache", None)
        else:
            config["use_cache"] = use_cache
        if "_is_accelerate_prepared" not in module_attributes:
            vars(module).pop("_is_accelerate_prepared", None)
        if getattr(model, f"is_{_KIND}_checkpointing") and not checkpointing:
            getattr(model, f"{_KIND}_checkpointing_disable")()
        if "_require_grads_hook" in vars(model).keys() - model_attributes:
            model.disable_input_require_grads()
        for part, training in modes.items():
            part.training = training


class _Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that begins after the last move of the masks, see `checks_since_best`."""

    def __init__(self, patience: int, last_move: int) -> None:
        super().__init__(patience)
        self._last_move = last_move

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        if state.global_step > self._last_move:
            super().on_evaluate(args, state, control, **given)


class _Arguments(TrainingArguments):  # type: ignore[misc]
    @property
    def device(self) -> torch.device:
        """The device of the Trainer; or of accelerate, if the Trainer knows only the CPU."""
        device: torch.device = super().device
        accelerate_device: torch.device = self.distributed_state.device
        return accelerate_device if device.type == "cpu" else device


def _arguments(module: nn.Module, job: RecoveryJob, plan: TrainingPlan) -> TrainingArguments:
    """The arguments of the Trainer."""
    options, steps, device = job.options, plan.steps, torch.device(job.device)
    interval, windows = max(1, math.ceil(steps / options.checks)), len(plan.windows or ())
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    share, remainder = divmod(plan.batch, processes)
    if remainder:
        message = f"a step of {plan.batch} samples cannot be divided among {processes} processes"
        raise AptError(message, "choose a multiple", ("batch",))
    # A divisor of the share, so that a step has exactly its samples.
    micro_batch = max(n for n in range(1, min(share, options.micro_batch) + 1) if share % n == 0)
    try:
        arguments = _Arguments(
            output_dir=str(job.checkpoints),
            max_steps=steps,
            learning_rate=job.rate,
            lr_scheduler_type="cosine_with_restarts" if windows else "cosine",
            lr_scheduler_kwargs={"num_cycles": windows} if windows else {},
            ddp_find_unused_parameters=True if windows else None,
            warmup_steps=math.ceil(_WARM_UP * steps),
            per_device_train_batch_size=micro_batch,
            # Several windows are measured faster; a batch of other samples is not of one shape.
            per_device_eval_batch_size=micro_batch if isinstance(plan.text, Tensor) else 1,
            gradient_accumulation_steps=share // micro_batch,
            **(_checkpointing() if options.checkpointing else {}),
            optim=options.optimizer,
            max_grad_norm=1.0,
            use_cpu=device.type == "cpu",
            seed=job.seed % 2**32,  # the range of numpy
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would hide that a training diverges
            eval_strategy="steps",
            eval_steps=interval,
            save_strategy="steps",
            save_steps=interval,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type != "cpu",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
    except ValueError as error:
        if options.optimizer not in str(error):
            raise
        message = f"optimizer '{options.optimizer}' is unknown to transformers"
        raise AptError(message, "use adamw_torch or adafactor", ("optimizer",)) from error
    if arguments.device.type == "cpu" != device.type and processes == 1:
        arguments.distributed_state.device = device  # accelerate does not know all kinds of devices
    if arguments.device.type != device.type or (arguments.device != device and device.index):
        message = f"the training runs on {arguments.device}, not on {job.device}"
        raise AptError(message, "select the GPU with CUDA_VISIBLE_DEVICES", ("device",))
    # More GPUs would mean DataParallel, with more samples in a step.
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _checkpointing() -> dict[str, Any]:
    """The arguments for the checkpointing of activations."""
    if _KIND == "activation":
        return {"activation_checkpointing": True}
    # The reentrant form, an old default, computes no gradients if the inputs need none.
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {"gradient_checkpointing": True, **kwargs}


@contextmanager
def _masked_gradients(
    trainable: Trainable, masks: dict[str, Tensor], recorder: Recorder
) -> Iterator[None]:
    """Inside the context, fixed masked weights have zero gradients, zero moments and no decay."""
    if not trainable.masked:
        yield
        return
    parameters = dict(trainable.module.named_parameters(remove_duplicate=False))
    masks |= {name: mask.to(parameters[name].device) for name, mask in masks.items()}

    def masked(gradient: Tensor, name: str, mask: Tensor) -> Tensor:
        if not recorder.masks_gradient(name):
            return gradient
        # On a CPU a product with bytes is the fastest: `masked_fill` takes 15 times as long.
        return gradient * mask.logical_not().view(torch.uint8)

    with ExitStack() as stack:
        for name, mask in masks.items():
            if parameters[name].requires_grad:
                hook: Any = partial(masked, name=name, mask=mask)
                stack.callback(parameters[name].register_hook(hook).remove)  # type: ignore[no-untyped-call]
        yield


class _Trainer(Trainer):  # type: ignore[misc]
    loss_is_scaled_for_ga = False  # the loss is a mean over the batch

    def use(
        self, trainable: Trainable, measured: Loss, autocast: torch.autocast, ends: float | None
    ) -> None:
        """Set the trained module and its losses.

        Args:
            measured: the loss on the samples held back, which is trained if the kind has none.
            autocast: the precision of all products. That of accelerate would also copy all outputs
                of the model to fp32.
            ends: the time of `time.perf_counter` at which the learning rate reaches zero; None for
                a schedule by steps alone.
        """
        self._loss, self._measured = trainable.loss or measured, measured
        self._autocast, self._ends = autocast, ends

    def autocast_smart_context_manager(self, *_: Any, **__: Any) -> torch.autocast:
        """The context of each loss."""
        return self._autocast

    def create_scheduler(self, *given: Any, **named: Any) -> Any:
        """The schedule by steps, or by time if the time passes faster than the steps."""
        scheduler = super().create_scheduler(*given, **named)
        if self._ends is not None:
            scheduler.lr_lambdas = [
                partial(self._timed_factor, factor, time.perf_counter())
                for factor in scheduler.lr_lambdas
            ]
        return scheduler

    def _timed_factor(self, factor: Callable[[float], float], begun: float, step: int) -> float:
        """The factor of the learning rate at a step, or at a later step if time is short."""
        assert self._ends is not None
        share = (time.perf_counter() - begun) / max(self._ends - begun, 1e-9)
        return factor(max(step, min(share, 1.0) * self.args.max_steps))

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        try:
            return super().create_optimizer(*given, **named)
        except (ImportError, RuntimeError) as error:  # fused optimizers exist for some devices only
            raise AptError(
                f"optimizer {self.args.optim} cannot be used: {first_line(error)}",
                "install its package, or use adamw_torch or adafactor",
                ("optimizer",),
            ) from error

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        loss = self._loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._measured(model, inputs).detach(), None, None

"""The recovery of a pruned model: training of kept weights with fixed zeros."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.adapter import Adapter, Samples
from apt.adapter.recording import eval_mode
from apt.adapter.samples import ModelInputs, on_device
from apt.checkpoints.masks import Masks, filled, masks_of
from apt.compute import compute_dtype, computing_in, if_it_runs, mixed_precision
from apt.devices import keep_random_states, synchronize
from apt.errors import AptError, first_line, plugin_error
from apt.options import BATCH, STEPS, RecoverOptions
from apt.recovery.beside_dense import GROUPS, beside_dense, hiding_tokens
from apt.recovery.job import STEPS_FOLDER, RecoveryJob, TrainingPlan
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.objective import Objective, next_token_loss
from apt.recovery.record import Training
from apt.recovery.teacher import Teacher, write_teacher
from apt.recovery.trainable import Trainable, Unrecovered, train_only

if TYPE_CHECKING:  # imported where a training begins, see `apt.recovery.job`
    from apt.recovery.windows import BlockWindows

DENSE_LOSS = "dense_loss"
"""The key of the journal for the loss of the dense model on the samples held back.

A divergence from the dense model is 0.
"""

_MOST_HELD_BACK = 64
_MEASURING = 0.1  # the greatest share of a given time for measurements
_ENOUGH_STEPS = 400  # steps in a given time, above which a step may have more samples
_LEAST_STEP = 512  # positions of a step of samples that are not windows: fewer are too noisy
# Of the gradients of one sample: above the first, several samples together are not timed, and above
# the second not even one sample again.
_SLOW_SECONDS, _VERY_SLOW_SECONDS = 1.0, 20.0
_DENSE = "dense"  # the folder of the outputs of the dense model
_WINDOWS = Objective()


class NotRecoveredError(AptError):
    """The training did not lower the loss on the samples held back."""


def recover_model(
    model: nn.Module, tokens: Tensor | Samples, job: RecoveryJob
) -> tuple[Training, Masks]:
    """Train a pruned model, in place.

    Args:
        model: the pruned model, a model of transformers. Its parameters keep their dtypes; the
            training is in fp32, or mixed with bf16, see the option ``compute``.
        tokens: windows of text (samples, seqlen), or other samples, without padding.

    Returns:
        The record of the training, and the zeros that were kept.

    Raises:
        NotRecoveredError: no step lowered the loss on the samples held back.
        AptError: the kind of recovery is not usable for this model, or filled zeros.
    """
    from apt.recovery.training import train

    started, masks = time.perf_counter(), masks_of(model, job.adapter)
    with (
        _in_fp32(model),
        job.adapter.running(model),
        _objective(model, tokens, job) as (objective, tokens),
    ):
        text, held_back = _split(tokens, job.options, job.ranks.size)
        job.status("training", "preparing")
        job = _in_possible_precision(model, objective, text[:1], job)
        amount, teacher, sample = None, None, None
        if objective.dense:
            sample = _batch(objective, text[:1], job.device)[GROUPS][0]
        elif job.spec.teacher:  # the dense model runs on the samples of the steps only
            with _gradients_of_blocks(model, job.adapter):
                given = Trainable(model), text, held_back, job, started
                amount = _amount(model, *given, objective)
            text, held_back = amount.text, amount.held_back
            assert isinstance(text, Tensor)
            assert isinstance(held_back, Tensor)
            teacher = _teacher(text, held_back, job)
        unrecovered = Unrecovered(model, job.adapter, masks, job.options, teacher, sample)
        trainable = _prepared_trainable(unrecovered, job)
        with _restored_on_error(model, trainable, job):
            given = trainable, text, held_back, job, started
            amount = amount or _amount(model, *given, objective)
            plan = _complete_plan(model, trainable, masks, amount, job, started)
            training = train(trainable, masks, job, plan)
            _check_improved(training)
        if job.saved_adapter is not None and trainable.save is not None and job.ranks.first:
            trainable.save(job.saved_adapter)
        trainable.merge()
    if (filled_parameter := filled(masks, model)) is not None:
        raise AptError(
            f"recovery {job.spec.name} filled zeros of {filled_parameter}",
            "use another kind of recovery",
        )
    return training, masks


@dataclass(frozen=True)
class _Pace:
    """The pace of a training, in seconds.

    Attributes:
        sample: of a sample with gradients.
        update: of a step of the optimizer.
        forward: of the forward of a sample.
        beside_dense: True if the dense model runs beside the trained one, and is in these times.
    """

    sample: float
    update: float
    forward: float
    beside_dense: bool = False

    def __mul__(self, length: float) -> "_Pace":
        """The pace of samples that are longer by a factor."""
        return replace(self, sample=length * self.sample, forward=length * self.forward)


@contextmanager
def _objective(
    model: nn.Module, tokens: Tensor | Samples, job: RecoveryJob
) -> Iterator[tuple[Objective, Tensor | Samples]]:
    """What is measured, and the samples for it; while entered, the dense model can run.

    Raises:
        AptError: the dense model is needed and not given.
    """
    if isinstance(tokens, Tensor):
        yield _WINDOWS, tokens
        return
    dense = _dense_model(job)
    if job.ranks.first:
        job.journal.remember(DENSE_LOSS, lambda: 0.0)
    if tokens.mask is not None and "MaskedLM" in type(model).__name__:
        tokens = hiding_tokens(tokens, job.seed)
    with computing_in(dense, torch.float32), eval_mode(dense), job.adapter.running(dense):
        yield beside_dense(model, dense, tokens, job.options.hidden), tokens


def _dense_model(job: RecoveryJob) -> nn.Module:
    """The dense model on the device of the job."""
    if job.dense is None:
        raise AptError(f"recovery {job.spec.name} needs the dense model", "name it", ("dense",))
    return job.dense().to(job.device)


def _in_possible_precision(
    model: nn.Module, objective: Objective, sample: Tensor | Samples, job: RecoveryJob
) -> RecoveryJob:
    """The job, in fp32 if the model does not run in mixed precision; see `if_it_runs`."""
    mixed = mixed_precision(model.to(job.device).parameters(), job.options.compute)

    def run_first() -> None:
        objective.loss(model, _batch(objective, sample, job.device))

    with eval_mode(model):
        if if_it_runs(mixed, run_first) is mixed:
            return job
    return replace(job, options=replace(job.options, compute="float32"))


def _batch(objective: Objective, samples: Tensor | Samples, device: str) -> dict[str, Any]:
    """The first samples of a text as a batch on a device."""
    batch = objective.collate([(row, samples[row]) for row in range(len(samples))])
    return {key: _moved(value, torch.device(device)) for key, value in batch.items()}


def _moved(value: Tensor | list[ModelInputs], device: torch.device) -> Tensor | list[ModelInputs]:
    """A tensor, or the inputs of samples, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return [on_device(inputs, device) for inputs in value]


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside the context, parameters and buffers are fp32; their dtypes are restored after it."""
    settings = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    buffer_dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    model.float()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            if name in settings:  # after an error, modules of peft may remain
                dtype, gradient = settings[name]
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(gradient)
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(buffer_dtypes.get(name, buffer.dtype))


@contextmanager
def _restored_on_error(model: nn.Module, trainable: Trainable, job: RecoveryJob) -> Iterator[None]:
    """Restore the model from a backup on disk if an exception ends the training."""
    trained = {str(i): p for i, p in enumerate(model.parameters()) if p.requires_grad}
    backup = job.folder / f"before-{job.ranks.rank}.safetensors"
    try:
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, backup)
    except (OSError, SafetensorError) as error:
        trainable.undo()
        raise AptError(f"cannot write {backup}: {first_line(error)}", "free some space") from error
    try:
        yield
    except BaseException:
        # The values first: to undo may make parameters of the model from what is trained.
        with safe_open(backup, "pt") as saved:
            for name, parameter in trained.items():
                parameter.data.copy_(saved.get_tensor(name))
        trainable.undo()
        raise
    finally:
        backup.unlink()


def _complete_plan(
    model: nn.Module,
    trainable: Trainable,
    masks: Masks,
    plan: TrainingPlan,
    job: RecoveryJob,
    started: float,
) -> TrainingPlan:
    """The plan with moving masks, windows of blocks, and the end.

    A training of one process with a given time, from ``started``, ends in time. Several processes
    cannot agree on an end.

    Raises:
        AptError: the options move masks, and the kind of recovery trains adapters.
    """
    steps, moving = plan.steps, None
    if job.options.move_masks:
        if not trainable.masked:
            message = f"recovery {job.spec.name} trains adapters, and its masks cannot move"
            raise AptError(message, "use the kind distill or layers", ("kind", "move_masks"))
        moving = MovingMasks(model, job.adapter, masks, steps)
    timed = job.options.minutes is not None and job.ranks.size == 1
    ends = started + 60 * (job.options.minutes or 0) if timed else None
    return replace(plan, moving=moving, windows=_windows(model, steps, job), ends=ends)


def forget(folder: Path) -> None:
    """Delete the checkpoints, and the outputs of the dense model, of an earlier training."""
    for name in (STEPS_FOLDER, _DENSE, f"{_DENSE}.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _windows(model: nn.Module, steps: int, job: RecoveryJob) -> "BlockWindows | None":
    """The windows of blocks, if blocks are trained in turn."""
    if job.options.window is None:
        return None
    from apt.recovery.windows import BlockWindows

    return BlockWindows(model, job.adapter, job.options.window, steps)


def _split(
    tokens: Tensor | Samples, options: RecoverOptions, processes: int
) -> tuple[Tensor | Samples, Tensor | Samples]:
    """The samples to train on, and the last samples, which are held back.

    If possible, their number is a multiple of the processes: otherwise the Trainer gives a sample
    to several processes.
    """
    if len(tokens) < 2:
        raise AptError(
            f"the text has {len(tokens)} samples, and a recovery needs at least 2",
            "give more text, or a smaller seqlen",
            ("calibration", "samples", "seqlen"),
        )
    count = min(
        max(1, round(options.validation_share * len(tokens))), _MOST_HELD_BACK, len(tokens) - 1
    )
    if (rounded_up := count + -count % processes) < len(tokens):
        count = rounded_up
    return tokens[:-count], tokens[-count:]


def _amount(
    model: nn.Module,
    trainable: Trainable,
    text: Tensor | Samples,
    held_back: Tensor | Samples,
    job: RecoveryJob,
    started: float,
    objective: Objective = _WINDOWS,
) -> TrainingPlan:
    """The number of steps, their samples, and the samples held back.

    A given time begins at ``started``.
    """
    options = job.options
    batch = options.batch or BATCH
    if options.minutes is not None:
        windows, first = _windows(model, 1, job), text[: options.micro_batch]

        def fitting_amount() -> list[int]:
            assert options.minutes is not None
            pace = _pace(trainable, windows, first, job, objective)
            pace = pace * (text.numel() / len(text) * len(first) / first.numel())
            remaining = 60 * options.minutes - (time.perf_counter() - started)
            least = math.ceil(_LEAST_STEP * len(text) / text.numel()) if objective.dense else 1
            return [*_steps_in(remaining, pace, len(held_back), job, least)]

        chosen = job.journal.remember("amount", fitting_amount) if job.ranks.first else []
        steps, count, batch = job.ranks.share(chosen)  # a resumed training has the same steps
        held_back = held_back[:count]
    elif isinstance(options.tokens, int):
        steps = math.ceil(options.tokens / (batch * text.numel() / len(text)))
    elif options.tokens == "auto":
        steps = max(1, len(text) // batch)
    else:
        steps = options.steps or STEPS
    return TrainingPlan(steps, batch, text[: steps * batch], held_back, objective)


def _steps_in(
    seconds: float, pace: _Pace, held_back: int, job: RecoveryJob, least: int = 1
) -> tuple[int, int, int]:
    """The steps in a given time, the number of measured samples, and the samples of a step.

    Measuring takes at most a tenth of the time, unless one sample per process takes more. If there
    are few steps, a step gets fewer samples, since more steps are better, but not fewer than
    ``least``.
    """
    options, processes = job.options, job.ranks.size
    per_sample = (options.checks + 1) * pace.forward
    greatest = max(processes, int(_MEASURING * seconds / per_sample) // processes * processes)
    count = min(held_back, greatest)
    before = pace.forward if job.spec.teacher and not pace.beside_dense else 0.0
    sample = pace.sample / processes + before

    def steps(batch: int) -> int:
        return max(1, int((seconds - count * per_sample) / (batch * sample + pace.update)))

    batch = options.batch or BATCH
    while options.batch is None and steps(batch) < _ENOUGH_STEPS:
        if batch < 2 * least or batch % (2 * processes):
            break
        batch //= 2
    return steps(batch), count, batch


@contextmanager
def _gradients_of_blocks(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Inside the context, the parameters of the blocks require gradients, and no other ones."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    train_only(model, (p for _, block in adapter.blocks(model) for p in block.parameters()))
    try:
        yield
    finally:
        for parameter, requires in required.items():
            parameter.requires_grad_(requires)


def _pace(
    trainable: Trainable,
    windows: "BlockWindows | None",
    samples: Tensor | Samples,
    job: RecoveryJob,
    objective: Objective,
) -> _Pace:
    """The pace on one process.

    The time of the optimizer is the time of AdamW with zero gradients. A kind with a teacher is
    prepared after the run of the teacher. So for such a kind, the timed step trains all blocks by
    the loss of the next token.

    Args:
        samples: samples that run together.
    """
    loss_of = trainable.loss or objective.loss
    model, device = trainable.module.to(job.device), torch.device(job.device)
    mixed = mixed_precision(model.parameters(), job.options.compute)
    with nullcontext() if windows is None else windows.middle():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        size = 1
        for is_first in (True, False):  # the first run warms up
            started = _now(device)
            batch = _batch(objective, samples[:size], job.device)
            with mixed:
                loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            backward_done = _now(device)
            nn.utils.clip_grad_norm_(trained, 1.0)
            # With zero gradients no weight changes, even after gradients that are not finite.
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            gradients = backward_done - started
            sample, update = gradients / size, _now(device) - backward_done
            if gradients > _VERY_SLOW_SECONDS:
                break
            if is_first and gradients <= _SLOW_SECONDS:
                size = len(samples)
    model.zero_grad(set_to_none=True)
    with torch.no_grad(), mixed:
        started = _now(device)
        objective.loss(model, batch)
        forward = (_now(device) - started) / size
    return _Pace(sample, update, forward, objective.dense)


def _now(device: torch.device) -> float:
    """The time in seconds, after all queued work of a device."""
    synchronize(device)
    return time.perf_counter()


def _prepared_trainable(unrecovered: Unrecovered, job: RecoveryJob) -> Trainable:
    """The result of the kind of recovery, checked."""
    with keep_random_states():
        torch.manual_seed(job.seed)
        trainable: object = job.recovery(unrecovered)
    if isinstance(trainable, Trainable) and any(
        p.requires_grad for p in trainable.module.parameters()
    ):
        if job.saved_adapter is not None and trainable.save is None:
            message = f"recovery {job.spec.name} trains no adapter that can be saved"
            raise AptError(message, "leave the option out", ("save_adapter",))
        return trainable
    message = "returns a Trainable without a parameter that needs gradients"
    if not isinstance(trainable, Trainable):
        message = f"returns {type(trainable).__name__}, not an apt.extending.Trainable"
    raise plugin_error(f"recovery {job.spec.name}", message, "kind", "kind")


def _teacher(text: Tensor, held_back: Tensor, job: RecoveryJob) -> Teacher:
    """The outputs of the dense model, which the first rank computes; its loss is in the journal."""
    folder = job.folder / _DENSE
    if job.ranks.first and not folder.is_dir():
        dense = _dense_model(job)

        def step(done: int, total: int) -> None:
            job.status("dense model", f"running the dense model: sample {done} of {total}")

        dtype = next(dense.parameters()).dtype
        in_compute_dtype = computing_in(
            dense, compute_dtype(dtype, job.device, job.options.compute)
        )
        with (
            in_compute_dtype,
            eval_mode(dense),
            job.adapter.running(dense),
            mixed_precision(dense.parameters(), job.options.compute),
        ):
            job.journal.remember(DENSE_LOSS, lambda: _loss(dense, held_back, job.device))
            write_teacher(dense, text, job.options.top, folder, step)
    job.ranks.wait()
    return Teacher(folder)


@torch.no_grad()
def _loss(model: nn.Module, samples: Tensor, device: str) -> float:
    """The mean loss of the next token on samples (samples, seqlen)."""
    losses = [next_token_loss(model, {"input_ids": s[None].to(device)}) for s in samples]
    return float(torch.stack(losses).mean())


def _check_improved(training: Training) -> None:
    """Raise if the training did not lower the loss on the samples held back."""
    if training.best:
        return
    before = training.held_back.get(0, math.nan)
    lowest = min((loss for step, loss in training.held_back.items() if step), default=math.nan)
    reason = (
        f"the loss diverged after {training.diverged} steps"
        if training.diverged is not None
        else "the training did not lower the loss"
    )
    message = f"{reason}: {lowest:.4f} on the samples held back, {before:.4f} before"
    raise NotRecoveredError(message, "use a lower rate, or more text", ("rate", "calibration"))

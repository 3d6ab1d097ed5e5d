"""The recovery of a pruned model: its kept weights are trained, and its zeros stay."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.recording import eval_mode
from apt.checkpoints.masks import Masks, filled, masks_of
from apt.compute import compute_dtype, computing_in, mixed_precision
from apt.devices import keep_random_states, synchronize
from apt.errors import AptError, faulty, first_line
from apt.options import BATCH, STEPS, RecoverOptions
from apt.recovery.job import STEPS_FOLDER, Course, RecoveryJob
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.record import Training
from apt.recovery.teacher import Teacher, write_teacher
from apt.recovery.trainable import Trainable, Unrecovered, next_token_loss, train_only
from apt.recovery.training import train
from apt.recovery.windows import BlockWindows

DENSE_LOSS = "dense_loss"
"""The key by which the loss of the dense model on the samples held back is remembered."""

_MOST_HELD_BACK = 64
_MEASURING = 0.1  # of a given time
_ENOUGH_STEPS = 400  # of a given time, above which a step may have more samples
_SLOW = 1.0  # seconds of the gradients of one sample, above which more are not timed
_DENSE = "dense"  # the folder of the outputs of the dense model


class NotRecoveredError(AptError):
    """The training did not lower the loss on the samples held back."""


def recover_model(model: nn.Module, tokens: Tensor, job: RecoveryJob) -> tuple[Training, Masks]:
    """Train a pruned model, in place.

    Args:
        model: the pruned model, a causal language model of transformers. Its parameters have the
            same dtypes afterwards; the training is in fp32, or mixed with bf16, see the option
            ``compute``.
        tokens: samples of text (samples, seqlen), without padding.

    Returns:
        The record of the training, and the zeros that were kept.

    Raises:
        NotRecoveredError: no step lowered the loss on the samples held back.
        AptError: the kind of recovery does not serve this model, or filled zeros.
    """
    started, masks = time.perf_counter(), masks_of(model, job.adapter)
    text, held_back = _split(tokens, job.options, job.ranks.size)
    with _in_fp32(model), job.adapter.running(model):
        job.status("training", "preparing")
        amount = None
        if job.spec.teacher:  # the dense model runs on the samples of all steps, and no others
            with _blocks_trained(model, job.adapter):
                amount = _amount(model, Trainable(model), text, held_back, job, started)
            text, held_back = amount.text, amount.held_back
        trainable = _trainable(model, masks, text, held_back, job)
        with _undone_on_error(model, trainable, job):
            amount = amount or _amount(model, trainable, text, held_back, job, started)
            course = _planned(model, trainable, masks, amount, job, started)
            training = train(trainable, masks, job, course)
            _check_lower(training)
        if job.saved_adapter is not None and trainable.save is not None and job.ranks.first:
            trainable.save(job.saved_adapter)
        trainable.merge()
    if (wrong := filled(masks, model)) is not None:
        raise AptError(
            f"recovery {job.spec.name} filled zeros of {wrong}", "use another kind of recovery"
        )
    return training, masks


@dataclass(frozen=True)
class _Pace:
    """Seconds of a sample with its gradients, of the optimizer, and of a sample's forward."""

    sample: float
    update: float
    forward: float


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """While entered, parameters and buffers are fp32; then they have their dtypes again."""
    before = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    model.float()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            if name in before:  # after an error a module of peft may be left
                dtype, gradient = before[name]
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(gradient)
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(buffers.get(name, buffer.dtype))


@contextmanager
def _undone_on_error(model: nn.Module, trainable: Trainable, job: RecoveryJob) -> Iterator[None]:
    """Restore the model if an exception ends the training; meanwhile its weights are on disk."""
    trained = {str(i): p for i, p in enumerate(model.parameters()) if p.requires_grad}
    before = job.folder / f"before-{job.ranks.rank}.safetensors"
    try:
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, before)
    except (OSError, SafetensorError) as error:
        trainable.undo()
        raise AptError(f"cannot write {before}: {first_line(error)}", "free some space") from error
    try:
        yield
    except BaseException:
        trainable.undo()
        with safe_open(before, "pt") as saved:
            for name, parameter in trained.items():
                parameter.data.copy_(saved.get_tensor(name))
        raise
    finally:
        before.unlink()


def _planned(
    model: nn.Module,
    trainable: Trainable,
    masks: Masks,
    course: Course,
    job: RecoveryJob,
    started: float,
) -> Course:
    """The course with the masks that move, the windows of blocks, and the end.

    A training of one process that has a time, from ``started``, ends in time. Several processes
    could not agree on its end.

    Raises:
        AptError: masks shall move, and the kind of recovery trains adapters.
    """
    steps, moving = course.steps, None
    if job.options.move_masks:
        if not trainable.masked:
            fault = f"recovery {job.spec.name} trains adapters, and its masks cannot move"
            raise AptError(fault, "use the kind distill or layers", ("kind", "move_masks"))
        moving = MovingMasks(model, job.adapter, masks, steps)
    timed = job.options.minutes is not None and job.ranks.size == 1
    ends = started + 60 * (job.options.minutes or 0) if timed else None
    return replace(course, moving=moving, windows=_windows(model, steps, job), ends=ends)


def forget(folder: Path) -> None:
    """Delete the checkpoints, and the outputs of the dense model, of an earlier training."""
    for name in (STEPS_FOLDER, _DENSE, f"{_DENSE}.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _windows(model: nn.Module, steps: int, job: RecoveryJob) -> BlockWindows | None:
    """The windows of blocks, if blocks are trained in turn."""
    if job.options.window is None:
        return None
    return BlockWindows(model, job.adapter, job.options.window, steps)


def _split(tokens: Tensor, options: RecoverOptions, processes: int) -> tuple[Tensor, Tensor]:
    """The samples to train on, and the last ones, which are held back.

    Each process measures as many: the Trainer would give some of them two samples of the same.
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
    if (more := count + -count % processes) < len(tokens):
        count = more
    return tokens[:-count], tokens[-count:]


def _amount(
    model: nn.Module,
    trainable: Trainable,
    text: Tensor,
    held_back: Tensor,
    job: RecoveryJob,
    started: float,
) -> Course:
    """The steps, and the samples that they use and that are measured.

    The given time begins at ``started``.
    """
    options = job.options
    batch = options.batch or BATCH
    if options.minutes is not None:
        windows, given = _windows(model, 1, job), text[: options.micro_batch].to(job.device)

        def fitting() -> list[int]:
            assert options.minutes is not None
            pace = _pace(trainable, windows, given, job)
            left = 60 * options.minutes - (time.perf_counter() - started)
            return [*_steps_in(left, pace, len(held_back), job)]

        chosen = job.journal.remember("amount", fitting) if job.ranks.first else []
        steps, count, batch = job.ranks.share(chosen)  # a training that is resumed has the same
        held_back = held_back[:count]
    elif isinstance(options.tokens, int):
        steps = math.ceil(options.tokens / (batch * text.shape[1]))
    elif options.tokens == "auto":
        steps = max(1, len(text) // batch)
    else:
        steps = options.steps or STEPS
    return Course(steps, batch, text[: steps * batch], held_back)


def _steps_in(
    seconds: float, pace: _Pace, held_back: int, job: RecoveryJob
) -> tuple[int, int, int]:
    """The steps in a time, the samples on which the loss is measured, and those of a step.

    To measure takes at most a tenth of the time, but for one sample of each process. With few
    steps, more of them with fewer samples each are better.
    """
    options, processes = job.options, job.ranks.size
    each = (options.checks + 1) * pace.forward
    most = max(processes, int(_MEASURING * seconds / each) // processes * processes)
    count = min(held_back, most)
    sample = pace.sample / processes + (pace.forward if job.spec.teacher else 0.0)

    def steps(batch: int) -> int:
        return max(1, int((seconds - count * each) / (batch * sample + pace.update)))

    batch = options.batch or BATCH
    while options.batch is None and steps(batch) < _ENOUGH_STEPS and batch % (2 * processes) == 0:
        batch //= 2
    return steps(batch), count, batch


@contextmanager
def _blocks_trained(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Inside the context, the parameters of the blocks require gradients, and no others."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    train_only(model, (p for _, block in adapter.blocks(model) for p in block.parameters()))
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.requires_grad_(gradient)


def _pace(
    trainable: Trainable, windows: BlockWindows | None, given: Tensor, job: RecoveryJob
) -> _Pace:
    """The pace on one process.

    The optimizer's part is that of AdamW, without gradients. A kind with a teacher is prepared
    after the teacher has run. The step that is timed for it trains all blocks by the loss of the
    next token.

    Args:
        given: samples (samples, seqlen) that run together.
    """
    model, device = trainable.module.to(job.device), torch.device(job.device)
    mixed = mixed_precision(model.parameters(), job.options.compute)
    with nullcontext() if windows is None else windows.middle():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        for count in (1, len(given)):  # the first one warms up, and is enough where it is slow
            batch = {"input_ids": given[:count], "row": torch.arange(count, device=device)}
            started = _now(device)
            with mixed:
                loss = trainable.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = _now(device)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.zero_grad(set_to_none=False)  # no weight moves, whatever the gradients are
            optimizer.step()
            sample, update = (gradients - started) / count, _now(device) - gradients
            if gradients - started > _SLOW:
                break
    model.zero_grad(set_to_none=True)
    with torch.no_grad(), mixed:
        started = _now(device)
        next_token_loss(model, {"input_ids": given[:count]})
        forward = (_now(device) - started) / count
    return _Pace(sample, update, forward)


def _now(device: torch.device) -> float:
    """The time in seconds, after all work that a device was given."""
    synchronize(device)
    return time.perf_counter()


def _trainable(
    model: nn.Module, masks: Masks, text: Tensor, held_back: Tensor, job: RecoveryJob
) -> Trainable:
    """What the kind of recovery trains."""
    teacher = _teacher(text, held_back, job) if job.spec.teacher else None
    with keep_random_states():
        torch.manual_seed(job.seed)
        made: object = job.recovery(Unrecovered(model, job.adapter, masks, job.options, teacher))
    if isinstance(made, Trainable) and any(p.requires_grad for p in made.module.parameters()):
        if job.saved_adapter is not None and made.save is None:
            fault = f"recovery {job.spec.name} trains no adapter that can be saved"
            raise AptError(fault, "leave the option out", ("save_adapter",))
        return made
    fault = "returns a Trainable without a parameter that needs gradients"
    if not isinstance(made, Trainable):
        fault = f"returns {type(made).__name__}, not an apt.extending.Trainable"
    raise faulty(f"recovery {job.spec.name}", fault, "kind", "kind")


def _teacher(text: Tensor, held_back: Tensor, job: RecoveryJob) -> Teacher:
    """The outputs of the dense model, computed by the first rank, which remembers its loss."""
    folder = job.folder / _DENSE
    if job.ranks.first and not folder.is_dir():
        if job.dense is None:
            raise AptError(f"recovery {job.spec.name} needs the dense model", "name it", ("dense",))
        dense = job.dense().to(job.device)

        def step(done: int, total: int) -> None:
            job.status("dense model", f"running the dense model: sample {done} of {total}")

        stored = next(dense.parameters()).dtype
        computing = computing_in(dense, compute_dtype(stored, job.device, job.options.compute))
        with (
            computing,
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


def _check_lower(training: Training) -> None:
    """Raise if the weights are those before the training."""
    if training.best:
        return
    before = training.held_back.get(0, math.nan)
    lowest = min((loss for step, loss in training.held_back.items() if step), default=math.nan)
    what = (
        f"the loss diverged after {training.diverged} steps"
        if training.diverged is not None
        else "the training did not lower the loss"
    )
    fault = f"{what}: {lowest:.4f} on the samples held back, {before:.4f} before"
    raise NotRecoveredError(fault, "use a lower rate, or more text", ("rate", "calibration"))

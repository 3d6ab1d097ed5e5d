"""The callback of transformers' Trainer that records a training and ends it early."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from apt.adapter.recording import eval_mode
from apt.events import CheckpointSaved, HeldBack, TrainingObserver, TrainingStep
from apt.recovery.job import checkpoint_of
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.record import StopRule, Training

_DIVERGED = 2.0  # nats per token above the loss before the training


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Records the losses, and ends a training that diverges, or by a rule."""

    def __init__(
        self,
        training: Training,
        rules: tuple[StopRule, ...],
        observe: TrainingObserver,
        moving: MovingMasks | None,
        ends: float | None = None,
    ) -> None:
        self._training, self._rules, self._observe = training, rules, observe
        self._ends, self._measuring = ends, 0.0
        self._moving, self._step = moving, 1  # the number of the current step
        self._started = 0.0

    def begin(self, trainer: Trainer, checkpoint: str | None) -> None:
        """Measure the loss before the training, and read the record of a checkpoint."""
        self._started = time.perf_counter()
        with eval_mode(trainer.model):
            self._record_held_back(0, trainer.evaluate()["eval_loss"])
        self._measuring = time.perf_counter() - self._started
        if trainer.args.world_size > 1:
            # Otherwise accelerate assumes that the gradients of the model are shared already.
            vars(trainer.model).pop("_is_accelerate_prepared", None)
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
        """Set the number of the current step."""
        self._step = state.global_step + 1

    def masks_gradient(self, name: str) -> bool:
        """True if the gradient of a parameter is masked in the current step."""
        return self._moving is None or not self._moving.moves(name, self._step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Move the masks; measure the loss after the last step, or at the end of the time."""
        if state.global_step >= state.max_steps:  # transformers 4.57 does not measure then
            control.should_evaluate = True
        elif self._ends is not None and time.perf_counter() + self._measuring > self._ends:
            control.should_evaluate = control.should_save = control.should_training_stop = True
            self._training.stopped = "the time was over"
        if self._moving is not None:
            step, optimizer = state.global_step, given["optimizer"]
            self._training.exchanges += self._moving.after_step(step, optimizer)

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
        """Record the loss on the samples held back, and apply the rules."""
        training, loss = self._training, float(metrics["eval_loss"])
        if not state.global_step or training.diverged is not None:
            return
        self._record_held_back(state.global_step, loss)
        if not loss < training.held_back.get(0, math.inf) + _DIVERGED:
            self._diverge(state, control)
        for rule in self._rules:
            if reason := rule(training):
                training.stopped, control.should_training_stop = reason, True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the complete checkpoint; then delete all earlier checkpoints but the best one."""
        folder = checkpoint_of(Path(str(args.output_dir)), state.global_step)
        if state.is_world_process_zero and self._moving is not None:
            self._moving.save(folder)
        self._observe(CheckpointSaved(state.global_step))
        if state.is_world_process_zero:
            names = {folder.name, Path(state.best_model_checkpoint or "").name}
            for checkpoint in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if checkpoint.name not in names:
                    shutil.rmtree(checkpoint)

    def _record_held_back(self, step: int, loss: float) -> None:
        self._training.held_back[step] = loss
        self._observe(HeldBack(step, loss))

    def _diverge(self, state: TrainerState, control: TrainerControl) -> None:
        self._training.diverged, control.should_training_stop = state.global_step, True

    def end(self, trainer: Trainer) -> None:
        """Record the end."""
        training, state = self._training, trainer.state
        training.seconds = time.perf_counter() - self._started
        finite = {step: loss for step, loss in training.held_back.items() if math.isfinite(loss)}
        training.best = min(finite, key=lambda step: finite[step], default=0)
        if training.stopped or training.diverged is not None:
            return
        if state.global_step < training.steps:
            training.stopped = "the loss on the samples held back no longer fell"

"""The job of a recovery, its options and its folder, and the plan of its training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from apt.adapter import Adapter, Samples
from apt.distributed.ranks import Ranks
from apt.events import CheckpointSaved, Status, TrainingEvent, TrainingObserver
from apt.files.journal import Journal
from apt.options import RecoverOptions
from apt.plugin.specs import RecoverySpec
from apt.recovery.moving_masks import MovingMasks
from apt.recovery.objective import Objective
from apt.recovery.trainable import Recovery

if TYPE_CHECKING:  # transformers' Trainer imports datasets and pandas, a second for every run
    from apt.recovery.windows import BlockWindows

CHECKPOINT = "checkpoint"
"""The key of the lines of a journal about checkpoints."""

STEPS_FOLDER = "steps"
"""The folder of the checkpoints, within that of the training."""


def checkpoint_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after a step, with the name that the Trainer gives."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


@dataclass(frozen=True)
class RecoveryJob:
    """The inputs of a recovery except the model and the text.

    Attributes:
        folder: a folder for checkpoints and for the outputs of the dense model.
        dense: opens the dense model, which reads the same samples; None without a dense model.
        journal: the journal of the training, which the first rank writes. The training continues
            from the last checkpoint in the journal.
        status: called at each step outside the training.
        saved_adapter: the directory for the trained adapter, which the first rank writes before the
            adapter is merged; None to write no adapter.
    """

    adapter: Adapter
    spec: RecoverySpec
    recovery: Recovery
    options: RecoverOptions
    folder: Path
    dense: Callable[[], nn.Module] | None = None
    seed: int = 0
    device: str = "cpu"
    ranks: Ranks = field(default_factory=Ranks)
    journal: Journal = field(default_factory=Journal)
    observe: TrainingObserver = lambda event: None
    status: Status = lambda phase, text="": None
    saved_adapter: Path | None = None

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.spec.rate if self.options.rate is None else self.options.rate

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / STEPS_FOLDER

    def written_checkpoints(self) -> list[Path]:
        """The completely written checkpoints, in the order of their steps."""
        steps = self.ranks.share(self.journal.values(CHECKPOINT))
        return [checkpoint_of(self.checkpoints, step) for step in steps]

    def report(self, event: TrainingEvent) -> None:
        """Report an event of the training; a checkpoint is recorded in the journal."""
        if isinstance(event, CheckpointSaved) and self.ranks.first:
            folder = checkpoint_of(self.checkpoints, event.step)
            self.journal.keep({CHECKPOINT: event.step}, folder)
        self.observe(event)


@dataclass(frozen=True)
class TrainingPlan:
    """The number of steps of a training, its samples, and its end.

    Attributes:
        batch: the number of samples of a step, over all processes.
        text: the samples to train on: windows of text (samples, seqlen) or others.
        held_back: the samples on which the loss is measured.
        objective: this loss.
        moving: the masks if they move; None for fixed masks.
        windows: the windows of blocks if blocks are trained in turn; None to train all together.
        ends: the time of `time.perf_counter` at which the training ends; None for no time limit.
    """

    steps: int
    batch: int
    text: Tensor | Samples
    held_back: Tensor | Samples
    objective: Objective = field(default_factory=Objective)
    moving: MovingMasks | None = None
    windows: "BlockWindows | None" = None
    ends: float | None = None

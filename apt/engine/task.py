"""The task of a run: prune a model, make it smaller, train it, or set weights to zero again."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from apt.checkpoints.load import open_skeleton
from apt.checkpoints.masks import Masks
from apt.checkpoints.opened import Opened
from apt.distributed.ranks import Ranks
from apt.engine.opening import cuts_file
from apt.engine.store import ModelStore
from apt.engine.text import Text
from apt.files.journal import Line
from apt.options import PruneRun
from apt.output.report import Report, versions
from apt.planning.plan import Plan
from apt.plugin.registry import Registry

WITHOUT_EFFECT = tuple(declared.key for declared in PruneRun.OPTIONS if not declared.option.effect)
"""The options that do not change the result, except for rounding."""


def shared_settings(options: dict[str, Any], *, stream: bool = False) -> Line:
    """The settings that must be the same on all ranks: options with an effect, and versions.

    The platforms may differ. A streamed run makes other calls between ranks than a run in memory.
    """
    effective = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
    packages = {key: value for key, value in versions().items() if key != "platform"}
    return {"options": effective | {"stream": stream}, "versions": packages}


@dataclass(frozen=True)
class TaskResult:
    """The result of a task.

    Attributes:
        report: the report with the record of the task.
        plan: the pattern of each site; None if ``masks`` has the zeros.
        masks: the masks of the model (True where pruned), if there is no plan.
        save_masks: True if the masks are written beside the model.
        adapter: the folder of a trained adapter, which becomes a part of the output.
    """

    report: Report
    plan: Plan | None = None
    masks: Masks = field(default_factory=dict)
    save_masks: bool = False
    adapter: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run that has passed all checks that need neither weights nor text.

    Attributes:
        options: the options of the run, with defaults filled in.
        dtype: the dtype of the weights; None for the dtype of the checkpoint.
        plan: a plan with all parameters that may change; None if all parameters may change.
        event: the words for the task after "before" and "after", in messages.
        resumable: True if an interrupted run in memory can be resumed.
    """

    event: ClassVar[str] = ""
    resumable: ClassVar[bool] = False

    options: Any
    registry: Registry
    skeleton: Opened
    device: str
    dtype: torch.dtype | None = None
    plan: Plan | None = None

    @property
    def stream(self) -> bool:
        """True if the blocks stay on disk."""
        return bool(getattr(self.options, "stream", False))

    @property
    def in_place(self) -> bool:
        """True if the output has the stored bytes of a quantised checkpoint."""
        return self.skeleton.quantised is not None

    @property
    def changes_kept_weights(self) -> bool:
        """True if a run that removes experts may change the weights of others."""
        return False

    @property
    def writes_file(self) -> bool:
        """True if the store writes one file, not a directory."""
        return cuts_file(self.options, self.skeleton.source)

    @property
    def exports_alone(self) -> bool:
        """True if the output is an exported file alone, and the written directory is temporary."""
        return bool(getattr(self.options, "exports_alone", False))

    @property
    def resume(self) -> bool:
        """True to continue an interrupted run."""
        return bool(getattr(self.options, "resume", False))

    @property
    def known_scores(self) -> dict[str, Any]:
        """The metrics that are known before the run, by ``"before"`` or ``"after"``."""
        return {}

    def record(self) -> dict[str, Any]:
        """The options for the report, as values for JSON."""
        record: dict[str, Any] = self.options.record()
        return record

    def recorded(self, report: Report) -> dict[str, Any]:
        """The options in the report of a finished run."""
        return report.options

    def space(self, written: int) -> int:
        """The bytes of disk that the run needs, for an output of ``written`` bytes."""
        return written

    def read_text(self, ranks: Ranks) -> Text:
        """Read and tokenise the text of the run; only the first rank measures."""
        raise NotImplementedError

    def begin(self, store: ModelStore, text: Text) -> Report:
        """Check the weights, and begin the report."""
        raise NotImplementedError

    def inputs(self, store: ModelStore, text: Text, report: Report) -> Line:
        """All inputs of the result, for the journal of a run that can be resumed."""
        raise NotImplementedError

    def decide(self, store: ModelStore, text: Text) -> tuple[Text, Plan | None]:
        """The text with samples that the model generates, and the final plan, if there is one."""
        return text, self.plan

    def change(
        self, store: ModelStore, text: Text, plan: Plan | None, report: Report
    ) -> TaskResult:
        """Change the model, with the text and the plan of `decide`."""
        raise NotImplementedError

    def dense_model(self) -> Any:
        """The model beside which samples are measured; None for the model before the run."""
        return None

    def open(self, written: Path) -> Opened:
        """The changed model in a directory or a file, without weights."""
        is_file, adapter = written.is_file(), self.skeleton.spec.name
        folder, name = (written.parent, written.name) if is_file else (written, None)
        source = replace(self.skeleton.source, location=str(folder), gguf=name)
        return open_skeleton(source, self.registry, adapter, expanded=self.in_place)

    def with_output(self, report: Report, store: ModelStore) -> Report:
        """The report with what is known once the output is written."""
        return report

    def finished(
        self, report: Report, scores: dict[str, Any], timeline: dict[str, Any], seconds: float
    ) -> Report:
        """The report with the metrics, the timeline and the time of the run."""
        return report

    def forget(self) -> None:
        """Delete the files with which the run could be resumed. The output is published."""

"""The interface between a run and the storage of its model: in memory, or streamed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from apt.calibration.storage import Store
from apt.engine.prune_model import Job
from apt.engine.text import Text
from apt.output.report import Report
from apt.planning.plan import Plan
from apt.pruning.block_storage import BlockStorage


class RunStorage(Protocol):
    """A model in memory, or streamed from disk to disk. Methods are called in this order."""

    @property
    def model(self) -> nn.Module:
        """The model, available after `begin`."""

    @property
    def block_storage(self) -> BlockStorage | None:
        """The storage of the blocks, available after `begin`; None if all are in memory."""

    @property
    def store(self) -> Store:
        """The store of the calibration activations between two blocks."""

    def check_space(self) -> None:
        """Raise `AptError` if the disk has not enough space for the output."""

    def opened(self) -> AbstractContextManager[None]:
        """While entered, the workplace is locked; at the end the output is published or deleted."""

    def readable(self) -> AbstractContextManager[None]:
        """While entered, the whole dense model can run."""

    def begin(self, text: Text, report: Report) -> Report:
        """Load the model; return the report with the hash of its weights."""

    def earlier_report(self) -> Report | None:
        """The report of an earlier run that was interrupted after its output was published."""

    def own_text(self, job: Job, tokens: Tensor) -> Tensor:
        """``tokens`` (samples, seqlen) and those that the model generates."""

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """A result of plain values, from the journal of an interrupted run or computed now."""

    def measure(self, held_out: Tensor | None, when: str) -> dict[str, Any]:
        """The metrics of the run under the key ``when``; empty if there is no text for them."""

    def write(self, report: Report, plan: Plan) -> Report:
        """Write the pruned model and the report, and verify the written model."""

    def with_final_scores(self, report: Report) -> Report:
        """The report with the metrics of the published output."""

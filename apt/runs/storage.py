"""What the orchestrator of a run asks of the place where a model lies meanwhile."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from apt.calibration.storage import Store
from apt.output.report import Report
from apt.planning.plan import Plan
from apt.pruning.block_storage import BlockStorage
from apt.runs.prune_model import Job
from apt.runs.text import Text


class RunStorage(Protocol):
    """A model in memory, or streamed from disk to disk; methods are called in this order."""

    @property
    def model(self) -> nn.Module:
        """The model, from `begin` on."""

    @property
    def block_storage(self) -> BlockStorage | None:
        """Where its blocks are while they have no turn, from `begin` on."""

    @property
    def store(self) -> Store:
        """Where the calibration activations are between two blocks."""

    def check_space(self) -> None:
        """Raise `AptError` where the disk has no room for the output."""

    def opened(self) -> AbstractContextManager[None]:
        """While entered, the output is this run's; at the end it appears, or vanishes."""

    def begin(self, text: Text, report: Report) -> Report:
        """Make the model ready; the report with the hash of its weights."""

    def finished(self) -> Report | None:
        """The report of an earlier run that had done all but to clear up; None where not."""

    def own_text(self, job: Job, tokens: Tensor) -> Tensor:
        """``tokens`` (samples, seqlen) and those that the model writes itself."""

    def measure(self, held_out: Tensor | None, when: str) -> dict[str, Any]:
        """The run's metrics under the name ``when``; nothing where there is no text for them."""

    def write(self, report: Report, plan: Plan) -> Report:
        """Write the pruned model and the report, and verify the model as written."""

    def measured(self, report: Report) -> Report:
        """The report with the measures that are taken of the output in its place."""

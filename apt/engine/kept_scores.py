"""The scores of experts from the report of an earlier run, to choose another number of experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.adapter import Groups
from apt.checkpoints.opened import Opened
from apt.errors import AptError
from apt.output.report import Report
from apt.planning.structure import Structure
from apt.pruning.expert_choice import lowest, protected_experts
from apt.solver import ColumnGroups

_CALIBRATE_AGAIN = "run the whole command with a calibration instead"


@dataclass(frozen=True)
class KeptScores:
    """The scores of experts in the output of ``shrink``.

    Attributes:
        place: the directory, or the file of a model with its report beside it.
        report: the report of the earlier run.
    """

    place: Path
    report: Report

    @classmethod
    def read(cls, place: Path) -> "KeptScores":
        """The scores in an output.

        Raises:
            AptError: the output has no scores, or scores that hold only for its number of experts.
        """
        report = Report.read(place)
        method, experts = report.options.get("method"), report.structure.get("experts")
        if not experts:
            raise _refused(f"no experts were removed in {place}")
        if not all("scores" in entry for entry in experts.values()):
            raise _refused(f"{place} has no scores of experts: its method {method} gives none")
        if not (report.options.get("shrink") or {}).get("dense_scores"):
            raise AptError(
                f"the scores in {place} hold only for its number of experts: each block was judged "
                "behind smaller blocks",
                "repeat that run with dense scores",
                ("dense_scores", "scores_from"),
            )
        if any(entry["merged"] for entry in experts.values()):
            raise _refused(f"the experts of {place} were merged, which needs a calibration")
        return cls(place, report)

    @property
    def method(self) -> str:
        """The name of the method that computed the scores."""
        return str(self.report.options.get("method"))

    @property
    def scores(self) -> dict[str, Sequence[float]]:
        """The scores of the experts of each block."""
        blocks = self.report.structure["experts"].items()
        return {name: [float(score) for score in entry["scores"]] for name, entry in blocks}

    def structure(
        self, opened: Opened, kept: Mapping[str, int], protect: Sequence[str]
    ) -> Structure:
        """The structure with the experts of the lowest scores removed.

        Args:
            kept: the number of experts that each block keeps, by kind.
            protect: the sources of text whose most used experts are kept.

        Raises:
            AptError: the report lacks the scores of a block or the tokens of a protected source.
        """
        removed = dict[str, dict[str, tuple[int, ...]]]()
        for name, block in opened.adapter.blocks(opened.module):
            for groups in opened.adapter.groups(block, opened.config):
                if groups.kind in kept:
                    mask = self._removed(name, groups, kept[groups.kind], protect)
                    removed[name] = {groups.kind: tuple(mask.nonzero().squeeze(1).tolist())}
        return Structure(kept, removed=removed)

    def _removed(self, block: str, groups: Groups, kept: int, protect: Sequence[str]) -> Tensor:
        """The mask (experts,) of the experts that a block loses."""
        scores, pattern = self.scores.get(block), ColumnGroups(groups.count, kept, groups.bins)
        if scores is None or len(scores) != groups.count or not groups.routed:
            raise self._mismatch(f"{self.place} has no scores of the {groups.kind} of {block}")
        protected = None
        if protect:
            weights = self.report.routing.get(block, {}).get("weights", {})
            if missing := [name for name in protect if name not in weights]:
                raise self._mismatch(f"{self.place} was not calibrated on {missing[0]}")
            by_source = [torch.tensor(list(map(float, weights[name]))) for name in protect]
            protected, _ = protected_experts(by_source, pattern)
        return lowest(torch.tensor(scores), pattern, protected)

    def check_model(self, record: Mapping[str, Any], *, stream: bool) -> None:
        """Raise unless the scores were computed for this model.

        Args:
            record: the entry ``model`` of the report of this run.
            stream: True if this run is streamed, which hashes files in place of tensors.
        """
        earlier = self.report.model
        is_same = record.get("type") == earlier.get("type")
        if bool(self.report.options.get("stream")) == stream:
            is_same = is_same and record.get("sha256") == earlier.get("sha256")
        if not is_same:
            raise self._mismatch(f"{self.place} is the output for other weights")

    def _mismatch(self, message: str) -> AptError:
        return AptError(message, "give the output of a run for the same model", ("scores_from",))


def _refused(message: str) -> AptError:
    return AptError(message, _CALIBRATE_AGAIN, ("scores_from",))

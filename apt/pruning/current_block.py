"""The block that is being pruned, with everything that its solves need."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from apt.adapter import Site
from apt.calibration.batches import OpenBlock
from apt.calibration.targets import Targets
from apt.planning.plan import PlannedBlock
from apt.pruning.paused_forward import PausedForwards

Dropped = tuple[int, str, nn.Module]
"""The index, the name and the module of a dropped block."""


@dataclass(kw_only=True)
class CurrentBlock(OpenBlock):
    """The block that is being pruned.

    Attributes:
        dropped: the dropped blocks between it and the next one that is kept.
        dense: the dense weights (out, in) of those that write to the residual stream; none without
            a dense stream, since only the drift between the streams needs them.
        scales: the factors of the rows (out, 1) of each site with row importance.
        propagated: True if the batches' states are already those after the block.
    """

    planned: PlannedBlock
    dropped: Sequence[Dropped] = ()
    scales: dict[Site, Tensor] = field(default_factory=dict)
    propagated: bool = False

    def __post_init__(self) -> None:
        self.sites = self.adapter.sites(self.module)
        both_streams = self.batches[0].dense is not None
        writers = (site for site in self.sites if site.residual and both_streams)
        self.dense = {s: s.oriented(s.weight(self.module).data).clone() for s in writers}

    def paused_forwards(self, targets: Targets | None) -> PausedForwards:
        """The paused forwards of all batches through the block."""
        to_capture = [entry.site for entry in self.planned.pruned]
        return PausedForwards(self, self.sites, to_capture, self.dense, targets)

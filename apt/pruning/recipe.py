"""The recipe of the loop over blocks: how sites are solved, and how blocks are tuned."""

from dataclasses import dataclass, field

from apt.calibration.targets import Targets
from apt.solver import SolverOptions
from apt.tuning.reconstruct import Reconstruction
from apt.tuning.row_importance import RowImportance


@dataclass(frozen=True)
class Recipe:
    """How the blocks of a model are pruned; see `apt.PruneOptions` for the choice of it.

    Args:
        solver: the options of the method.
        targets: the error that sites make up for; None prunes strictly layer by layer.
        row_importance: how rows are weighted in the choice of masks, if at all.
        reconstruction: how a block is tuned once its sites are solved, if at all.
        ordered: within a block, solve the sites in their order of execution, each on what the
            pruned ones before it give.
    """

    solver: SolverOptions = field(default_factory=SolverOptions)
    targets: Targets | None = None
    row_importance: RowImportance | None = None
    reconstruction: Reconstruction | None = None
    ordered: bool = False

"""The recipe of the loop over blocks: the options for solving sites and tuning blocks."""

from dataclasses import dataclass, field

from apt.calibration.targets import Targets
from apt.solver import IntegerGrid, SolverOptions
from apt.tuning.reconstruct import Reconstruction
from apt.tuning.row_importance import RowImportance


@dataclass(frozen=True)
class Recipe:
    """The options for pruning the blocks of a model; `apt.PruneOptions` determines them.

    Args:
        targets: the error-aware targets; None prunes layer-wise.
        row_importance: the weighting of rows in the choice of masks; None weights all rows alike.
        reconstruction: the tuning of a block after its sites are solved; None for no tuning.
        ordered: True to solve the sites of a block in their order of execution, each on the outputs
            of the pruned sites before it (true-sequential).
        integers: the integers that kept weights are rounded to, after the tuning of their block;
            None for no rounding.
    """

    solver: SolverOptions = field(default_factory=SolverOptions)
    targets: Targets | None = None
    row_importance: RowImportance | None = None
    reconstruction: Reconstruction | None = None
    ordered: bool = False
    integers: IntegerGrid | None = None

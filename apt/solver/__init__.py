"""The layer-wise pruning problem: tensors in, tensors out.

A linear layer computes ``Y = X Wᵀ``. Pruning seeks ``V`` with a given zero pattern that minimises
``‖X Wᵀ − X Vᵀ‖²``. This package works on the weight ``W`` of shape (out, in) and on the Gram
matrix ``XᵀX`` of shape (in, in). It is independent of models, adapters and files.
"""

from apt.patterns import (
    NM,
    ColumnGroups,
    Granularity,
    Grid,
    IntegerGrid,
    MixedNM,
    Pattern,
    Points,
    SitePattern,
    Unstructured,
    keeps_all,
    lowest,
    lowest_k,
    meets,
    parse_pattern,
)
from apt.solver.admm_search import admm
from apt.solver.dead_inputs import solve_live
from apt.solver.gram import DampedGram, Gram, SolverError
from apt.solver.group_removal import (
    GroupChoice,
    GroupRemoval,
    joint_removal,
    keep_columns,
    removal_loss,
    removal_order,
)
from apt.solver.integers import Rounded, rounded
from apt.solver.least_squares import Joint, joint_weights, relative_layer_error, solve_masked
from apt.solver.options import EFFORTS, Effort, MethodError, Solution, SolverOptions, check_solution
from apt.solver.precision import full_precision
from apt.solver.sparsegpt import MAX_REMOVAL_SETS, mm, ms, sm, ss

__all__ = [
    "EFFORTS",
    "MAX_REMOVAL_SETS",
    "NM",
    "ColumnGroups",
    "DampedGram",
    "Effort",
    "Gram",
    "Granularity",
    "Grid",
    "GroupChoice",
    "GroupRemoval",
    "IntegerGrid",
    "Joint",
    "MethodError",
    "MixedNM",
    "Pattern",
    "Points",
    "Rounded",
    "SitePattern",
    "Solution",
    "SolverError",
    "SolverOptions",
    "Unstructured",
    "admm",
    "check_solution",
    "full_precision",
    "joint_removal",
    "joint_weights",
    "keep_columns",
    "keeps_all",
    "lowest",
    "lowest_k",
    "meets",
    "mm",
    "ms",
    "parse_pattern",
    "relative_layer_error",
    "removal_loss",
    "removal_order",
    "rounded",
    "sm",
    "solve_live",
    "solve_masked",
    "ss",
]  # fmt: skip

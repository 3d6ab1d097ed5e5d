"""Magnitude and Wanda: masks without compensation."""

import torch
from torch import Tensor

from apt.solver import Gram, Granularity, Pattern, Solution, SolverOptions


@torch.no_grad()
def magnitude(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Prune the smallest ``|w|`` of the layer."""
    return _prune(weight, weight.abs(), pattern, "layer")


@torch.no_grad()
def wanda(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Prune the smallest ``|w| · ‖x_j‖₂`` of each output row (arXiv 2306.11695, section 3).

    Raises:
        SolverError: some inputs are not finite.
    """
    gram.check_finite()
    norms = gram.matrix.diagonal().sqrt().to(weight.dtype)
    return _prune(weight, weight.abs() * norms, pattern, "row")


def _prune(weight: Tensor, scores: Tensor, pattern: Pattern, per: Granularity) -> Solution:
    mask = pattern.smallest(scores, per)
    return Solution(weight.masked_fill(mask, 0), mask)

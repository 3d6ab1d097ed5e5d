"""The layer-wise error of pruned weights."""

import math

from torch import Tensor

from apt.solver.precision import full_precision


@full_precision()
def relative_layer_error(dense: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """``tr((V−W) G (V−W)ᵀ) / tr(W G Wᵀ)``: the share of the output's energy that is lost.

    Args:
        dense, pruned: ``W`` and ``V`` (out, in).
        gram: the undamped ``XᵀX`` (in, in), in any scale.

    Returns:
        The error. If the dense output is zero, 0 if nothing is lost, else infinity.
    """
    lost, whole = _energy(pruned - dense, gram), _energy(dense, gram)
    return lost / whole if whole else (math.inf if lost else 0.0)


def _energy(weight: Tensor, gram: Tensor) -> float:
    return float((weight @ gram).mul_(weight).sum(dtype=weight.dtype).clamp_(min=0))

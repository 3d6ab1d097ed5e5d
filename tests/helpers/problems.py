"""Small random layer-wise problems in fp64, and plain reference solutions for the solver."""

from itertools import combinations

import torch
from hypothesis import strategies as st

from apt.solver import Gram


def problem(seed, out, width, tokens=None):
    """A weight (out, width) and the Gram matrix of correlated inputs with a few large features."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    mixing = draw(width, width) * 0.5 + torch.eye(width, dtype=torch.float64)
    inputs = draw(tokens or 3 * width, width) @ mixing * (1 + draw(width).abs() * 2)
    return draw(out, width), Gram.of(inputs)


def quadratic_loss(dense, pruned, matrix):
    """``½ δ H δᵀ`` of every row."""
    delta = pruned - dense
    return 0.5 * ((delta @ matrix) * delta).sum(1)


def least_squares(dense, matrix, mask):
    """The best kept weights, row by row, by ``lstsq`` on a square root of ``H``."""
    root = torch.linalg.cholesky(matrix).T
    best = torch.zeros_like(dense)
    for row in range(len(dense)):
        kept = ~mask[row]
        target = root @ dense[row]
        best[row, kept] = torch.linalg.lstsq(root[:, kept], target[:, None]).solution[:, 0]
    return best


def removal_sets(width, removed):
    """All masks (sets, width) that prune ``removed`` of ``width`` columns."""
    sets = list(combinations(range(width), removed))
    masks = torch.zeros(len(sets), width, dtype=torch.bool)
    for mask, chosen in zip(masks, sets, strict=True):
        mask[list(chosen)] = True
    return masks


seeds = st.integers(0, 2**31 - 1)
group_patterns = st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 3), (1, 3), (4, 8)])

"""Tail exponents of the spectra of weights, as in the code of AlphaPruning (arXiv 2410.10912).

All operations are in fp32 and in the order of the authors' code: the highest bin of the histogram
and the best tail are discrete choices, which a rounding can change.
"""

import math

import torch
from torch import Tensor

_BINS = 100  # of the histogram, from the smallest to the largest logarithm


def tail_from_peak(weight: Tensor) -> float:
    """The exponent ``α`` of a weight (out, in), with the tail of the best fit.

    ``λ_min`` runs over the eigenvalues up to 1.5 times the lower edge of the highest bin of the
    histogram of ``log λ``. Each ``λ_min`` gives an ``α`` by `_hill`. The result is the ``α`` with
    the least Kolmogorov-Smirnov distance between the tail and its power law. It is infinite if a
    weight has fewer than two eigenvalues.
    """
    spectrum = _spectrum(weight)
    if len(spectrum) < 2:
        return math.inf
    logs = spectrum.log()
    edge = torch.pow(10, _peak(spectrum.log10()))
    # The authors compare λ with log10(0.95 edge): no lower bound, unless the edge is above 1.05.
    tried = (spectrum[:-1] >= (0.95 * edge).log10()) & (spectrum[:-1] <= 1.5 * edge)
    alphas = {start: _hill(logs[start:]) for start in tried.nonzero().flatten().tolist()}
    best = min(alphas, key=lambda start: float(_distance(spectrum[start:], alphas[start])))
    return float(alphas[best])


def tail_from_middle(weight: Tensor) -> float:
    """The exponent ``α`` of the upper half of the spectrum of a weight (out, in)."""
    spectrum = _spectrum(weight)
    return float(_hill(spectrum.log()[len(spectrum) // 2 :])) if len(spectrum) else math.inf


def _spectrum(weight: Tensor) -> Tensor:
    """The eigenvalues of ``W Wᵀ`` in ascending order, without exact zeros, which have no logarithm.

    They are computed as squares of singular values. Small eigenvalues of the product itself would
    have no correct digit in fp32, and the smallest one decides the bins of the histogram.
    """
    eigenvalues: Tensor = torch.linalg.svdvals(weight.float()).cpu().square().flip(0)
    return eigenvalues[eigenvalues > 0]


def _peak(logs: Tensor) -> Tensor:
    """The lower edge of the highest bin of the histogram; of several such bins, the first."""
    low, high = logs[0].item(), logs[-1].item()
    counts = torch.histc(logs, _BINS, min=low, max=high)
    return torch.linspace(low, high, _BINS + 1)[int(counts.argmax())]


def _hill(logs: Tensor) -> Tensor:
    """``α = 1 + k / Σ ln(λ_i / λ_min)`` of the ascending logarithms of ``k`` eigenvalues."""
    count = len(logs)
    return 1 + count / (logs.sum() - count * logs[0]).clamp_min(0)


def _distance(tail: Tensor, alpha: Tensor) -> Tensor:
    """The largest difference between the distribution of the tail and its power law."""
    steps = torch.arange(len(tail)) / len(tail)
    return (1 - (tail / tail[0]) ** (1 - alpha) - steps).abs().max()

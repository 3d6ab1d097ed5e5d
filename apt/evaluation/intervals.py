"""Differences between two models on the same questions or windows, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom.
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        value: the mean difference.
        error: its standard error.
        low, high: its 95 % confidence interval by Student's t distribution. Neighbouring windows of
            one text are alike, so that the true interval of windows is somewhat wider.
    """

    value: float
    error: float
    low: float
    high: float


def mean_difference(one: Sequence[float], other: Sequence[float]) -> Difference | None:
    """The mean of ``one`` − ``other``, pair by pair; None for fewer than two values."""
    each = [a - b for a, b in zip(one, other, strict=True)]
    if len(each) < 2:
        return None
    mean = math.fsum(each) / len(each)
    variance = math.fsum((e - mean) ** 2 for e in each) / (len(each) - 1)
    error = math.sqrt(variance / len(each))
    margin = quantile(len(each) - 1) * error
    return Difference(mean, error, mean - margin, mean + margin)


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution with ``degrees`` of freedom, at least 1."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    return 1.95996 + 2.3723 / degrees  # the normal quantile z, and (z³ + z) / 4

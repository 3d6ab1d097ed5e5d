"""Differences between two models on the same questions or windows, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_95 = 1.959964
"""Half the width of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        value: the mean difference.
        low, high: its 95 % confidence interval, from the single differences, which are taken as
            normally distributed.
    """

    value: float
    low: float
    high: float


def mean_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """The mean of ``one`` − ``other``, value by value.

    Args:
        one, other: values of the same questions or windows, in the same order; at least one each.
    """
    each = [a - b for a, b in zip(one, other, strict=True)]
    mean = math.fsum(each) / len(each)
    variance = math.fsum((e - mean) ** 2 for e in each) / max(len(each) - 1, 1)
    margin = NORMAL_95 * math.sqrt(variance / len(each))
    return Difference(mean, mean - margin, mean + margin)

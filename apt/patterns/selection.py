"""The selection of the lowest and the highest scores, with an exact or an approximate count."""

import math

import numpy as np
import torch
from torch import Tensor

_SAMPLE = 2**14  # scores from which a threshold is estimated


def lowest_k(scores: Tensor, k: int) -> Tensor:
    """The mask of the ``k`` lowest entries of each row of ``scores`` (rows, columns)."""
    if len(scores) == 1 and scores.shape[1] > 2 * _SAMPLE:
        return _lowest_of_many(scores[0], k).unsqueeze(0)
    if selects_in_numpy(scores) and k > 0:
        mask = scores <= kth_lowest(scores, k).unsqueeze(1)
        if int(mask.count_nonzero()) == k * len(scores):  # else some scores are equal
            return mask
    mask = torch.zeros_like(scores, dtype=torch.bool)
    chosen = scores.topk(k, dim=1, largest=False, sorted=False).indices
    return mask.scatter_(1, chosen, True)


def lowest_of_groups(groups: Tensor, kept: int) -> Tensor:
    """`lowest_k` of many short rows, by comparison with thresholds unless scores are equal.

    Args:
        groups: the scores (groups, m).
        kept: the number of scores of each group that are not chosen.
    """
    mask = groups < nth_largest(list(groups.unbind(1)), kept).unsqueeze(1)
    removed = groups.shape[1] - kept
    exact = int(mask.count_nonzero()) == removed * len(groups)
    return mask if exact else lowest_k(groups, removed)


def _lowest_of_many(scores: Tensor, k: int) -> Tensor:
    """`lowest_k` of one long row, about four times faster: only a bracket of scores is sorted.

    A sample of the scores gives the bracket. Its width is four standard deviations of the sampled
    rank. If the bracket misses the threshold (for scores in a regular order), all scores are
    sorted.
    """
    sample = scores[:: stride(scores.numel())]
    size = len(sample)
    rank, margin = k / scores.numel() * size, 2 * math.sqrt(size)
    low, high = (
        kth_lowest(sample, min(max(int(position), 0), size - 1) + 1)
        for position in (rank - margin, rank + margin + 1)
    )
    mask = scores < low
    middle = ((scores <= high) & ~mask).nonzero().squeeze(1)
    missing = k - int(mask.count_nonzero())
    if not 0 <= missing <= len(middle):
        middle, missing = torch.arange(scores.numel(), device=scores.device), k
        mask = torch.zeros_like(mask)
    chosen = scores[middle].topk(missing, largest=False, sorted=False).indices
    mask[middle[chosen]] = True
    return mask


def stride(count: int) -> int:
    """An odd stride that samples about `_SAMPLE` of ``count`` scores, from all columns alike."""
    return max(1, count // _SAMPLE) | 1


def kth_lowest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th lowest entry along the last dimension, counted from 1."""
    if not selects_in_numpy(values):
        return values.kthvalue(k).values
    rows = values.detach().contiguous().numpy()
    return torch.from_numpy(np.asarray(np.partition(rows, k - 1)[..., k - 1]))


def selects_in_numpy(values: Tensor) -> bool:
    """True if numpy selects among ``values``.

    On one thread it takes a sixth of the time of torch; torch distributes rows over threads.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return False
    return min(values.numel() // max(1, values.shape[-1]), torch.get_num_threads()) < 6


def nth_largest(values: list[Tensor], n: int) -> Tensor:
    """The element-wise ``n``-th largest, by a partial bubble sort: faster than `torch.topk`."""
    rank = len(values) - n + 1
    up = rank > n  # bubble from the nearer end
    for end in range(len(values) - 1, len(values) - 1 - min(n, rank), -1):
        for i in range(end):
            low, high = torch.minimum(*values[i : i + 2]), torch.maximum(*values[i : i + 2])
            values[i : i + 2] = (low, high) if up else (high, low)
    return values[len(values) - min(n, rank)]

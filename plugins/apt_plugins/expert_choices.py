"""Choices of the experts to remove: by use, and by saliency."""

import torch
from torch import Tensor

from apt.extending import RoutedExperts
from apt.solver import ColumnGroups


def by_frequency(experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
    """The experts to which the router gives the fewest tokens."""
    return groups.lowest(_tokens(experts).cpu())


def reap(experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
    """The experts of the smallest mean of ``g ‖f(x)‖`` (REAP, arXiv 2510.13999, eq. 9).

    The mean is over the tokens of an expert, ``g`` is its weight and ``f(x)`` is its output.
    """
    saliency = experts.sums(experts.norms()) / _tokens(experts).clamp_min(1)
    return groups.lowest(saliency.cpu())


def by_effect(experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
    """The experts of the smallest ``Σ ‖g f(x)‖² / ‖h‖²``, with ``h`` the stream after the block.

    This is the change of the block's output without the expert, if no other takes its tokens.
    """
    relative = experts.norms().square() / experts.sizes.unsqueeze(1)
    return groups.lowest(experts.sums(relative).cpu())


def _tokens(experts: RoutedExperts) -> Tensor:
    """The number of tokens of each expert."""
    return experts.sums(torch.ones_like(experts.routing.weights))
